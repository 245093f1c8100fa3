"""tools/bench VERB [OPTIONS]: run one of the benchmarks.

A verb is a module of this folder with `add_options(parser)` and `run(options) -> dict`.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import benchmarks
from benchmarks.machine import describe

VERBS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if "\ndef add_options(" in path.read_text()
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/bench", description=benchmarks.__doc__)
    parser.add_argument("verb", choices=VERBS)
    verb = importlib.import_module(f"benchmarks.{parser.parse_args(arguments[:1]).verb}")
    parser = argparse.ArgumentParser(prog=f"tools/bench {arguments[0]}", description=verb.__doc__)
    verb.add_options(parser)
    parser.add_argument("--json", type=Path, help="write all numbers and the machine to this file")
    parser.add_argument("--picture", type=Path, help="draw them into this .png")
    options = parser.parse_args(arguments[1:])
    results = {"machine": describe(), **verb.run(options)}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.picture:
        verb.draw(results, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
