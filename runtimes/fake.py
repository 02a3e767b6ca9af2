"""A scripted runtime for tests: outputs and failures come from a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from edgevit.contracts import Arrays
from edgevit.specs import TensorSpec

Script = Callable[[Arrays], dict[str, NDArray[Any]]]


class FakeRuntime:
    """Answers `run` with `script(inputs)`; counts its calls."""

    name = "fake"

    def __init__(
        self,
        script: Script,
        inputs: Sequence[TensorSpec] = (TensorSpec("image", ("batch", 3, 32, 32), layout="NCHW"),),
        outputs: Sequence[TensorSpec] = (TensorSpec("logits", ("batch", 1000)),),
        precision: str = "fp32",
    ) -> None:
        self.script = script
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.effective_precision = precision
        self.calls: list[str] = []

    def load(self) -> None:
        """Note the call."""
        self.calls.append("load")

    def describe(self) -> dict[str, Any]:
        """Nothing but its name."""
        return {"runtime": "fake"}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """What the script says."""
        self.calls.append("run")
        return self.script(inputs)

    def close(self) -> None:
        """Note the call."""
        self.calls.append("close")
