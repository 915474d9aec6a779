"""Metrics, and the report made from them."""
