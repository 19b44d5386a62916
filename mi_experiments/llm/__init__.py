"""Hold a language model and walk through it, block after block; plain arguments, no config."""
