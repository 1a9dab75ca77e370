"""Check a file of records before training on it.

    python -m hf_vlp.data.validate FILE [--columns captions=caption,alt image=file] [--first 10]

Prints the first bad records with position, field and reason, and how many there are; exit status 1 if any.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm.auto import tqdm

from hf_vlp.data.readers import parse_columns, read_records
from hf_vlp.data.record import IMAGE_FIELDS, RecordError, check_record


def bad_records(
    records: Any, required: Sequence[str] = ("image", "captions"), progress: bool = True
) -> Iterator[RecordError]:
    """The faults of all bad records, one a record, in the order of the rows.

    Args:
        records: a `datasets.Dataset` or a sequence of rows.
        required: fields that each must have.
        progress: show a bar.
    """
    if hasattr(records, "cast_column"):
        from datasets import Image, List

        stored = Image(decode=False)
        for field in set(IMAGE_FIELDS) & set(records.column_names):
            records = records.cast_column(field, stored if field == IMAGE_FIELDS[0] else List(stored))

    def fault(position: int) -> RecordError | None:
        try:
            check_record(records[position], position, required)
        except RecordError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        faults = pool.map(fault, range(len(records)))
        yield from filter(None, tqdm(faults, "records", len(records), disable=not progress))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hf_vlp.data.validate", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", help="file, folder, glob pattern or Hub id")
    parser.add_argument("--split")
    parser.add_argument("--columns", nargs="*", default=[], metavar="FIELD=COLUMN[,COLUMN]")
    parser.add_argument("--image-root", help="folder of relative picture paths (default: the file's)")
    parser.add_argument("--require", nargs="*", default=["image", "captions", "image_id"], metavar="FIELD")
    parser.add_argument("--first", type=int, default=10, help="bad records to print")
    options = parser.parse_args(arguments)
    try:
        columns = parse_columns(options.columns)
        readable = [field for field in options.require if field != "image_id"]  # ids are made up where there are none
        records = read_records(
            options.file, split=options.split, columns=columns, image_root=options.image_root, required=readable
        )
    except (ValueError, FileNotFoundError) as error:
        print(error)
        return 1
    count = 0
    for fault in bad_records(records, options.require, progress=sys.stderr.isatty()):
        count += 1
        if count <= options.first:
            print(fault)
    print(f"{count} bad of {len(records)} records" if count else f"all {len(records)} records are good")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
