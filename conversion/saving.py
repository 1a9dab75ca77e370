"""What every converter does with a model that it has read: check it, fill our class, save a folder, look again, upload."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedConfig

from conversion.checkpoints import CheckpointError
from conversion.tables import ConversionError
from hf_vlp.export.hub import push_to_hub, write_card
from hf_vlp.files import whole_folder

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Converted:
    """A model of ours to be: its class, configuration and state dict, and what of the file has no place in it."""

    model_class: type
    config: PreTrainedConfig
    state: dict[str, torch.Tensor]
    left_out: list[str]


def refuse_no_numbers(name: str, tensor: torch.Tensor) -> None:
    """Raises ConversionError for a weight that is quantised, complex or not finite; of meta tensors only the type is seen."""
    if tensor.dtype not in FLOATS:
        raise ConversionError(
            f"{name} is {tensor.dtype}, not one of {', '.join(map(str, FLOATS))}: take the weights before quantisation"
        )
    if not tensor.is_meta and not tensor.isfinite().all():
        raise ConversionError(
            f"{name} holds infinities or NaN: the training diverged or a half-precision export overflowed; take another checkpoint"
        )


def fill(model_class: type, config, state: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32):
    """A model of the class in eval mode, every entry of the state dict copied into it and none of its own missing.

    Raises:
        ConversionError: entries are left over or missing.
    """
    state = {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in state.items()
    }
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if left := {key: names for key, names in info.items() if names}:
        raise ConversionError(f"loading into {model_class.__name__} left over: {left}")
    return model.eval()


def build_model(converted: Converted, dtype: torch.dtype = torch.float32):
    """`fill` with what was converted."""
    return fill(converted.model_class, converted.config, converted.state, dtype)


def counted_parts(sizes: Mapping[str, int], facts: Mapping[str, str], left_out: list[str]) -> str:
    """A line for each part with its parameters and what is known of it, one for all, "total", and one for what was left out."""
    sizes = {**sizes, "total": sum(sizes.values())}
    lines = [f"{part:<24} {size:>13,} parameters  {facts.get(part, '')}".rstrip() for part, size in sizes.items()]
    if left_out:
        lines.append(f"left out, without a place there: {', '.join(sorted(left_out))}")
    return "\n".join(lines)


def check_saved(
    folder: Path, state: Mapping[str, torch.Tensor], dtype: torch.dtype, model_class: type = AutoModel
) -> int:
    """Load a saved folder by `model_class` and compare it with our state dict, bit by bit; gives the number of tensors.

    Raises:
        ConversionError: a tensor is missing or differs.
    """
    saved = model_class.from_pretrained(folder, dtype=dtype).state_dict()
    wanted = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    wrong = [name for name in saved if name not in wanted or not torch.equal(wanted[name], saved[name])]
    if wrong:
        raise ConversionError(
            f"the saved folder differs from the checkpoint in {len(wrong)} tensors: {', '.join(wrong[:5])}"
        )
    return len(saved)


def command_line(script: str, description: str, checkpoint: str, vocabulary: str) -> argparse.ArgumentParser:
    """The options that every converter has; `checkpoint` and `vocabulary` say what those two take."""
    parser = argparse.ArgumentParser(f"python -m conversion.{script}", description=description)
    parser.add_argument("--checkpoint", type=Path, required=True, help=checkpoint)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    parser.add_argument("--vocabulary", type=Path, help=vocabulary)
    parser.add_argument("--sha256", help="expected hash of the weight file")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the saved weights"
    )
    parser.add_argument(
        "--check",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FOLDER",
        help="compare the saved folder with the checkpoint, and a forward with FOLDER's inputs and outputs.safetensors",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the folder to this repository")
    return parser


def run_or_exit(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], arguments: list[str] | None
) -> None:
    """Run with the parsed command line; what a user can put right ends it with one line and status 1."""
    options = parser.parse_args(arguments)
    try:
        refuse_no_outputs(options.check)
        run(options)
    except (CheckpointError, ConversionError, FileExistsError) as error:
        parser.exit(1, f"error: {error}\n")


def refuse_no_outputs(folder: Path | None) -> None:
    """Raises ConversionError for a `--check FOLDER` that lacks the files that it names; nothing is converted by then."""
    if folder is None or folder == Path():
        return
    missing = [name for name in ("inputs.safetensors", "outputs.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ConversionError(
            f"--check {folder}: no {' and no '.join(missing)} there; give a folder with the original's inputs and outputs, "
            "or --check alone to compare the saved tensors"
        )


def save(
    options: argparse.Namespace,
    model,
    state: Mapping[str, torch.Tensor],
    processor,
    summary: str,
    compare: Callable[[Path], Mapping[str, float]],
    remedy: str = "--vocabulary",
    model_class: type = AutoModel,
) -> None:
    """Write the folder that the command line names, with its card; print what was converted and what was checked.

    Args:
        options: parsed by `command_line`.
        state: our state dict, under the names of `model_class`. processor: None leaves it out.
        compare: largest differences of a forward to the stored outputs of the folder it is given.
        remedy: the options that would give a processor, where there is none.
        model_class: that the check loads the folder with; without one, the class that AutoModel gives.
    """
    with whole_folder(options.output, options.overwrite) as folder:
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        write_card(folder, repo_id=options.push_to_hub or str(options.output))
        if options.check is not None:
            count = check_saved(folder, state, getattr(torch, options.dtype), model_class)
            print(f"check        {count} tensors equal the checkpoint's, largest difference 0")
    print(summary)
    missing = "" if processor else f", without a processor: give {remedy}"
    print(f"saved        {options.output} in {options.dtype}{missing}")
    if options.check is not None and options.check != Path():
        for name, difference in compare(options.check).items():
            print(f"forward      {name}: largest difference {difference:.2e}")
    if options.push_to_hub:
        print(f"uploaded     {push_to_hub(options.output, options.push_to_hub)}")
