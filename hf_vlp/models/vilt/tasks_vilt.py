"""ViLT's downstream tasks: filling masks, retrieval, visual question answering and visual reasoning (section 4.2)."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from hf_vlp.layers.heads import ClassifierHead, MaskedTokenHead, PredictsWords
from hf_vlp.layers.towers import require_pairs
from hf_vlp.models.vilt.configuration_vilt import VlpViltConfig
from hf_vlp.models.vilt.modeling_vilt import MATCH, Image, VlpViltModel, VlpViltPreTrainedModel, images_of
from hf_vlp.objectives.masked_prediction import masked_prediction_loss
from hf_vlp.outputs import FusionOutput

PRETRAINING = r"^(mlm_head|itm_head|mpp_head|vilt\.image_embeddings\.mask_token)"  # what a task has no use for
RECORDED = ("output_hidden_states", "output_attentions")


class VlpViltTask(VlpViltPreTrainedModel):
    """The transformer under a head: it loads out of a pre-training folder, whose own heads are left out."""

    _keys_to_ignore_on_load_unexpected = [PRETRAINING]

    def __init__(self, config: VlpViltConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.vilt = VlpViltModel(config, add_pooling_layer)
        self.vilt.image_embeddings.mask_token = None  # of masked patch prediction alone

    def encode_image(self, *args, **kwargs) -> Image:
        """See `VlpViltModel.encode_image`."""
        return self.vilt.encode_image(*args, **kwargs)

    def resize_image_positions(self, image_size: int) -> None:
        """See `VlpViltModel.resize_image_positions`."""
        self.vilt.resize_image_positions(image_size)

    def pooled(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, image: Image, image_modality=None, **kwargs
    ) -> tuple[torch.Tensor, FusionOutput | dict]:
        """The pooled state [B, D], and the whole output where hidden states or attention maps are asked for."""
        recorded = {key: True for key in RECORDED if kwargs.get(key, getattr(self.config, key))}
        if recorded:  # every state, so no short cut
            output = self.vilt(
                input_ids, attention_mask, **image, image_modality=image_modality, return_dict=True, **recorded
            )
            return output.pooler_output, output
        return self.vilt.pooled(input_ids, attention_mask, image, image_modality=image_modality), {}


def classified(loss, logits: torch.Tensor, recorded: FusionOutput | dict) -> SequenceClassifierOutput:
    """The output of a task, with what was recorded on the way."""
    return SequenceClassifierOutput(
        loss=loss,
        logits=logits,
        hidden_states=recorded.get("hidden_states"),
        attentions=recorded.get("attentions"),
    )


class VlpViltForMaskedLM(PredictsWords, VlpViltTask):
    """Words behind masks, with the image in sight."""

    _keys_to_ignore_on_load_unexpected = [PRETRAINING.replace("mlm_head", r"vilt\.pooler")]

    def __init__(self, config: VlpViltConfig):
        super().__init__(config, add_pooling_layer=False)
        self.mlm_head = MaskedTokenHead(
            config.hidden_size, config.vocab_size, config.hidden_act, config.text_layer_norm_eps
        )
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Texts with [MASK] and their images -> logits [B, L, V]; with `labels` [B, L] (-100 ignored) the mean cross-entropy, 0 where
        nothing is masked. In training with labels logits are None: only those at masked words are computed.

        `image_embeds`, `image_mask`: what `encode_image` returned, instead of pixels.

        Raises:
            ValueError: words or image missing.
        """
        image = _images(self.vilt, input_ids, pixel_values, pixel_mask, patch_index, image_embeds, image_mask)
        recorded = {key: True for key in RECORDED if kwargs.get(key, getattr(self.config, key))}
        if recorded:
            output = self.vilt(input_ids, attention_mask, **image, return_dict=True, **recorded)
            states = output.text_hidden_states
        else:
            output, states = {}, self.vilt.read(input_ids, attention_mask, image, input_ids.shape[1])
            if attention_mask is not None:  # states of padding depend on what was left out
                states = states * attention_mask.unsqueeze(-1).to(states.dtype)
        loss = None if labels is None else masked_prediction_loss(states, labels, self.mlm_head)[0]
        logits = None if labels is not None and self.training else self.mlm_head(states)
        return MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )


class VlpViltForImageTextRetrieval(VlpViltTask):
    """A score of each pair, trained by telling an image's text from false ones (section 4.2).

    The matching head stays beside the rank head as pre-training left it, frozen, as in the released files: its probability says whether
    a pair matches, the rank head's score is for comparing.
    """

    _keys_to_ignore_on_load_unexpected = [PRETRAINING.replace("itm_head|", "")]
    _keys_to_ignore_on_load_missing = [r"^rank_head\."]

    def __init__(self, config: VlpViltConfig):
        super().__init__(config)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.itm_head.requires_grad_(False)
        self.rank_head = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, whose loading makes every weight trainable; the matching head stays frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).itm_head.requires_grad_(False)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The rank head begins as the row of the matching head that stands for a match."""
        super()._init_weights(module)
        if module is self:
            init.copy_(self.rank_head.weight, self.itm_head.weight[MATCH:])
            init.copy_(self.rank_head.bias, self.itm_head.bias[MATCH:])

    def score_pairs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **image: torch.Tensor
    ) -> torch.Tensor:
        """Score of each text with the image of the same row, [B]; higher is a better match.

        `image`: what `encode_image` takes, or what it returned.
        """
        return self.rank_head(self.vilt.pooled(input_ids, attention_mask, images_of(self.vilt, image))).squeeze(-1)

    def match_probability(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **image: torch.Tensor
    ) -> torch.Tensor:
        """Probability that each text and the image of the same row belong together, [B], by the matching head of pre-training."""
        logits = self.itm_head(self.vilt.pooled(input_ids, attention_mask, images_of(self.vilt, image)))
        return logits.float().softmax(dim=-1)[:, MATCH]

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """T texts for each image.

        Args:
            input_ids, attention_mask: [B, T, L], or [B, L] for one text an image.
            pixel_values, pixel_mask, or image_embeds, image_mask: of B images, each read with its T texts.
            labels: [B], which of the T texts is the image's; the collator puts it first, so the labels are 0.

        Returns:
            logits [B, T], the scores ([B, 1] of one text); with labels the cross-entropy over the T texts.

        Raises:
            ValueError: words or image missing, labels with one text alone.
        """
        image = _images(self.vilt, input_ids, pixel_values, pixel_mask, patch_index, image_embeds, image_mask)
        texts = input_ids.shape[1] if input_ids.ndim == 3 else 1
        if labels is not None and texts < 2:
            raise ValueError("a retrieval loss needs several texts an image, input_ids [B, T, L] with T of 2 or more")
        require_pairs(input_ids=input_ids, images=image["image_embeds"], labels=labels)
        flat = input_ids.reshape(-1, input_ids.shape[-1])
        mask = None if attention_mask is None else attention_mask.reshape(flat.shape)
        image = {name: value.repeat_interleave(texts, dim=0) for name, value in image.items()}
        pooled, recorded = self.pooled(flat, mask, image, **kwargs)
        logits = self.rank_head(pooled).view(-1, texts)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return classified(loss, logits, recorded)


class VlpViltForVisualQuestionAnswering(VlpViltTask):
    """One of K answers to a question about an image."""

    def __init__(self, config: VlpViltConfig):
        super().__init__(config)
        self.classifier = ClassifierHead(
            config.hidden_size, 2 * config.hidden_size, config.num_labels, config.hidden_act
        )
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Questions and images -> logits [B, K]; with `labels` [B, K], scores of the answers from 0 to 1, the binary cross-entropy summed
        over answers and averaged over questions.

        `image_embeds`, `image_mask`: what `encode_image` returned, instead of pixels.

        Raises:
            ValueError: words or image missing, labels of another shape than the logits.
        """
        image = _images(self.vilt, input_ids, pixel_values, pixel_mask, patch_index, image_embeds, image_mask)
        pooled, recorded = self.pooled(input_ids, attention_mask, image, **kwargs)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape:
                raise ValueError(
                    f"labels must be scores of every answer {list(logits.shape)}, got {list(labels.shape)}"
                )
            loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float()) * logits.shape[1]
        return classified(loss, logits, recorded)


class VlpViltForVisualReasoning(VlpViltTask):
    """Whether a statement about two images is true (NLVR2): each image is read with the statement, and both are compared.

    The second image has its own modality, which begins as that of images.
    """

    def __init__(self, config: VlpViltConfig):
        super().__init__(config)
        self.second_image_embedding = nn.Parameter(torch.empty(1, config.hidden_size))
        self.classifier = ClassifierHead(2 * config.hidden_size, 2 * config.hidden_size, 2, config.hidden_act)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self:
            init.copy_(self.second_image_embedding, self.vilt.modality_embeddings.weight[1:])

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Statements [B, L] about two images each -> logits [B, 2], of false and of true; with `labels` [B], 1 for true, the
        cross-entropy.

        `pixel_values` [B, 2, 3, H, W], `pixel_mask` [B, 2, H, W] or None where no picture is padded; `patch_index` [B, 2, n], the patches
        to keep, or None for all.

        Raises:
            ValueError: statements or images missing, or another number than two images.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError("visual reasoning needs input_ids and pixel_values")
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values must be [B, 2, 3, H, W], two images for each statement; got {list(pixel_values.shape)}"
            )
        require_pairs(input_ids=input_ids, pixel_values=pixel_values, labels=labels)
        given = (pixel_values, pixel_mask, patch_index)
        image = self.vilt.encode_image(*(None if part is None else part.flatten(0, 1) for part in given))
        modality = torch.stack([self.vilt.modality_embeddings.weight[1:], self.second_image_embedding])  # [2, 1, D]
        modality = modality.repeat(len(input_ids), 1, 1)
        twice = [None if text is None else text.repeat_interleave(2, dim=0) for text in (input_ids, attention_mask)]
        pooled, recorded = self.pooled(*twice, image, modality, **kwargs)
        logits = self.classifier(pooled.unflatten(0, (-1, 2)).flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return classified(loss, logits, recorded)


def _images(model, input_ids, pixel_values, pixel_mask, patch_index, image_embeds, image_mask) -> Image:
    """Images as `encode_image` returns them, from what a forward was given.

    Raises:
        ValueError: words or image missing, or pixels and an encoded image.
    """
    if input_ids is None:
        raise ValueError("give input_ids: ViLT reads words and image together")
    pixels = {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "patch_index": patch_index}
    return images_of(model, {**pixels, "image_embeds": image_embeds, "image_mask": image_mask})
