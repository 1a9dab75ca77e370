"""The code of the documents: found, checked against the programs' own parsers, and run.

`python -m tests.contract.documents FILE [FILE ...]` runs documents in the working folder, each from top to bottom: Python
blocks share their names, as in a reader's session; of the shell commands, those of `RUN`.
"""

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).parents[2]
# What a tiny model does in a moment; the others are only parsed here, and run by tests of their own.
RUN = (
    "examples/evaluate.py",
    "examples/explain.py",
    "examples/extract_regions.py",
    "examples/search.py",
    "hf_vlp.data.regions",
    "hf_vlp.data.validate",
    "conversion.to_original",
)
# And of those, this is not: thousands of pictures.
TOO_LONG = ("examples/extract_regions.py", "examples/data/emoji/train.parquet")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document and where it begins."""

    file: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def blocks(file: Path, *languages: str) -> list[Block]:
    """The fenced blocks in these languages, in order."""
    text = file.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = [Block(file, text[: fence.start(2)].count("\n") + 1, fence[1], fence[2]) for fence in fences]
    return [block for block in found if block.language in languages]


def commands(text: str) -> list[list[str]]:
    """The commands of shell lines, as words; a backslash continues a line."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    return [shlex.split(part) for line in lines for part in line.split("&&")]


def header_commands(file: Path) -> list[list[str]]:
    """Command lines at the head of a script (indented) or a recipe (after #); those with a gap ("...", "[") are left out."""
    head = re.sub(r"\\\n#?\s*", " ", file.read_text(encoding="utf-8").partition("\nimport ")[0])
    found = re.findall(r"^(?:#  | ) +((?:python|accelerate launch) .*)$", head, re.MULTILINE)
    plain = [re.sub(r"\s{3,}[a-z].*", "", line).replace("--num_processes N", "--num_processes 2") for line in found]
    return [shlex.split(line) for line in plain if "..." not in line and "[" not in line]


@dataclass(frozen=True)
class Program:
    """A script (path) or module of the project, and the words it gets."""

    name: str
    arguments: list[str]
    is_module: bool

    @classmethod
    def of(cls, words: list[str]) -> "Program | None":
        """Of a command; None for pip, pytest and the like. accelerate's own options are parsed by accelerate."""
        if words[:2] == ["accelerate", "launch"]:
            launched = launch_command_parser().parse_args(words[2:])
            return cls(launched.training_script, launched.training_script_args, False)
        if words[:2] == ["python", "-m"]:
            return cls(words[2], words[3:], True)
        return cls(words[1], words[2:], False) if words[0] == "python" else None

    def _beside(self):
        """A script finds the modules of its own folder, as `python SCRIPT` lets it."""
        return mock.patch.object(sys, "path", [str((ROOT / self.name).parent), *sys.path])

    def run(self) -> None:
        """As a program, in this process."""
        script = self.name if self.is_module else str(ROOT / self.name)
        with mock.patch.object(sys, "argv", [script, *self.arguments]), self._beside():
            (runpy.run_module if self.is_module else runpy.run_path)(script, run_name="__main__")

    def parse(self) -> tuple[argparse.Namespace, list[str]]:
        """What the program's own parser makes of the words, and the words it left over; nothing is run."""
        if self.is_module:
            package = importlib.util.find_spec(self.name).submodule_search_locations
            main = importlib.import_module(f"{self.name}.__main__" if package else self.name).main
        else:
            with self._beside():
                main = runpy.run_path(str(ROOT / self.name), run_name="parsed only")["main"]
        with mock.patch.object(sys, "argv", [self.name, *self.arguments]), _stop_after_parsing():
            try:
                main()
            except _Parsed as parsed:
                return parsed.args
        raise AssertionError(f"{self.name} parses no arguments")


class _Parsed(BaseException):
    pass


def _stop_after_parsing():
    original, depth = argparse.ArgumentParser.parse_known_args, []

    def stop(parser, *args, **kwargs):
        depth.append(parser)
        try:
            options, rest = original(parser, *args, **kwargs)
        finally:
            depth.pop()
        if depth:  # a sub-command's parser inside its parser
            return options, rest
        takes_the_rest = parser.prog.startswith(("pretrain", "finetune"))  # recipe keys
        if rest and not takes_the_rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        raise _Parsed(options, rest)

    return mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop)


def programs(block: Block) -> list[Program]:
    """Those of a block of shell commands that are run."""
    found = [Program.of(words) for words in commands(block.text)]
    run = [program for program in found if program and program.name in RUN]
    return [program for program in run if not {program.name, *program.arguments}.issuperset(TOO_LONG)]


def run_document(file: Path) -> Iterator[str]:
    """Runs a document; gives the name of every block after it ran."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(file, "python", "bash"):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(file), "exec"), names)
            yield block.name
            continue
        for program in programs(block):
            try:
                program.run()
            except SystemExit as end:
                assert not end.code, f"{block.name}: {program.name} ended with {end.code}"
        yield block.name


if __name__ == "__main__":
    for document in sys.argv[1:]:
        for name in run_document(Path(document)):
            print(f"ran {name}", flush=True)
