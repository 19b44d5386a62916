"""Record what a run leaves."""
