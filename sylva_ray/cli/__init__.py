"""The command line: one file per command, each of which parses its words and calls `sylva_ray.api`.

Wrong input: one line that names key, value and what is allowed, exit code 2, nothing written. A failure while running:
one line and the command that resumes, exit code 1. Ctrl-C leaves a run that can be resumed (130), and so does SIGTERM (143).

No file here imports torch, Ray or anything slow, so that a help text and a mistyped key are answered at once.
"""

from sylva_ray.cli.app import app, main

__all__ = ["app", "main"]
