"""Evaluates a saved model, prints a table and writes results.json, from which the model card takes its numbers.

    python examples/evaluate.py FOLDER --task retrieval --data test.parquet
    python examples/evaluate.py FOLDER --task zero-shot --data test.parquet --columns label=concept
    python examples/evaluate.py FOLDER --task linear-probe --data test.parquet --columns label=group \
        --train train.parquet --validation validation.parquet
    python examples/evaluate.py FOLDER --task retrieval --data dataset_coco.json --image-root coco --split test \
        --captions-per-image 5 --five-fold [--save-scores a.safetensors] [--ensemble b.safetensors c.safetensors]
    python examples/evaluate.py FOLDER --task retrieval --data captions.jsonl --region-store test.regions
    python examples/evaluate.py FOLDER --task retrieval --data coco_precomp --split testall --five-fold
    python examples/evaluate.py FOLDER --task cxc --data dataset_coco.json --image-root coco --split test \
        --annotations cxc_annots
    python examples/evaluate.py FOLDER --task retrieval --data captions.jsonl --candidates CLIP_FOLDER --k 16 64 \
        --resume scores.safetensors
    python examples/evaluate.py FOLDER --task retrieval --data dataset_flickr30k.json --image-root f30k --split test --k 128
    python examples/evaluate.py FOLDER --task vqa --data vqav2 --split test-dev --image-root coco --submission answers.json
    python examples/evaluate.py FOLDER --task nlvr2 --data nlvr2/data/dev.json --image-root nlvr2/images
    python examples/evaluate.py FOLDER --task entailment --data hypotheses.jsonl
    python examples/evaluate.py FOLDER --task grounding --data refcoco+_test.json --image-root coco --split testA \
        --references "refs(unc).p" --instances instances.json --proposals dets.json
    accelerate launch --num_processes N examples/evaluate.py ...    each process does its part

FOLDER: a folder or Hub id that `AutoModel.from_pretrained` loads. DATA: a file, picture folder or Hub id of records;
Karpathy's split files of COCO and Flickr30k (the fourth example: the published protocol) with --split and --image-root.
Retrieval and cxc need `image` and `captions`; zero-shot and linear-probe `image` and `label` (a class index with names, or
the name itself); vqa `image`, `question` and, to be scored, `answers`; nlvr2 `images`, `statement` and `label`; entailment
`image`, `hypothesis` and `label`; grounding `image`, `phrase` and boxes: `box`, the one that is meant, and `proposals`, x y w h in
pixels, or all as `boxes`, x1 y1 x2 y2 as fractions, with the position of the one that is meant as `label`. A model that reads
image and text together scores every pair for retrieval: hours for large sets, told before it starts. With --k
it scores those that another model proposes, or a file of its --save-scores (--candidates); without --candidates those that
its own embeddings propose, where it has them: ALBEF's published protocol, with --max-length 30 and k = 256 for COCO.
A model that sees regions needs no `image` but `regions` or `image_id`, the keys of its region store; or a folder with the
`<split>_caps.txt` and `<split>_ims.npy` of SCAN and VSE-infinity.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoProcessor

import hf_vlp  # noqa: F401 (registers the architectures)
from evaluation.classes import linear_probe, zero_shot
from evaluation.grounding import grounding
from evaluation.inputs import load_model, read
from evaluation.retrieval import crisscrossed, retrieval
from evaluation.tasks import entailment, nlvr2, vqa
from hf_vlp.evaluation.encoding import takes_regions
from hf_vlp.evaluation.provenance import command, conditions, shortened
from hf_vlp.files import write_text

TASKS = {
    "retrieval": retrieval,
    "cxc": crisscrossed,
    "zero-shot": zero_shot,
    "linear-probe": linear_probe,
    "vqa": vqa,
    "nlvr2": nlvr2,
    "entailment": entailment,
    "grounding": grounding,
}


def add_result(path: Path, result: dict) -> None:
    """Put a result into a results file, in place of an earlier one of the same task, data, split and protocol."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    same = ("task", "data", "split", "protocol")
    results = [old for old in results if any(old.get(key) != result[key] for key in same)]
    write_text(path, json.dumps([*results, result], indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", required=True, help="records to evaluate on")
    parser.add_argument("--split", help="of a source with several")
    parser.add_argument("--columns", nargs="*", default=[], metavar="FIELD=COLUMN[,COLUMN]")
    parser.add_argument("--image-root", help="folder of relative picture paths")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--bf16", action="store_true", help="compute under bfloat16 autocast")
    parser.add_argument("--prompt", help="retrieval: a text around each caption, e.g. 'a photo of {}'")
    parser.add_argument("--max-length", type=int, metavar="N", help="cut texts to so many tokens, marks included")
    parser.add_argument("--captions-per-image", type=int, help="retrieval: only the first so many (COCO: 5)")
    parser.add_argument("--five-fold", action="store_true", help="retrieval: the 1K protocol on 5,000 images, too")
    parser.add_argument("--region-store", help="of a model that sees regions, in place of its processor's")
    parser.add_argument(
        "--save-scores", type=Path, metavar="FILE", help="retrieval: write all scores to a .safetensors file"
    )
    parser.add_argument(
        "--ensemble", type=Path, nargs="+", metavar="FILE", help="retrieval: the mean with these models' saved scores"
    )
    parser.add_argument("--pair-batch-size", type=int, default=256, help="retrieval: pairs scored at a time")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="retrieval by pairs: a .safetensors file to write to and go on from"
    )
    parser.add_argument(
        "--candidates", metavar="MODEL_OR_SCORES", help="retrieval by pairs: what proposes the ones to score"
    )
    parser.add_argument(
        "--k",
        type=int,
        nargs="+",
        metavar="N",
        help="how many are proposed, by --candidates or the model itself: images for each caption, captions for each image",
    )
    parser.add_argument(
        "--first-stage-weight", type=float, default=0.0, metavar="W", help="with --k: add W times the score that proposed"
    )
    parser.add_argument("--submission", type=Path, metavar="FILE", help="vqa: answers for the test server, JSON")
    parser.add_argument(
        "--layer", type=int, help="grounding: whose attention of words is looked at; the paper's if not given"
    )
    parser.add_argument("--block", type=int, help="grounding: of the image encoder, to be looked at instead")
    parser.add_argument("--references", type=Path, help="grounding by a list of phrases: REFER's refs(unc).p")
    parser.add_argument("--instances", type=Path, help="the same: REFER's instances.json")
    parser.add_argument("--proposals", type=Path, help="the same: a detector's {image id: [[x, y, w, h], ...]}, JSON")
    parser.add_argument(
        "--annotations", type=Path, help="cxc: folder of cxc_it.json, cxc_t2t.json, testall_ids.txt, ..."
    )
    parser.add_argument("--templates", type=Path, help="zero-shot: a file of prompts, {} for the name, one a line")
    parser.add_argument(
        "--classes", type=Path, help="zero-shot: a file of class names, one class a line, names split by |"
    )
    parser.add_argument("--train", help="linear-probe: records to fit on")
    parser.add_argument("--validation", help="linear-probe: records to choose C on")
    parser.add_argument("--C", type=float, default=0.316, help="linear-probe: inverse penalty")
    parser.add_argument("--output", type=Path, help="results file (default: results.json in a local model folder)")
    options = parser.parse_args()

    options.accelerator = accelerator = Accelerator()
    model = load_model(options.model, options.task).to(accelerator.device)
    processor = AutoProcessor.from_pretrained(options.model)
    if options.region_store is not None:
        if not takes_regions(processor):
            raise SystemExit(
                f"--region-store {options.region_store}: the model {options.model} sees pictures, not regions"
            )
        processor.feature_extractor.region_store = options.region_store
    if options.max_length is not None:
        processor.tokenizer.model_max_length = options.max_length
    with accelerator.main_process_first():
        records = read(options, options.data, processor)
    shared = {
        "batch_size": options.batch_size,
        "device": accelerator.device,
        "autocast": torch.bfloat16 if options.bf16 else None,
    }
    result = TASKS[options.task](options, model, processor, records, shared)
    result["protocol"] += f", {conditions(model, processor, shared['autocast'])}"
    if options.max_length is not None:
        result["protocol"] += f", texts of at most {options.max_length} tokens"
    if options.columns:
        result["protocol"] += f", columns {' '.join(options.columns)}"
    result = {
        "task": options.task,
        "data": shortened(options.data),
        "split": options.split,
        **result,
        "command": command(accelerator.num_processes),
        "date": date.today().isoformat(),
    }
    output = options.output or (Path(options.model) / "results.json" if Path(options.model).is_dir() else None)
    if output is not None and accelerator.is_main_process:
        add_result(output, result)
        print(f"written to {output}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
