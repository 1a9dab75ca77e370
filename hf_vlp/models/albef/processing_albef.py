"""ALBEF's processor: pictures and texts to exactly what the models' `forward` takes, and the answers they choose from.

ALBEF, "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation" (https://arxiv.org/abs/2107.07651).
Depends on an image processor and a tokenizer handed in.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ProcessorMixin

from hf_vlp.inputs.captions import Captions, check_padding_side, listed
from hf_vlp.inputs.pictures import pictures_or_pairs
from hf_vlp.inputs.text_cleaning import clean_caption, clean_question

CLEANINGS = {"caption": clean_caption, "question": clean_question, None: lambda text, max_words: text}


class VlpAlbefProcessor(Captions, ProcessorMixin):
    """Pictures through the image processor, texts through the cleaning and the tokenizer.

    Args:
        image_processor: `VlpAlbefImageProcessor`, or any other of transformers.
        tokenizer: BERT's in lower case `without_end_mark` (of `hf_vlp.inputs.vocabulary`) for the released models; or any with a
            `cls_token` in front of a text and a `sep_token`. Pads on the right: the first token stands for the text.
        text_cleaning: "caption" or "question", whose punctuation, capitals and spaces are removed as in the released code; None: texts are
            handed over as they are. Saved with the processor.
        max_words: after which a cleaned text is cut. Saved with the processor; the released code tests questions with 50.

    Raises:
        ValueError: unknown `text_cleaning`, a tokenizer that pads on the left.
    """

    def __init__(self, image_processor=None, tokenizer=None, text_cleaning="caption", max_words=30):
        if text_cleaning not in CLEANINGS:
            raise ValueError(
                f"text_cleaning={text_cleaning!r} is unknown: choose one of {', '.join(map(repr, CLEANINGS))}"
            )
        if max_words < 1:
            raise ValueError(f"max_words={max_words} leaves no word of a text: give 1 or more")
        if tokenizer is not None:
            check_padding_side(tokenizer.padding_side)
        super().__init__(image_processor, tokenizer)
        self.text_cleaning = text_cleaning
        self.max_words = max_words

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        max_words: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """One batch for `forward`; give pictures, texts or both.

        Args:
            images: one picture or a list, as the image processor takes them; for texts about two pictures each (NLVR2) a list of pairs,
                [[left, right], ...].
            text: one text or a list; an empty one is its marks. The text of a special token is that token, unless the cleaning puts it
                in lower case.
            max_words: for this call, in the place of the processor's.
            kwargs: options of the tokenizer (`padding="max_length"`, `max_length`, ...) and of the image processor (`size`, ...), for
                this call. `return_tensors` is "pt" unless given, `padding` to the longest text of the call. A text too long is cut with
                its marks kept, and the first call that cuts any warns; with `truncation=False` it is an error. The released code
                cuts at 25 tokens in pre-training and with questions in training, pads and cuts to 30 where it ranks captions, and cuts
                elsewhere no text.

        Returns:
            `pixel_values` float32 [B, 3, R, R], of pairs [B, 2, 3, R, R]. `input_ids` and `attention_mask` int64 [B, L], L at most
            `max_length` or the tokenizer's `model_max_length`. The tokenizer's `token_type_ids`, which the models do not read, are left
            out unless asked for.

        Raises:
            ValueError: neither pictures nor texts, no texts in the list, a pair that is none, a `max_words` below 1, a `max_length` below
                3, padding on the left or to a limit that neither call nor tokenizer has, a text that is too long and may not be cut, and
                what the image processor refuses.
            TypeError: a text that is no string.
        """
        if images is None and text is None:
            raise ValueError("the processor was given neither images nor text: give images=, text= or both")
        options = self._options(kwargs)
        batch = {}
        if text is not None:
            words = self.max_words if max_words is None else max_words
            texts = [CLEANINGS[self.text_cleaning](one, words) for one in listed(text)]
            batch.update(self._encode(texts, options["text_kwargs"]))
        if images is not None:
            batch.update(pictures_or_pairs(self.image_processor, images, options["images_kwargs"]))
        return BatchFeature(batch, tensor_type=options["text_kwargs"].get("return_tensors"))

    def encode_answers(self, answers: str | Sequence[str]) -> BatchFeature:
        """Answers for the decoder, each between `[CLS]` and `[SEP]` whatever the tokenizer puts around a text; they are not cleaned.

        Returns:
            `answer_ids` int64 [K, La], padded with the tokenizer's padding, 0 of BERT's, and `answer_mask` int64 [K, La].

        Raises:
            ValueError: no answers, one longer than the tokenizer's `model_max_length`.
            TypeError: an answer that is no string.
        """
        answers = listed(answers)
        bare = self.tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
        start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        rows = [torch.tensor([start, *ids, end]) for ids in bare]
        longest = self.tokenizer.model_max_length
        for answer, row in zip(answers, rows, strict=True):
            if len(row) > longest:
                raise ValueError(f"the answer {answer!r:.80} has {len(row)} tokens, more than {longest}: shorten it")
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
        return BatchFeature({"answer_ids": ids, "answer_mask": mask})

    @property
    def model_input_names(self) -> list[str]:
        """Keys of a batch that has both sides."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask"]
