"""Cases of CLIP's inputs: strings and image files as they stand in the folder, token ids and pixels out."""

import gzip
import hashlib
import importlib.util
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_vlp.inputs.text_cleaning import clean_clip_text
from hf_vlp.inputs.vocabulary import clip_tokenizer_from_merges, decode_clip
from hf_vlp.models.clip.image_processing_clip import VlpClipImageProcessorPil
from hf_vlp.models.clip.processing_clip import VlpClipProcessor
from tests.parity.harness import Case, CaseError

MERGE_TABLES = ("bpe_simple_vocab_16e6.txt.gz", "merges.txt.gz")
PUBLISHED = "bpe_simple_vocab_16e6.txt.gz"
PUBLISHED_SIZE = 49408


def tokenizer(case: Case) -> None:
    """cases.json: each `text` to ids, tokens, the text they stand for, and rows of the context length."""
    cases = case.json("cases.json")
    rows = (entry.get("truncated") for entry in cases)
    longest = case.config.get("context_length") or next((len(row) for row in rows if row), 77)
    with tempfile.TemporaryDirectory() as folder:
        ours = clip_tokenizer_from_merges(merge_table(case, Path(folder)), max_length=longest)
    facts = {"vocab_size": len(ours), "sot": ours.bos_token_id, "eot": ours.eos_token_id}
    case.expect({f"config.json: {name}": case.config[name] for name in facts if name in case.config})
    case.compare({f"config.json: {name}": value for name, value in facts.items()})
    if "vocab.json" in case.files:
        case.expect({"vocab.json": case.json("vocab.json")})
        case.compare({"vocab.json": ours.get_vocab()})
    if "merges.txt" in case.files:
        merges = [" ".join(pair) for pair in json.loads(ours.backend_tokenizer.to_str())["model"]["merges"]]
        lines = case.path("merges.txt").read_text("utf-8").split("\n")[1 : len(ours) - 513]
        case.expect({"merges.txt": [line for line in lines if line]})
        case.compare({"merges.txt": merges})
    processor = VlpClipProcessor(image_processor=VlpClipImageProcessorPil(), tokenizer=ours)
    for number, entry in enumerate(cases):
        prefix = f"cases.json: {number}: "
        case.expect({prefix + name: value for name, value in entry.items()})
        case.compare({prefix + name: value for name, value in token_values(processor, entry["text"], longest).items()})


def merge_table(case: Case, folder: Path) -> Path:
    """The merge table of the case: its own (plain text is packed into `folder`), else the published one, of open_clip.

    Raises:
        CaseError: there is none, or it is not the one that config.json names.
    """
    own = next((name for name in MERGE_TABLES if name in case.files), None)
    if own is not None:
        path = case.path(own)
    elif "merges.txt" in case.files:
        path = folder / "merges.txt.gz"
        path.write_bytes(gzip.compress(case.path("merges.txt").read_bytes()))
    elif case.config.get("vocab_size", PUBLISHED_SIZE) == PUBLISHED_SIZE:
        package = importlib.util.find_spec("open_clip")
        if package is None:
            raise CaseError(
                f"{case.folder} has no merge table and open_clip_torch is not installed: pip install -e .[test]"
            )
        path = Path(package.origin).with_name(PUBLISHED)
    else:
        raise CaseError(f"{case.folder} has no merge table: none of {', '.join((*MERGE_TABLES, 'merges.txt'))}")
    wanted = case.config.get("bpe_sha256")
    if wanted and hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        raise CaseError(f"{path} is not the merge table with the SHA-256 that config.json names")
    return path


def token_values(processor: VlpClipProcessor, text: str, longest: int) -> dict[str, object]:
    """What the original's tokenizer and its `tokenize` give for a text; padding is 0 there and the end token here."""
    tokenizer = processor.tokenizer
    ids = tokenizer(clean_clip_text(text), add_special_tokens=False, verbose=False).input_ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # texts that are cut on purpose
        batch = processor(text=[text], padding="max_length", max_length=longest)
    row = (batch["input_ids"] * batch["attention_mask"])[0].tolist()
    too_long = len(ids) + 2 > longest
    return {
        "ids": ids,
        "tokens": tokenizer.convert_ids_to_tokens(ids),
        "decoded": decode_clip(tokenizer, ids),
        "padded": None if too_long else row,  # the original raises an error
        "truncated": row,
        "too_long": too_long,
    }


def image_preprocess(case: Case) -> None:
    """cases.json: each `file` to pixels of `n_px` x `n_px`; `rgb.N` [H, W, 3] stands in for a file that is left out.

    Without either, the entry fails if its pixels are stored, and is listed if they are not.
    """
    names = {"mean": "image_mean", "std": "image_std"}
    options = {ours: case.config[name] for name, ours in names.items() if name in case.config}
    for number, entry in enumerate(case.json("cases.json")):
        prefix = f"cases.json: {number}: "
        case.expect({prefix + name: value for name, value in entry.items()})
        pixels = case.inputs.get(f"rgb.{number}")
        if entry["file"] in case.files:
            image = Image.open(case.path(entry["file"]))
            image.load()
            case.compare({prefix + "mode": image.mode, prefix + "size_wh": list(image.size)})
            if pixels is not None:
                decoded = torch.from_numpy(np.array(image.convert("RGB")))
                case.check(f"inputs.safetensors: rgb.{number}", decoded, pixels, 0.0)
        elif pixels is not None and entry.get("mode") in ("RGB", "L"):
            # no order of steps to get wrong: these modes resize alike before and after the conversion
            image = Image.fromarray(pixels.to(torch.uint8).numpy())
            case.listed(prefix + "mode", "an input, the file being left out")
            case.compare({prefix + "size_wh": list(image.size)})
        else:
            for name in [name for name in ("mode", "size_wh") if name in entry]:
                case.listed(prefix + name, f"the folder has no {entry['file']}")
            if f"pixels.{number}" in case.stored:
                case.settle(f"pixels.{number}", False, note=f"the folder has no {entry['file']}")
            continue
        size = entry["n_px"]
        processor = VlpClipImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **options
        )
        case.compare({f"pixels.{number}": processor(images=image, return_tensors="pt")["pixel_values"][0]})
