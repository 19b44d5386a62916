"""Carry a tiny trained Llama and its synthetic language, for machines without a network.

The language has an exactly known entropy, so the perplexity of the model, dense or compressed, can
be compared with a floor that no model can beat. `language` samples documents and knows their true
likelihood, `grammar` is the program that writes them, `entropy` its closed form, and
`python -m mi_experiments.embedded.train` rebuilds the shipped model.
"""

from pathlib import Path

MODEL_DIRECTORY: Path = Path(__file__).parent / "model"


def find_model(path: str) -> str:
    """Return a directory or hub id; `embedded` is the model of the package."""
    return str(MODEL_DIRECTORY) if path == "embedded" else path
