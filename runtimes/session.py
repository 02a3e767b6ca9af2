"""The one wrapper around every runtime: lifetime and input checks live here, not in each runtime."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit.contracts import Arrays, Runtime
from edgevit.errors import RuntimeFailure
from edgevit.specs import Batch, TensorSpec


class Session:
    """A loaded runtime as a context manager: `with Session(OrtRuntime(path)) as session: session.run(...)`."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._open = False

    def __enter__(self) -> Session:
        self.runtime.load()
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the model; may be called twice."""
        self._open = False
        self.runtime.close()

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name for inputs by name.

        Raises:
            RuntimeFailure: not loaded, an input missing, unknown, of a wrong shape or type, or the runtime failed.
        """
        name = self.runtime.name
        if not self._open:
            raise RuntimeFailure(f"runtime {name}: not loaded, or closed already; use it as a context manager")
        wanted = {spec.name: spec for spec in self.runtime.inputs}
        if set(inputs) != set(wanted):
            raise RuntimeFailure(f"runtime {name}: inputs {sorted(inputs)}, expected {sorted(wanted)}")
        for key, spec in wanted.items():
            _check(name, inputs[key], spec)
        return self.runtime.run(inputs)

    def run_all(self, images: NDArray[np.float32], batch: Batch) -> dict[str, NDArray[Any]]:
        """Outputs for pictures (n, 3, h, w) of any number.

        A static batch is filled up at the end and the surplus dropped; a dynamic one runs as one picture and the rest,
        so that two batch sizes are seen.
        """
        if batch == "dynamic":
            chunks = [images[:1], images[1:]]
        else:
            chunks = [images[i : i + batch] for i in range(0, len(images), batch)]
        parts = []
        for chunk in (c for c in chunks if len(c)):
            filled = chunk if batch == "dynamic" else np.resize(chunk, (batch, *chunk.shape[1:]))
            parts.append({name: array[: len(chunk)] for name, array in self.run({"image": filled}).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def require_precision(self, where: Path) -> None:
        """Compare the precision that really runs with the one that was asked for.

        Raises:
            RuntimeFailure: they differ.
        """
        actual, wanted = self.runtime.effective_precision, self.runtime.asked_precision
        if actual != wanted:
            raise RuntimeFailure(f"{where}: runs in {actual}, expected {wanted}; its numbers would be another model's")


def _check(runtime: str, array: NDArray[Any], spec: TensorSpec) -> None:
    if not isinstance(array, np.ndarray) or array.dtype.name != spec.dtype:
        came = array.dtype.name if isinstance(array, np.ndarray) else type(array).__name__
        raise RuntimeFailure(f"runtime {runtime}: input {spec.name} is {came}, expected a {spec.dtype} array")
    fits = len(array.shape) == len(spec.shape) and all(
        got > 0 if isinstance(want, str) else got == want for got, want in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        want = "x".join(str(d) for d in spec.shape)
        raise RuntimeFailure(
            f"runtime {runtime}: input {spec.name} has shape {'x'.join(map(str, array.shape))}, expected {want}; "
            "export again with --batch or --image-size for another"
        )
