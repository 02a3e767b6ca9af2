"""Train the small networks on the reference task: `python -m edgevit.reference.train [MODEL ...]`.

Writes each network's weights (float16 safetensors) and the record of how well they do into the folder `weights`. A few
minutes a network on two cores. The seed fixes pictures, order and initialisation, but not the last digits: sums are
taken in another order by another number of threads, and in bfloat16 where the processor multiplies it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevit.errors import UsageError
from edgevit.reference import CLASSES, task, trained
from edgevit.registry import family_of

BATCH = 64  # pictures a step
TELL = 50  # steps between two lines
WARM_UP = 0.06  # share of the steps during which the learning rate rises
DECAY = 0.05  # AdamW's weight decay of matrices; gains, biases and tables have none
SMOOTHING = 0.1  # of the labels


@dataclass(frozen=True)
class Phase:
    """So many pictures of `side` pixels, at a learning rate that rises, then falls from `rate` to 0 as a cosine."""

    side: int
    pictures: int
    rate: float


@dataclass(frozen=True)
class Plan:
    """Small pictures first, because they are cheap; `half`: products in bfloat16 where the processor has it.

    Depthwise convolutions are slower in bfloat16.
    """

    phases: tuple[Phase, ...]
    half: bool = True


PLANS = {
    "vit_reference_tiny": Plan((Phase(128, 128_000, 1.5e-3), Phase(224, 16_384, 5e-4), Phase(224, 64_000, 1e-3))),
    "swin_tiny": Plan(
        (Phase(96, 64_000, 2e-3), Phase(224, 10_240, 7e-4), Phase(224, 40_000, 1e-3), Phase(224, 16_000, 7e-4))
    ),
    "vit_lsla_tiny": Plan((Phase(96, 64_000, 2e-3), Phase(224, 10_240, 7e-4), Phase(224, 32_000, 1e-3))),
    "crossformer_tiny": Plan((Phase(96, 64_000, 2e-3), Phase(224, 10_240, 7e-4), Phase(224, 32_000, 1e-3))),
    "mobileformer_tiny": Plan((Phase(96, 48_000, 3e-3), Phase(224, 6_144, 7e-4)), half=False),
    "mobileformer_26m": Plan((Phase(96, 48_000, 2e-3), Phase(224, 6_144, 7e-4), Phase(224, 9_600, 7e-4)), half=False),
}


@dataclass(frozen=True)
class Pictures:
    """A split in memory: uint8 (n, SIDE, SIDE, 3), and the classes (n,)."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def of(cls, split: str, count: int, device: torch.device, keep: Path | None) -> Pictures:
        """The first pictures of a split; those that `keep`, a folder, has from an earlier run are not made again."""
        labels = torch.tensor([task.label(split, i) for i in range(count)], device=device)
        path = None if keep is None else keep / f"{split}_{count}.npy"
        if path is not None and path.exists():
            return cls(torch.from_numpy(np.load(path)).to(device), labels)
        pixels = np.stack([np.asarray(task.picture(split, i)) for i in range(count)])
        if path is not None:
            np.save(path, pixels)
        return cls(torch.from_numpy(pixels).to(device), labels)


def train(name: str, pictures: Pictures, test: Pictures, *, seed: int = 0, resume: bool = False) -> None:
    """Train one network; write its weights and record after each phase, so that a broken run leaves something.

    With `resume` only the last phase, from the weights that there are.
    """
    plan, family, device = PLANS[name], family_of(name)[1], pictures.pixels.device
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = family.build(name, family.OPTIONS(), num_classes=CLASSES, features_only=False).to(device)
    net.apply(_start)
    if resume:
        net.load_state_dict({key: tensor.float() for key, tensor in trained.read(name).state.items()})
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stubs lack this argument
    half = plan.half and (device.type == "cuda" or torch.cpu._is_amx_tile_supported())
    started = time.monotonic()
    for phase in plan.phases[-1:] if resume else plan.phases:
        net.train()
        for line in _phase(net, phase, pictures, rng, half=half):
            print(f"{name} {phase.side}: {line}, {time.monotonic() - started:.0f} s", flush=True)
        counts = accuracy(trained.rounded(net), test)
        seconds = time.monotonic() - started
        record = trained.save(name, net, [asdict(each) for each in plan.phases], counts, seconds, resumed=resume)
        print(f"{name}: {record['top1']:.4f} of {record['pictures']} test pictures", flush=True)


def _phase(net: nn.Module, phase: Phase, pictures: Pictures, rng: np.random.Generator, *, half: bool) -> Iterator[str]:
    """Train for one phase; say now and then how it goes."""
    optimizer = torch.optim.AdamW(_groups(net), lr=phase.rate, betas=(0.9, 0.98))
    small, steps = resized(pictures, phase.side), phase.pictures // BATCH
    right = 0
    for step in range(steps):
        images, labels = batch(small, phase.side, rng)
        for group in optimizer.param_groups:
            group["lr"] = phase.rate * schedule(step / steps)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = net(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        right += int((logits.argmax(1) == labels).sum())
        if (step + 1) % TELL == 0 or step + 1 == steps:
            yield f"step {step + 1} of {steps}, right {right / BATCH / (step % TELL + 1):.3f}"
            right = 0


def _start(module: nn.Module) -> None:
    """What the papers' networks start from is too small for networks as narrow as these: they would not start."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)


def schedule(done: float) -> float:
    """Linear rise, then half a cosine to 0; `done` is the share of the steps behind."""
    if done < WARM_UP:
        return (done + 1e-3) / WARM_UP
    return (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def _groups(net: nn.Module) -> list[dict[str, object]]:
    """Matrices with weight decay, all else without."""
    matrices = [p for n, p in net.named_parameters() if p.dim() >= 2 and n.endswith("weight")]
    chosen = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in chosen]
    return [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]


def resized(pictures: Pictures, side: int) -> Pictures:
    """The pictures at the scale at which a crop of `side` pixels is what the preprocessing keeps of them."""
    whole = round(side / trained.IMAGE.crop)
    if whole == task.SIDE:
        return pictures
    parts = [
        F.interpolate(part.permute(0, 3, 1, 2).float(), (whole, whole), mode="bilinear", antialias=True)
        for part in pictures.pixels.split(BATCH)  # b 256 256 3 -> b 3 s s
    ]
    return Pictures(torch.cat([part.round().byte().permute(0, 2, 3, 1) for part in parts]), pictures.labels)


def batch(pictures: Pictures, side: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Normalised float32 (BATCH, 3, side, side) and classes; the batch is cut and turned at random."""
    chosen = torch.from_numpy(rng.choice(len(pictures.labels), BATCH, replace=False))
    top, left = rng.integers(0, pictures.pixels.shape[1] - side + 1, 2)
    images = pictures.pixels[chosen][:, top : top + side, left : left + side]
    if rng.random() < 0.5:
        images = images.transpose(1, 2)
    return normalised(images.flip([axis for axis in (1, 2) if rng.random() < 0.5])), pictures.labels[chosen]


def normalised(images: Tensor) -> Tensor:
    """uint8 (b, h, w, 3) -> float32 (b, 3, h, w), channels last, as the networks take it."""
    mean, std = (torch.tensor(each, device=images.device) for each in (trained.IMAGE.mean, trained.IMAGE.std))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(net: nn.Module, test: Pictures) -> tuple[int, int]:
    """How many of the test pictures the network gets right at the size of use, in float32; and of how many."""
    side, right = trained.IMAGE.size[0], 0
    edge = (task.SIDE - side) // 2
    for first in range(0, len(test.labels), BATCH):
        images = test.pixels[first : first + BATCH, edge : edge + side, edge : edge + side]
        right += int((net(normalised(images)).argmax(1) == test.labels[first : first + BATCH]).sum())
    return right, len(test.labels)


def main() -> None:
    """Train the networks named on the command line, or all."""
    parser = argparse.ArgumentParser(prog="python -m edgevit.reference.train", description=main.__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(PLANS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor")
    parser.add_argument("--keep", type=Path, help="folder for the pictures, for a later run")
    parser.add_argument("--resume", action="store_true", help="only the last phase, from the weights there are")
    chosen = parser.parse_args()
    unknown = next((name for name in chosen.models if name not in PLANS), None)
    if unknown is not None:
        raise UsageError(f"{unknown}: no plan to train it; expected {', '.join(PLANS)}")
    torch.set_num_threads(chosen.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    counts = {"train": task.SPLITS["train"], "test": trained.TESTED}
    pictures, test = (Pictures.of(split, count, device, chosen.keep) for split, count in counts.items())
    print(f"{len(pictures.labels) + len(test.labels)} pictures, {time.monotonic() - started:.0f} s", flush=True)
    for name in chosen.models or PLANS:
        train(name, pictures, test, resume=chosen.resume)


if __name__ == "__main__":
    main()
