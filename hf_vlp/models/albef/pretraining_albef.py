"""ALBEF trained by contrast and matching, in pre-training by masked words too; the same parts score pairs (sections 3.2, 3.3 and 4.2)."""

import torch
from torch import nn
from transformers.models.auto.modeling_auto import AutoModelForMaskedLM
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from hf_vlp.layers.attention import Attention
from hf_vlp.layers.heads import MaskedTokenHead, PredictsWords
from hf_vlp.layers.logit_scale import Temperature
from hf_vlp.layers.post_norm import KeyValues
from hf_vlp.layers.towers import require_pairs, require_shape
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.modeling_albef import VlpAlbefModel, VlpAlbefTaught, VlpAlbefTextModel
from hf_vlp.momentum.queue import FeatureQueue
from hf_vlp.objectives.masked_prediction import distilled_masked_prediction_loss, masked_prediction_loss
from hf_vlp.objectives.matching import draw_negatives, matching_labels, matching_loss, negative_weights
from hf_vlp.objectives.momentum_contrast import momentum_contrastive_loss
from hf_vlp.outputs import PreTrainingOutput

MATCH = 1  # row of the matching head


class VlpAlbefAligned(VlpAlbefTaught):
    """What is trained by contrast and matching: the model, its matching head, and in training its momentum copy and the queue.

    temperature_limits: whether the temperature is held between its limits.
    """

    temperature_limits = False
    _keys_to_ignore_on_load_missing = [r"^teacher\.", r"^queue\."]  # a copy of the weights, and an empty queue

    def __init__(self, config: VlpAlbefConfig):
        super().__init__(config)
        limits = (config.temperature_min, config.temperature_max) if self.temperature_limits else None
        self.temperature = Temperature(config.temperature_init_value, limits)
        self.itm_head = nn.Linear(config.multimodal_config.hidden_size, 2)

    def add_teacher(self) -> None:
        """The momentum copy and the queue, where the configuration has them."""
        super().add_teacher()
        if self.config.momentum_teacher:
            self.queue = FeatureQueue(self.config.queue_size, self.config.projection_dim)

    def fuse(self, *args, **kwargs) -> torch.Tensor:
        """See `VlpAlbefModel.fuse`."""
        return self.albef.fuse(*args, **kwargs)

    def get_image_features(self, *args, **kwargs) -> torch.Tensor:
        """See `VlpAlbefModel.get_image_features`."""
        return self.albef.get_image_features(*args, **kwargs)

    def get_text_features(self, *args, **kwargs) -> torch.Tensor:
        """See `VlpAlbefModel.get_text_features`."""
        return self.albef.get_text_features(*args, **kwargs)

    def keys_and_values(self, image_embeds: torch.Tensor) -> list[KeyValues]:
        """What the texts of `score_pairs` attend to of encoded images [B, 1 + P, D], to be computed once for many of them."""
        return self.albef.fusion_model.keys_and_values(image_embeds)

    def score_pairs(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        key_values: list[KeyValues] | None = None,
        **image: torch.Tensor,
    ) -> torch.Tensor:
        """Logit of matching of each text with its image, [B * T]; higher is a better match.

        `input_ids`, `attention_mask` [B * T, L]: T texts an image, those of an image side by side; or `text_embeds` [B * T, L, D] as
        `encode_text` returned them. `image`: of B images, what `encode_image` takes or what it returned; or the `key_values`
        of one image that all texts are read with.
        """
        if text_embeds is None:
            text_embeds = self.albef.encode_text(input_ids, attention_mask)["text_embeds"]
        if key_values is None:
            image_embeds = image.get("image_embeds")
            if image_embeds is None:
                image_embeds = self.albef.encode_image(**image)["image_embeds"]
            states = self.albef.fuse(text_embeds, attention_mask, image_embeds, rows=1)
        else:
            states = self.albef.fusion_model.read(text_embeds, attention_mask, key_values, None, rows=1)
        return self.itm_head(states[:, 0])[:, MATCH]

    def match_logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, 2] of no match and of a match of B pairs, in one plain pass whose attention maps can be looked at."""
        states = self.albef(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        return self.itm_head(states.last_hidden_state[:, 0])

    def pair_similarities(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """Similarities over temperature of B texts to their own images, [B]."""
        image, text = self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)
        return (image * text).sum(dim=1) / self.temperature()

    def cross_attention(self, layer: int | None = None) -> Attention:
        """See `VlpAlbefModel.cross_attention`."""
        return self.albef.cross_attention(layer)

    def image_attention(self, block: int) -> Attention:
        """See `VlpAlbefModel.image_attention`."""
        return self.albef.image_attention(block)

    def _require_teacher(self) -> None:
        if not hasattr(self, "teacher"):
            raise ValueError(
                "training needs the momentum copy, and this model has none: load it with momentum_teacher=True, which makes one of its "
                "weights"
            )

    def teacher_states(
        self, pixel_values: torch.Tensor, *texts: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """States of the images [B, 1 + P, D] and of each of the `texts` [B, L] by the momentum copy, which is moved first in training.

        None without texts, as nothing is to be taught.
        """
        with torch.no_grad():
            self.move_teacher()
            if not texts:
                return (None,)
            image = self.teacher.albef.encode_image(pixel_values)["image_embeds"]
            return image, *_each_text(self.teacher.albef, texts, attention_mask)

    def contrast(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        teacher_image: torch.Tensor,
        teacher_text: torch.Tensor,
        image_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image-text contrast against the momentum features of the batch and the queue (equations 1, 2 and 6).

        Args:
            image, text, teacher_image, teacher_text: states [B, 1 + P, D] and [B, L, D]. image_ids: [B] or None.

        Returns:
            The loss; similarities over temperature of images to texts and of texts to images, [B, B + Q]; unit embeddings [B, E].

        Raises:
            ValueError: no `image_ids` where the configuration leaves texts of the same image out.
        """
        image_embeds, text_embeds = self.albef.project_image(image), self.albef.project_text(text)
        with torch.no_grad():
            keys = self.teacher.albef.project_image(teacher_image), self.teacher.albef.project_text(teacher_text)
        targets = self.config.contrastive_targets
        if targets == "exclude" and image_ids is None:
            raise ValueError(
                'contrastive_targets is "exclude" in the configuration, which needs image_ids in the batch; "plain" needs none'
            )
        loss, image_to_text, text_to_image = momentum_contrastive_loss(
            image_embeds,
            text_embeds,
            *keys,
            self.queue.image_features,
            self.queue.text_features,
            self.temperature(),
            self.distillation_weight,
            image_ids=None if targets == "plain" else image_ids,
            queue_ids=None if targets == "plain" else self.queue.image_ids,
            exclude=targets == "exclude",
        )
        if self.training:
            self.queue.enqueue(*keys, image_ids)
        return loss, image_to_text, text_to_image, image_embeds, text_embeds

    def match(
        self,
        text: torch.Tensor,
        attention_mask: torch.Tensor | None,
        images: list[KeyValues],
        negative_image: tuple[torch.Tensor, torch.Tensor],
        negative_text: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Matching of true pairs, of each text with a false image, and of each image with a false text (section 3.2).

        Both texts of an image are read side by side, so that keys and values are copied for the false images alone.

        Args:
            text, attention_mask: [B, L, D] and [B, L]. images: keys and values of the B images.
            negative_image: of each text the row of its false image and whether it has one, [B] each; negative_text: of each image.

        Returns:
            Loss, correct, count.
        """
        read, own = self.albef.fusion_model.read, torch.arange(len(text), device=text.device)
        both = torch.stack([own, negative_text[0]], dim=1).flatten()  # [2 B], the texts of each image
        mask = None if attention_mask is None else attention_mask[both]
        true, false_text = read(text[both], mask, images, None, rows=1)[:, 0].unflatten(0, (-1, 2)).unbind(1)
        false_image = read(text, attention_mask, images, negative_image[0], rows=1)[:, 0]
        logits = self.itm_head(torch.cat([true, false_image, false_text]))
        return matching_loss(logits, matching_labels(negative_image[1], negative_text[1]))

    def negatives(
        self,
        image_to_text: torch.Tensor,
        text_to_image: torch.Tensor,
        image_ids: torch.Tensor | None,
        draws: torch.Tensor | None,
        given: tuple[torch.Tensor | None, torch.Tensor | None],
        generator: torch.Generator | None,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """A false image for each text and a false text for each image, the more probable the more similar (section 3.2).

        Args:
            image_to_text, text_to_image: [B, B + Q], of which the batch's columns count.
            draws: [B, 2] in [0, 1), of the image and of the text; drawn from `generator` if not given.
            given: rows [B] of the images and of the texts that are taken instead.
        """
        count = len(image_to_text)
        if draws is None:
            draws = torch.rand(count, 2, generator=generator, device=None if generator is None else generator.device)
        ids = None if self.config.contrastive_targets == "plain" else image_ids
        found = []
        for similarities, column, index in zip((text_to_image, image_to_text), draws.unbind(1), given, strict=True):
            if index is None:
                weights = negative_weights(similarities[:, :count].detach(), ids)
                found.append(draw_negatives(weights, column.to(weights.device)))
            else:
                found.append((index, torch.ones_like(index, dtype=torch.bool)))
        return tuple(found)


def _each_text(
    model: VlpAlbefModel, texts: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """States [B, L, D] of each of several texts [B, L] with the same mask, in one pass."""
    mask = None if attention_mask is None else attention_mask.repeat(len(texts), 1)
    return model.encode_text(torch.cat(texts), mask)["text_embeds"].chunk(len(texts))


def _require_batch(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_ids: torch.Tensor | None,
    draws: torch.Tensor | None,
    image_index: torch.Tensor | None,
    text_index: torch.Tensor | None,
) -> None:
    """Raise a ValueError unless all that is given fits texts [B, L]."""
    count = len(input_ids)
    require_shape(input_ids.shape, attention_mask=attention_mask)
    require_shape((count, 2), negative_draws=draws)
    require_shape((count,), image_ids=image_ids, negative_image_index=image_index, negative_text_index=text_index)


class VlpAlbefForPreTraining(PredictsWords, VlpAlbefAligned):
    """Contrast, matching and masked words, with soft targets by the momentum copy (sections 3.2 and 3.3)."""

    temperature_limits = True
    taught_parts = ("albef", "mlm_head")

    def __init__(self, config: VlpAlbefConfig):
        super().__init__(config)
        fusion = config.multimodal_config
        self.mlm_head = MaskedTokenHead(
            fusion.hidden_size, config.text_config.vocab_size, fusion.hidden_act, fusion.layer_norm_eps
        )
        self.add_teacher()
        words = self.albef.get_input_embeddings()
        name = next(key for key, part in self.albef.named_modules() if part is words)
        self._tied_weights_keys = {"mlm_head.decoder.weight": f"albef.{name}.weight"}
        if config.momentum_teacher:
            self._tied_weights_keys["teacher.mlm_head.decoder.weight"] = f"teacher.albef.{name}.weight"
        self.post_init()
        self._freeze_unread()

    def train(self, mode: bool = True) -> "VlpAlbefForPreTraining":
        """As of any module. Also takes the gradients away again that transformers gives to what no weighed term reads."""
        super().train(mode)
        self._freeze_unread()
        return self

    def _freeze_unread(self) -> None:
        """No gradient for parts that no weighed term reads: a wrapper of several processes would wait for it."""
        config, base, unread = self.config, self.albef, []
        if not config.itc_weight:
            unread += [base.visual_projection, base.text_projection, self.temperature]
        if not config.itm_weight:
            unread.append(self.itm_head)
        if not config.mlm_weight:
            unread.append(self.mlm_head)
        if not (config.itm_weight or config.mlm_weight):
            unread.append(base.fusion_model)
        words = base.get_input_embeddings().weight  # where they are tied to the head
        for part in unread:
            for parameter in part.parameters():
                parameter.requires_grad_(parameter.requires_grad and parameter is words)

    def fill_tower(self, name: str, tower: str | nn.Module) -> None:
        """See `VlpAlbefModel.fill_tower`; of a BERT the head that predicts masked words is taken as well."""
        if name == "text_model" and isinstance(self.albef.text_model, VlpAlbefTextModel):
            if isinstance(tower, str):
                tower = AutoModelForMaskedLM.from_pretrained(tower, dtype=torch.float32)
            if hasattr(tower, "cls"):
                head = tower.cls.predictions
                weights = {"dense": head.transform.dense, "norm": head.transform.LayerNorm}
                self.mlm_head.load_state_dict(
                    {
                        f"{key}.{kind}": getattr(part, kind)
                        for key, part in weights.items()
                        for kind in ("weight", "bias")
                    },
                    strict=False,
                )
                self.mlm_head.decoder.bias.data.copy_(head.decoder.bias)
        super().fill_tower(name, tower)

    def masked_words(
        self,
        text: torch.Tensor,
        attention_mask: torch.Tensor | None,
        images: list[KeyValues],
        labels: torch.Tensor,
        teacher_text: torch.Tensor | None,
        teacher_image: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masked words with the image in sight, hard and soft targets (equations 3 and 7): loss, correct, count.

        `text`, `teacher_text` [B, L, D]: states of the masked texts; `teacher_image` [B, 1 + P, D].
        """
        states = self.albef.fusion_model.read(text, attention_mask, images, None)
        if not self.distillation_weight:
            return masked_prediction_loss(states, labels, self.mlm_head)
        with torch.no_grad():
            theirs = self.teacher.albef.fuse(teacher_text, attention_mask, teacher_image)
        return distilled_masked_prediction_loss(
            states, labels, self.mlm_head, theirs, self.teacher.mlm_head, self.distillation_weight
        )

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        mlm_input_ids: torch.Tensor | None = None,
        mlm_labels: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        negative_draws: torch.Tensor | None = None,
        negative_image_index: torch.Tensor | None = None,
        negative_text_index: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PreTrainingOutput:
        """One loss of every term that the configuration weighs; in training the momentum copy and the queue move.

        Args:
            input_ids, attention_mask: [B, L], whole texts. pixel_values: [B, 3, H, W], their images.
            mlm_input_ids, mlm_labels: [B, L], texts with masked words, and those words, -100 elsewhere.
            image_ids: [B], identities of the images.
            negative_draws: [B, 2] in [0, 1), by which false pairs are drawn; from `generator` if not given.
            negative_image_index, negative_text_index: [B], the false image of each text and the false text of each image instead.

        Returns:
            loss; losses "itc", "itm" and "mlm", as far as weighed; embeddings, unless words alone are weighed; correct and counts of the
            last two.

        Raises:
            ValueError: what an active term needs is missing, rows do not fit, no momentum copy, or no term is active.
        """
        config = self.config
        weights = {"itc": config.itc_weight, "itm": config.itm_weight, "mlm": config.mlm_weight}
        active = {name for name, weight in weights.items() if weight > 0}
        if not active:
            raise ValueError("every term of pre-training has weight 0 in this configuration: set one above 0")
        if input_ids is None or pixel_values is None:
            raise ValueError("pre-training needs input_ids and pixel_values")
        if "mlm" in active and (mlm_input_ids is None or mlm_labels is None):
            raise ValueError(
                "pre-training needs mlm_input_ids and mlm_labels in the batch: let the collator make them, or set mlm_weight to 0"
            )
        require_pairs(input_ids=input_ids, pixel_values=pixel_values, mlm_input_ids=mlm_input_ids, image_ids=image_ids)
        _require_batch(input_ids, attention_mask, image_ids, negative_draws, negative_image_index, negative_text_index)
        require_shape(input_ids.shape, mlm_input_ids=mlm_input_ids, mlm_labels=mlm_labels)
        self._require_teacher()
        if self.training:
            self.temperature.clamp_()
        contrasted, distilled = bool(active - {"mlm"}), "mlm" in active and self.distillation_weight > 0
        texts = (input_ids,) * contrasted + (mlm_input_ids,) * ("mlm" in active)
        image = self.albef.encode_image(pixel_values)["image_embeds"]
        states = _each_text(self.albef, texts, attention_mask)
        teacher_image, *teacher_text = self.teacher_states(
            pixel_values, *texts[: contrasted + distilled], attention_mask=attention_mask
        )
        losses, correct, counts, image_embeds, text_embeds = {}, {}, {}, None, None
        if contrasted:
            contrast, *similar, image_embeds, text_embeds = self.contrast(
                image, states[0], teacher_image, teacher_text[0], image_ids
            )
        images = self.albef.fusion_model.keys_and_values(image) if active - {"itc"} else []
        if "itc" in active:
            losses["itc"] = contrast
        if "itm" in active:
            given = negative_image_index, negative_text_index
            false = self.negatives(*similar, image_ids, negative_draws, given, generator)
            losses["itm"], correct["itm"], counts["itm"] = self.match(states[0], attention_mask, images, *false)
        if "mlm" in active:
            losses["mlm"], correct["mlm"], counts["mlm"] = self.masked_words(
                states[-1], attention_mask, images, mlm_labels, teacher_text[-1] if distilled else None, teacher_image
            )
        loss = sum(weights[name] * value for name, value in losses.items())
        return PreTrainingOutput(loss, losses, image_embeds, text_embeds, correct, counts)


class VlpAlbefForImageTextRetrieval(VlpAlbefAligned):
    """Contrast and matching, where texts of one image are all its own (section 4.2, retrieval and weakly supervised grounding)."""

    _keys_to_ignore_on_load_unexpected = [r"^(teacher\.)?mlm_head\.", r"^teacher\.", r"^queue\."]

    def __init__(self, config: VlpAlbefConfig):
        super().__init__(config)
        self.add_teacher()
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        negative_draws: torch.Tensor | None = None,
        negative_image_index: torch.Tensor | None = None,
        negative_text_index: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PreTrainingOutput:
        """The sum of contrast and matching; arguments and what is returned as of `VlpAlbefForPreTraining`, without masked words.

        Raises:
            ValueError: texts or images are missing, rows do not fit, no momentum copy.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError("training retrieval needs input_ids and pixel_values; pairs are scored by score_pairs")
        require_pairs(input_ids=input_ids, pixel_values=pixel_values, image_ids=image_ids)
        _require_batch(input_ids, attention_mask, image_ids, negative_draws, negative_image_index, negative_text_index)
        self._require_teacher()
        image = self.albef.encode_image(pixel_values)["image_embeds"]
        (text,) = _each_text(self.albef, (input_ids,), attention_mask)
        teacher = self.teacher_states(pixel_values, input_ids, attention_mask=attention_mask)
        contrast, *similar, image_embeds, text_embeds = self.contrast(image, text, *teacher, image_ids)
        given = negative_image_index, negative_text_index
        false = self.negatives(*similar, image_ids, negative_draws, given, generator)
        images = self.albef.fusion_model.keys_and_values(image)
        matching, correct, count = self.match(text, attention_mask, images, *false)
        losses = {"itc": contrast, "itm": matching}
        return PreTrainingOutput(
            contrast + matching, losses, image_embeds, text_embeds, {"itm": correct}, {"itm": count}
        )
