"""The outside world: models, blocks, texts, perplexity and export; plain arguments, no config."""
