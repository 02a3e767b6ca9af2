"""What the folders promise each other. A runtime is load, run, close; an exporter turns a module into files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from edgevit.specs import Ability, Certificate, ExportSpec, ModelCard, OperatorTime, Size, TensorSpec

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

Arrays = Mapping[str, NDArray[Any]]


class Runtime(Protocol):
    """Runs one model. The constructor only notes what to run; `load` may raise RuntimeFailure.

    Buffers: `run` never keeps or changes its inputs, and what it returns is the caller's to keep. A runtime may trust
    its inputs: names, shapes and types are checked in one place, `edgevit.runtimes.Session`, through which all
    runtimes are used.

    OPTIONS: a frozen dataclass of what it takes beside (device, streams, ...); every field has a default.
    """

    name: str
    OPTIONS: type[Any]

    def __init__(self, path: Path, threads: int | None = None, precision: str = "fp32", options: Any = None) -> None:
        """Note what to run, and in which precision; `threads` and `options` are its own choice where None."""

    @classmethod
    def obstacle(cls) -> str | None:
        """Why nothing can be run with it on this machine and what to do, or None."""

    def load(self) -> None:
        """Make ready to run; called once."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """What `run` takes, known after `load`."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What `run` returns, known after `load`."""

    @property
    def asked_precision(self) -> str:
        """What the precision asked for means on this device: float16 weights may have to be computed in "fp32"."""

    @property
    def effective_precision(self) -> str:
        """The precision that really runs, read back from what was loaded: "fp32", "bf16", ..."""

    def describe(self) -> dict[str, Any]:
        """Version, provider, threads: what a reader needs to repeat a measurement."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""

    def profile(self, inputs: Arrays, runs: int) -> tuple[OperatorTime, ...]:
        """What each executed operator took, the median of `runs`; with 0 nothing is timed, the times are 0.

        RuntimeFailure where this runtime cannot tell.
        """

    def close(self) -> None:
        """Release the model; may be called twice."""


@runtime_checkable
class ManyAtOnce(Protocol):
    """What a runtime has beside the contract if several callers can use one loaded model at the same time."""

    def lane(self) -> Callable[[Arrays], dict[str, NDArray[Any]]]:
        """An independent caller of the loaded model, as `run`; all lanes may be called at once, from any threads."""


@dataclass(frozen=True)
class Built:
    """What an exporter made for one image size: files, signature, how it came about.

    `model_file` is what the target's runtime loads; a name may be that of a directory. `checked_file` is what the
    exporter's checker runs here: the same file, or the one that the first was built from. `graph` is the deploy form
    as an ONNX graph, on which complexity is counted and rules are checked. `notes` is what the user must be told.
    """

    model_file: str
    checked_file: str
    graph: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    certificates: tuple[Certificate, ...]
    choices: Mapping[str, Any]
    notes: tuple[str, ...] = ()


Watch = Callable[[Path, NDArray[Any], Callable[[str, NDArray[Any]], None]], None]


@dataclass(frozen=True)
class Calibration:
    """The pictures that int8 ranges are measured on.

    `images` has them for each image size, normalised float32 (n, 3, h, w). `record` goes into the manifest: source,
    hashes, labels, seed, what was skipped. `notes` is what the user must be told. `watch` runs a model file of the
    target in its checker on pictures one by one and tells the callback every floating value that it makes, by name;
    None where the checker cannot.
    """

    images: Mapping[Size, NDArray[Any]]
    record: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    watch: Watch | None = None


class Exporter(Protocol):
    """Turns a reference module into a target's files.

    `runtime` names the registered runtime that runs them on the device; `checker` the one that runs
    `Built.checked_file` on any machine, so that every export ends with a comparison. `precisions` lists what
    `ExportSpec.precision` may be, OPTIONS is a frozen dataclass of what the target takes beside, each with a default.
    RECIPE is another one, of how the target is quantised: `edgevit.export.quantize.Recipe` and what it has beside.
    `export` writes only below `directory` and raises ExportError; it does not change `model`.

    Several image sizes come in one call, because how files share weights is the target's affair: graphs beside a common
    weight file (ONNX), or nothing in common (a TensorRT engine, a Core ML package). Each size
    is a whole of its own in what is returned, and may name files that another one names too.
    """

    name: str
    runtime: str
    checker: str
    precisions: tuple[str, ...]
    naive_suffix: str
    OPTIONS: type[Any]
    RECIPE: type[Any]

    def export(
        self,
        model: nn.Module,
        card: ModelCard,
        specs: Sequence[ExportSpec],
        directory: Path,
        calibration: Calibration | None = None,
    ) -> tuple[Built, ...]:
        """Write the files for one model into an existing empty directory; one `Built` for each spec, in their order.

        There is at least one spec; they differ in `image_size` alone. `calibration` is there where the precision is
        int8 and `spec.recipe.calibrated`.
        """

    def export_naive(self, model: nn.Module, card: ModelCard, spec: ExportSpec, path: Path) -> None:
        """Write what the target's own exporter makes of the same reference form: the baseline of `bench --vs naive`.

        `path` ends in `naive_suffix`.
        """

    def lint_for(self, settings: Any) -> tuple[str, ...]:
        """The lint profiles that an export with these OPTIONS has to meet, e.g. ("tensorrt-8.6", "tensorrt-11")."""

    def abilities(self) -> tuple[Ability, ...]:
        """What can be built, run and only checked on this machine, and how to get the rest."""


class ModelFamily(Protocol):
    """What a model file offers to the rest of the house; the module itself satisfies this protocol.

    CARDS: one card per model name, in the order they are listed.
    OPTIONS: a frozen dataclass of what the family takes beside; every field has a default.
    CLASSIFIER: the layer that `num_classes` replaces.
    HEAD_PREFIXES: parameters that the backbone (`features_only`) does not have.
    """

    CARDS: Mapping[str, ModelCard]
    OPTIONS: type[Any]
    CLASSIFIER: str
    HEAD_PREFIXES: tuple[str, ...]

    def build(self, name: str, options: Any, *, num_classes: int, features_only: bool) -> nn.Module:
        """The reference form with its official initialisation."""

    def filter_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors under this file's parameter names, without buffers that the network recomputes."""

    def fit_checkpoint(self, state: dict[str, Tensor], module: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Resample what depends on the options (bias tables, position embeddings) to `module`, and what to tell."""
