"""Keep files whole, finished work and computed values."""
