"""ALBEF's answers to questions about images: written word by word, or chosen from a list by how probable they are (section 4.2)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from hf_vlp.layers.attention import mask_of_keys
from hf_vlp.layers.heads import MaskedTokenHead
from hf_vlp.layers.packing import run_by_length
from hf_vlp.layers.text_embeddings import TextEmbeddings
from hf_vlp.layers.towers import require_shape
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.modeling_albef import VlpAlbefModel, bert_blocks, images_of_texts
from hf_vlp.models.albef.tasks_albef import VlpAlbefTask, joint, require_words_and_images
from hf_vlp.objectives.distillation import IGNORED

LOGITS_AT_ONCE = 1024  # tokens whose logits over the vocabulary are held at a time


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
        self.layers = nn.ModuleList(bert_blocks(config, sizes, sizes.hidden_size, config.answer_layers, is_causal=True))
        self.head = MaskedTokenHead(sizes.hidden_size, text.vocab_size, sizes.hidden_act, sizes.layer_norm_eps)

    @torch.no_grad()
    def begin_as(
        self, model: VlpAlbefModel, copy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = init.copy_
    ) -> None:
        """Layers and embeddings become those that fuse and the text encoder's, as far as they are alike, and not from a checkpoint.

        `copy`: of the second tensor into the first; `torch.Tensor.copy_` replaces what is from a checkpoint too.
        """
        for own, other in (
            (self.layers, model.fusion_model.layers),
            (self.embeddings, getattr(model.text_model, "embeddings", None)),
        ):
            found = {} if other is None else dict(other.named_parameters())
            for name, tensor in own.named_parameters():
                if name in found and found[name].shape == tensor.shape:
                    copy(tensor, found[name])

    @torch.no_grad()
    def resize_words(self, like: nn.Embedding) -> None:
        """As many words as `like` [V, D] has; rows go on as they are, and new ones begin as its."""
        table, head, count = self.embeddings.word_embeddings, self.head.decoder, len(like.weight)
        kept = min(count, table.num_embeddings)
        place = {"device": table.weight.device, "dtype": table.weight.dtype}
        self.embeddings.word_embeddings = nn.Embedding(count, table.embedding_dim, table.padding_idx, **place)
        self.head.decoder = nn.Linear(head.in_features, count, **place)
        for new, old, beginning in (
            (self.embeddings.word_embeddings.weight, table.weight, like.weight),
            (self.head.decoder.weight, head.weight, like.weight),
            (self.head.decoder.bias, head.bias, torch.zeros(count, **place)),
        ):
            new.requires_grad_(old.requires_grad).copy_(beginning)[:kept] = old[:kept]

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
        mask = create_causal_mask(self.config, states, None, None)
        questions = [layer.cross_attention.keys_and_values(question_states) for layer in self.layers]
        if answer_rows is not None:
            questions = images_of_texts(questions, answer_rows)
            question_states = question_states.index_select(0, answer_rows)
            question_mask = None if question_mask is None else question_mask.index_select(0, answer_rows)
        together = states.reshape(len(question_states), -1, states.shape[-1])
        seen = mask_of_keys(self.config, together, question_mask, question_states)
        for layer, question in zip(self.layers, questions, strict=True):
            states = layer(states, mask, question, seen)
        return states


class VlpAlbefForVisualQuestionAnswering(VlpAlbefTask):
    """Answers to a question about an image: written word by word in training, the most probable of a list in evaluation.

    The list, `answer_ids` [K, answer_length] with -100 at padding, is saved with the model; `set_answers` fills it. K is `num_labels`.
    The decoder begins as the layers that fuse, the text encoder's embeddings and the masked-language head of pre-training.
    """

    # begun as copies; that a list of answers is missing is told
    _keys_to_ignore_on_load_missing = [r"^teacher\.", r"^answer_decoder\.(embeddings|layers)\."]
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

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs) -> None:
        """As in transformers; embeddings that a folder lacks have begun as the text encoder's, so the head finds its weight."""
        for own, other in self._tied_weights_keys.items():
            if missing_keys is not None and {own, other} <= missing_keys:
                missing_keys.discard(other)
        super().tie_weights(missing_keys=missing_keys, **kwargs)

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

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in transformers, for the words of questions and of answers."""
        words = super().resize_token_embeddings(*args, **kwargs)
        self.answer_decoder.resize_words(words)
        if hasattr(self, "teacher"):
            self.teacher.answer_decoder.resize_words(self.teacher.albef.get_input_embeddings())
        self.tie_weights()
        return words

    @torch.no_grad()
    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """See `VlpAlbefModel.resize_position_embeddings`; the table of the answers' words as well."""
        std = self.config.initializer_range
        self.answer_decoder.embeddings.resize_positions(new_num_position_embeddings, std)
        super().resize_position_embeddings(new_num_position_embeddings)

    def begin_copies(self, copy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """The decoder begins as the layers that fuse, with the text encoder's embeddings; its head stays."""
        self.answer_decoder.begin_as(self.albef, copy)

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
        require_shape(answer_ids.shape, answer_mask=answer_mask)
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
        require_shape(answer_ids.shape, answer_mask=answer_mask)
        answer_mask, traced = answer_mask.bool(), torch.compiler.is_compiling()
        if not traced:
            _require_answers(answer_ids, answer_mask)
        count, k = len(question_states), min(k, len(answer_ids))
        start = answer_ids[:1, :1].expand(count, 1)
        logits = self.answer_decoder.head(self.answer_decoder(start, question_states, question_mask)[:, 0]).float()
        first, candidates = logits.log_softmax(dim=-1)[:, answer_ids[:, 1]].topk(k)  # [B, k]
        longest = answer_ids.shape[1] if traced else int(answer_mask[candidates].sum(dim=-1).max())
        ids = answer_ids[candidates].flatten(0, 1)[:, :longest]  # [B * k, L]
        places = answer_mask[candidates].flatten(0, 1)[:, 2:longest]
        scores = first.flatten() * (2 if self.config.count_first_token_twice else 1)
        if longest > 2:
            rest, words = torch.zeros(places.shape, device=scores.device), _words(places)
            lengths = 1 + places.sum(dim=1)  # of what is read; behind the last word nothing is predicted
            states = self._write(ids[:, :-1], lengths, question_states, question_mask)[:, 1:]
            found = self._log_probability(states.flatten(0, 1)[words], ids[:, 2:].flatten()[words])
            rest.view(-1)[words] = found
            scores = scores + rest.masked_fill(~places, 0.0).sum(dim=1)
        scores, order = scores.view(count, k).sort(dim=1, descending=True)
        return candidates.gather(1, order), scores

    def _write(
        self,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        question_states: torch.Tensor,
        question_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """States [B * k, L, D] of k answers to each question, not defined behind `lengths` [B * k].

        On a CPU answers of similar length run together.
        """
        if ids.device.type != "cpu" or torch.compiler.is_compiling():
            return self.answer_decoder(ids, question_states, question_mask)
        each = len(ids) // len(question_states)

        def run(members: torch.Tensor | slice, reach: torch.Tensor) -> torch.Tensor:
            question = None if isinstance(members, slice) else members // each
            return self.answer_decoder(ids[members, : int(reach.max())], question_states, question_mask, question)

        return run_by_length(lengths, ids.shape[1], run)

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
            A traced graph takes the list as filled.

        Raises:
            ValueError: words or images missing, a part of the answers missing, or nothing to answer from.
        """
        require_words_and_images(input_ids, pixel_values, attention_mask)
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
        if not missing:
            require_shape(answer_ids.shape, answer_mask=answer_mask)
            if not torch.compiler.is_compiling() and bool(((answer_rows < 0) | (answer_rows >= len(input_ids))).any()):
                raise ValueError(
                    f"answer_rows go from {int(answer_rows.min())} to {int(answer_rows.max())}: they number the questions of the batch, "
                    f"0 to {len(input_ids) - 1}"
                )
        states = joint(self.albef, input_ids, attention_mask, pixel_values)
        loss = logits = None
        if not missing:
            loss = self._learn(states, (input_ids, attention_mask, pixel_values), **learnt)
        listed = self.answer_ids.ge(0)
        filled = torch.compiler.is_compiling() or bool(listed.any())
        if missing or (not self.training and filled):
            if not filled:
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
        counted = answer_mask[:, 1:].bool()  # [A, La - 1], behind which a word is to be written
        words = _words(counted)

        def predict(parts: nn.Module, read: torch.Tensor | None = None) -> torch.Tensor:
            read = joint(parts.albef, *question) if read is None else read
            written = parts.answer_decoder(answer_ids[:, :-1], read, question[1], answer_rows)
            return parts.answer_decoder.head(written.flatten(0, 1)[words]).float()  # [M, V]

        logits, targets = predict(self, states), answer_ids[:, 1:].flatten()[words]
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        teacher_logits, weight = self.soft_targets(predict)
        if teacher_logits is not None:
            soft = nn.functional.cross_entropy(logits, teacher_logits.softmax(dim=-1), reduction="none")
            losses = (1 - weight) * losses + weight * soft
        weights = (answer_weights.to(losses.dtype)[:, None] * counted).flatten()
        return (losses * weights[words]).sum() / len(states)


def _words(places: torch.Tensor) -> torch.Tensor | slice:
    """Where [A, La] of the flattened words is true; all in a traced graph, where shapes cannot depend on the mask."""
    return slice(None) if torch.compiler.is_compiling() else places.flatten().nonzero()[:, 0]


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
