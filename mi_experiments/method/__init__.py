"""Do the mathematics: tensors in, tensors out; torch alone, no model, config or file."""
