"""Build the emoji picture-caption set from two MIT-licensed npm packages.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    mkdir art names && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz -C art && tar xzf emojibase-data-17.0.0.tgz -C names
    python build_emoji.py art/package names/package OUT_DIR

Writes train/validation/test.parquet in the layout that `datasets.load_dataset("parquet", ...)` reads with an Image
column.
A concept (the name before the first colon: all skin tones of "man pilot" are one concept) is in exactly one split.
Flags are left out: their artwork's origin is uncertain.
"""

import hashlib
import io
import json
import sys
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

SIZE = 112  # pixels, transparent background
FLAGS = 9  # emojibase group


def names(folder, language):
    rows = json.loads((folder / language / "data.json").read_text(encoding="utf-8"))
    rows = [r for row in rows for r in (row, *row.get("skins", []))]
    return {r["hexcode"].lower().replace("-fe0f", ""): r for r in rows}


def split_of(concept):
    bucket = int(hashlib.sha256(concept.encode()).hexdigest(), 16) % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def main(art, data, out):
    english, chinese = names(data, "en"), names(data, "zh")
    splits = {"train": [], "validation": [], "test": []}
    for file in sorted((art / "assets").glob("*.webp")):
        code = file.stem.replace("-fe0f", "")
        row = english.get(code)
        if row is None or row.get("group") in (None, FLAGS):
            continue
        picture = PILImage.open(file).convert("RGBA").resize((SIZE, SIZE), PILImage.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=80, method=2)
        concept = row["label"].split(":")[0]
        splits[split_of(concept)].append(
            {
                "image_id": code,
                "image": {"bytes": buffer.getvalue(), "path": f"{code}.webp"},
                "caption": row["label"],
                "caption_zh": chinese.get(code, row)["label"],
                "keywords": ", ".join(row.get("tags", [])),
                "concept": concept,
                "group": row["group"],
            }
        )
    features = Features(
        {
            "image_id": Value("string"),
            "image": Image(),
            "caption": Value("string"),
            "caption_zh": Value("string"),
            "keywords": Value("string"),
            "concept": Value("string"),
            "group": Value("int32"),
        }
    )
    for name, rows in splits.items():
        Dataset.from_list(rows, features=features).to_parquet(str(out / f"{name}.parquet"))
        print(
            name,
            len(rows),
            "pairs,",
            len({r["concept"] for r in rows}),
            "concepts,",
            (out / f"{name}.parquet").stat().st_size,
            "bytes",
        )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
