"""How often the gate is wrong, measured anew: the tables of docs/gate.md. `make gate-study`.

python -m edgevit.cli.gate_study RESULTS.jsonl [--gates SAME FIVE TEN] [--simulated N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from edgevit.api.studying import CASES, coverage, study, table


def main(words: Sequence[str]) -> None:
    """Measure what is not in the file yet, then print the tables."""
    parser = argparse.ArgumentParser(prog="python -m edgevit.cli.gate_study")
    parser.add_argument("results", type=Path, help="one gate a line; an interrupted study goes on from it")
    parser.add_argument("--gates", type=int, nargs=3, default=(200, 100, 100), metavar=("SAME", "FIVE", "TEN"))
    parser.add_argument("--simulated", type=int, default=1000, help="gates for each correlation")
    asked = parser.parse_args(words)
    wanted = dict(zip(CASES, asked.gates, strict=True))
    print(table(study(asked.results, wanted, lambda line: print(line, file=sys.stderr, flush=True))))
    print()
    print(coverage(asked.simulated))


if __name__ == "__main__":
    main(sys.argv[1:])
