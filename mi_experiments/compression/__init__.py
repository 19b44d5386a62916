"""Prune and quantize every linear, block after block."""
