"""Finds pictures of a folder by a text or by another picture: encoded once, searched often.

    python examples/search.py index MODEL PICTURES --output my_pictures
    python examples/search.py query my_pictures --text "a red car in the rain" --top 5 --sheet found.png
    python examples/search.py query my_pictures --image like_this.jpg

MODEL: a folder or Hub id of a model with two towers. The index is two files: my_pictures.safetensors holds the vectors
[N, E], my_pictures.json the pictures' names and the model.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor

import hf_vlp  # noqa: F401 (registers the architectures)
from hf_vlp.data.readers import PICTURES
from hf_vlp.data.record import RecordError, decode_image
from hf_vlp.evaluation.encoding import encode_images, encode_texts, evaluating
from hf_vlp.evaluation.ranks import top_targets
from hf_vlp.files import whole_file, write_text
from hf_vlp.training.report import draw_retrieval


class PictureFiles:
    """Rows of a list of picture files; one that cannot be read is noted, and a blank one stands in for it."""

    def __init__(self, files: list[Path]):
        self.files = files
        self.faults: dict[int, RecordError] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Image.Image]:
        try:
            return {"image": decode_image(self.files[row], row)}
        except RecordError as fault:
            self.faults[row] = fault
            return {"image": Image.new("RGB", (32, 32))}


def load(source: str):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return AutoModel.from_pretrained(source).to(device), AutoProcessor.from_pretrained(source), device


def index(options) -> None:
    folder = Path(options.pictures)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise SystemExit(f"no pictures in {folder}")
    pictures = PictureFiles(files)
    model, processor, device = load(options.model)
    with evaluating(model) as inner:
        vectors = encode_images(inner, processor, pictures, batch_size=options.batch_size, device=device)
    good = [row for row in range(len(files)) if row not in pictures.faults]
    for fault in list(pictures.faults.values())[:5]:
        print(f"left out: {fault.reason}", file=sys.stderr)
    if not good:
        raise SystemExit(f"none of the {len(files)} pictures can be read")
    with whole_file(f"{options.output}.safetensors") as partial:
        save_file({"image_features": normalize(vectors[good], dim=1)}, partial)
    names = [str(files[row].relative_to(folder)) for row in good]
    content = {"model": options.model, "folder": str(folder.resolve()), "names": names}
    write_text(f"{options.output}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(good)} pictures in {options.output}.safetensors, {len(pictures.faults)} left out")


def query(options) -> None:
    content = json.loads(Path(f"{options.index}.json").read_text(encoding="utf-8"))
    vectors = load_file(f"{options.index}.safetensors")["image_features"]
    if len(vectors) != len(content["names"]):
        raise SystemExit(f"{options.index} has {len(vectors)} vectors for {len(content['names'])} names: index anew")
    model, processor, device = load(content["model"])
    with evaluating(model) as inner:
        asked = {"batch_size": 1, "device": device, "progress": False}
        if options.text is not None:
            vector = encode_texts(inner, processor, [options.text], **asked)
        else:
            vector = encode_images(inner, processor, [{"image": decode_image(options.image)}], **asked)
    vector = normalize(vector, dim=1)
    if vector.shape[1] != vectors.shape[1]:
        raise SystemExit(
            f"the model embeds in {vector.shape[1]} dimensions, the index has {vectors.shape[1]}: index anew"
        )
    found = top_targets(vector, vectors, options.top)[0].tolist()
    for row in found:
        print(f"{float(vector[0] @ vectors[row]):.3f}  {content['names'][row]}")
    if options.sheet:
        title = options.text if options.text is not None else f"like {Path(options.image).name}"
        shown = [decode_image(Path(content["folder"]) / content["names"][row]) for row in found]
        draw_retrieval([title], [shown], [[False] * len(shown)], options.sheet)
        print(f"sheet: {options.sheet}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("index", help="encode the pictures of a folder")
    one.add_argument("model", help="folder or Hub id")
    one.add_argument("pictures", help="folder of pictures")
    one.add_argument("--output", type=Path, required=True, help="name of the index, without suffix")
    one.add_argument("--batch-size", type=int, default=64)
    one.set_defaults(run=index)
    two = verbs.add_parser("query", help="search an index")
    two.add_argument("index", help="name of the index, without suffix")
    what = two.add_mutually_exclusive_group(required=True)
    what.add_argument("--text")
    what.add_argument("--image")
    two.add_argument("--top", type=int, default=5)
    two.add_argument("--sheet", type=Path, help="save the pictures found as one picture")
    two.set_defaults(run=query)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
