"""Turn documents into calibration and evaluation tokens."""
