"""Pictures and captions on the way to a batch: the transform, the pairs, the collators of pre-training."""

from collections.abc import Callable
from dataclasses import asdict

from hf_vlp.data.collate import Collator, PairCollator
from hf_vlp.data.fusion_collate import FusionPretrainingCollator, TextAssignmentCollator
from hf_vlp.data.pairs import ImageTextPairs, caption_with_keywords, draw_caption, first_caption
from hf_vlp.data.samplers import UniqueImageBatchSampler
from hf_vlp.inputs.caption_augmentation import CaptionAugmentation
from hf_vlp.inputs.grid_augmentation import GridDropping
from hf_vlp.inputs.image_augmentations import TrainingTransform
from hf_vlp.inputs.region_store import RegionStore
from hf_vlp.inputs.regions import RegionDropping
from hf_vlp.inputs.text_masking import RandomMasking, WholeWordMasking
from hf_vlp.training.building import image_config
from hf_vlp.training.recipe import Recipe, RecipeError


def build_transform(recipe: Recipe, processor) -> TrainingTransform | None:
    """What is done to training pictures; None of regions.

    Raises:
        RecipeError: an augmentation that there is not, or that does not fit the image processor.
    """
    if recipe.data.regions is not None:
        return None
    try:
        return TrainingTransform(processor.image_processor, **recipe.data.augmentation)
    except ValueError as error:
        raise RecipeError(f"data.augmentation = {recipe.data.augmentation}: {error}") from error


def build_pairs(
    recipe: Recipe, records, transform: TrainingTransform | None, regions: RegionStore | None, progress: bool
) -> ImageTextPairs:
    """Training records as pairs, a drawn caption with each image."""
    caption = first_caption if recipe.data.first_caption else draw_caption
    if recipe.data.extra_text is not None:
        extra = asdict(recipe.data.extra_text)
        caption = caption_with_keywords(*extra.pop("columns"), **extra, caption=caption)
    return ImageTextPairs(
        records,
        None if transform is None else transform.prepare,
        seed=recipe.training.seed,
        compose=caption,
        cache=recipe.data.cache,
        regions=regions,
        on_bad_record=recipe.data.on_bad_record,
        progress=progress,
    )


def build_sampler(recipe: Recipe, images) -> UniqueImageBatchSampler:
    """Batches of rows, shuffled anew every epoch; two rows with the same of `images` [N] never share one.

    Raises:
        RecipeError: fewer different images than a batch holds.
    """
    try:
        return UniqueImageBatchSampler(images, recipe.training.batch_size, seed=recipe.training.seed)
    except ValueError as error:
        raise RecipeError(f"training.batch_size = {recipe.training.batch_size}: {error}") from error


def reads_both_together(recipe: Recipe, config) -> bool:
    """Whether a recipe pre-trains on masked words, false images or two images, or a model that fuses: no use for towers apart."""
    return (
        recipe.task is not None
        or recipe.data.masking is not None
        or recipe.data.false_images
        or finds_false_pairs(config)
    )


def finds_false_pairs(config) -> bool:
    """Whether a model contrasts image and text before it fuses them, and so finds the false pairs to fuse in its batch."""
    return hasattr(config, "itc_weight")


def pair_collator(recipe: Recipe, processor, model, transform: TrainingTransform | None) -> PairCollator:
    """Pictures or regions, texts and grids, each augmented as the recipe says."""
    shares, augment = recipe.data.size_augmentation, None if transform is None else transform.augment
    if shares.regions:
        augment = RegionDropping(shares.regions)
    cells, longest = None, recipe.data.max_tokens
    if shares.grid:
        if not hasattr(model, "count_cells") or transform is None:
            raise RecipeError("data.size_augmentation.grid: this model pools no grid of cells; set it to 0")
        cells = GridDropping(model.count_cells(transform.augment.size, transform.augment.size), shares.grid)
    try:
        texts = CaptionAugmentation(processor.tokenizer, shares.captions, longest) if shares.captions else None
    except ValueError as error:
        raise RecipeError(f"data.size_augmentation.captions = {shares.captions}: {error}") from error
    return PairCollator(processor, augment, recipe.training.seed, longest, augment_text=texts, draw_cells=cells)


def fusion_collator(
    recipe: Recipe, processor, config, pairs: ImageTextPairs, augment: Callable | None = None, limit: bool = True
) -> Collator:
    """Masked words, false images and, where the model's configuration asks for them, fewer and masked patches; or texts to be assigned.

    Args:
        limit: keep as many patches as the configuration and as many tokens as the recipe says in training; else all.

    Raises:
        RecipeError: a tokenizer without a mask token, or whose words cannot be told; false images for a model that finds its own.
    """
    longest = recipe.data.max_tokens if limit else None
    if recipe.task == "text_assignment":
        return TextAssignmentCollator(processor, augment, recipe.training.seed, longest)
    finds = finds_false_pairs(config)
    if finds and recipe.data.false_images:
        raise RecipeError("data.false_images = True: this model finds false images in its batch; leave it out")
    masking, image, mask = recipe.data.masking, image_config(config), None
    if masking is not None:
        try:
            mask = (
                WholeWordMasking(processor.tokenizer, masking.probability, masking.padded_to)
                if masking.whole_words
                else RandomMasking(processor.tokenizer, masking.probability)
            )
        except ValueError as error:
            raise RecipeError(f"data.masking: {error}") from error
    return FusionPretrainingCollator(
        processor,
        pairs if recipe.data.false_images else None,
        mask,
        augment,
        recipe.training.seed,
        longest,
        patch_size=getattr(image, "patch_size", None),
        max_image_length=getattr(config, "max_image_length", None) if limit else None,
        mask_patches=masking.patches if masking is not None and getattr(config, "mpp_weight", 0) else 0.0,
        negative_draws=finds,
    )


def held_out_batches(
    recipe: Recipe, processor, config, records, regions: RegionStore | None
) -> tuple[ImageTextPairs, Collator]:
    """Held-out records as pairs and what makes batches of them: pictures as the image processor has them, all their patches in sight."""
    pairs = ImageTextPairs(
        records,
        unchanged if regions is None else None,
        seed=recipe.training.seed,
        regions=regions,
        on_bad_record=recipe.data.on_bad_record,
    )
    return pairs, fusion_collator(recipe, processor, config, pairs, limit=False)


def unchanged(picture):
    """A picture as it is."""
    return picture
