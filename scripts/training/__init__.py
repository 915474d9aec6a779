"""Fine-tuning: what both doors share, and each one's loop."""
