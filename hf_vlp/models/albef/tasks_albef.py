"""ALBEF's downstream tasks: filling masks, visual entailment, reasoning over two images and what precedes it (section 4.2)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from hf_vlp.layers.attention import mask_of_keys
from hf_vlp.layers.heads import MaskedTokenHead, PredictsWords
from hf_vlp.layers.towers import require_pairs, require_shape
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.modeling_albef import VlpAlbefModel, VlpAlbefTaught, bert_blocks, images_of_texts
from hf_vlp.objectives.distillation import distilled_cross_entropy
from hf_vlp.objectives.masked_prediction import masked_prediction_loss
from hf_vlp.objectives.matching import draw_negatives, negative_weights
from hf_vlp.outputs import PreTrainingOutput

UNUSED = r"^(temperature|itm_head|mlm_head|assignment_head|teacher|queue|albef\.(visual|text)_projection)\b"  # of a folder, by a task
ASSIGNMENT_TEMPERATURE = 0.07  # of the likeness by which other images are drawn
MATCHED_FIRST, MATCHED_SECOND, NOT_MATCHED = 0, 1, 2  # rows of the assignment head


class VlpAlbefTask(VlpAlbefTaught):
    """A head without contrast: it loads out of a pre-training folder, whose own heads are left out."""

    _keys_to_ignore_on_load_unexpected = [UNUSED]
    taught_parts = ("albef", "classifier")

    def __init__(self, config: VlpAlbefConfig, add_projections: bool = False):
        super().__init__(config, add_projections)

    def soft_targets(self, predict: Callable[[nn.Module], torch.Tensor]) -> tuple[torch.Tensor | None, float]:
        """What the momentum copy predicts and alpha, its weight; None and 0 where it does not teach. In training it moves first.

        `predict`: from something with the parts of the model as attributes, to logits.
        """
        if not hasattr(self, "teacher"):
            return None, 0.0
        self.move_teacher()
        if not self.distillation_weight:
            return None, 0.0
        with torch.no_grad():
            return predict(self.teacher), self.distillation_weight

    def classify(
        self, predict: Callable[[nn.Module], torch.Tensor], labels: torch.Tensor | None
    ) -> SequenceClassifierOutput:
        """Logits [B, K] of what `predict` makes of the model, and with `labels` [B] their cross-entropy and the teacher's."""
        logits = predict(self)
        loss = None if labels is None else distilled_cross_entropy(logits, labels, *self.soft_targets(predict))
        return SequenceClassifierOutput(loss=loss, logits=logits)


class VlpAlbefClassifier(nn.Module):
    """Linear(D, D) -> ReLU -> Linear(D, K)."""

    def __init__(self, size: int, num_labels: int):
        super().__init__()
        self.fc1 = nn.Linear(size, size)
        self.fc2 = nn.Linear(size, num_labels)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[B, D] -> logits [B, K]."""
        return self.fc2(self.fc1(states).relu())


def joint(
    model: VlpAlbefModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor,
    rows: int | None = None,
) -> torch.Tensor:
    """States of the words read with their images, [B, L or rows, D]; not defined at padding."""
    text = model.encode_text(input_ids, attention_mask)
    return model.fuse(**text, **model.encode_image(pixel_values), rows=rows)


def require_words_and_images(
    input_ids: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    **others: torch.Tensor | None,
) -> None:
    """Raise a ValueError where words or images are missing, or where rows or the mask of the words do not fit."""
    if input_ids is None or pixel_values is None:
        raise ValueError("give input_ids and pixel_values: the task reads words and image together")
    require_pairs(input_ids=input_ids, pixel_values=pixel_values, **others)
    require_shape(input_ids.shape, attention_mask=attention_mask)


class VlpAlbefForVisualEntailment(VlpAlbefTask):
    """Whether an image contradicts a text (0), leaves it open (1) or entails it (2): SNLI-VE, with `num_labels=3`."""

    def __init__(self, config: VlpAlbefConfig):
        super().__init__(config)
        self.classifier = VlpAlbefClassifier(config.multimodal_config.hidden_size, config.num_labels)
        self.add_teacher()
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Texts [B, L] and images [B, 3, H, W] -> logits [B, K]; with `labels` [B] the cross-entropy, hard and soft.

        Raises:
            ValueError: words or images missing, or rows that do not fit.
        """
        require_words_and_images(input_ids, pixel_values, attention_mask, labels=labels)

        def predict(parts: nn.Module) -> torch.Tensor:
            return parts.classifier(joint(parts.albef, input_ids, attention_mask, pixel_values, rows=1)[:, 0])

        return self.classify(predict, labels)


class VlpAlbefOfTwoImages(VlpAlbefTask):
    """A text read with two images: behind each layer that attends to the first comes one that attends to the second (section 4.2, NLVR2).

    The second stack begins as a copy of the first. With `shared_image_keys` both have the same projections of the images to keys and
    values, held by the first.
    """

    _keys_to_ignore_on_load_missing = [r"^teacher\.", r"^second_layers\."]

    def __init__(self, config: VlpAlbefConfig, add_projections: bool = False):
        super().__init__(config, add_projections)
        width = config.vision_config.hidden_size
        self.second_layers = nn.ModuleList(bert_blocks(config, config.multimodal_config, width))
        if config.shared_image_keys:
            for layer in self.second_layers:
                layer.cross_attention.k_proj = layer.cross_attention.v_proj = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if module is self:
            self.begin_copies(init.copy_)
        super()._init_weights(module)
        if module is self and hasattr(self, "teacher"):
            if not any(getattr(weight, "_is_hf_initialized", False) for weight in self.second_layers.parameters()):
                _begin_second(self.teacher, init.copy_)  # as the layers of the copy, not as a copy of the model's

    @torch.no_grad()
    def begin_copies(self, copy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """The second stack begins as the first."""
        _begin_second(self, copy)


def _begin_second(parts: nn.Module, copy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """`second_layers` of a model or of its momentum copy become the layers that fuse, by `copy` of the second tensor into the first."""
    firsts = dict(parts.albef.fusion_model.layers.named_parameters())
    for name, own in parts.second_layers.named_parameters():
        copy(own, firsts[name])


def joint_with_two(
    parts: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_embeds: torch.Tensor,
    first: torch.Tensor | slice,
    second: torch.Tensor | slice,
) -> torch.Tensor:
    """State [B, D] of the first word of each text, read with two of the N encoded images [N, 1 + P, D].

    `parts`: something with `albef` and `second_layers`. `first`, `second`: [B], which images, or a slice of them, which is not copied.
    """
    albef, fusion, seconds = parts.albef, parts.albef.fusion_model, parts.second_layers
    if seconds[0].cross_attention.k_proj is None:
        images = fusion.keys_and_values(image_embeds)
        pairs = [images_of_texts(images, index) for index in (first, second)]
    else:
        others = image_embeds[second]
        pairs = [
            fusion.keys_and_values(image_embeds[first]),
            [layer.cross_attention.keys_and_values(others) for layer in seconds],
        ]
    states = albef.encode_text(input_ids, attention_mask)["text_embeds"]
    mask = create_bidirectional_mask(albef.config, inputs_embeds=states, attention_mask=attention_mask)
    one = mask_of_keys(albef.config, states[:, :1], attention_mask, states)
    last = seconds[-1]
    for layer, follower, image, other in zip(fusion.layers, seconds, *pairs, strict=True):
        states = layer(states, mask, image)
        states = follower(states, one, other, None, 1) if follower is last else follower(states, mask, other)
    return states[:, 0]


class VlpAlbefForVisualReasoning(VlpAlbefOfTwoImages):
    """Whether a statement about two images is true (NLVR2)."""

    taught_parts = ("albef", "second_layers", "classifier")

    def __init__(self, config: VlpAlbefConfig):
        super().__init__(config)
        self.classifier = VlpAlbefClassifier(config.multimodal_config.hidden_size, 2)
        self.add_teacher()
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Statements [B, L] about two images each -> logits [B, 2], of false and of true; with `labels` [B], 1 for true, the
        cross-entropy, hard and soft.

        `pixel_values` [B, 2, 3, H, W].

        Raises:
            ValueError: statements or images missing, or another number than two images.
        """
        require_words_and_images(input_ids, pixel_values, attention_mask, labels=labels)
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values must be [B, 2, 3, H, W], two images for each statement; got {list(pixel_values.shape)}"
            )
        first, second = slice(0, None, 2), slice(1, None, 2)

        def predict(parts: nn.Module) -> torch.Tensor:
            images = parts.albef.encode_image(pixel_values.flatten(0, 1))["image_embeds"]
            return parts.classifier(joint_with_two(parts, input_ids, attention_mask, images, first, second))

        return self.classify(predict, labels)


class VlpAlbefForMaskedLM(PredictsWords, VlpAlbefTask):
    """Words behind masks, with the image in sight."""

    _keys_to_ignore_on_load_unexpected = [UNUSED.replace("mlm_head|", "")]

    def __init__(self, config: VlpAlbefConfig):
        super().__init__(config)
        fusion = config.multimodal_config
        self.mlm_head = MaskedTokenHead(
            fusion.hidden_size, config.text_config.vocab_size, fusion.hidden_act, fusion.layer_norm_eps
        )
        words = self.albef.get_input_embeddings()
        name = next(key for key, part in self.albef.named_modules() if part is words)
        self._tied_weights_keys = {"mlm_head.decoder.weight": f"albef.{name}.weight"}
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> MaskedLMOutput:
        """Texts [B, L] with [MASK] and their images [B, 3, H, W] -> logits [B, L, V]; with `labels` [B, L] (-100 ignored) the mean
        cross-entropy, 0 where nothing is masked. In training with labels logits are None: only those at masked words are computed.

        Raises:
            ValueError: words or images missing, or rows that do not fit.
        """
        require_words_and_images(input_ids, pixel_values, attention_mask, labels=labels)
        require_shape(input_ids.shape, labels=labels)
        states = joint(self.albef, input_ids, attention_mask, pixel_values)
        if attention_mask is not None:  # states of padding depend on what was left out
            states = states * attention_mask.unsqueeze(-1).to(states.dtype)
        loss = None if labels is None else masked_prediction_loss(states, labels, self.mlm_head)[0]
        return MaskedLMOutput(loss=loss, logits=None if labels is not None and self.training else self.mlm_head(states))


class VlpAlbefForTextAssignment(VlpAlbefOfTwoImages):
    """Which of two images a text belongs to, or to neither: what the layers of two images learn before NLVR2 (section 4.2).

    Other images are drawn by how alike their projections are, which are not trained here.
    """

    def __init__(self, config: VlpAlbefConfig):
        super().__init__(config, add_projections=True)
        self.albef.text_projection = None
        self.albef.visual_projection.requires_grad_(False)
        self.assignment_head = nn.Linear(config.multimodal_config.hidden_size, 3)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, whose loading makes every weight trainable; the projection stays frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).albef.visual_projection.requires_grad_(False)
        return loaded

    @torch.no_grad()
    def draw_pairs(self, image_embeds: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Two of B images for each of their B texts, and where its own is among them.

        Args:
            image_embeds: [B, 1 + P, D], encoded.
            draws: [B, 4] in [0, 1): whether the own image is there (above 1/3), whether it is first (above 1/2), and by which two others
                are drawn, the more often the more alike.

        Returns:
            First image, second image and label, [B] each.

        Raises:
            ValueError: fewer than 3 images.
        """
        count = len(image_embeds)
        if count < 3:
            raise ValueError(
                f"text assignment draws two other images for each text, so a batch needs 3 or more pairs; got {count}"
            )
        embeds = self.albef.project_image(image_embeds).float()
        draws = draws.to(embeds.device)
        weights = negative_weights(embeds @ embeds.T / ASSIGNMENT_TEMPERATURE)
        other, _ = draw_negatives(weights, draws[:, 2])
        third, _ = draw_negatives(weights.scatter(1, other[:, None], 0.0), draws[:, 3])
        own = torch.arange(count, device=embeds.device)
        labels = torch.where(draws[:, 1] > 0.5, MATCHED_FIRST, MATCHED_SECOND)
        labels = torch.where(draws[:, 0] > 1 / 3, labels, NOT_MATCHED)
        first = torch.where(labels == MATCHED_FIRST, own, other)
        second = torch.where(labels == MATCHED_FIRST, other, torch.where(labels == MATCHED_SECOND, own, third))
        return first, second, labels

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        assignment_draws: torch.Tensor | None = None,
        first_image_index: torch.Tensor | None = None,
        second_image_index: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PreTrainingOutput:
        """Cross-entropy of the three assignments.

        Args:
            input_ids, attention_mask: [B, L]. pixel_values: [B, 3, H, W], image i of text i.
            assignment_draws: [B, 4], see `draw_pairs`; from `generator` if not given.
            first_image_index, second_image_index, labels: [B], the images of each text and where its own is, instead of drawing.

        Returns:
            loss and losses "assignment", correct and counts.

        Raises:
            ValueError: words or images missing, fewer than 3 pairs to draw from, only some of indices and labels.
        """
        require_words_and_images(input_ids, pixel_values, attention_mask, assignment_draws=assignment_draws)
        require_shape((len(input_ids), 4), assignment_draws=assignment_draws)
        require_shape(
            input_ids.shape[:1],
            first_image_index=first_image_index,
            second_image_index=second_image_index,
            labels=labels,
        )
        image = self.albef.encode_image(pixel_values)["image_embeds"]
        given = (first_image_index, second_image_index, labels)
        if all(part is None for part in given):
            if assignment_draws is None:
                device = None if generator is None else generator.device
                assignment_draws = torch.rand(len(input_ids), 4, generator=generator, device=device)
            given = self.draw_pairs(image, assignment_draws)
        elif any(part is None for part in given):
            raise ValueError("give first_image_index, second_image_index and labels, or none of them")
        *indices, labels = given
        logits = self.assignment_head(joint_with_two(self, input_ids, attention_mask, image, *indices)).float()
        loss = nn.functional.cross_entropy(logits, labels)
        correct, count = logits.detach().argmax(dim=-1).eq(labels).sum(), labels.new_tensor(len(labels))
        return PreTrainingOutput(
            loss, {"assignment": loss}, correct={"assignment": correct}, counts={"assignment": count}
        )
