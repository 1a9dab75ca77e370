"""ViLT's processor: pictures and texts to exactly what the models' `forward` takes.

ViLT, "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision" (https://arxiv.org/abs/2102.03334).
Depends on an image processor and a tokenizer handed in.
"""

from collections.abc import Sequence
from typing import Any

from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ProcessorMixin

from hf_vlp.inputs.captions import Captions, check_padding_side, listed
from hf_vlp.inputs.pictures import pictures_or_pairs


class VlpViltProcessor(Captions, ProcessorMixin):
    """Pictures through the image processor, texts through the tokenizer.

    Args:
        image_processor: `VlpViltImageProcessor`, or any other of transformers.
        tokenizer: BERT's, lower case in the released models, with a `model_max_length` of what the model has positions for (40). Pads on
            the right: positions count from the start of a text.

    Raises:
        ValueError: a tokenizer that pads on the left.
    """

    def __init__(self, image_processor=None, tokenizer=None):
        if tokenizer is not None:
            check_padding_side(tokenizer.padding_side)
        super().__init__(image_processor, tokenizer)

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """One batch for `forward`; give pictures, texts or both.

        Args:
            images: one picture or a list, as the image processor takes them; for texts about two pictures each (NLVR2) a list of pairs,
                [[left, right], ...].
            text: one text or a list; an empty one is its marks. The text of a special token is that token, as in the released code:
                "a [MASK] on a sofa" is a text with a masked word. A tokenizer made with `split_special_tokens=True` takes it as
                ordinary text.
            kwargs: options of the tokenizer (`padding="max_length"`, `max_length`, ...) and of the image processor (`size`, ...), for
                this call. `return_tensors` is "pt" unless given, `padding` to the longest text of the call. A text too long is cut with
                its end mark kept, and the first call that cuts any warns; with `truncation=False` it is an error.

        Returns:
            `pixel_values` float32 [B, 3, H, W] and `pixel_mask` int64 [B, H, W]; of pairs [B, 2, 3, H, W] and [B, 2, H, W], both
            pictures of all pairs on one canvas. `input_ids` and `attention_mask` int64 [B, L], L at most `max_length` or the tokenizer's
            `model_max_length`. The tokenizer's `token_type_ids`, which the models do not read, are left out unless asked for.

        Raises:
            ValueError: neither pictures nor texts, no texts in the list, a pair that is none, a `max_length` below 3, padding on the left
                or to a limit that neither call nor tokenizer has, a text that is too long and may not be cut, and what the image
                processor refuses.
            TypeError: a text that is no string.
        """
        if images is None and text is None:
            raise ValueError("the processor was given neither images nor text: give images=, text= or both")
        options = self._options(kwargs)
        batch = {}
        if text is not None:
            batch.update(self._encode(listed(text), options["text_kwargs"]))
        if images is not None:
            batch.update(pictures_or_pairs(self.image_processor, images, options["images_kwargs"]))
        return BatchFeature(batch, tensor_type=options["text_kwargs"].get("return_tensors"))

    @property
    def model_input_names(self) -> list[str]:
        """Keys of a batch that has both sides."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask"]
