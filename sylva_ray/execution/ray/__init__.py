"""Experiments on a Ray cluster. Only this package and the sweeps import Ray."""
