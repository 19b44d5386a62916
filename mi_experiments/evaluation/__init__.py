"""Evaluate the dense and the compressed model."""
