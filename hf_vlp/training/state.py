"""The run folder: checkpoints from which a run goes on as if it had never stopped.

    run/recipe.yaml  metrics.jsonl  curves.png  retrieval.png  results.json  README.md
        model.safetensors  config.json  and the processor's files
        checkpoints/step-00000100/model.safetensors  optimizer.safetensors  random-<process>.safetensors  state.json
        checkpoints/best.json
        checkpoints/left-step-00000300      what a resumed run left behind: it went on from an earlier checkpoint

Tensors are safetensors and everything else JSON: reading a checkpoint executes nothing. A folder is written beside its
place and renamed, so a checkpoint is whole or absent.
"""

import json
import os
import random
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model

from hf_vlp.distributed import share_buffers
from hf_vlp.files import write_text

_CHECKPOINT = re.compile(r"step-(\d{8})")


class StateError(RuntimeError):
    """A checkpoint that is missing, damaged or of another run; the message names the file and the remedy."""


@dataclass
class Progress:
    """Where a run stands: optimizer steps done, the epoch, batches of it already used, and seconds spent."""

    step: int = 0
    epoch: int = 0
    position: int = 0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: the run folder.
        accelerator: of the run; its `scaler`, if any, is part of the state.
        model, optimizer, scheduler: the prepared model and optimizer, and the schedule.
        stream: the batches, with `state_dict` and `load_state_dict`, and `progress`, which every save writes down.
        keep: newest checkpoints kept; the best one stays as well.
        metric: key of the evaluation's metrics by which the best is known, higher is better.
        vocabulary: `hf_vlp.inputs.vocabulary.fingerprint` of the run's tokenizer; a checkpoint of another is refused.
    """

    def __init__(
        self,
        folder: str | Path,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        stream: Any,
        *,
        keep: int = 2,
        metric: str = "validation/rsum",
        vocabulary: str | None = None,
    ):
        self.folder = Path(folder) / "checkpoints"
        self.accelerator, self.keep, self.metric, self.vocabulary = accelerator, keep, metric, vocabulary
        self.model = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.scheduler, self.stream = scheduler, stream

    # ------------------------------------------------------------------------------------------------ write

    def save(self, metrics: dict[str, float] | None = None) -> Path:
        """Writes `step-<step>` with every process's random state; called by all processes.

        `metrics`: of this very step, if it was evaluated; they decide whether it is the best.
        """
        accelerator, progress = self.accelerator, self.stream.progress
        final = self.folder / f"step-{progress.step:08d}"
        partial = self.folder / f".writing-{final.name}"
        # every process goes on as it would from this checkpoint
        share_buffers(self.model)
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        save_file(_random_tensors(), partial / f"random-{accelerator.process_index}.safetensors")
        if accelerator.is_main_process:
            save_model(self.model, str(partial / "model.safetensors"))
            tensors, plain = _split_optimizer(self.optimizer)
            save_file(tensors, partial / "optimizer.safetensors")
            state = {
                "progress": asdict(progress),
                "stream": self.stream.state_dict(),
                "processes": accelerator.num_processes,
                "vocabulary": self.vocabulary,
                "optimizer": plain,
                "scheduler": self.scheduler.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "metrics": metrics,
            }
            (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            if self._improves(metrics):
                self._write_best(final, metrics[self.metric])
            self._rotate()
        accelerator.wait_for_everyone()
        return final

    def improves(self, metrics: dict[str, float] | None) -> bool:
        """Whether these metrics beat every saved checkpoint's; called by all processes, the main one decides."""
        answer = [self._improves(metrics)] if self.accelerator.is_main_process else [None]
        return broadcast_object_list(answer)[0]

    def _improves(self, metrics: dict[str, float] | None) -> bool:
        if metrics is None or self.metric not in metrics:
            return False
        path = self.folder / "best.json"
        return not path.exists() or metrics[self.metric] > json.loads(path.read_text(encoding="utf-8"))["value"]

    def _write_best(self, path: Path, value: float) -> None:
        best = {"checkpoint": path.name, "metric": self.metric, "value": value}
        write_text(self.folder / "best.json", json.dumps(best))

    def _leave_later(self) -> list[Path]:
        """Renames the checkpoints behind the present step, which are of a future that this run will not have, and finds the best
        of the others. Left in place they would pass for the newest, and `keep` would delete the new ones."""
        left = []
        for path in self.all():
            if int(_CHECKPOINT.fullmatch(path.name)[1]) > self.stream.progress.step:
                left.append(path.with_name(f"left-{path.name}"))
                shutil.rmtree(left[-1], ignore_errors=True)
                os.replace(path, left[-1])
        if left and (self.folder / "best.json").exists() and self.best() is None:
            (self.folder / "best.json").unlink()
            metrics = {path: _read_json(path / "state.json")["metrics"] or {} for path in self.all()}
            values = {path: found[self.metric] for path, found in metrics.items() if self.metric in found}
            if values:
                best = max(values, key=values.get)
                self._write_best(best, values[best])
        return left

    def _rotate(self) -> None:
        best = self.best()
        for old in self.all()[: -self.keep]:
            if old != best:
                shutil.rmtree(old)

    # ------------------------------------------------------------------------------------------------ find

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else []
        return sorted(path for path in found if _CHECKPOINT.fullmatch(path.name))

    def last(self) -> Path | None:
        return self.all()[-1] if self.all() else None

    def best(self) -> Path | None:
        path = self.folder / "best.json"
        if not path.exists():
            return None
        best = self.folder / json.loads(path.read_text(encoding="utf-8"))["checkpoint"]
        return best if best.is_dir() else None

    # ------------------------------------------------------------------------------------------------ read

    def resume(self, where: str | Path = "auto") -> Path:
        """Puts model, optimizer, schedule, stream, progress, loss scale and random states back.

        Later checkpoints of this run folder are renamed to `left-step-<step>`: no longer counted, and yours to delete.

        Args:
            where: "auto" for the newest checkpoint of this run folder, or the folder of a checkpoint.

        Raises:
            StateError: no checkpoint, a damaged file, another number of processes, another vocabulary, model, optimizer or
                data.

        Returns:
            The checkpoint's folder.
        """
        path = self.last() if str(where) == "auto" else Path(where)
        if path is None or not (path / "state.json").is_file():
            raise StateError(f"there is no checkpoint to resume from in {self.folder if path is None else path}")
        state = _read_json(path / "state.json")
        if state["processes"] != self.accelerator.num_processes:
            raise StateError(
                f"{path} was written by {state['processes']} processes and this run has "
                f"{self.accelerator.num_processes}: batches and random states would differ from an unbroken run. "
                f"Launch with --num_processes {state['processes']}, or start anew with model.from_pretrained"
            )
        if self.vocabulary is not None and state.get("vocabulary") not in (None, self.vocabulary):
            raise StateError(
                f"{path} was trained with another vocabulary than this run's tokenizer has: its token ids would mean other "
                "words. Resume with the captions and processor settings of that run, or give processor.from_pretrained"
            )
        # every file is read before anything is changed
        tensors = _read_tensors(path / "optimizer.safetensors")
        randoms = _read_tensors(path / f"random-{self.accelerator.process_index}.safetensors")
        self._check_optimizer(state["optimizer"], path)
        try:
            self.stream.load_state_dict(state["stream"])
        except ValueError as error:
            raise StateError(f"{path}: {error}") from error
        self.load_weights(path)
        self.optimizer.load_state_dict(_join_optimizer(self.optimizer, tensors, state["optimizer"]))
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        _set_random(randoms)
        for name, value in state["progress"].items():
            setattr(self.stream.progress, name, value)
        self.accelerator.wait_for_everyone()  # "auto" of a slower process still looks for the newest
        if self.accelerator.is_main_process and (left := self._leave_later()):
            self.accelerator.print(f"left behind, to be deleted by you: {', '.join(map(str, left))}")
        self.accelerator.wait_for_everyone()
        return path

    def load_weights(self, path: Path) -> None:
        """The model weights alone."""
        try:
            with safe_open(str(path / "model.safetensors"), framework="pt"):
                pass  # a damaged file is found before a weight is changed
            load_model(self.model, str(path / "model.safetensors"))
        except (SafetensorError, OSError) as error:
            raise StateError(f"{path / 'model.safetensors'} is damaged ({error}): resume from another one") from error
        except RuntimeError as error:
            raise StateError(f"{path} holds another model than the recipe's: {error}") from error

    def _check_optimizer(self, plain: dict, path: Path) -> None:
        theirs = [group["names"] for group in plain["param_groups"]]
        ours = [group.get("names") for group in self.optimizer.param_groups]
        if theirs != ours:
            raise StateError(f"{path} was written with other parameter groups: resume with the recipe of that run")


def _split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state as named tensors and as what JSON can hold."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain.setdefault(str(index), {})[name] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def _join_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], plain: dict) -> dict:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in plain["state"].items()}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape and value.ndim:
            # fused kernels walk memory: the state must lie as its parameter does (channels_last)
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    # JSON has no tuples
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in plain["param_groups"]]
    return {"state": state, "param_groups": groups}


def _random_tensors() -> dict[str, torch.Tensor]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def _set_random(tensors: dict[str, torch.Tensor]) -> None:
    gauss = tensors["python_gauss"].item()
    random.setstate((3, tuple(tensors["python"].tolist()), None if gauss != gauss else gauss))
    position, has_gauss = tensors["numpy_position"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, tensors["numpy_gauss"].item()))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{path} is damaged ({error}): resume from another checkpoint") from error


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} is damaged ({error}): resume from another checkpoint") from error


def refuse_taken_folder(folder: str | Path, resume: str | None) -> None:
    """Before any work: a run folder is not written over, unless to go on with it.

    Raises:
        StateError: it holds a run already and nothing said to resume it, on any process.
    """
    folder = Path(folder)
    taken = [(folder / "recipe.yaml").exists() or (folder / "checkpoints").exists()]
    broadcast_object_list(taken)
    if taken[0] and resume is None:
        raise StateError(f"{folder} already holds a run: go on with --resume auto, or choose another --output")
