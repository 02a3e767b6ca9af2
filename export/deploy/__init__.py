"""The deploy form: exact rewrites of the reference module, in one order, each with its certificate."""

from __future__ import annotations

import copy

import torch
from torch import nn

from edgevit.specs import Certificate

from .batchnorm import fold_batchnorm
from .bridges import channel_first_bridges
from .certificate import DeploySpec, Rewrite, certify, probe
from .channel_shuffle import densify_pointwise, gather_shuffle
from .class_token import fold_positions, read_tokens_only
from .dynamic_relu import clip_slopes
from .former import masked_former
from .grouped_attention import group_tokens
from .hidden_branches import branch_hidden
from .mlp_branches import branch_mlp
from .patch_merging import flat_embedding, gather_patches
from .token_stream import merge_token_stream

__all__ = ["REWRITES", "DeploySpec", "deploy"]

REWRITES: tuple[Rewrite, ...] = (
    fold_batchnorm,  # first: every later rewrite moves convolution weights and needs the shift beside them
    densify_pointwise,  # before clip_slopes: it reorders the hyper network's own last Linear
    clip_slopes,
    channel_first_bridges,
    masked_former,
    branch_hidden,  # after densify_pointwise (no shuffle inside a bottleneck) and clip_slopes (it splits the slopes)
    gather_shuffle,  # the shuffles that densify_pointwise and branch_hidden left
    merge_token_stream,  # after those before it: it merges across what they left behind
    group_tokens,  # the attention families; of the rewrites above only fold_batchnorm touches them
    gather_patches,
    flat_embedding,
    fold_positions,
    read_tokens_only,  # after group_tokens: it replaces a block of that form
    branch_mlp,  # after read_tokens_only: the few tokens that it leaves need no branches
)


def deploy(model: nn.Module, spec: DeploySpec) -> tuple[nn.Module, list[Certificate]]:
    """The deploy form of `model` for one input shape, float32, and the certificates of the rewrites that applied.

    The rewrites run in float64, so that folding rounds once, at the end. `model` is not changed.

    Raises:
        ExportError: a rewrite did not keep the function.
    """
    certificates = []
    with torch.no_grad():
        form = copy.deepcopy(model).eval().double().requires_grad_(False)
        probed = probe(form, spec)
        for rewrite in REWRITES:
            form, certificate, probed = certify(rewrite, form, spec, probed)
            if certificate is not None:
                certificates.append(certificate)
        return form.float(), certificates
