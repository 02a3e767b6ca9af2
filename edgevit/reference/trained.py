"""The trained networks that ship with edgevit: where their files are, how they were made, how well they do."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit.errors import CheckpointError, UsageError
from edgevit.shares import wilson
from edgevit.specs import ImageSpec

if TYPE_CHECKING:
    from torch import nn

    from edgevit.checkpoint import Checkpoint

FOLDER = Path(__file__).parent / "weights"
PLAIN, STRESSED = "reference-task", "reference-task-stress"  # what takes the place of a file of weights
NAMES = (PLAIN, STRESSED)
IMAGE = ImageSpec()
TESTED = 2048  # test pictures of the recorded accuracy: its 95 % interval is 2 points wide at 95 %


def models() -> list[str]:
    """The networks whose weights ship with edgevit."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def record(name: str) -> dict[str, Any]:
    """What is known of a network's shipped weights: how they were made, and how well they do.

    Raises:
        UsageError: none ship for this network. CheckpointError: the installation is damaged.
    """
    path = FOLDER / f"{name}.json"
    if not path.exists():
        raise UsageError(f"{name}: no weights of the reference task ship for it; expected one of {', '.join(models())}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("sha256"), str):
        raise CheckpointError(f"{path}: damaged, expected the record of shipped weights; install edgevit again")
    return content


def read(name: str) -> Checkpoint:
    """The shipped weights of a network.

    Raises:
        UsageError: none ship for it. CheckpointError: the file is not the one that was shipped.
    """
    from edgevit.checkpoint import read_checkpoint

    known, path = record(name), FOLDER / f"{name}.safetensors"
    weights = read_checkpoint(path)
    if weights.sha256 != known["sha256"]:
        raise CheckpointError(
            f"{path}: sha256 {weights.sha256[:12]}..., expected {known['sha256'][:12]}... as shipped; "
            "install edgevit again"
        )
    return weights


def rounded(net: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights are what a float16 file keeps of them."""
    import torch

    net = copy.deepcopy(net).eval()
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.copy_(tensor.half() if tensor.is_floating_point() else tensor)
    return net


def save(
    name: str,
    net: nn.Module,
    phases: Sequence[dict[str, Any]],
    right: tuple[int, int],
    seconds: float,
    *,
    resumed: bool = False,
) -> dict[str, Any]:
    """Write the weights of a network and their record; return the record. `seconds` is this run's, resumed or not."""
    import safetensors.torch
    import torch

    state = {key: t.half() if t.is_floating_point() else t for key, t in net.state_dict().items()}
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.safetensors"
    safetensors.torch.save_file({key: t.contiguous().cpu() for key, t in state.items()}, path)
    share = wilson(*right)
    record = {
        "model": name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "parameters": sum(p.numel() for p in net.parameters()),
        "top1": share.value,
        "top1_low": share.low,
        "top1_high": share.high,
        "pictures": right[1],
        "phases": list(phases),
        "command": f"python -m edgevit.reference.train {name}{' --resume' * resumed}",
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(seconds),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "processor_bfloat16": bool(torch.cpu._is_amx_tile_supported()),
    }
    write(name, record)
    return record


def write(name: str, record: Mapping[str, Any]) -> None:
    """Keep a record beside its weights."""
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
