"""ALBEF's downstream tasks: filling masks, visual entailment, reasoning over two images, and questions answered in words (section 4.2)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from hf_vlp.layers.heads import MaskedTokenHead
from hf_vlp.layers.post_norm import PostNormBlock
from hf_vlp.layers.text_embeddings import TextEmbeddings
from hf_vlp.layers.towers import require_pairs
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.modeling_albef import VlpAlbefModel, VlpAlbefTaught, bert_blocks
from hf_vlp.objectives.distillation import IGNORED, distilled_cross_entropy
from hf_vlp.objectives.masked_prediction import masked_prediction_loss
from hf_vlp.objectives.matching import draw_negatives, negative_weights
from hf_vlp.outputs import PreTrainingOutput

UNUSED = r"^(temperature|itm_head|mlm_head|assignment_head|teacher|queue|albef\.(visual|text)_projection)\b"  # of a folder, by a task
ASSIGNMENT_TEMPERATURE = 0.07  # of the likeness by which other images are drawn
MATCHED_FIRST, MATCHED_SECOND, NOT_MATCHED = 0, 1, 2  # rows of the assignment head
LOGITS_AT_ONCE = 1024  # tokens whose logits over the vocabulary are held at a time


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


def _joint(
    model: VlpAlbefModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor,
    rows: int | None = None,
) -> torch.Tensor:
    """States of the words read with their images, [B, L or rows, D]; not defined at padding."""
    text = model.encode_text(input_ids, attention_mask)
    return model.fuse(**text, **model.encode_image(pixel_values), rows=rows)


def _require_words_and_images(input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None, **others) -> None:
    """Raise a ValueError where one of the two is missing or rows do not fit."""
    if input_ids is None or pixel_values is None:
        raise ValueError("give input_ids and pixel_values: the task reads words and image together")
    require_pairs(input_ids=input_ids, pixel_values=pixel_values, **others)


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
        _require_words_and_images(input_ids, pixel_values, labels=labels)

        def predict(parts: nn.Module) -> torch.Tensor:
            return parts.classifier(_joint(parts.albef, input_ids, attention_mask, pixel_values, rows=1)[:, 0])

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
            firsts = dict(self.albef.fusion_model.layers.named_parameters())
            for name, own in self.second_layers.named_parameters():
                init.copy_(own, firsts[name])
        super()._init_weights(module)


def _joint_with_two(
    parts: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_embeds: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
) -> torch.Tensor:
    """State [B, D] of the first word of each text, read with two of the N encoded images [N, 1 + P, D].

    `parts`: something with `albef` and `second_layers`. `first`, `second`: [B], which images.
    """
    albef, fusion, seconds = parts.albef, parts.albef.fusion_model, parts.second_layers
    if seconds[0].cross_attention.k_proj is None:
        images = fusion.keys_and_values(image_embeds)
        pairs = [[(key[index], value[index]) for key, value in images] for index in (first, second)]
    else:
        others = image_embeds[second]
        pairs = [
            fusion.keys_and_values(image_embeds[first]),
            [layer.cross_attention.keys_and_values(others) for layer in seconds],
        ]
    states = albef.encode_text(input_ids, attention_mask)["text_embeds"]
    mask = create_bidirectional_mask(albef.config, inputs_embeds=states, attention_mask=attention_mask)
    one = create_bidirectional_mask(
        albef.config, inputs_embeds=states[:, :1], attention_mask=attention_mask, encoder_hidden_states=states
    )
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
        _require_words_and_images(input_ids, pixel_values, labels=labels)
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values must be [B, 2, 3, H, W], two images for each statement; got {list(pixel_values.shape)}"
            )
        first = 2 * torch.arange(len(input_ids), device=input_ids.device)

        def predict(parts: nn.Module) -> torch.Tensor:
            images = parts.albef.encode_image(pixel_values.flatten(0, 1))["image_embeds"]
            return parts.classifier(_joint_with_two(parts, input_ids, attention_mask, images, first, first + 1))

        return self.classify(predict, labels)


class VlpAlbefForMaskedLM(VlpAlbefTask):
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

    def get_output_embeddings(self) -> nn.Linear:
        return self.mlm_head.decoder

    def set_output_embeddings(self, value: nn.Linear):
        self.mlm_head.decoder = value

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
        _require_words_and_images(input_ids, pixel_values, labels=labels)
        states = _joint(self.albef, input_ids, attention_mask, pixel_values)
        if attention_mask is not None:  # states of padding depend on what was left out
            states = states * attention_mask.unsqueeze(-1).to(states.dtype)
        loss = None if labels is None else masked_prediction_loss(states, labels, self.mlm_head)[0]
        return MaskedLMOutput(loss=loss, logits=None if labels is not None and self.training else self.mlm_head(states))


class VlpAlbefAnswerDecoder(nn.Module):
    """Words of an answer one after the other, each in sight of those before it and of the question (section 4.2, VQA)."""

    def __init__(self, config: VlpAlbefConfig):
        super().__init__()
        text, sizes = config.text_config, config.multimodal_config
        self.config = config
        self.embeddings = TextEmbeddings(
            text.vocab_size,
            text.max_position_embeddings,
            getattr(text, "type_vocab_size", 1),
            sizes.hidden_size,
            norm_eps=sizes.layer_norm_eps,
            dropout=sizes.hidden_dropout_prob,
            pad_token_id=text.pad_token_id,
        )
        self.layers = nn.ModuleList(
            PostNormBlock(
                config,
                sizes.hidden_size,
                sizes.intermediate_size,
                sizes.num_attention_heads,
                hidden_act=sizes.hidden_act,
                norm_eps=sizes.layer_norm_eps,
                dropout=sizes.attention_probs_dropout_prob,
                hidden_dropout=sizes.hidden_dropout_prob,
                key_value_size=sizes.hidden_size,
                is_causal=True,
            )
            for _ in range(config.answer_layers)
        )
        self.head = MaskedTokenHead(sizes.hidden_size, text.vocab_size, sizes.hidden_act, sizes.layer_norm_eps)

    @torch.no_grad()
    def begin_as(self, model: VlpAlbefModel) -> None:
        """Layers and embeddings become those that fuse and the text encoder's, as far as they are alike and not from a checkpoint."""
        for own, other in (
            (self.layers, model.fusion_model.layers),
            (self.embeddings, getattr(model.text_model, "embeddings", None)),
        ):
            found = {} if other is None else dict(other.named_parameters())
            for name, tensor in own.named_parameters():
                if name in found and found[name].shape == tensor.shape:
                    init.copy_(tensor, found[name])

    def forward(
        self,
        answer_ids: torch.Tensor,
        question_states: torch.Tensor,
        question_mask: torch.Tensor | None,
        answer_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States [A, La, D] of answers padded on the right, which no real word sees.

        Args:
            answer_ids: [A, La]. question_states, question_mask: [B, L, D] and [B, L], what the answers attend to.
            answer_rows: [A], the question of each answer; None: A / B answers of each question, side by side.
        """
        states = self.embeddings(answer_ids)
        mask = create_causal_mask(self.config, inputs_embeds=states, attention_mask=None, past_key_values=None)
        questions = [layer.cross_attention.keys_and_values(question_states) for layer in self.layers]
        if answer_rows is not None:
            questions = [(key[answer_rows], value[answer_rows]) for key, value in questions]
            question_states = question_states[answer_rows]
            question_mask = None if question_mask is None else question_mask[answer_rows]
        seen = create_bidirectional_mask(
            self.config,
            inputs_embeds=states.reshape(len(question_states), -1, states.shape[-1]),
            attention_mask=question_mask,
            encoder_hidden_states=question_states,
        )
        for layer, question in zip(self.layers, questions, strict=True):
            states = layer(states, mask, question, seen)
        return states


class VlpAlbefForVisualQuestionAnswering(VlpAlbefTask):
    """Answers to a question about an image: written word by word in training, the most probable of a list in evaluation.

    The list, `answer_ids` [K, answer_length] with -100 at padding, is saved with the model; `set_answers` fills it. K is `num_labels`.
    The decoder begins as the layers that fuse, the text encoder's embeddings and the masked-language head of pre-training.
    """

    _keys_to_ignore_on_load_missing = [r"^teacher\.", r"^answer_ids$"]
    _tied_weights_keys = {"answer_decoder.head.decoder.weight": "answer_decoder.embeddings.word_embeddings.weight"}
    taught_parts = ("albef", "answer_decoder")

    def __init__(self, config: VlpAlbefConfig):
        super().__init__(config)
        self.answer_decoder = VlpAlbefAnswerDecoder(config)
        self.register_buffer("answer_ids", torch.full((config.num_labels, config.answer_length), IGNORED))
        self.add_teacher()
        if config.momentum_teacher:
            tied = {f"teacher.{own}": f"teacher.{other}" for own, other in self._tied_weights_keys.items()}
            self._tied_weights_keys = self._tied_weights_keys | tied
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, key_mapping: dict[str, str] | None = None, **kwargs):
        """As in transformers; the masked-language head of a pre-training folder becomes the decoder's."""
        heads = {r"^mlm_head\.": "answer_decoder.head.", r"^teacher\.mlm_head\.": "teacher.answer_decoder.head."}
        return super().from_pretrained(*args, key_mapping={**heads, **(key_mapping or {})}, **kwargs)

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As in transformers, under the model's own names: a mapping used in loading is not undone unless asked for."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if module is self:
            init.constant_(self.answer_ids, IGNORED)
            self.answer_decoder.begin_as(self.albef)
        super()._init_weights(module)
        if module is self and hasattr(self, "teacher"):
            loaded = (
                getattr(weight, "_is_hf_initialized", False) for weight in self.answer_decoder.layers.parameters()
            )
            if not any(loaded):  # the copy's decoder then begins as the copy of what fuses
                self.teacher.answer_decoder.begin_as(self.teacher.albef)

    @torch.no_grad()
    def set_answers(self, answer_ids: torch.Tensor, answer_mask: torch.Tensor | None = None) -> None:
        """The list to answer from.

        `answer_ids` [K, La]: a start token, words, an end token, padding; `answer_mask` [K, La], None: all but the padding token.

        Raises:
            ValueError: another number of answers than `num_labels`, answers too long for the list, not begun alike or empty.
        """
        count, length = self.answer_ids.shape
        if len(answer_ids) != count:
            raise ValueError(
                f"{len(answer_ids)} answers for a model of {count}: give {count}, or load it with num_labels={len(answer_ids)}"
            )
        if answer_mask is None:
            answer_mask = answer_ids.ne(self.config.text_config.pad_token_id)
        answer_mask = answer_mask.bool()
        longest = int(answer_mask.sum(dim=1).max())
        if longest > length:
            raise ValueError(
                f"an answer has {longest} tokens, the list has room for {length}: load the model with answer_length={longest}"
            )
        _require_answers(answer_ids, answer_mask)
        self.answer_ids.fill_(IGNORED)
        self.answer_ids[:, :longest] = answer_ids.masked_fill(~answer_mask, IGNORED)[:, :longest]

    @torch.no_grad()
    def rank_answers(
        self,
        question_states: torch.Tensor,
        question_mask: torch.Tensor | None,
        answer_ids: torch.Tensor,
        answer_mask: torch.Tensor,
        k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The answers of a list that are most probable after a question.

        Those k are compared whose first word is most probable, by the log probability of all their words; with
        `count_first_token_twice`, as in the released code, that of the first word is added once more.

        Args:
            question_states, question_mask: [B, L, D] and [B, L], questions read with their images.
            answer_ids, answer_mask: [K, La], as for `set_answers`. k: no more than K are compared.

        Returns:
            Which answers, and their scores, [B, k] each, the best first.

        Raises:
            ValueError: k below 1, answers not begun alike or empty.
        """
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}: it says how many answers are compared")
        answer_mask = answer_mask.bool()
        _require_answers(answer_ids, answer_mask)
        count, k = len(question_states), min(k, len(answer_ids))
        start = answer_ids[:1, :1].expand(count, 1)
        logits = self.answer_decoder.head(self.answer_decoder(start, question_states, question_mask)[:, 0]).float()
        first, candidates = logits.log_softmax(dim=-1)[:, answer_ids[:, 1]].topk(k)  # [B, k]
        longest = int(answer_mask[candidates].sum(dim=-1).max())
        ids = answer_ids[candidates].flatten(0, 1)[:, :longest]  # [B * k, L]
        places = answer_mask[candidates].flatten(0, 1)[:, 2:longest]
        scores = first.flatten() * (2 if self.config.count_first_token_twice else 1)
        if longest > 2:
            rest = torch.zeros(places.shape, device=scores.device)
            states = self.answer_decoder(ids[:, :-1], question_states, question_mask)[:, 1:]
            rest[places] = self._log_probability(states[places], ids[:, 2:][places])
            scores = scores + rest.sum(dim=1)
        scores, order = scores.view(count, k).sort(dim=1, descending=True)
        return candidates.gather(1, order), scores

    def _log_probability(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[M, D] and [M] -> [M], of each target behind its state; few logits are held at a time."""
        found = []
        for some, target in zip(states.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True):
            found.append(-nn.functional.cross_entropy(self.answer_decoder.head(some).float(), target, reduction="none"))
        return torch.cat(found)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        answer_ids: torch.Tensor | None = None,
        answer_mask: torch.Tensor | None = None,
        answer_weights: torch.Tensor | None = None,
        answer_rows: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Questions about images, with answers to learn or to be answered from the list.

        Args:
            input_ids, attention_mask: [B, L], questions. pixel_values: [B, 3, H, W].
            answer_ids, answer_mask: [A, La], answers to learn: a start token, words, an end token, padding.
            answer_weights, answer_rows: [A], what each answer counts, and its question.

        Returns:
            With answers the loss, hard and soft, summed over the words, weighed and averaged over questions. Logits [B, K] in
            evaluation, unless answers came and the list is empty: scores of the `answer_candidates` best, the lowest number elsewhere.

        Raises:
            ValueError: words or images missing, a part of the answers missing, or nothing to answer from.
        """
        _require_words_and_images(input_ids, pixel_values)
        learnt = {
            "answer_ids": answer_ids,
            "answer_mask": answer_mask,
            "answer_weights": answer_weights,
            "answer_rows": answer_rows,
        }
        missing = [name for name, value in learnt.items() if value is None]
        if 0 < len(missing) < len(learnt):
            raise ValueError(f"answers to learn need {', '.join(learnt)}; missing: {', '.join(missing)}")
        if not missing and len({len(value) for value in learnt.values()}) > 1:
            counts = ", ".join(f"{len(value)} {name}" for name, value in learnt.items())
            raise ValueError(f"every answer has one row of each, got {counts}")
        states = _joint(self.albef, input_ids, attention_mask, pixel_values)
        loss = logits = None
        if not missing:
            loss = self._learn(states, (input_ids, attention_mask, pixel_values), **learnt)
        listed = self.answer_ids.ge(0)
        if missing or (not self.training and bool(listed.any())):
            if not bool(listed.any()):
                raise ValueError("the list of answers is empty: fill it with set_answers, or give answers to learn")
            listed_ids = self.answer_ids.clamp(min=0)
            chosen, scores = self.rank_answers(
                states, attention_mask, listed_ids, listed, self.config.answer_candidates
            )
            logits = scores.new_full((len(states), len(listed)), torch.finfo(scores.dtype).min)
            logits = logits.scatter(1, chosen, scores)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _learn(
        self,
        states: torch.Tensor,
        question: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
        answer_ids: torch.Tensor,
        answer_mask: torch.Tensor,
        answer_weights: torch.Tensor,
        answer_rows: torch.Tensor,
    ) -> torch.Tensor:
        """Loss of writing the answers; `states` [B, L, D] of the `question` by the model, whose momentum copy reads it itself."""
        places = answer_mask[:, 1:].bool()  # [A, La - 1], behind which a word is to be written

        def predict(parts: nn.Module, read: torch.Tensor | None = None) -> torch.Tensor:
            read = _joint(parts.albef, *question) if read is None else read
            written = parts.answer_decoder(answer_ids[:, :-1], read, question[1], answer_rows)
            return parts.answer_decoder.head(written[places]).float()  # [M, V]

        logits, targets = predict(self, states), answer_ids[:, 1:][places]
        words = nn.functional.cross_entropy(logits, targets, reduction="none")
        teacher_logits, weight = self.soft_targets(predict)
        if teacher_logits is not None:
            soft = nn.functional.cross_entropy(logits, teacher_logits.softmax(dim=-1), reduction="none")
            words = (1 - weight) * words + weight * soft
        weights = answer_weights.to(words.dtype)[:, None].expand(places.shape)
        return (words * weights[places]).sum() / len(states)


def _require_answers(answer_ids: torch.Tensor, answer_mask: torch.Tensor) -> None:
    """Raise a ValueError unless all answers begin with the same token and at least one word follows."""
    if answer_ids.ndim != 2 or answer_ids.shape[1] < 2 or not bool(answer_mask[:, :2].all()):
        raise ValueError(
            "an answer needs a start token and at least one more, padded on the right: [K, La] with La of 2 or more"
        )
    if not bool(answer_ids[:, 0].eq(answer_ids[0, 0]).all()):
        raise ValueError(
            "all answers must begin with the same start token: the first word is predicted behind it once for all"
        )


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
        _require_words_and_images(input_ids, pixel_values, assignment_draws=assignment_draws)
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
        logits = self.assignment_head(_joint_with_two(self, input_ids, attention_mask, image, *indices)).float()
        loss = nn.functional.cross_entropy(logits, labels)
        correct, count = logits.detach().argmax(dim=-1).eq(labels).sum(), labels.new_tensor(len(labels))
        return PreTrainingOutput(
            loss, {"assignment": loss}, correct={"assignment": correct}, counts={"assignment": count}
        )
