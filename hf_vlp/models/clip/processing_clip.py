"""CLIP's processor: pictures and captions to exactly what the models' `forward` takes.

CLIP, "Learning Transferable Visual Models From Natural Language Supervision" (https://arxiv.org/abs/2103.00020), sections 2.4 and 2.5.
Depends on an image processor and a tokenizer handed in; the tokenizer may be CLIP's or that of any text encoder.
"""

from collections.abc import Sequence
from typing import Any

from transformers import CLIPTokenizer
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ProcessorMixin

from hf_vlp.inputs.captions import Captions, check_padding_side, listed
from hf_vlp.inputs.text_cleaning import clean_clip_text

CLEANINGS = ("clip", "none")


class VlpClipProcessor(Captions, ProcessorMixin):
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

    def __init__(self, image_processor=None, tokenizer=None, text_cleaning=None):
        if text_cleaning is None:
            text_cleaning = "clip" if isinstance(tokenizer, CLIPTokenizer) else "none"
        if text_cleaning not in CLEANINGS:
            raise ValueError(
                f"text_cleaning={text_cleaning!r} is unknown: choose one of {', '.join(map(repr, CLEANINGS))}"
            )
        if tokenizer is not None:
            check_padding_side(tokenizer.padding_side)
        super().__init__(image_processor, tokenizer)
        self.text_cleaning = text_cleaning

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
        options = self._options(kwargs)
        batch = {}
        if text is not None:
            texts = listed(text)
            if self.text_cleaning == "clip":
                texts = [clean_clip_text(one) for one in texts]
            batch.update(self._encode(texts, options["text_kwargs"]))
        if images is not None:
            batch.update(self.image_processor(images, **options["images_kwargs"]))
        return BatchFeature(batch, tensor_type=options["text_kwargs"].get("return_tensors"))

    @property
    def model_input_names(self) -> list[str]:
        """Keys of a batch that has both sides."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask"]
