"""Tracking of runs and sweeps with MLflow: metric names, delivery with retries, and the client."""
