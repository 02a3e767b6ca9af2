"""The two bridges with the feature map left channel first: no transpose of a map, no scaling, one clip for the gate."""

from __future__ import annotations

from torch import Tensor, nn

from edgevit.models.mobile_former import BRIDGE_HEADS, FormerToMobile, MobileToFormer

from .certificate import Changed, DeploySpec
from .linear import affine, make_linear, stack


def channel_first_bridges(model: nn.Module, spec: DeploySpec) -> Changed:
    """Fold scales and gate into the projections and merge projections that read the same tokens.

    Given:  q, gate = Linear(z), Linear(z); softmax(scale q x) x^T * 2 clip(gate + 3, 0, 6) / 6   (Mobile->Former)
            k, v = Linear(z), Linear(z); x + (softmax(scale x^T k^T) v)^T                         (Mobile<-Former)
    Result: q, gate = one Linear; x softmax(q^T x)^T * clip(gate, 0, 2)
            k, v = one Linear; x + v softmax(k^T x), softmax over the tokens
            with x, q, k, v, gate as (c/k, positions or t): no map is transposed, tokens only once, together
    """
    places = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MobileToFormer):
                setattr(parent, name, ChannelFirstMobileToFormer(child))
                places += 1
            elif isinstance(child, FormerToMobile):
                setattr(parent, name, ChannelFirstFormerToMobile(child))
                places += 1
    return model, places, ()


def split_heads(projected: Tensor, tokens: int, parts: int) -> tuple[Tensor, ...]:
    """(n t, parts c) -> parts of (n, k, c/k, t)."""
    heads = parts * BRIDGE_HEADS
    if projected.shape[0] == tokens:
        # The reshape behind the transpose keeps ONNX Runtime from moving it through the split, once for every part.
        return projected.t().reshape(parts, BRIDGE_HEADS, -1, tokens).split(1)  # t (parts c) -> parts k c/k t
    by_head = projected.reshape(-1, tokens, heads, projected.shape[-1] // heads).permute(0, 2, 3, 1)
    return by_head.split(BRIDGE_HEADS, dim=1)


def map_heads(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, k, c/k, h w), the same memory."""
    _, channels, height, width = x.shape
    return x.reshape(-1, BRIDGE_HEADS, channels // BRIDGE_HEADS, height * width)


class ChannelFirstMobileToFormer(nn.Module):
    """Mobile->Former; `queries` yields scaled queries, then gates."""

    def __init__(self, bridge: MobileToFormer) -> None:
        super().__init__()
        gate = bridge.alpha[0]
        if not isinstance(gate, nn.Linear):
            raise TypeError(f"expected the gate's Linear, got {type(gate).__name__}")
        self.queries = stack(
            affine(bridge.q, bridge.scale), affine(gate, 1 / 3, 1.0)
        )  # 2 hsig(y) = clip(y/3 + 1, 0, 2)
        self.proj = make_linear(bridge.proj.weight, bridge.proj.bias)
        self.layer_norm = bridge.layer_norm

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, c, h, w), z (n, t, d) -> tokens (n, t, d), scores (n, k, t, h, w)."""
        q, gate = split_heads(self.queries(z.flatten(0, 1)), z.shape[1], parts=2)
        out, scores = gather_from_map(map_heads(x), q, gate.clamp(0, 2))
        return self.layer_norm(z + self.proj(out.reshape(-1, z.shape[1], x.shape[1]))), scores.unflatten(
            3, x.shape[-2:]
        )


class ChannelFirstFormerToMobile(nn.Module):
    """Mobile<-Former; `keys_values` yields scaled keys, then values."""

    def __init__(self, bridge: FormerToMobile) -> None:
        super().__init__()
        self.keys_values = stack(affine(bridge.k, bridge.scale), bridge.proj)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (n, c, h, w), z (n, t, d) -> (n, c, h, w)."""
        k, v = split_heads(self.keys_values(z.flatten(0, 1)), z.shape[1], parts=2)
        return scatter_to_map(map_heads(x), k, v).reshape(x.shape)


def gather_from_map(x: Tensor, q: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Mobile->Former attention: K = V = x.

    x (n, k, c/k, hw), q and clipped gate (n, k, c/k, t) -> gated output (n t, c), scores (n, k, t, hw).
    """
    scores = q.transpose(2, 3) @ x
    out = (x @ scores.softmax(-1).transpose(2, 3)) * gate  # n k c/k t
    channels, tokens = x.shape[1] * x.shape[2], q.shape[3]
    if x.shape[0] == 1:
        return out.reshape(channels, tokens).t(), scores
    return out.reshape(-1, channels, tokens).transpose(1, 2).reshape(-1, channels), scores  # n t c -> n*t c


def scatter_to_map(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mobile<-Former attention: x (n, k, c/k, hw), k and v (n, k, c/k, t) -> x + output, same shape."""
    return x + v @ (k.transpose(2, 3) @ x).softmax(2)
