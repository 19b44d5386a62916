"""One-shot LLM compression guided by mutual information, under an exact bit budget.

Each linear of a causal language model is pruned and quantized in one SparseGPT sweep. The input
channels of every site (the linears that read one tensor) are grouped, by mutual information or by
a control; each group has its own bit width; the average width is exactly what was asked.

Read the folders `texts`, `calibration`, `planning`, `compression`, `export`, `evaluation` and
`records` in this order, and you follow the data; `docs/architecture.md` has the order of imports.
"""
