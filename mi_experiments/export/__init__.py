"""Write the compressed model to disk, one file a format."""
