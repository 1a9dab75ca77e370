"""CLIP's processor: pictures and captions to exactly what the models' `forward` takes.

CLIP, "Learning Transferable Visual Models From Natural Language Supervision" (https://arxiv.org/abs/2103.00020), sections 2.4 and 2.5.
Depends on an image processor and a tokenizer handed in; the tokenizer may be CLIP's or that of any text encoder.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import CLIPTokenizer
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from hf_vlp.inputs.text_cleaning import clean_clip_text

CLEANINGS = ("clip", "none")
SHORTEST = 3  # start, one token, end


class VlpClipProcessorKwargs(ProcessingKwargs, total=False):
    """Tensors, captions padded to the longest and cut at the tokenizer's limit, unless the call says otherwise."""

    _defaults = {"text_kwargs": {"padding": True, "truncation": True}, "common_kwargs": {"return_tensors": "pt"}}


class VlpClipProcessor(ProcessorMixin):
    """Pictures through the image processor, captions through the cleaning and the tokenizer.

    Args:
        image_processor: `VlpClipImageProcessor`, or any other of transformers.
        tokenizer: CLIP's, or that of the text encoder. Pads on the right: pooling looks for the first end of text, and positions
            count from the start.
        text_cleaning: "clip" for the cleaning of the released tokenizer (lower case, broken encodings and HTML repaired), "none" to
            hand captions over as they are. None: "clip" with a `CLIPTokenizer`, else "none". Saved with the processor.

    Raises:
        ValueError: unknown `text_cleaning`, or a tokenizer that pads on the left.
    """

    valid_processor_kwargs = VlpClipProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, text_cleaning=None):
        if text_cleaning is None:
            text_cleaning = "clip" if isinstance(tokenizer, CLIPTokenizer) else "none"
        if text_cleaning not in CLEANINGS:
            raise ValueError(
                f"text_cleaning={text_cleaning!r} is unknown: choose one of {', '.join(map(repr, CLEANINGS))}"
            )
        if tokenizer is not None:
            _check_padding_side(tokenizer.padding_side)
        super().__init__(image_processor, tokenizer)
        self.text_cleaning = text_cleaning
        self._has_warned = False

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """One batch for `forward`; give pictures, captions or both.

        Args:
            images: one picture or a list, as the image processor takes them.
            text: one caption or a list; an empty one is start and end of text.
            kwargs: options of the tokenizer (`padding="max_length"`, `max_length`, ...) and of the image processor (`size`, ...), for
                this call. `return_tensors` is "pt" unless given, `padding` to the longest caption of the call. A caption too long is
                cut with its end of text kept, and the first call that cuts any warns; with `truncation=False` it is an error.

        Returns:
            `pixel_values` float32 [B, 3, R, R]; `input_ids` and `attention_mask` int64 [B, L], L at most `max_length` or the
            tokenizer's `model_max_length`. A foreign tokenizer's `token_type_ids` are left out unless asked for.

        Raises:
            ValueError: neither pictures nor captions, no captions in the list, a `max_length` below 3, padding on the left or to a
                limit that neither call nor tokenizer has, a caption that is too long and may not be cut, and what the image
                processor refuses.
            TypeError: a caption that is no string.
        """
        if images is None and text is None:
            raise ValueError("the processor was given neither images nor text: give images=, text= or both")
        # a tokenizer is saved with the limit of its last call, which is no setting: `model_max_length` is
        settings = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "max_length"}
        options = self._merge_kwargs(tokenizer_init_kwargs=settings, **kwargs)
        batch = {}
        if text is not None:
            batch.update(self._encode(text, options["text_kwargs"]))
        if images is not None:
            batch.update(self.image_processor(images, **options["images_kwargs"]))
        return BatchFeature(batch, tensor_type=options["text_kwargs"].get("return_tensors"))

    @property
    def model_input_names(self) -> list[str]:
        """Keys of a batch that has both sides."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask"]

    def _encode(self, text: str | Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("no captions were given: the list is empty")
        for position, one in enumerate(texts):
            if not isinstance(one, str):
                raise TypeError(
                    f"caption {position} is a {type(one).__name__} ({one!r:.80}), not a string: convert or leave it out"
                )
        if self.text_cleaning == "clip":
            texts = [clean_clip_text(one) for one in texts]
        _check_padding_side(options.get("padding_side") or self.tokenizer.padding_side)

        longest = options.pop("max_length", None)
        longest = self.tokenizer.model_max_length if longest is None else longest
        if longest < SHORTEST:
            raise ValueError(
                f"max_length={longest} leaves no room for a word between start and end of text: give {SHORTEST} or more"
            )
        bounded = longest < VERY_LARGE_INTEGER
        to_longest = options.get("padding") == "max_length"
        if to_longest and not bounded:
            raise ValueError("padding='max_length' needs a max_length: this tokenizer has no limit of its own")
        cuts = bounded and options.pop("truncation", True) not in (False, None, "do_not_truncate")
        options |= {"truncation": cuts, "max_length": longest if cuts or to_longest else None}
        encoded = self.tokenizer(texts, **options)
        if bounded:
            self._report_long(texts, encoded, longest, cuts)
        # zeros for one text, and no argument of our models
        unwanted = () if options.get("return_token_type_ids") else ("token_type_ids",)
        return {name: value for name, value in encoded.items() if name not in unwanted}

    def _report_long(self, texts: list[str], encoded: Any, longest: int, cuts: bool) -> None:
        """An error for captions that may not be cut; one warning for those that were."""
        if cuts and self._has_warned:
            return
        if encoded.encodings is None or not cuts:
            lengths = [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
            long = [position for position, length in enumerate(lengths) if length > longest]
        else:
            long = [position for position, encoding in enumerate(encoded.encodings) if encoding.overflowing]
        if long and not cuts:
            raise ValueError(
                f"caption {long[0]} has {lengths[long[0]]} tokens, more than {longest}: shorten it, or leave truncation on"
            )
        if long:
            self._has_warned = True
            warnings.warn(
                f"{len(long)} of {len(texts)} captions had more than {longest} tokens and were cut, end of text kept. "
                "This processor does not warn again.",
                stacklevel=4,
            )


def _check_padding_side(side: str) -> None:
    if side != "right":
        raise ValueError(
            f"the tokenizer pads on the {side}, but pooling and positions count from the start of a caption: "
            "set tokenizer.padding_side = 'right'"
        )
