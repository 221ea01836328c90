"""Sweeps of experiments on Ray Tune: spaces, searches, trials, results and reports."""
