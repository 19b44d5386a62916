"""The mathematics: torch only, tensors in, tensors out; no model, config or file."""
