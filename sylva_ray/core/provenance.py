"""Where the code of a run came from: the commit of a checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

TIMEOUT_S = 5.0
"""Of git, which answers at once on a local disk."""


def package_commit() -> str | None:
    """Return the git commit of this package's sources, with ``+`` after it if they have been changed since.

    None where the package is not in a checkout (a wheel), or git is not installed.
    """
    tracked = _git("ls-files", "--error-unmatch", "__init__.py")  # a wheel may lie inside somebody's repository
    commit = None if tracked is None else _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return commit.strip() + ("+" if _git("status", "--porcelain", "--", ".") else "")


def _git(*arguments: str) -> str | None:
    """Return what git prints in the package's folder; None if it fails."""
    command = ["git", "-C", str(PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
