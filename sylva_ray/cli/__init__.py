"""The command line: one file per command, which parses the arguments and calls `sylva_ray.api`.

Exit codes: 2 after wrong input (one line with key, value and what is allowed; nothing is written), 1 after a failure
(one line, with the command that resumes the run), 130 after Ctrl-C and 143 after SIGTERM (the run can be resumed).

No module here imports PyTorch, Ray or other modules that take long to import, so that help texts and errors appear at
once.
"""

import sys

try:
    from sylva_ray.cli.app import app, main
except KeyboardInterrupt:  # Ctrl-C before the commands are imported
    print("sylva-ray: interrupted: nothing was begun", file=sys.stderr)
    sys.exit(130)

__all__ = ["app", "main"]
