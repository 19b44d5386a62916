"""One-shot LLM compression guided by mutual information, under an exact bit budget.

Each linear of a causal language model is pruned and quantized in one SparseGPT sweep. The input
channels of every site (the linears that read one tensor) are grouped, by mutual information or by
a control; each group has its own bit width; the average width is exactly what was asked.

    commands/       what a person types
    experiment.py   run_experiment: load, plan, compress, evaluate, record
    plan.py         what every linear will get, and why
    pipeline.py     the sequential layer pipeline
    method/         the mathematics: tensors in, tensors out
    llm/            the outside world: models, texts, perplexity, export
    embedded/       a tiny trained model and its language, for a fresh machine
"""
