"""What an evaluation starts from: the records, and the model that the task asks for."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForVisualQuestionAnswering

from evaluation.grounding import read_phrases
from hf_vlp.auto import AutoModelForImageTextRetrieval, AutoModelForVisualEntailment, AutoModelForVisualReasoning
from hf_vlp.data.precomputed import PrecomputedSplit
from hf_vlp.data.readers import parse_columns, read_records
from hf_vlp.evaluation.encoding import takes_regions

NEEDED = {
    "retrieval": ["captions"],
    "cxc": ["captions"],
    "zero-shot": ["label"],
    "linear-probe": ["label"],
    "vqa": ["question"],
    "nlvr2": ["statement", "label"],
    "entailment": ["hypothesis", "label"],
    "grounding": ["phrase"],
}
HEADS = {
    "retrieval": AutoModelForImageTextRetrieval,
    "vqa": AutoModelForVisualQuestionAnswering,
    "nlvr2": AutoModelForVisualReasoning,
    "entailment": AutoModelForVisualEntailment,
    "grounding": AutoModelForImageTextRetrieval,
}


def load_model(source: str, task: str):
    """The model with the head that the task needs; for retrieval by towers, and where no head is needed, without one.

    A model reads image and text together, and is asked for scores of pairs, where its architecture has a head for retrieval.
    """
    config = AutoConfig.from_pretrained(source)
    head = HEADS.get(task)
    known = head is not None and type(config) in head._model_mapping
    if not known and head is not None and task != "retrieval":
        raise SystemExit(f"{source} is a {config.model_type}, which has no model for --task {task}")
    if not known:
        return AutoModel.from_pretrained(source)
    model, found = head.from_pretrained(source, output_loading_info=True)
    if found["missing_keys"]:
        raise SystemExit(
            f"{source} has no weights {', '.join(sorted(found['missing_keys'])[:3])} of {type(model).__name__}: it was "
            f"not trained for --task {task}. Fine-tune it (examples/finetune.py) before"
        )
    return model


def scores_pairs(model) -> bool:
    """Whether a model was loaded to score pairs."""
    return type(getattr(model, "config", None)) in AutoModelForImageTextRetrieval._model_mapping


def read(options, source, processor):
    """The records of a source, with the fields that the task needs."""
    if options.task == "grounding" and any((options.references, options.instances, options.proposals)):
        return read_phrases(options, source)
    needed = list(NEEDED[options.task])
    if not takes_regions(processor):
        needed.insert(0, "images" if options.task == "nlvr2" else "image")
    elif any(Path(source).glob("*_ims.npy")):
        return precomputed(options, source, processor)
    columns = parse_columns(options.columns)
    return read_records(source, split=options.split, columns=columns, image_root=options.image_root, required=needed)


def precomputed(options, source, processor) -> list[dict]:
    """Records of a folder of SCAN and VSE-infinity; with its own features, or with keys of --region-store."""
    split = PrecomputedSplit(source, options.split or "test")
    records = split.records()
    if options.region_store is not None:
        return records
    processor.feature_extractor.region_store = None  # the folder's features count, not those of the training
    caption_of = {}
    for caption, image_id in enumerate(split.image_ids):
        caption_of.setdefault(image_id, caption)
    return [{**row, "regions": split.regions(caption_of[row["image_id"]])} for row in records]
