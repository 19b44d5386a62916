"""Compose, check and identify what was asked."""
