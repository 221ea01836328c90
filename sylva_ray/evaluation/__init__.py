"""The command `evaluate`: attack the trained, personal models of a run."""
