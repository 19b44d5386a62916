"""Measure what the method needs on calibration tokens."""
