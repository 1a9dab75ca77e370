"""Run case folders: `python -m tests.parity ARCH KIND DIR [DIR ...]`.

Exit status 0 if everything agrees and nothing is left over, else 1.
"""

import argparse
import sys

from transformers.utils.logging import disable_progress_bar

from tests.parity.harness import CaseError, report, run


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m tests.parity", description="compare ours with stored outputs of the original"
    )
    parser.add_argument("architecture", metavar="ARCH", help="for instance clip")
    parser.add_argument("kind", metavar="KIND", help="name of a case in tests/golden/ARCH; says how a folder is run")
    parser.add_argument("folders", metavar="DIR", nargs="+", help="case folders of this kind, of any name")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    status = 0
    for folder in options.folders:
        try:
            case = run(options.architecture, options.kind, folder)
        except CaseError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        print("\n".join(report(case)))
        status |= not case.passed
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
