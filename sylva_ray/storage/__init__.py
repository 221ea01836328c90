"""Run folders: their files, atomic writes, checkpoints, and copies at a URL."""
