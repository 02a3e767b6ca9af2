"""Which blocks lose what in int8: `sensitivity`, and the float blocks that keep an export within `max_drop`."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit import registry
from edgevit.contracts import Calibration, Exporter
from edgevit.errors import ExportError, UnknownNameError, UsageError
from edgevit.options import as_json, parse_options, split_options
from edgevit.runtimes import Session
from edgevit.specs import ExportSpec, Size, check_image_sizes

from .calibrating import Progress, Source, calibrate, pictures_for
from .running import RunOn, open_runtime

# Of a node's name: a block, a stage's other parts (downsample), or the first module on its path.
BLOCK = re.compile(r"(?:[^/]*?\bblocks\.(?:steps\.)?\d+|layers\.\d+\.\w+|[^./]+)")
SHOWN = 4  # blocks that a note names; the manifest has all of them


@dataclass(frozen=True)
class Loss:
    """What a quantised form loses on the pictures against float32 PyTorch.

    `drop` is in points: of top-1 accuracy where the pictures have labels, else of agreement with float32, which is
    never negative. `sqnr_db` is signal to quantisation noise of the logits.
    """

    drop: float
    agreement: float
    sqnr_db: float


class Trials:
    """Quantises one network again and again, with other blocks each time, and measures what that loses."""

    def __init__(self, loaded: Any, spec: ExportSpec, exporter: Exporter, calibration: Calibration) -> None:
        self.loaded, self.spec, self.exporter, self.calibration = loaded, spec, exporter, calibration
        self.size: Size = spec.image_size or loaded.card.image.size
        self.images = calibration.images[self.size]
        self.labels = labels_of(calibration, loaded.num_classes)
        torch_runtime: Any = registry.runtime_class("torch")
        with Session(torch_runtime(loaded.module, self.size)) as session:
            outputs = session.run_all(self.images, 1)
        if "logits" not in outputs:
            raise UsageError(f"{spec.model}: features have no classes to lose; leave --features-only or --max-drop out")
        self.expected = outputs["logits"]

    @property
    def measure_name(self) -> str:
        """What `Loss.drop` counts."""
        return "top-1" if self.labels is not None else "agreement with float32"

    def blocks(self) -> dict[str, int]:
        """The blocks that have something to quantise, in the order of the graph, with their multiply-accumulates."""
        from edgevit.bench.complexity import macs_by_node

        with tempfile.TemporaryDirectory(prefix="edgevit-int8-") as folder:
            built = self._build(self.spec.recipe, Path(folder))
        kept = {entry["node"] for entry in built.choices["kept_float"]}
        found: dict[str, int] = {}
        for node, macs in macs_by_node(built.graph).items():
            block = block_of(node)
            if node not in kept and block:
                found[block] = found.get(block, 0) + macs
        return found

    def measure(self, **changes: Any) -> Loss:
        """What the spec's recipe with these fields changed loses."""
        recipe = dataclasses.replace(self.spec.recipe, **changes)
        with tempfile.TemporaryDirectory(prefix="edgevit-int8-") as folder:
            built = self._build(recipe, Path(folder))
            runtime = open_runtime(self.exporter.checker, Path(folder) / built.checked_file, "int8", RunOn())
            with Session(runtime) as session:
                actual = session.run_all(self.images, self.spec.batch)["logits"]
        return loss(self.expected, actual, self.labels)

    def _build(self, recipe: Any, folder: Path) -> Any:
        spec = dataclasses.replace(self.spec, recipe=recipe)
        return self.exporter.export(self.loaded.module, self.loaded.card, [spec], folder, self.calibration)[0]


def labels_of(calibration: Calibration, num_classes: int) -> NDArray[Any] | None:
    """The classes of the pictures (n), where each has one and there are as many classes as the network's."""
    labels = [entry.get("label") for entry in calibration.record["pictures"]]
    return None if None in labels or calibration.record["classes"] != num_classes else np.array(labels)


def loss(expected: NDArray[Any], actual: NDArray[Any], labels: NDArray[Any] | None) -> Loss:
    """What `actual` logits (n, classes) lose against those expected, with the classes of the pictures (n) if known."""
    chosen, wanted = actual.argmax(1), expected.argmax(1)
    agreement = float(np.mean(chosen == wanted)) * 100
    drop = 100 - agreement if labels is None else float(np.mean(wanted == labels) - np.mean(chosen == labels)) * 100
    noise = float(np.square(actual.astype(np.float64) - expected).sum())
    signal = float(np.square(expected, dtype=np.float64).sum())
    return Loss(drop, agreement, 10 * math.log10(signal / noise) if noise and signal else math.inf)


def block_of(node: str) -> str:
    """The block that a node belongs to, "" for one that no module made."""
    found = BLOCK.match(node) if "/" in node else None
    return found[0] if found else ""


def patterns_of(block: str) -> tuple[str, str]:
    """The patterns on node names that a block's nodes match, and no other's."""
    return f"{block}.*", f"{block}/*"


# ---- within a drop


@dataclass(frozen=True)
class Told:
    """What keeping within a drop came to."""

    measure: str
    limit: float
    before: Loss
    after: Loss
    raised: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "measure": self.measure, "limit": self.limit, "drop_before": self.before.drop,
            "drop_after": self.after.drop, "raised_to_float": list(self.raised),
        }  # fmt: skip

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user."""
        drop = f"{self.after.drop:.2f} points of {self.measure} lost on the calibration pictures (at most {self.limit})"
        if not self.raised:
            return (f"int8: {drop}, no block had to go back to float",)
        more = f" and {len(self.raised) - SHOWN} more" if len(self.raised) > SHOWN else ""
        names = ", ".join(self.raised[:SHOWN]) + more
        return (f"int8: {drop}, {self.before.drop:.2f} before these blocks went back to float: {names}",)


def within_drop(trials: Trials, limit: float, progress: Progress) -> tuple[Any, Told]:
    """The recipe with as many blocks kept float, the most sensitive first, as it takes to lose no more than `limit`.

    Blocks are ordered by the noise that each makes when it alone is quantised; how many it takes is then found by
    halving. One block at least stays quantised.

    Raises:
        ExportError: with all blocks but one in float it still loses more.
    """
    recipe = trials.spec.recipe
    progress(0.0, "measuring what int8 loses")
    before = trials.measure()
    told = Told(trials.measure_name, limit, before, before, ())
    if before.drop <= limit:
        return recipe, told
    worst = _by_noise(trials, progress)

    def kept(count: int) -> tuple[str, ...]:
        return (*recipe.keep_float, *(pattern for block in worst[:count] for pattern in patterns_of(block)))

    enough: dict[int, Loss] = {}
    low, high = 1, len(worst) - 1  # the answer lies between them, if there is one
    while low <= high:
        middle = (low + high) // 2
        progress(0.8, f"with {middle} of {len(worst)} blocks in float")
        found = trials.measure(keep_float=kept(middle))
        if found.drop <= limit:
            enough[middle], high = found, middle - 1
        else:
            low = middle + 1
    if not enough:
        raise ExportError(
            f"int8 for {trials.spec.target}: {before.drop:.2f} points of {told.measure} lost, at most {limit} asked "
            "for, and with all blocks but one in float it still is more; allow a larger --max-drop, or export fp16"
        )
    count = min(enough)
    told = dataclasses.replace(told, after=enough[count], raised=tuple(worst[:count]))
    return dataclasses.replace(recipe, keep_float=kept(count)), told


def _by_noise(trials: Trials, progress: Progress) -> list[str]:
    """The blocks, first the one that makes the most noise when it alone is quantised."""
    noise = {}
    blocks = list(trials.blocks())
    for i, block in enumerate(blocks):
        progress(0.1 + 0.7 * i / len(blocks), f"quantising {block} alone ({i + 1} of {len(blocks)})")
        noise[block] = trials.measure(only=patterns_of(block)).sqnr_db
    return sorted(blocks, key=noise.__getitem__)


# ---- sensitivity


def specify(model: str, exporter: Exporter, precision: str, options: Mapping[str, Any], seed: int) -> ExportSpec:
    """What is asked for, its options shared out among the family, the target and, with int8, its recipe.

    Raises:
        UnknownNameError: the target has no such precision, or nobody such an option. UsageError: an option's value.
    """
    if precision not in exporter.precisions:
        raise UnknownNameError(f"precision for {exporter.name}", precision, exporter.precisions)
    target, quantised = exporter.name, precision == "int8"
    owners = [(model, registry.family_of(model)[1].OPTIONS), (target, exporter.OPTIONS)]
    owners += [(f"{target} in int8", exporter.RECIPE)] if quantised else []
    mine, its, *how = split_options(options, *owners)
    return ExportSpec(
        model, target, precision, options=tuple(sorted(mine.items())), seed=seed,
        settings=parse_options(exporter.OPTIONS, target, its),
        recipe=parse_options(exporter.RECIPE, target, how[0]) if quantised else None,
    )  # fmt: skip


def load_reference(spec: ExportSpec) -> Any:
    """The reference network of a request, with its weights."""
    from edgevit.models import load_model

    return load_model(
        spec.model,
        spec.weights,
        spec.num_classes,
        features_only=spec.features_only,
        options=dict(spec.options),
        seed=spec.seed,
        randomize=True,
    )


def sensitivity(
    model: str,
    target: str = "onnx",
    *,
    calibration: Source = None,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    image_size: Size | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Any]:
    """What each block of a network loses in a target's int8: it alone quantised, and all but it.

    Arguments as of `export_model`. The losses are measured on the calibration pictures, in the target's arithmetic.

    Raises:
        UsageError, UnknownNameError, CheckpointError, InputError, ExportError: as `export_model`.
    """
    exporter = registry.exporter(target)
    spec = specify(model, exporter, "int8", options or {}, seed)
    spec = dataclasses.replace(spec, weights=None if weights is None else str(weights), num_classes=num_classes)
    wanted = pictures_for(spec, calibration, max_drop=0.0)  # none of them: the losses are measured on them
    loaded = load_reference(spec)
    sizes = check_image_sizes(image_size, loaded.card.image.size, loaded.card.size_multiple)
    spec = dataclasses.replace(spec, image_size=sizes[0])
    pictures = calibrate(spec, sizes, loaded.card.image, wanted) or Calibration({})
    progress(0.0, "running the float32 network")
    trials = Trials(loaded, spec, exporter, pictures)
    return {
        "model": model,
        "target": target,
        "weights": dict(loaded.weights),
        "random_weights": "entry" not in loaded.weights,
        "recipe": as_json(spec.recipe),
        "pictures": len(trials.images),
        "measure": trials.measure_name,
        "all_int8": _record(trials.measure()),
        "blocks": _in_and_out(trials, progress),
        "notes": list(pictures.notes),
    }


def _in_and_out(trials: Trials, progress: Progress) -> list[dict[str, Any]]:
    """Each block alone in int8, and all but it."""
    blocks, kept, rows = trials.blocks(), trials.spec.recipe.keep_float, []
    for i, (block, macs) in enumerate(blocks.items()):
        progress((i + 0.5) / len(blocks), f"{block} ({i + 1} of {len(blocks)})")
        alone = trials.measure(only=patterns_of(block))
        without = trials.measure(keep_float=(*kept, *patterns_of(block))) if len(blocks) > 1 else None
        rows.append({"block": block, "macs": macs, "one_in": _record(alone), "one_out": without and _record(without)})
    return rows


def _record(found: Loss) -> dict[str, Any]:
    """A loss as JSON has it, which knows no infinity: no noise at all is None."""
    return {**dataclasses.asdict(found), "sqnr_db": found.sqnr_db if math.isfinite(found.sqnr_db) else None}
