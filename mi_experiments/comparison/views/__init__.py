"""A comparison of runs to look at: one page, plots for papers, a saved W&B workspace."""
