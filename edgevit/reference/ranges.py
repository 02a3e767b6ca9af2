"""How uneven the channels of the shipped networks are: `python -m edgevit.reference.ranges [MODEL ...]`.

A scale for a whole tensor serves its largest channel: where that is 30 times the median, the median one is left with a
thirtieth of the 256 values of eight bits. Writes what it finds into the records of the weights.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgevit.inputs import preprocess
from edgevit.models import load_model
from edgevit.reference import task, trained

PICTURES = 64  # of the calibration split: four of each class
UNEVEN = 8  # times the median: three of the eight bits are gone for half of the channels


@torch.no_grad()
def channel_spread(model: nn.Module, images: Tensor) -> dict[str, float]:
    """For the input of each Linear and convolution, its largest channel over its median one, by largest magnitude.

    images (n, 3, h, w), normalised. Layers whose median channel is always 0 are left out, and those that read pixels.
    """
    found: dict[str, float] = {}

    def look(name: str, layer: nn.Module, x: Tensor) -> None:
        axis = 1 if isinstance(layer, nn.Conv2d) else x.dim() - 1
        largest = x.abs().amax([a for a in range(x.dim()) if a != axis])  # c
        if len(largest) > 3 and largest.median() > 0:
            found[name] = float(largest.max() / largest.median())

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: look(name, layer, args[0]))
        for name, layer in layers
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def summary(spread: dict[str, float]) -> dict[str, Any]:
    """The median and the largest spread of a network's layers, where the largest is, and how many are uneven."""
    ratios = np.array(list(spread.values()))
    return {
        "layers": len(ratios),
        "median": round(float(np.median(ratios)), 2),
        "largest": round(float(ratios.max()), 1),
        "at": max(spread, key=lambda name: spread[name]),
        f"above_{UNEVEN}": int((ratios > UNEVEN).sum()),
    }


def pictures(split: str, count: int) -> Tensor:
    """The first pictures of a split, as the networks take them: (count, 3, 224, 224)."""
    return torch.from_numpy(np.stack([preprocess(task.picture(split, i), trained.IMAGE) for i in range(count)]))


def main() -> None:
    """Measure the channels of the networks named on the command line, or of all that ship."""
    parser = argparse.ArgumentParser(prog="python -m edgevit.reference.ranges", description=main.__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    images = pictures("calibration", PICTURES)
    for name in parser.parse_args().models or trained.models():
        found = {
            weights: summary(channel_spread(load_model(name, weights).module, images)) for weights in trained.NAMES
        }
        record = trained.record(name) | {"channel_spread": found}
        trained.write(name, record)
        print(json.dumps({"model": name, **found}))


if __name__ == "__main__":
    main()
