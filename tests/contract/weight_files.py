"""What the tests of every converter share: manifests of published files, comparison of state dicts, a pickle that would do harm."""

import gzip
import json
import os
from pathlib import Path

import torch


def same(left, right) -> bool:
    """Whether two state dicts have the same names, values and types."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


def read_manifest(path: Path, unknown: int = 0) -> tuple[dict, dict[str, torch.Tensor]]:
    """The facts of a published file and its tensors, on the meta device; `unknown`: the size where the facts leave it open, as -1."""
    facts = json.loads(gzip.decompress(path.read_bytes()))
    tensors = {
        name: torch.empty(
            [unknown if size == -1 else size for size in shape], dtype=getattr(torch, dtype), device="meta"
        )
        for name, (dtype, shape) in facts["tensors"].items()
    }
    return facts, tensors


class CallsSystem:
    """Pickles to a call that leaves a trace when it is run."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)
