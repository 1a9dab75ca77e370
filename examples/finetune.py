"""Fine-tunes a saved model for a task, from records to a folder that the task's Auto class loads.

    CPU      accelerate launch --cpu examples/finetune.py --config examples/configs/vilt_vqa_emoji.yaml
    1 GPU    accelerate launch examples/finetune.py --config examples/configs/vilt_vqa_emoji.yaml --train questions.jsonl
    N GPUs   accelerate launch --num_processes N examples/finetune.py --config ... --train ...

Records are JSON lines, parquet, CSV, a data set of the Hub, or the official files. `task` of the recipe says what they hold:

    vqa         image, question, answers [{"answer": "yes", "score": 1.0}, ...]; a model that writes answers learns all of them, weighed
                by their scores, and chooses in evaluation from the list that it was given
    nlvr2       images (two), statement, label (true or false)
    entailment  image, hypothesis, label ("entailment", "neutral" or "contradiction")
    retrieval   image, captions; each image is told its caption from false ones, and every pair is scored; a model that contrasts both
                before it fuses them finds the false ones in its batch, and an `image_id` tells what belongs together
    grounding   image, phrase; trained as retrieval, by phrases without boxes. Held-out records also say which box is meant, as
                examples/evaluate.py has it: the phrases are found by where the model looks

`model.from_pretrained` of the recipe is the folder to start from; heads of other tasks are left out, and one that it lacks is new.
Any recipe key can follow as `--section.key value`, or `--key value` where only one section has it. `--resume auto` goes on from
the last checkpoint of `--output` (default runs/<recipe>), `--dry-run` prints size, memory and time of a few steps and writes nothing.
"""

from hf_vlp.data.pairs import ImageTextPairs
from hf_vlp.data.record import RecordError
from hf_vlp.inputs.vocabulary import fingerprint
from hf_vlp.training.building import build_config, build_model
from hf_vlp.training.recipe import RecipeError
from hf_vlp.training.state import StateError
from training.batches import build_sampler, build_transform
from training.inputs import SPLITS, build_processor, open_store, read_split
from training.run import open_stream, read_command, start, train_and_save
from training.tasks import TASKS, fingerprint_of, list_answers, name_classes, task_of


def main() -> None:
    options, recipe = read_command(__doc__, None)
    if recipe.task not in TASKS:
        raise RecipeError(
            f"task is required, one of {', '.join(TASKS)}; examples/pretrain.py is for recipes with {recipe.task or 'none'}"
        )
    task = TASKS[recipe.task]
    run = start(options, recipe)
    accelerator = run.accelerator

    # ------------------------------------------------------------------------------------------------ data
    with accelerator.main_process_first():
        records = {split: read_split(recipe.data, split, task.required(recipe, split)) for split in SPLITS}
    config = build_config(recipe)
    task = task_of(recipe.task, config)
    labels = task.labels(recipe, records, config)
    if labels is not None:
        name_classes(config, labels)
    processor = build_processor(recipe, config, records["train"], (task.text,))
    regions = open_store(recipe, config)
    transform = build_transform(recipe, processor)
    dataset = task.dataset(
        records["train"],
        None if transform is None else transform.prepare,
        labels,
        seed=recipe.training.seed,
        cache=recipe.data.cache,
        regions=regions,
        on_bad_record=recipe.data.on_bad_record,
        progress=accelerator.is_main_process,
    )
    # several questions of a batch may be about one image
    sampler = build_sampler(recipe, dataset.image_ids if isinstance(dataset, ImageTextPairs) else range(len(dataset)))
    if labels is not None:
        accelerator.print(f"{len(dataset):,} of {len(records['train']):,} records to train on, {len(labels):,} classes")
    if outside := dataset.report().get("fraction_outside"):
        accelerator.print(f"{100 * outside:.1f} % of the records' answers are none of these")

    # ------------------------------------------------------------------------------------------------ model
    model = build_model(recipe, config, processor.tokenizer, task.model_class)
    if hasattr(model, "set_answers"):
        list_answers(model, processor, labels)
    collate = task.collator(recipe, processor, config, dataset, None if transform is None else transform.augment)
    stream = open_stream(run, dataset, sampler, collate)
    held_out = task.held_out(recipe, accelerator, model, processor, {split: records[split] for split in SPLITS[1:]})
    vocabulary = fingerprint(processor.tokenizer) + fingerprint_of(labels)
    train_and_save(
        run, model, processor, stream, held_out, vocabulary, load_with=task.auto_class, store=recipe.data.regions
    )


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, StateError, RecordError) as error:
        raise SystemExit(f"finetune.py: {error}") from None
