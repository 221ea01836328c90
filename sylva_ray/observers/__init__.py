"""Observers that keep a run's files and send them to MLflow, and the reader of finished runs for comparisons."""
