"""From recordings to labels, events and files for people to read."""
