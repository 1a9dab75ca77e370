"""Files and folders that are whole or absent: written under a temporary name beside their place, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not. Folders are made.

    The temporary name keeps the suffix, by which writers choose their format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text, whole."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def files_into(folder: str | Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder`, among those there, when the block ends well."""
    folder = Path(folder)
    partial = folder / ".writing"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in sorted(partial.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_folder(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends well, and vanishes when it does not.

    Raises:
        FileExistsError: `output` exists, is not an empty folder, and `overwrite` is false.
    """
    output = Path(output)
    occupied = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if occupied and (not overwrite or not output.is_dir()):
        raise FileExistsError(
            f"{output} exists and is not an empty folder; give another --output, or --overwrite a folder"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".writing-{os.getpid()}-{output.name}"
    partial.mkdir()
    try:
        yield partial
        if output.exists():
            former = partial.with_name(f"{partial.name}-former")
            output.rename(former)
            partial.rename(output)
            shutil.rmtree(former)
        else:
            partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
