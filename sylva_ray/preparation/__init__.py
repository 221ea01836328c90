"""From a configuration to an experiment that is ready to run."""
