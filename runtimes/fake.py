"""A scripted runtime for tests: outputs and failures come from a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from edgevit.contracts import Arrays
from edgevit.specs import NoOptions, OperatorTime, TensorSpec

Script = Callable[[Arrays], dict[str, NDArray[Any]]]


class FakeRuntime:
    """Answers `run` with `script(inputs)`; counts its calls."""

    name = "fake"
    OPTIONS = NoOptions

    def __init__(
        self,
        script: Script,
        inputs: Sequence[TensorSpec] = (TensorSpec("image", ("batch", 3, 32, 32), layout="NCHW"),),
        outputs: Sequence[TensorSpec] = (TensorSpec("logits", ("batch", 1000)),),
        precision: str = "fp32",
        asked: str = "fp32",
        profiled: Sequence[OperatorTime] = (),
    ) -> None:
        self.script = script
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.effective_precision, self.asked_precision = precision, asked
        self.profiled = tuple(profiled)
        self.calls: list[str] = []

    @classmethod
    def obstacle(cls) -> str | None:
        """None."""
        return None

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

    def lane(self) -> Callable[[Arrays], dict[str, NDArray[Any]]]:
        """`run` itself."""
        self.calls.append("lane")
        return self.run

    def profile(self, inputs: Arrays, runs: int) -> tuple[OperatorTime, ...]:  # noqa: ARG002  # the contract's signature
        """What it was given."""
        self.calls.append("profile")
        return self.profiled

    def close(self) -> None:
        """Note the call."""
        self.calls.append("close")
