"""The one place where the folders meet: each verb of the command line is one function, with the same errors."""

from __future__ import annotations

from .benching import benchmark
from .catalog import doctor, info, list_models
from .exporting import export_model
from .ingesting import ingest
from .linting import lint
from .profiling import profile
from .proving import verify
from .running import load, predict

__all__ = [
    "benchmark",
    "doctor",
    "export_model",
    "info",
    "ingest",
    "lint",
    "list_models",
    "load",
    "predict",
    "profile",
    "verify",
]
