"""From recordings to a detector: index, search, mark, teach, review."""
