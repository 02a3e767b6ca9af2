"""What there is: `list_models`, `info`, `doctor`."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

from edgevit import __version__, registry
from edgevit.errors import UnknownNameError
from edgevit.options import as_json, parse_options
from edgevit.paper import gaps
from edgevit.specs import Size, check_image_size

from .counting import counter
from .natural_size import size_notes


def list_models(pattern: str = "*", family: str | None = None) -> list[str]:
    """Names of the registered models that match a shell pattern, of one family or of all.

    Raises:
        UnknownNameError: no such family.
    """
    if family is not None and family not in registry.FAMILIES:
        raise UnknownNameError("family", family, registry.FAMILIES)
    of_family = None if family is None else registry.FAMILIES[family][1]
    return [name for name in registry.model_names(pattern) if of_family is None or name in of_family]


def info(model: str, image_size: Size | None = None, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is known of a model: exact parameters, MACs and FLOPs at a size, the paper's figures, its options.

    `gaps` has ours minus the paper's in percent of the paper's; the papers' FLOPs are multiply-adds, so they stand
    beside MACs. None where the paper has no figure, or it is for other options or another size.

    Raises:
        UnknownNameError: no such model or option. UsageError: the size or an option's value.
    """
    from edgevit.models import model_card

    card = model_card(model)
    size = check_image_size(image_size or card.image.size, card.size_multiple)
    kind = registry.family_of(model)[1].OPTIONS
    chosen = parse_options(kind, model, options or {})
    count = counter(model, options or {}, num_classes=card.num_classes)
    counted = count(size)
    published = chosen == kind()
    comparable = published and size == card.image.size
    return {
        "model": card.name,
        "family": card.family,
        "title": card.title,
        "url": card.url,
        "origin": card.origin,
        "image_size": list(size),
        "parameters": counted.parameters,
        "macs": counted.macs,
        "flops": counted.flops,
        "paper": dict(card.paper),
        "gaps": gaps(card.paper, counted.parameters if published else None, counted.macs if comparable else None),
        "options": as_json(chosen),
        "targets": list(registry.TARGETS),
        "notes": [*card.notes, *size_notes(card, [size], lambda at: count(at).macs)],
    }


def doctor() -> dict[str, Any]:
    """What of edgevit works on this machine: versions, targets and runtimes with what they lack, the processor.

    A target that can be loaded has `abilities`: what can be built, run and only checked here, and how to get the rest;
    a runtime has the `obstacle` that keeps it from running anything here, or None. `ok` is that everything can be
    loaded but what an extra that was not asked for would bring.
    """
    from edgevit.bench.machine import machine_record

    checks = [{**check, **_tells(check)} for check in registry.check_all()]
    return {
        "edgevit": __version__,
        "python": platform.python_version(),
        "ok": all(check["ok"] or check.get("optional") for check in checks),
        "checks": checks,
        "machine": machine_record(),
    }


def _tells(check: Mapping[str, Any]) -> dict[str, Any]:
    """What a target or runtime that can be loaded says of this machine."""
    if not check["ok"]:
        return {}
    if check["kind"] == "runtime":
        return {"obstacle": registry.runtime_class(check["name"]).obstacle()}
    return {"abilities": [dataclasses.asdict(ability) for ability in registry.exporter(check["name"]).abilities()]}
