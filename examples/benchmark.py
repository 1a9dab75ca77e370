"""How fast the models are, against the plain formulation of their papers and against other packages, on this machine.

    python examples/benchmark.py clip                                       every row, float32 and bf16 autocast
    python examples/benchmark.py clip --rows step --dtype bfloat16 --threads 2 --output bench.json
    python examples/benchmark.py clip --device cuda --batch 256
    python examples/benchmark.py vse --rows gpo,step --dtype float32
    python examples/benchmark.py vilt --rows inference,step
    python examples/benchmark.py albef --rows step,ablation --dtype float32
    python examples/benchmark.py clip --small                               tiny models: does it run?

Random weights of the published sizes; before anything is timed, everyone's numbers are compared in float32. Per row and contender:

    samples/s  median over the rounds; the contenders take turns, A B C A B C ...
    MFU        matmul operations of the plain formulation for the contender's input, a second, as a fraction of what a large matmul
               of the same dtype reached in the same rounds. Work that a contender avoids (padding it never gets; the last block
               where nobody reads it) counts only where it shrinks the input.
    x plain    how many times faster than the plain formulation, the median of the ratios within each round;
               for memory, how many times less

A best line of ours is marked *. Use a quiet machine for numbers to be quoted; ratios stand more than absolute times.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import transformers

from benchmarks import albef, clip, vilt, vse
from benchmarks.measure import Call, Settings, peak_bytes
from hf_vlp.files import write_text

# each a module with ROWS and BATCH; with step_alone where a row needs it
ARCHITECTURES = {"clip": clip, "vse": vse, "vilt": vilt, "albef": albef}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def machine(settings: Settings) -> dict:
    name = torch.cuda.get_device_name() if settings.device == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "batch": settings.batch,
        "repeat": settings.repeat,
        "small": settings.small,
    }


def processor() -> str:
    capabilities = torch.backends.cpu.get_cpu_capability()
    information = Path("/proc/cpuinfo")
    names = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({capabilities})"


def table(records: list[dict]) -> str:
    """One line a contender, under a line for each row and dtype."""
    width = max(len(record["contender"]) for record in records) + 4
    lines = []
    for position, record in enumerate(records):
        group = (record["row"], record["dtype"])
        fellows = [one for one in records if (one["row"], one["dtype"]) == group]
        if position == 0 or group != (records[position - 1]["row"], records[position - 1]["dtype"]):
            ceiling = record.get("ceiling_gflops")
            lines += [
                "",
                " ".join(filter(None, group)) + (f" (matmul ceiling {ceiling:,.0f} GFLOP/s)" if ceiling else ""),
            ]
            timed = "samples/s         ms    MFU" if "ms" in record else "       GB"
            lines.append(f"  {'':{width}}{timed}  x plain")
        ours = [one["ratio"] for one in fellows if one["contender"].startswith("ours")]
        mark = "*" if record["contender"].startswith("ours") and record["ratio"] == max(ours) else " "
        line = f"{mark} {record['contender']:{width}}{record['value']:9.{1 if record['value'] < 1e4 else 0}f}"
        if "ms" in record:
            line += f" {record['ms']:10.1f} " + (f"{record['mfu']:6.2f}" if record["mfu"] else f"{'':6}")
            phases = ", ".join(f"{name} {value:.0f}" for name, value in record["phases_ms"].items())
            line += f"  {record['ratio']:7.2f}" + (f"   {phases} ms" if phases else "")
        else:
            line += f"  {record['ratio']:7.2f}"
        lines.append(line)
    return "\n".join(lines[1:])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("--rows", default=None, help="names with commas between; all unless given")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=None, help="samples a call; unless given 16, vse 128, vilt 8 (4 a step), albef 4")
    parser.add_argument("--repeat", type=int, default=None, help="rounds of every row, 5 unless given")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=None, help="also write the numbers as JSON")
    parser.add_argument("--small", action="store_true", help="tiny models and inputs, once: a test of this script")
    parser.add_argument("--peak", default=None, help=argparse.SUPPRESS)  # one contender, in a process of its own
    options = parser.parse_args()
    known = ARCHITECTURES[options.architecture].ROWS
    options.rows = list(known) if options.rows is None else options.rows.split(",")
    if unknown := [row for row in options.rows if row not in known]:
        parser.error(f"--rows: {options.architecture} has no {', '.join(unknown)}, but {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    for name, value in (("--batch", options.batch), ("--repeat", options.repeat), ("--threads", options.threads)):
        if value is not None and value < 1:
            parser.error(f"{name} {value}: give 1 or more")
    return options


def main() -> None:
    options = arguments()
    architecture = ARCHITECTURES[options.architecture]
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        batch=options.batch or (4 if options.small else architecture.BATCH),
        repeat=options.repeat or (1 if options.small else 5),
        device=options.device,
        dtypes=tuple(DTYPES[name] for name in options.dtype),
        small=options.small,
    )
    if options.peak:
        step = architecture.step_alone(options.peak, settings)
        for _ in range(2):
            step(Call(settings.device, settings.dtypes[0]))
        print(json.dumps({"peak_bytes": peak_bytes(settings.device)}))
        return
    result = {"architecture": options.architecture, "machine": machine(settings), "rows": []}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), file=sys.stderr)
    for name in options.rows:
        for row in architecture.ROWS[name](settings):
            records = [{"name": name, **record} for record in row.measure(settings)]
            print(f"{table(records)}\n", flush=True)
            result["rows"] += records
            if options.output:
                write_text(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
