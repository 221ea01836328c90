"""Pre-training of a backbone."""
