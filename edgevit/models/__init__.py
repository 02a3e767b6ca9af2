"""Reference networks by name: create, load, list."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgevit import checkpoint
from edgevit.errors import UsageError
from edgevit.options import parse_options
from edgevit.reference import trained
from edgevit.reference.stress import stress
from edgevit.registry import family_of
from edgevit.specs import ModelCard

DEFAULT_CLASSES = 1000  # ImageNet-1k, which all published checkpoints of these networks classify
MAX_SEED = 2**63 - 1  # the largest that PyTorch's generator takes
ADDED = ("bias_table", "scale_table", "pos_embed", "cls_token", "dist_token")  # no matrices: used as they are
MAX_CLASSES = 1_000_000  # more than any published vocabulary; beyond it the last layer alone would not fit in memory


@dataclass(frozen=True)
class LoadedModel:
    """A reference module in eval mode, its card, where its weights came from, and what the user should be told."""

    module: nn.Module
    card: ModelCard
    num_classes: int
    weights: Mapping[str, Any]
    notes: tuple[str, ...]


def model_card(name: str) -> ModelCard:
    """What is known of a published network.

    Raises:
        UnknownNameError: no such model.
    """
    return family_of(name)[1].CARDS[name]


def create_model(
    name: str,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    features_only: bool = False,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """The reference form of a network in eval mode, parameters float32 under their official names.

    Args:
        name: a registered model.
        weights: an official .pth, a bare state_dict or .safetensors, or the name of weights that ship with edgevit,
            "reference-task" or "reference-task-stress"; without it those of the `*_tiny` networks that have some, else
            the official initialisation, seeded.
        num_classes: outputs of the classifier; if not the checkpoint's, the last layer is new and a warning says so.
        features_only: return the maps of stride 4, 8, 16, 32 (and what else the family names) instead of logits.
        options: what the family takes beside, e.g. `spatial_dynamic_relu=True`.

    Raises:
        UnknownNameError, UsageError: the request. CheckpointError: the weights.
    """
    loaded = load_model(name, weights, num_classes, features_only=features_only, options=options, seed=seed)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return loaded.module


def load_model(
    name: str,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    *,
    features_only: bool = False,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    randomize: bool = False,
) -> LoadedModel:
    """`create_model` with its provenance. With `randomize` and no weights, no parameter keeps a neutral value."""
    _, family = family_of(name)
    if num_classes is not None and not 1 <= num_classes <= MAX_CLASSES:
        raise UsageError(f"number of classes {num_classes}: expected 1 to {MAX_CLASSES}")
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"seed {seed}: expected 0 to {MAX_SEED}")
    choices = parse_options(family.OPTIONS, name, options or {})
    if weights is None and family.CARDS[name].num_classes != DEFAULT_CLASSES:
        weights = trained.PLAIN
    read = None if weights is None else _read(name, weights)
    state = None if read is None else family.filter_checkpoint(dict(read.state))
    classes = num_classes or _classes_of(state, family.CLASSIFIER, family.CARDS[name].num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = family.build(name, choices, num_classes=classes, features_only=features_only)
        if read is None and randomize:
            randomize_(module)
    if read is None or state is None:
        new = {"source": "random", "seed": seed, "sha256": checkpoint.state_sha256(module.state_dict())}
        return LoadedModel(module.eval(), family.CARDS[name], classes, new, ())
    note = None
    if features_only:
        state = {key: tensor for key, tensor in state.items() if not key.startswith(family.HEAD_PREFIXES)}
    elif num_classes is not None:  # asked for: another number of classes is no misfit then
        state, note = checkpoint.replace_classifier(module, state, family.CLASSIFIER)
    state, notes = family.fit_checkpoint(state, module)
    checkpoint.load_state(module, state, where=str(weights))
    record: dict[str, Any] = {"source": Path(str(weights)).name, "sha256": read.sha256, "entry": read.entry}
    if weights == trained.STRESSED:
        done = stress(module)
        record |= {"sha256": checkpoint.state_sha256(module.state_dict()), "enlarged": done.enlarged}
    return LoadedModel(module.eval(), family.CARDS[name], classes, record, (*([note] if note else []), *notes))


def _read(name: str, weights: str | Path) -> checkpoint.Checkpoint:
    """A file's weights, or those that ship under this name; a file of that name is reached as ./reference-task."""
    return trained.read(name) if weights in trained.NAMES else checkpoint.read_checkpoint(Path(weights))


def _classes_of(state: Mapping[str, torch.Tensor] | None, layer: str, default: int) -> int:
    """Rows of a checkpoint's classifier; the default where it has none, for the strict load to name what is wrong."""
    rows = None if state is None else state.get(f"{layer}.weight")
    if rows is None or rows.dim() != 2 or not 1 <= rows.shape[0] <= MAX_CLASSES:
        return default
    return rows.shape[0]


def randomize_(module: nn.Module) -> None:
    """Give every parameter and statistic a plausible random value, from torch's current generator.

    An initialised network is no test of an exporter: its norms are identities and its dynamic ReLUs plain ReLUs. The
    gains keep activations near unit size through the depth of these networks.
    """
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn_like(tensor)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand_like(tensor))
            elif name.endswith(ADDED):
                tensor.copy_(0.5 * noise)
            elif tensor.dim() >= 2:
                gain = 1.15 if tensor.dim() == 4 else 0.75  # convolutions are followed by rectifiers, Linears by norms
                tensor.copy_(gain * noise / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
