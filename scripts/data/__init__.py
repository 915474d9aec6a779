"""Sounds and labels: opened, divided, counted, batched, measured."""
