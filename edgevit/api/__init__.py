"""The one place where the folders meet: each verb of the command line is one function, with the same errors."""

from __future__ import annotations

from .benching import benchmark
from .catalog import doctor, info, list_models
from .exporting import export_model
from .proving import verify
from .running import load, predict

__all__ = ["benchmark", "doctor", "export_model", "info", "list_models", "load", "predict", "verify"]
