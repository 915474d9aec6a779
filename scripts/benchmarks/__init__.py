"""Timing of the parts, ours against what people use today."""
