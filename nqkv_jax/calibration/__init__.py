"""Calibration: what some schemes learn about a model before they cache anything."""

from nqkv_jax.calibration.recorder import Recorder as Recorder
