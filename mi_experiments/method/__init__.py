"""Do the mathematics: tensors in, tensors out; no model, config or file."""
