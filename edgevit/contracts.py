"""What the folders promise each other. A runtime is load, run, close; an exporter turns a module into files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from edgevit.specs import Certificate, ExportSpec, ModelCard, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

Arrays = Mapping[str, NDArray[Any]]


class Runtime(Protocol):
    """Runs one model. The constructor only notes what to run; `load` may raise RuntimeFailure.

    Buffers: `run` never keeps or changes its inputs, and what it returns is the caller's to keep. A runtime may trust
    its inputs: names, shapes and types are checked in one place, `edgevit.runtimes.Session`, through which all
    runtimes are used.
    """

    name: str

    def load(self) -> None:
        """Make ready to run; called once."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """What `run` takes, known after `load`."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What `run` returns, known after `load`."""

    @property
    def effective_precision(self) -> str:
        """The precision that really runs, read back from what was loaded: "fp32", "bf16", ..."""

    def describe(self) -> dict[str, Any]:
        """Version, provider, threads: what a reader needs to repeat a measurement."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""

    def close(self) -> None:
        """Release the model; may be called twice."""


@dataclass(frozen=True)
class Built:
    """What an exporter made for one image size: the file that the runtime loads, its signature, how it came about.

    `onnx_file` is the graph on which complexity is counted, where the target has one.
    """

    model_file: str
    onnx_file: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    certificates: tuple[Certificate, ...]
    choices: Mapping[str, str]


class Exporter(Protocol):
    """Turns a reference module into a target's files.

    `runtime` names the registered runtime that can run them here; `precisions` lists what `ExportSpec.precision` may
    be. `export` writes only below `directory` and raises ExportError; it does not change `model`.

    Several image sizes come in one call, because how files share weights is the target's affair: graphs beside a common
    weight file (ONNX), one package that holds every shape (CoreML), or nothing in common (a TensorRT engine). Each size
    is a whole of its own in what is returned, and may name files that another one names too.
    """

    name: str
    runtime: str
    precisions: tuple[str, ...]

    def export(
        self, model: nn.Module, card: ModelCard, specs: Sequence[ExportSpec], directory: Path
    ) -> tuple[Built, ...]:
        """Write the files for one model into an existing empty directory; one `Built` for each spec, in their order.

        There is at least one spec; they differ in `image_size` alone.
        """

    def export_naive(self, model: nn.Module, card: ModelCard, spec: ExportSpec, path: Path) -> None:
        """Write what the target's own exporter makes of the same reference form: the baseline of `bench --vs naive`."""


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
