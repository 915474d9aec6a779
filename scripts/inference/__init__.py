"""From recordings to labels, events and the files that people read."""
