"""Fine-tuning: what both commands share, and the loop of each."""
