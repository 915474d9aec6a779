"""Metrics, and the report made of them."""
