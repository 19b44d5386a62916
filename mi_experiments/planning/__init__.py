"""Decide groups, widths and sparsity of every linear."""
