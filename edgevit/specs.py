"""The frozen records that cross folders: what is asked for, what a network is, what was measured.

Units stand in the names (`latency_ms`, `size_bytes`). Every record turns into JSON with `dataclasses.asdict`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from edgevit.errors import UsageError

MAX_SIDE = 4096  # pixels; a larger picture is a typing error long before it is a wish
MAX_BATCH = 1024  # pictures; beyond it the input alone is more than 600 MB at 224x224
MAX_SIZES = 16  # in one artifact: their list is part of its directory's name, which may have 255 bytes

Batch = int | Literal["dynamic"]
Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes the network's input: resize the short side, crop the centre, scale to [0, 1], normalise.

    `size` is (height, width) in pixels; `crop` is the share of the resized short side that the crop keeps.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop: float = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


@dataclass(frozen=True)
class ModelCard:
    """What is known of one published network before anything is built.

    `parameters` is exact; `macs` counts convolutions, linears and matmuls at `image.size`, batch 1, reference form.
    `size_multiple` divides every legal height and width. `paper` holds what the paper claims.
    """

    name: str
    family: str
    title: str
    url: str
    origin: str
    parameters: int
    macs: int
    paper: dict[str, str | float] = field(default_factory=dict)
    image: ImageSpec = ImageSpec()
    size_multiple: int = 32
    notes: tuple[str, ...] = ()
    num_classes: int = 1000  # of its published weights: ImageNet-1k


@dataclass(frozen=True)
class NoOptions:
    """The OPTIONS of a target or runtime that leaves nothing to choose."""


@dataclass(frozen=True)
class ExportSpec:
    """One export: which network with which weights, for which target, precision and input shape."""

    model: str
    target: str
    precision: str = "fp32"
    weights: str | None = None
    num_classes: int | None = None
    image_size: tuple[int, int] | None = None
    batch: Batch = 1
    features_only: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    pointwise: Literal["auto", "dense", "grouped"] = "auto"
    seed: int = 0
    settings: Any = NoOptions()  # what the target takes beside: its exporter's OPTIONS
    recipe: Any = None  # how it is quantised: its exporter's RECIPE, with precision int8

    def __post_init__(self) -> None:
        if self.pointwise not in ("auto", "dense", "grouped"):
            raise UsageError(f"pointwise {self.pointwise!r}: expected auto, dense or grouped")
        check_batch(self.batch)


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output; a dynamic dimension is its name, a static one its length.

    An image input takes `values` "normalised", or "pixels": RGB from 0 to 255, normalised inside the model.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    layout: str = ""
    values: Literal["normalised", "pixels"] = "normalised"


@dataclass(frozen=True)
class Parity:
    """How far a runtime's outputs lie from the float32 reference on real pictures."""

    inputs: int
    max_abs: float
    max_abs_limit: float
    cosine: float
    cosine_limit: float
    top1_agreement: float | None
    reference: str
    runtime: str

    @property
    def passed(self) -> bool:
        """A NaN anywhere fails: every comparison with it is false."""
        agrees = self.top1_agreement is None or self.top1_agreement == 1.0
        return self.max_abs <= self.max_abs_limit and self.cosine >= self.cosine_limit and agrees

    def record(self) -> dict[str, Any]:
        """The fields and the verdict, for a manifest."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Certificate:
    """What one rewrite of the deploy form did, and the proof that it changed nothing.

    `max_rel` is the largest difference in float64, relative to the largest output. `macs_before` and `macs_after` count
    the products of one picture: where an artifact's batch is not 1, two ran and share what does not depend on them.
    `input_independent` says that what was folded into constants had no path from the image.
    """

    rewrite: str
    places: int
    max_rel: float
    parameters_before: int
    parameters_after: int
    operations_before: int
    operations_after: int
    macs_before: int
    macs_after: int
    input_independent: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OperatorTime:
    """One executed operator of a profile: `time_ms` for one inference, `precision` as it really ran ("fp32", ...).

    `origins` names the graph nodes that it computes, several where the runtime fused them. `macs` is what its products
    cost where the runtime can tell; None leaves it to who knows the graph.
    """

    name: str
    kind: str
    precision: str
    time_ms: float
    origins: tuple[str, ...] = ()
    macs: int | None = None


@dataclass(frozen=True)
class Finding:
    """What a lint rule found at one node: how bad, why, what to do about it, and the rule's source (URL)."""

    rule: str
    level: Literal["error", "warning", "advice"]
    node: str
    why: str
    do: str
    source: str


@dataclass(frozen=True)
class Ability:
    """What can be done for a target on this machine: build its files, run them, or only check what they compute."""

    what: Literal["build", "run", "check"]
    ok: bool
    detail: str
    how: str = ""  # to get it, where it is not there


def check_image_size(size: Size, multiple: int) -> Size:
    """Return `size` as two whole numbers, or raise UsageError, where it can naming the nearest legal size."""
    size = as_size(size)
    if any(side <= 0 or side > MAX_SIDE or side % multiple for side in size):
        near = tuple(min(max(round(side / multiple), 1), MAX_SIDE // multiple) * multiple for side in size)
        raise UsageError(
            f"image size {size[0]}x{size[1]}: height and width must be multiples of {multiple} "
            f"between {multiple} and {MAX_SIDE}; try {near[0]}x{near[1]}"
        )
    return size


def check_image_sizes(wish: Size | Sequence[Size] | None, own: Size, multiple: int) -> tuple[Size, ...]:
    """The sizes that `wish` (one, a sequence, or None for the model's own) asks for, or raise UsageError."""
    if wish is None:
        return (own,)
    several = isinstance(wish, Sequence) and len(wish) > 0 and all(isinstance(size, list | tuple) for size in wish)
    pairs: Sequence[Any] = wish if several else (wish,)
    sizes = [check_image_size(pair, multiple) for pair in pairs]
    twice = next((size for size in sizes if sizes.count(size) > 1), None)
    if twice is not None:
        raise UsageError(f"image sizes {size_list(sizes)}: {size_text(twice)} is given twice; give each size once")
    if len(sizes) > MAX_SIZES:
        raise UsageError(
            f"image sizes: {len(sizes)} of them, at most {MAX_SIZES} share an artifact; export the rest alone"
        )
    return tuple(sizes)


def as_size(size: Any) -> Size:
    """(height, width) as ints, also from a list or NumPy's numbers; anything else raises UsageError."""
    try:
        height, width = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        numbers = isinstance(size, list | tuple) and size and all(isinstance(side, int | float) for side in size)
        shown = size_text(size) if numbers else repr(size)
        raise UsageError(
            f"image size {shown}: expected (height, width) in whole pixels, e.g. (224, 224), or a sequence of these"
        ) from None
    return height, width


def size_text(size: Iterable[Any]) -> str:
    """(256, 320) -> "256x320"."""
    return "x".join(map(str, size))


def size_list(sizes: Iterable[Iterable[Any]]) -> str:
    """[(224, 224), (256, 320)] -> "224x224,256x320", as the command line takes them."""
    return ",".join(map(size_text, sizes))


def check_batch(batch: Batch) -> Batch:
    """Return `batch` or raise UsageError."""
    whole = isinstance(batch, int) and not isinstance(batch, bool) and 1 <= batch <= MAX_BATCH
    if batch != "dynamic" and not whole:
        raise UsageError(f"batch {batch}: expected a whole number from 1 to {MAX_BATCH}, or 'dynamic'")
    return batch


@dataclass(frozen=True)
class LatencyResult:
    """The times of one contestant of a race, raw; nothing is rounded here.

    `samples_ms[i]` was taken in round `rounds[i]`. `latency_ms` maps "p50", "p90", ... to milliseconds, or to None
    where the samples are too few. Warm-up runs and the discarded first run of every turn are counted, not kept.
    `effective_precision` and `attestation`, which precision each operator's products ran in, are read back from the
    runtime by the caller: the bench knows no runtime.
    """

    name: str
    samples_ms: tuple[float, ...]
    rounds: tuple[int, ...]
    latency_ms: dict[str, float | None]
    warmup_runs: int
    discarded_runs: int
    effective_precision: str | None = None
    attestation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Comparison:
    """Two contestants of one race: `ratio` is time of the baseline / time of the candidate, above 1 = candidate faster.

    `low` and `high` bound the ratio of the two loaded instances with 95 % confidence, from a bootstrap over `rounds`;
    None where the rounds are too few. All three are None where a round measured 0 ms.
    """

    baseline: str
    candidate: str
    ratio: float | None
    low: float | None
    high: float | None
    rounds: int


@dataclass(frozen=True)
class BenchReport:
    """One race: each contestant's times, each later contestant against the first, and what a reader must be warned of.

    `stopped_by` says what ended it: "duration" (time passed, samples enough), "time limit" or "sample limit".
    """

    results: tuple[LatencyResult, ...]
    comparisons: tuple[Comparison, ...]
    warnings: tuple[str, ...]
    rounds: int
    seed: int
    stopped_by: Literal["duration", "time limit", "sample limit"]


@dataclass(frozen=True)
class Complexity:
    """What one pass through a deployed graph costs, counted and not measured.

    `macs` counts Attention, Conv, Gemm and MatMul (split in `macs_by_op`); `flops` is 2 x `macs`. `parameters` counts
    elements of stored floating-point tensors, each stored tensor once, and of integer tensors that stand for them (the
    input of a DequantizeLinear; its scale does not count). `weight_bytes` is the size of every stored tensor of any
    type, `activation_bytes` of every tensor computed from the image, as if none were fused or reused. `not_counted`
    maps an op kind without a matrix product to the elements it puts out; `unknown` maps an op kind that may hide a
    product to its number of nodes: while it is not empty, `macs` is a lower bound.
    """

    macs: int
    flops: int
    macs_by_op: dict[str, int]
    parameters: int
    weight_bytes: int
    activation_bytes: int
    not_counted: dict[str, int]
    unknown: dict[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModuleCount:
    """What a PyTorch module costs at one image size, batch 1: `macs` counts convolutions, linears and matmuls."""

    parameters: int
    macs: int
    flops: int


Verdict = Literal["pass", "regression", "inconclusive", "not gated"]


@dataclass(frozen=True)
class Check:
    """One thing that a gate looks at: `baseline` and `candidate` in `unit`, and how much worse the candidate is.

    `worse` is relative (0.05 = 5 % more time, bytes, parameters or MACs), of accuracy in points lost; below 0 it is
    better. `low` and `high` bound it with 95 % confidence where it was measured, None where it is exact. `limit` is
    what was allowed. "not gated" says in `detail` why nothing could be compared; it decides nothing.
    """

    what: Literal["latency", "accuracy", "size", "parameters", "macs"]
    verdict: Verdict
    unit: str
    baseline: float | None
    candidate: float | None
    worse: float | None
    limit: float
    low: float | None = None
    high: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class GateReport:
    """What a gate found: `verdict` is "regression" where a check is, else "inconclusive" where one is, else "pass".

    `smallest_seen` is the smallest slowdown that this many rounds of this noise would have shown (relative, above the
    limit or not). `causes` says what changed on the machine meanwhile. `log_ratios` has one number for each round: the
    logarithm of the candidate's time over the baseline's; `rounds_ms` has what the two took in each, medians.
    `compared` is how: "side by side", or through the "reference workload" of a stored result, which then stands for
    the baseline.
    """

    verdict: Literal["pass", "regression", "inconclusive"]
    baseline: str
    candidate: str
    checks: tuple[Check, ...]
    compared: Literal["side by side", "reference workload"]
    rounds: int
    spent_s: float
    stopped_by: Literal["clear", "budget"]
    smallest_seen: float | None
    log_ratios: tuple[float, ...]
    rounds_ms: tuple[tuple[float, float], ...] = ()
    causes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
