"""A sweep's folder.

::

    SWEEP/  space.yaml  sweep.json  report.html  best.yaml | pareto/*.yaml
            trials/POINT-sSEED/      run folders, as `sylva-ray run` writes them
            attempts/POINT-sSEED.jsonl   when each trial began and ended
            tune/                    Ray Tune's own state, for --resume
            mlflow.json              the parent run
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sylva_ray.config.schema import read_yaml
from sylva_ray.core.errors import UserError
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.jsonl import append_record, read_records
from sylva_ray.storage.run_folder import SUMMARY
from sylva_ray.sweeps.space import Space, resolved_space


class SweepFolder:
    """Where everything of a sweep is; makes nothing but what it is asked to write."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.space = self.root / "space.yaml"
        self.trials = self.root / "trials"
        self.tune = self.root / "tune"
        self.results = self.root / "sweep.json"
        self.report = self.root / "report.html"
        self.best = self.root / "best.yaml"
        self.pareto = self.root / "pareto"
        self.parent = self.root / "mlflow.json"
        self.compute = self.root / "compute.yaml"

    def check(self, space: Space, resume: bool) -> None:
        """Whether the folder may become this sweep's, or is already. Writes nothing.

        Raises:
            UserError: it holds something else, or another sweep, or ``resume`` does not fit.
        """
        text, where = space.to_yaml(), str(self.root)
        if self.space.exists():
            if not resume:
                raise UserError("--out", where, "already holds a sweep; add --resume to continue it, or choose another")
            if self.load().to_yaml() != text:
                raise UserError("--out", where, "holds a sweep of another space (see its space.yaml)")
            if any(self.tune.glob("searcher-state-*.pkl")) and not any(self.tune.glob("searcher-state-*.json")):
                fix = "holds a search by Optuna that was saved by an older version, as a pickle: start it again in another folder"
                raise UserError("--resume", where, fix)
        elif self.root.exists() and any(self.root.iterdir()):
            raise UserError("--out", where, "is not empty and holds no sweep; choose another folder")
        elif resume:
            raise UserError("--resume", where, "holds no sweep to resume")

    def claim(self, space: Space, resume: bool) -> None:
        """Make the folder this sweep's.

        Raises:
            UserError: see `check`; or it cannot be written.
        """
        self.check(space, resume)
        try:
            self.trials.mkdir(parents=True, exist_ok=True)
            (self.root / "attempts").mkdir(exist_ok=True)
            self.write(self.space, space.to_yaml())
        except OSError as error:
            raise UserError("--out", str(self.root), f"cannot be written ({error.strerror})") from None

    def load(self) -> Space:
        """The space as it was resolved.

        Raises:
            UserError: the folder holds no sweep.
        """
        if not self.space.exists():
            raise UserError("SWEEP", str(self.root), "is no sweep's folder (no space.yaml in it)")
        return resolved_space(read_yaml(self.space))

    def trial(self, key: str) -> Path:
        """The run folder of a trial."""
        return self.trials / key

    def finished(self, key: str) -> bool:
        """Whether a trial has its result."""
        return (self.trial(key) / SUMMARY).exists()

    def note(self, key: str, **event: Any) -> None:
        """Add to a trial's history: ``began`` (which names the attempt), then ``alive`` per ``step`` and where a worker was
        ``lost``, at last ``ended`` with ``outcome`` and ``error``. Times are Unix seconds."""
        append_record(self.root / "attempts" / f"{key}.jsonl", event)

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """A trial's history, oldest first."""
        return read_records(self.root / "attempts" / f"{key}.jsonl")

    def write(self, path: Path, text: str) -> Path:
        """In one step for readers."""
        path.parent.mkdir(exist_ok=True)
        return write_atomically(path, text)

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """None where there is no such file yet."""
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        return content
