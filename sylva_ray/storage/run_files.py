"""What a run folder says of a run that has ended: ``summary.json``, and ``evaluation.json`` where it was attacked again.

Apart from the report, which draws: a process that only reads these files need not import a plotting library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sylva_ray.core.errors import UserError


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """``summary.json`` of a finished run, None of an unfinished one.

    Raises:
        UserError: it is not JSON.
    """
    return _read(run_dir / "summary.json", "resume the run to write it again")


def read_evaluation(run_dir: Path) -> dict[str, Any] | None:
    """``evaluation.json``, None where `sylva-ray evaluate` has not run.

    Raises:
        UserError: it is not JSON.
    """
    return _read(run_dir / "evaluation.json", "run sylva-ray evaluate again")


def _read(path: Path, fix: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(path.stem, str(path), f"is not JSON ({error}); {fix}") from None
    return content
