"""INT8, one recipe per target: calibration, placement, and what stays float and why."""

from .recipe import Calibrator, Recipe

__all__ = ["Calibrator", "Recipe"]
