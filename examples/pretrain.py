"""Trains a model by a recipe, from data to a folder that `AutoModel.from_pretrained` loads.

    CPU      accelerate launch --cpu examples/pretrain.py
    1 GPU    accelerate launch examples/pretrain.py --config examples/configs/clip_rn50.yaml --data.train pairs.jsonl
    N GPUs   accelerate launch --num_processes N examples/pretrain.py --config ... --data.train ...

Without --config: the built-in emoji pictures, a few minutes on two CPU cores. Any recipe key can follow as
`--section.key value`, or `--key value` where only one section has it. `--resume auto` goes on from the last checkpoint
of `--output` (default runs/<recipe>), `--dry-run` prints size, memory and time of a few steps and writes nothing.
`task: text_assignment` of a recipe is a second pre-training, which tells to which of two images a text belongs (before NLVR2).
"""

from pathlib import Path

from transformers import AutoModelForPreTraining

from hf_vlp.auto import AutoModelForTextAssignment
from hf_vlp.data.record import RecordError
from hf_vlp.inputs.vocabulary import fingerprint
from hf_vlp.training.building import build_config, build_model
from hf_vlp.training.recipe import RecipeError
from hf_vlp.training.results import HeldOutRetrieval, HeldOutTerms
from hf_vlp.training.state import StateError
from training.batches import (
    build_pairs,
    build_sampler,
    build_transform,
    fusion_collator,
    held_out_batches,
    pair_collator,
    reads_both_together,
)
from training.inputs import SPLITS, build_processor, open_store, read_split
from training.run import open_stream, read_command, start, train_and_save

# what each task of a recipe trains, and the Auto class that loads the folder
TASKS = {
    None: (AutoModelForPreTraining, "AutoModel"),
    "text_assignment": (AutoModelForTextAssignment, "AutoModelForTextAssignment"),
}
QUICK_START = Path(__file__).resolve().parent / "configs" / "clip_emoji.yaml"


def main() -> None:
    options, recipe = read_command(__doc__, QUICK_START)
    if recipe.task not in TASKS:
        raise RecipeError(f"task = {recipe.task}: this recipe is for examples/finetune.py")
    model_class, load_with = TASKS[recipe.task]
    run = start(options, recipe)
    accelerator = run.accelerator

    # ------------------------------------------------------------------------------------------------ data
    needed = ("captions",) if recipe.data.regions is not None else ("image", "captions")
    with accelerator.main_process_first():
        records = {split: read_split(recipe.data, split, needed) for split in SPLITS}
    config = build_config(recipe)
    processor = build_processor(recipe, config, records["train"])
    regions = open_store(recipe, config)
    transform = build_transform(recipe, processor)
    pairs = build_pairs(recipe, records["train"], transform, regions, progress=accelerator.is_main_process)
    sampler = build_sampler(recipe, pairs.image_ids)
    if recipe.task == "text_assignment" and recipe.training.batch_size < 3 * accelerator.num_processes:
        raise RecipeError(
            f"training.batch_size = {recipe.training.batch_size}: text assignment draws two other images for each text; give 3 or more "
            "pairs to each process"
        )

    # ------------------------------------------------------------------------------------------------ model
    model = build_model(recipe, config, processor.tokenizer, model_class)
    told = (recipe, accelerator, model, processor, {split: records[split] for split in SPLITS[1:]})
    if reads_both_together(recipe, config):
        collate = fusion_collator(recipe, processor, config, pairs, None if transform is None else transform.augment)
        held_out = HeldOutTerms(
            *told, open_batches=lambda rows: held_out_batches(recipe, processor, config, rows, regions)
        )
    else:
        collate = pair_collator(recipe, processor, model, transform)
        held_out = HeldOutRetrieval(*told)
    stream = open_stream(run, pairs, sampler, collate)
    vocabulary = fingerprint(processor.tokenizer)
    train_and_save(run, model, processor, stream, held_out, vocabulary, load_with, store=recipe.data.regions)


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, StateError, RecordError) as error:
        raise SystemExit(f"pretrain.py: {error}") from None
