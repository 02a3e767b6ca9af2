"""The one place where the folders meet: each verb of the command line is one function, with the same errors."""

from __future__ import annotations

from .benching import benchmark
from .calibrating import Pictures
from .catalog import doctor, info, list_models
from .evaluating import evaluate
from .exporting import export_model
from .gating import gate
from .ingesting import ingest
from .linting import lint
from .profiling import profile
from .proving import verify
from .quantizing import sensitivity
from .running import load, predict
from .simulating import simulate

__all__ = [
    "Pictures",
    "benchmark",
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
