"""Run one experiment from beginning to end."""
