"""Measure on calibration tokens what planning and compression need."""
