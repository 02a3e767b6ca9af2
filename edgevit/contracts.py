"""What the folders promise each other. A runtime is load, run, close; an exporter is export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgevit.specs import ModelCard, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

Arrays = Mapping[str, np.ndarray]


class Runtime(Protocol):
    """Runs one model file. `load` may raise RuntimeFailure or MissingDependencyError, `run` RuntimeFailure.

    Buffers: `run` never keeps or changes its inputs; what it returns is the caller's to keep. `close` may be called
    twice; `run` after `close` raises RuntimeFailure. Use the wrapper in `edgevit.runtimes.base`, which checks names,
    shapes and types in one place, rather than a bare runtime.
    """

    name: str

    def load(self, path: Path) -> None: ...

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]: ...

    @property
    def effective_precision(self) -> str:
        """The precision that really runs, read back from the runtime: "fp32", "bf16", ..."""
        ...

    def describe(self) -> dict[str, Any]:
        """Version, provider, threads: what a reader needs to repeat a measurement."""
        ...

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


class ModelFamily(Protocol):
    """What a model file offers to the rest of the house; the module itself satisfies this protocol."""

    CARDS: Mapping[str, ModelCard]
    OPTIONS: type[Any]
    CLASSIFIER: str
    HEAD_PREFIXES: tuple[str, ...]

    def build(self, name: str, options: Any, *, num_classes: int, features_only: bool) -> nn.Module: ...

    def filter_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]: ...
