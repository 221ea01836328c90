"""Measures of accuracy and robustness, and checks of attacks."""
