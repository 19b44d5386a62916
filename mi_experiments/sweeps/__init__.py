"""Run many jobs as one sweep."""
