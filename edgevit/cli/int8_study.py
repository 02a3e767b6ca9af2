"""The tables of INT8, measured anew: speed and size of full networks, accuracy of trained ones. `make bench-int8`.

python -m edgevit.cli.int8_study [--duration S] [--limit N] [--out DIR] [speed] [size] [accuracy]
"""

from __future__ import annotations

import argparse
import datetime as dt
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgevit.api import Pictures, benchmark, export_model, simulate
from edgevit.artifact import Artifact
from edgevit.pictures import REFERENCE_TASK

# What INT8 is asked to reach against float32 of the same runtime, one thread, 224x224; 1: it must not be slower.
SPEED = {
    "openvino": {
        "swin_t": 2.4, "crossformer_s": 2.4, "vit_lsla": 2.4, "deit_small": 2.4,
        "mobileformer_294m": 1.5, "mobileformer_508m": 1.5,
    },
    "onnx": {
        "swin_t": 1.9, "crossformer_s": 1.9, "deit_small": 1.9, "vit_lsla": 1.0,
        "mobileformer_294m": 1.2, "mobileformer_508m": 1.2, "mobileformer_26m": 1.0,
    },
}  # fmt: skip
SIZE = {"onnx": 0.30, "openvino": 0.30, "tensorrt": 0.55, "coreml": 0.30}  # of the float32 file; of the engine
SIZED = ("swin_t", "crossformer_s", "vit_lsla", "deit_small", "mobileformer_294m", "mobileformer_508m")
LOST, AGREE, STRESSED = 0.5, 0.985, 1.0  # points of top-1 at most; share of equal predictions; points under stress
WEIGHTS = (REFERENCE_TASK, f"{REFERENCE_TASK}-stress")
CALIBRATED = Pictures(REFERENCE_TASK, 128)  # of random weights: what they are makes no difference to time or size
NETWORKS = (
    "mobileformer_tiny", "mobileformer_26m", "crossformer_tiny", "vit_lsla_tiny", "swin_tiny", "vit_reference_tiny",
)  # fmt: skip


def main(words: Sequence[str]) -> None:
    """Print the tables named, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m edgevit.cli.int8_study")
    parser.add_argument("tables", nargs="*", choices=["speed", "size", "accuracy", []], help="default: all")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds for each contestant of a race")
    parser.add_argument("--limit", type=int, default=2000, help="pictures for each accuracy")
    parser.add_argument("--models", help="only these, A,B,...; default: those of the README")
    parser.add_argument("--out", type=Path, help="keep the artifacts here")
    asked = parser.parse_args(words)
    tables = asked.tables or ["speed", "size", "accuracy"]
    every = {*NETWORKS, *SIZED, *(model for bars in SPEED.values() for model in bars)}
    only = set(asked.models.split(",")) if asked.models else every
    with tempfile.TemporaryDirectory(prefix="edgevit-int8-study-") as scratch:
        out = asked.out or Path(scratch)
        print(f"{dt.datetime.now(dt.UTC):%Y-%m-%d}")
        if "speed" in tables:
            _print(("model", "target", "INT8 against float32", "asked", "what ran"), _speed(out, asked.duration, only))
        if "size" in tables:
            _print(("model", "target", "file", "INT8 MB", "float32 MB", "ratio", "asked"), _size(out, only))
        if "accuracy" in tables:
            head = ("model", "weights", "target", "computed by", "float32", "INT8", "points lost", "agreement", "met")
            _print(head, _accuracy(asked.limit, only))


def _print(head: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    """One Markdown table, each row as soon as it is known."""
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def _pair(model: str, target: str, out: Path, **more: Any) -> tuple[Artifact, Artifact]:
    """The float32 artifact and the int8 one, with the same random weights."""
    full = export_model(model, target, out=out, force=True, options=more)
    small = export_model(
        model, target, precision="int8", calibration=CALIBRATED, out=out, force=True, options=more
    )
    return full, small


def _speed(out: Path, duration: float, only: Collection[str]) -> Iterator[Sequence[str]]:
    for target, models in SPEED.items():
        for model, asked in ((m, bar) for m, bar in models.items() if m in only):
            report = benchmark(_pair(model, target, out), threads=1, duration_s=duration)
            found = report["comparisons"][0]
            ran = report["results"][1]["attestation"]["verdict"]
            yield model, target, _ratio(found), f"{asked:.1f}: {'met' if found['ratio'] >= asked else 'not met'}", ran


def _ratio(found: dict[str, Any]) -> str:
    """1.23 [1.20, 1.26]: an interval is missing where the rounds were too few."""
    interval = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['ratio']:.2f}{interval}"


def _size(out: Path, only: Collection[str]) -> Iterator[Sequence[str]]:
    for target, asked in SIZE.items():
        for model in (name for name in SIZED if name in only):
            pair = _pair(model, target, out, **({"gpu": "sm89"} if target == "tensorrt" else {}))
            full, small = (_bytes(artifact) / 1e6 for artifact in pair)
            verdict = f"{asked:.2f}: {'met' if small / full <= asked else 'not met'}"
            yield model, target, pair[1].model_file.name, f"{small:.1f}", f"{full:.1f}", f"{small / full:.2f}", verdict


def _bytes(artifact: Artifact) -> int:
    """The size of what the device loads: one file, a package, or IR with its weights."""
    files = {file["name"]: file["bytes"] for file in artifact.manifest["files"]}
    name = artifact.model_file.name
    wanted = (name, f"{Path(name).stem}.bin") if name.endswith(".xml") else (name,)
    return sum(size for file, size in files.items() if file in wanted or file.startswith(f"{name}/"))


def _accuracy(limit: int, only: Collection[str]) -> Iterator[Sequence[str]]:
    for model in (name for name in NETWORKS if name in only):
        for weights in WEIGHTS:
            rows = simulate([model], REFERENCE_TASK, calibration=REFERENCE_TASK, weights=weights, limit=limit)["rows"]
            for row in rows:
                if "problem" in row:
                    yield model, weights, row["target"], row["problem"]
                    continue
                beside = row["against"]
                most = STRESSED if "stress" in weights else LOST
                agrees = "stress" in weights or beside["agreement"]["value"] >= AGREE
                met = beside["drop_points"]["value"] <= most and agrees
                figures = (_percent(beside["top1"]), _percent(row["top1"]), _points(beside["drop_points"]))
                agreement = _percent(beside["agreement"])
                yield model, weights, row["target"], row["runtime"], *figures, agreement, "yes" if met else "no"


def _percent(figure: dict[str, float]) -> str:
    return f"{figure['value']:.1%} [{figure['low']:.1%}, {figure['high']:.1%}]"


def _points(figure: dict[str, float]) -> str:
    return f"{figure['value']:+.2f} [{figure['low']:+.2f}, {figure['high']:+.2f}]"


if __name__ == "__main__":
    main(sys.argv[1:])
