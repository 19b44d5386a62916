"""Show a comparison of runs: one page, plots for papers, a saved W&B workspace."""
