"""Sounds and labels: opening, splitting, counting, batching, measuring."""
