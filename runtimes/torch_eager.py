"""PyTorch eager: the reference itself, behind the same contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgevit.contracts import Arrays
from edgevit.errors import RuntimeFailure
from edgevit.specs import NoOptions, OperatorTime, TensorSpec


class TorchRuntime:
    """Runs a module on pictures of `size` (height, width), any batch."""

    name = "torch"
    OPTIONS = NoOptions

    def __init__(self, module: nn.Module, size: tuple[int, int], threads: int | None = None) -> None:
        self.module = module
        self.size = size
        self.threads = threads
        self._before = torch.get_num_threads()

    @classmethod
    def obstacle(cls) -> str | None:
        """None: it runs wherever edgevit does."""
        return None

    def load(self) -> None:
        """Set the threads; the module is there already."""
        self._before = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    @property
    def inputs(self) -> list[TensorSpec]:
        """`image`, any batch."""
        return [TensorSpec("image", ("batch", 3, *self.size), layout="NCHW")]

    @property
    def outputs(self) -> list[TensorSpec]:
        """By name where the module names them; shapes are known only by running."""
        return []

    @property
    def asked_precision(self) -> str:
        """That of the module, whatever it is: the reference is taken as it comes."""
        return self.effective_precision

    @property
    def effective_precision(self) -> str:
        """The type of the parameters."""
        types = {str(p.dtype).removeprefix("torch.") for p in self.module.parameters()}
        return "+".join(sorted({"float32": "fp32", "float64": "fp64"}.get(t, t) for t in types))

    def describe(self) -> dict[str, Any]:
        """Version and threads."""
        return {"runtime": "torch", "version": torch.__version__, "threads": torch.get_num_threads()}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name: `logits`, or the fields of what the module returns."""
        image = torch.from_numpy(np.array(inputs["image"]))  # a copy: the module may not share the caller's memory
        with torch.no_grad():
            out = self.module(image)
        if isinstance(out, Tensor):
            return {"logits": out.numpy()}
        return {name: value.numpy() for name, value in out._asdict().items()}

    def profile(self, inputs: Arrays, runs: int) -> tuple[OperatorTime, ...]:  # noqa: ARG002  # the contract's signature
        """The reference is never timed.

        Raises:
            RuntimeFailure: always.
        """
        raise RuntimeFailure("runtime torch: the reference form has no profile; profile an artifact")

    def close(self) -> None:
        """Restore the threads."""
        torch.set_num_threads(self._before)
