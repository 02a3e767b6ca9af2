"""The token side of a whole network as few Gemms: what reads the same tokens becomes one Linear, across blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevit.models.mobile_former import Classifier, Features, LiteBottleneck, MobileFormer

from .bridges import (
    ChannelFirstFormerToMobile,
    ChannelFirstMobileToFormer,
    gather_from_map,
    map_heads,
    scatter_to_map,
    split_heads,
)
from .certificate import Changed, DeploySpec
from .dynamic_relu import ClippedDynamicReLU, clip, token_share
from .former import MaskedFormer, shifted_norm
from .hidden_branches import BranchedBlock
from .linear import ResidualLinear, make_linear, stack, unshift


def merge_token_stream(model: nn.Module, spec: DeploySpec) -> Changed:
    """Carry the tokens as (n t, d) through the network and merge the Linears that read them.

    Given:  after all other rewrites, per block: queries and gates; keys and values; two hyper networks
    Result: one Linear for this block's keys and values and the next block's queries and gates; one Linear for both
            hyper networks' first layers; the bridge's bias moved into the norm before it; what the first block
            computes from the token embedding alone folded to constants
    """
    if not isinstance(model, MobileFormer) or not all(
        isinstance(block, BranchedBlock | LiteBottleneck) for block in model.features
    ):
        return model, 0, ()
    stream = TokenStream(model, spec)
    return stream, len(stream.blocks), ("folded: first block's queries and gates",)


class TokenStream(nn.Module):
    """The deploy form of Mobile-Former as a whole."""

    embedding: Tensor
    queries: Tensor
    gates: Tensor

    def __init__(self, model: MobileFormer, spec: DeploySpec) -> None:
        super().__init__()
        self.stem, self.features_only = model.stem, model.features_only
        lite = [block for block in model.features if isinstance(block, LiteBottleneck)]
        blocks = [block for block in model.features if isinstance(block, BranchedBlock)]
        self.lite = nn.ModuleList(lite)
        self.strides = model.strides
        bridges = [cast(ChannelFirstMobileToFormer, block.local_global) for block in blocks]
        if not model.features_only:
            bridges.append(cast(ChannelFirstMobileToFormer, model.local_global))
            self.head = Head(model.classifier)
        nexts = [*bridges[1:], None][: len(blocks)]
        self.blocks = nn.ModuleList(StreamBlock(b, n, spec) for b, n in zip(blocks, nexts, strict=True))
        self.entries = nn.ModuleList(ResidualLinear(bridge.proj) for bridge in bridges)
        self.norms = nn.ModuleList(bridge.layer_norm for bridge in bridges)
        self.one_picture = spec.batch == 1
        embedding = model.tokens.weight.detach()
        self.count = embedding.shape[0]
        q, gate = split_heads(bridges[0].queries(embedding), self.count, parts=2)
        self.register_buffer("embedding", embedding + bridges[0].proj.bias.detach())
        self.register_buffer("queries", q.detach())
        self.register_buffer("gates", gate.detach().clamp(0, 2))

    def forward(self, image: Tensor) -> Tensor | Features:
        """image (n, 3, h, w) -> logits (n, classes), or `Features`."""
        x = self.stem(image)
        for lite in self.lite:
            x, _ = lite(x, self.embedding)
        z, q, gate = self.first_tokens(image), self.queries, self.gates
        maps: dict[int, Tensor] = {self.strides[len(self.lite) - 1]: x} if len(self.lite) else {}
        heads = map_heads(x)
        for i, block in enumerate(self.blocks):
            out, scores = gather_from_map(heads, q, gate)
            z = self.norms[i](self.entries[i](out, z))
            z, x, heads, q, gate = block(x, z, scores)
            maps[self.strides[len(self.lite) + i]] = x
        if self.features_only:
            return Features(maps[4], maps[8], maps[16], maps[32], z.reshape(-1, self.count, z.shape[1]))
        out, _ = gather_from_map(heads, q, gate)
        z = self.norms[-1](self.entries[-1](out, z))
        logits: Tensor = self.head(x, first_token(z, self.count, one_picture=self.one_picture))
        return logits

    def first_tokens(self, image: Tensor) -> Tensor:
        """The token embedding for every picture: (n t, d)."""
        if self.one_picture:
            return self.embedding
        return self.embedding.expand(image.shape[0], -1, -1).flatten(0, 1)


class StreamBlock(nn.Module):
    """One block from its Former on; ends with the next block's queries and gates."""

    def __init__(self, block: BranchedBlock, following: ChannelFirstMobileToFormer | None, spec: DeploySpec) -> None:
        super().__init__()
        self.block = block
        self.former = cast(MaskedFormer, block.global_block)
        self.one_picture = spec.batch == 1
        self.parts = 2 if following is None else 4
        bridge = cast(ChannelFirstFormerToMobile, block.global_local)
        projections = [bridge.keys_values] + ([] if following is None else [following.queries])
        hypers = [block.hyper1, block.hyper2]
        self.spatial = block.hyper1.spatial
        projection, hidden = stack(*projections), stack(*(hyper.hidden for hyper in hypers))
        if following is not None:
            shift = following.proj.bias.detach()
            self.former.ffn_norm = shifted_norm(self.former.ffn_norm, shift)
            projection, hidden = unshift(projection, shift), unshift(hidden, shift)
        self.projection = projection
        self.slopes = SlopePair(hidden, hypers, one_picture=self.one_picture)
        del block.local_global, block.global_block, block.global_local, block.hyper1, block.hyper2

    def forward(self, x: Tensor, z: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (n, c, h, w), z (n t, d), scores (n, k, t, hw) -> z, x, x by heads, next queries, next clipped gates."""
        count = scores.shape[2]
        z = self.former.update(z, count)
        theta = self.theta(x, z, scores)
        parts = split_heads(self.projection(z), count, self.parts)
        x = self.block.mobile(x, *self.block.slopes(theta))
        heads = scatter_to_map(map_heads(x), parts[0], parts[1])
        x = heads.reshape(-1, *x.shape[1:])
        if self.parts == 2:  # the last block of a backbone: nothing lies ahead, and nobody reads what stands in
            return z, x, heads, parts[0], parts[1]
        q, gate = parts[2], parts[3].clamp(0, 2)
        return z, x, heads, q, gate

    def theta(self, x: Tensor, z: Tensor, scores: Tensor) -> Tensor:
        """Clipped slopes of both activations: (n, 2e1 + 2e2, 1, 1), or (n, 2e1 + 2e2, h', w') where spatial."""
        count = scores.shape[2]
        if not self.spatial:
            theta: Tensor = self.slopes(first_token(z, count, one_picture=self.one_picture))
            return theta
        size = self.block.out_size(x)
        share = token_share(scores.unflatten(3, x.shape[-2:]), size)  # n t hw
        by_token = self.slopes(z).reshape(-1, count, self.slopes.channels)  # n*t 2e1+2e2 1 1 -> n t 2e1+2e2
        return (by_token.transpose(1, 2) @ share).unflatten(2, size)


class SlopePair(nn.Module):
    """Both hyper networks of a block, their first layers one Gemm and, where the widths agree, their second layers too.

    A hidden unit that is always one carries the second layers' biases, so that the pair is one product.
    """

    low: Tensor
    high: Tensor
    pair: Tensor

    def __init__(self, hidden: nn.Linear, hypers: Sequence[ClippedDynamicReLU], *, one_picture: bool) -> None:
        super().__init__()
        self.register_buffer("low", torch.cat([h.low for h in hypers]))
        self.register_buffer("high", torch.cat([h.high for h in hypers]))
        first, second = (h.slopes for h in hypers)
        self.channels = first.out_features + second.out_features
        self.paired = one_picture and not hypers[0].spatial and first.out_features == second.out_features
        if self.paired:
            halves = zip(hidden.weight.chunk(2), hidden.bias.chunk(2), strict=True)
            rows = [(torch.cat([w, w.new_zeros(1, w.shape[1])]), torch.cat([b, b.new_ones(1)])) for w, b in halves]
            hidden = make_linear(torch.cat([w for w, _ in rows]), torch.cat([b for _, b in rows]))
            pair = torch.stack([torch.cat([s.weight.t(), s.bias[None]]) for s in (first, second)])  # 2 d/4+1 2e
            self.register_buffer("pair", pair.detach().clone())
            self.low, self.high = (limit.reshape(2, 1, -1) for limit in (self.low, self.high))
        else:
            self.seconds = nn.ModuleList([first, second])
        self.hidden = hidden

    def forward(self, z: Tensor) -> Tensor:
        """z (m, d) -> clipped slopes of the first, then of the second activation: (m, 2e1 + 2e2, 1, 1)."""
        hidden = F.relu(self.hidden(z))
        if self.paired:
            y = hidden.reshape(2, 1, -1) @ self.pair  # 2 1 d/4+1 @ 2 d/4+1 2e -> 2 1 2e
        else:
            halves = zip(self.seconds, hidden.chunk(2, dim=1), strict=True)
            y = torch.cat([second(half) for second, half in halves], dim=1)  # m 2e1+2e2
        return clip(y, self.low, self.high).reshape(-1, self.channels, 1, 1)


class Head(nn.Module):
    """The classifier with the hard-swish as one operator and no dropout."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.conv = nn.Sequential(*(layer for layer in classifier.conv if not isinstance(layer, nn.Identity)))
        self.fc, self.classifier = classifier.fc, classifier.classifier[1]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (n, c, h, w), z (n, d), token 0 -> logits (n, classes)."""
        pooled = F.hardswish(self.conv(x).mean((2, 3)))  # n c h w -> n 6c
        logits: Tensor = self.classifier(F.hardswish(self.fc(torch.cat([pooled, z], dim=1))))
        return logits


def first_token(z: Tensor, count: int, *, one_picture: bool) -> Tensor:
    """z (n t, d) -> token 0 of every picture, (n, d)."""
    return z[:1] if one_picture else z.reshape(-1, count, z.shape[1])[:, 0]
