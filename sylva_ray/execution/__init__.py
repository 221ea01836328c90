"""Where an experiment runs: in this process, or on a Ray cluster."""
