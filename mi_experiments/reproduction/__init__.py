"""Judge runs against published and pinned numbers."""
