"""VSE-infinity's processor: regions or pictures, and captions, to exactly what the models' `forward` takes.

VSE-infinity, "Learning the Best Pooling Strategy for Visual Semantic Embedding" (https://arxiv.org/abs/2011.04305).
Depends on a tokenizer and on either a feature extractor or an image processor, handed in.
"""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ProcessorMixin

from hf_vlp.inputs.captions import Captions, check_padding_side, listed

LOADERS = {
    "image_processor": AutoImageProcessor,
    "tokenizer": AutoTokenizer,
    "feature_extractor": AutoFeatureExtractor,
}
SIDES = ("image_processor", "feature_extractor")  # of which a processor has one


class _Components:
    """`get_attributes()`, by which transformers checks, saves and shows components: of the class all, of a processor those it has."""

    def __get__(self, processor: Any, owner: type) -> Callable[[], list[str]]:
        return lambda: [name for name in LOADERS if processor is None or getattr(processor, name) is not None]


class VlpVseProcessor(Captions, ProcessorMixin):
    """Images through the feature extractor (region models) or the image processor (grid models), captions through the tokenizer.

    Args:
        image_processor: `VlpVseImageProcessor`, or any other of transformers; None in a region model.
        tokenizer: `BertTokenizer`, `VlpWordTokenizer`, or that of another text encoder. Pads on the right: pooling and positions count
            from the start of a caption.
        feature_extractor: `VlpRegionFeatureExtractor`; None in a grid model. Its `region_store` is saved with the processor as the path
            that it is.

    Raises:
        ValueError: both or none of image processor and feature extractor, no tokenizer, or one that pads on the left.
    """

    get_attributes = _Components()

    def __init__(self, image_processor=None, tokenizer=None, feature_extractor=None):
        if (image_processor is None) == (feature_extractor is None):
            given = "neither image_processor nor" if image_processor is None else "both image_processor and"
            raise ValueError(
                f"the processor was given {given} feature_extractor: a model of pixels needs an image_processor, one of regions a "
                "feature_extractor"
            )
        if tokenizer is None:
            raise ValueError("the processor has no tokenizer: give the one of the model's text encoder")
        self.image_processor, self.tokenizer, self.feature_extractor = image_processor, tokenizer, feature_extractor
        super().__init__(**{name: getattr(self, name) for name in self.get_attributes()})
        check_padding_side(tokenizer.padding_side)

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, regions: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """One batch for `forward`; give images, captions or both.

        Args:
            images: one picture or a list, as the image processor takes them.
            text: one caption or a list; an empty one is its marks.
            regions: one or a list of keys of the region store, `RegionFeatures` or arrays [R, F], as the feature extractor takes them.
            kwargs: options of the tokenizer (`padding="max_length"`, `max_length`, ...) and of the image processor (`size`, ...), for
                this call. `return_tensors` is "pt" unless given, `padding` to the longest caption of the call. A caption too long is
                cut with its end mark kept, and the first call that cuts any warns; with `truncation=False` it is an error.

        Returns:
            `pixel_values` float32 [B, 3, H, W], or `region_features` float32 [B, R, F] and `region_mask` int64 [B, R]; `input_ids` and
            `attention_mask` int64 [B, L], L at most `max_length` or the tokenizer's `model_max_length`. A tokenizer's `token_type_ids`
            are left out unless asked for.

        Raises:
            ValueError: nothing to process, regions for an image processor or pictures for a feature extractor, no captions in the list, a
                `max_length` below 3, padding on the left or to a limit that neither call nor tokenizer has, a caption that is too long
                and may not be cut, and what image processor and feature extractor refuse.
            TypeError: a caption that is no string.
        """
        if images is None and text is None and regions is None:
            raise ValueError("the processor was given nothing: give images= or regions=, text=, or both")
        if images is not None and self.image_processor is None:
            raise ValueError(
                "this processor makes images of regions and was given pictures: give regions=, keys of its region store, or extract "
                "the pictures' regions before"
            )
        if regions is not None and self.feature_extractor is None:
            raise ValueError("this processor makes images of pictures and was given regions: give images=")
        options = self._options(kwargs)
        batch = {}
        if text is not None:
            # the text of a special token inside a caption is ordinary text, as in the original
            options["text_kwargs"].setdefault("split_special_tokens", True)
            batch.update(self._encode(listed(text), options["text_kwargs"]))
        tensors = options["text_kwargs"].get("return_tensors")
        if images is not None:
            batch.update(self.image_processor(images, **options["images_kwargs"]))
        if regions is not None:
            batch.update(self.feature_extractor(regions, return_tensors=tensors))
        return BatchFeature(batch, tensor_type=tensors)

    @property
    def model_input_names(self) -> list[str]:
        """Keys of a batch that has both sides."""
        image_side = self.feature_extractor if self.image_processor is None else self.image_processor
        return [*image_side.model_input_names, "input_ids", "attention_mask"]

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the components that are there."""
        return {name: value for name, value in super().to_dict().items() if value is not None}

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        """The components in the order of `__init__`, None where the saved processor has none."""
        saved = processor_dict or {}
        sides = {
            name: LOADERS[name].from_pretrained(pretrained_model_name_or_path, **kwargs)
            for name in SIDES
            if saved.get(name)
        }
        # an option of the image side is none of the tokenizer's, which would keep whatever it is handed
        rest = {name: kwargs[name] for name in kwargs if not any(hasattr(side, name) for side in sides.values())}
        tokenizer = LOADERS["tokenizer"].from_pretrained(pretrained_model_name_or_path, **rest)
        return [sides.get("image_processor"), tokenizer, sides.get("feature_extractor")]
