"""A network that takes pixels: what follows Core ML's own scale and bias of a picture, folded into the weights.

Core ML computes pixel * scale + bias with one scale for all channels and one bias for each. A network is trained on
(pixel / 255 - mean) / std, so scale is 1 / 255, bias is -mean, and the division by std goes into the weights of the
convolutions that read the picture. Padding stays right: what Core ML hands over is centred already, so that a zero
added at the border means the same before and after.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHANNELS = 3


def scaled_input(form: nn.Module, std: Sequence[float], probe: Tensor) -> tuple[nn.Module, str]:
    """A network that computes form(x / std) from x (n, 3, h, w), and where the division went.

    Given:  convolutions, and nothing else, read the picture
    Result: their weights (k, 3, ...) divided by std; otherwise the division is an operator of its own

    The claim is not taken on trust: `probe` (zeros) is run with an observer at every convolution, and the result is
    compared with the original in float64. `form` is not changed.
    """
    gain = (1 / torch.tensor(std, dtype=torch.float64)).view(1, -1, 1, 1)
    image = torch.randn(probe.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    folded = copy.deepcopy(form).double()
    with torch.no_grad():
        expected = folded(image * gain)
        readers = _readers(folded, probe.double())
        for conv in readers:
            conv.weight.mul_(gain)  # k 3 h w
        alike = _same(folded(image), expected)
    if readers and alike:
        return folded.float(), f"folded into {len(readers)} convolution{'s' if len(readers) > 1 else ''}"
    return Divided(form, gain.float()), "an operator of its own: not only convolutions read the picture"


def _readers(module: nn.Module, probe: Tensor) -> list[nn.Conv2d]:
    """The convolutions that read the picture itself, all channels of it in one group."""
    found: list[nn.Conv2d] = []

    def observe(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].data_ptr() == probe.data_ptr() and isinstance(conv, nn.Conv2d):
            found.append(conv)

    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    hooks = [m.register_forward_pre_hook(observe) for m in convolutions if m.in_channels == CHANNELS]
    try:
        module(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(found))


CLOSE = 1e-9  # of float64, as the certificates of the deploy form have it


def _same(actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> bool:
    mine, theirs = ([out] if isinstance(out, Tensor) else list(out) for out in (actual, expected))
    return all(
        float((a - e).abs().max()) <= CLOSE * max(1.0, float(e.abs().max())) for a, e in zip(mine, theirs, strict=True)
    )


class Divided(nn.Module):
    """`form` after a product with 1 / std."""

    gain: Tensor

    def __init__(self, form: nn.Module, gain: Tensor) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("gain", gain)

    def forward(self, x: Tensor) -> Tensor | Sequence[Tensor]:
        """x (n, 3, h, w)."""
        result: Tensor | Sequence[Tensor] = self.form(x * self.gain)
        return result
