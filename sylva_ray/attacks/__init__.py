"""Evaluation attacks, one per file, and the PGD attack of adversarial training."""
