"""Phrases found in pictures by where a model looks, among the boxes that a detector proposes."""

import functools

from hf_vlp.data.annotation_lists import read_phrase_list, read_proposals, read_references
from hf_vlp.evaluation.grounding import evaluate_grounding
from hf_vlp.explain.attention_maps import image_maps, pair_maps


def grounding(options, model, processor, records, shared) -> dict:
    if not hasattr(model, "cross_attention"):
        raise SystemExit(
            f"{options.model} has no attention of words to the image, by which --task grounding finds boxes"
        )
    if options.layer is not None and options.block is not None:
        raise SystemExit("--layer is of the attention of words, --block of the image encoder's: give one of them")
    if options.block is not None:
        maps, where = functools.partial(image_maps, block=options.block), f"block {options.block} of the image encoder"
    else:
        where = "the paper's choice of layer" if options.layer is None else f"layer {options.layer}"
        maps = functools.partial(pair_maps, layer=options.layer)
    report = evaluate_grounding(model, processor, records, maps, **shared)
    report.protocol += f", by Grad-CAM in {where}"
    options.accelerator.print(report.table())
    return report.to_dict()


def read_phrases(options, source):
    """The records of the official files: the list of phrases, the references of REFER, and what a detector found."""
    files = {name: getattr(options, name) for name in ("references", "instances", "proposals")}
    if missing := [f"--{name}" for name, file in files.items() if file is None]:
        raise SystemExit(
            f"a list of phrases needs --references, --instances and --proposals: {', '.join(missing)} is missing"
        )
    records = read_phrase_list(
        source,
        options.image_root or ".",
        references=read_references(options.references, options.instances),
        proposals=read_proposals(options.proposals),
    )
    if options.split is None:
        return records
    rows = [row for row, split in enumerate(records["split"]) if split == options.split]
    if not rows:
        raise SystemExit(f"--split {options.split} is none of {', '.join(sorted(set(records['split'])))}")
    return records.select(rows)
