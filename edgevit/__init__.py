"""edgevit: vision transformers on edge devices. Export, lint, verify, run, profile, benchmark.

Importing this package imports neither PyTorch nor any runtime; the names below load what they need when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgevit.api import (
        Pictures,
        benchmark,
        doctor,
        evaluate,
        export_model,
        gate,
        info,
        ingest,
        lint,
        list_models,
        load,
        predict,
        profile,
        sensitivity,
        simulate,
        verify,
    )
    from edgevit.artifact import Artifact
    from edgevit.errors import EdgevitError
    from edgevit.models import create_model

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "edgevit.artifact",
    "EdgevitError": "edgevit.errors",
    "Pictures": "edgevit.api",
    "benchmark": "edgevit.api",
    "create_model": "edgevit.models",
    "doctor": "edgevit.api",
    "evaluate": "edgevit.api",
    "export_model": "edgevit.api",
    "gate": "edgevit.api",
    "info": "edgevit.api",
    "ingest": "edgevit.api",
    "lint": "edgevit.api",
    "list_models": "edgevit.api",
    "load": "edgevit.api",
    "predict": "edgevit.api",
    "profile": "edgevit.api",
    "sensitivity": "edgevit.api",
    "simulate": "edgevit.api",
    "verify": "edgevit.api",
}

__all__ = [
    "Artifact",
    "EdgevitError",
    "Pictures",
    "__version__",
    "benchmark",
    "create_model",
    "doctor",
    "evaluate",
    "export_model",
    "gate",
    "info",
    "ingest",
    "lint",
    "list_models",
    "load",
    "predict",
    "profile",
    "sensitivity",
    "simulate",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgevit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
