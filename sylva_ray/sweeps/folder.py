"""The folder of a sweep.

::

    SWEEP/  space.yaml  compute.yaml  sweep.json  report.html  best.yaml | pareto/*.yaml
            trials/POINT-sSEED/          run folders, as `sylva-ray run` writes them
            attempts/POINT-sSEED.jsonl   the history of each trial
            tune/                        the state of Ray Tune and of the search, for --resume
            mlflow.json                  the parent run
            search.json                  the state of an Optuna search when its driver started last
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from pydantic import ValidationError

from sylva_ray.config.schema import read_yaml
from sylva_ray.core.errors import UserError
from sylva_ray.core.text import abbreviated
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.claim import check_claim, list_names, write_marker
from sylva_ray.storage.jsonl import append_record, read_records
from sylva_ray.storage.lock import folder_lock
from sylva_ray.storage.run_folder import SPACE, TRIALS, RunFolder
from sylva_ray.sweeps.events import AttemptEvent, Outcome
from sylva_ray.sweeps.growth import grown_space
from sylva_ray.sweeps.space import Space, resolved_space


class SweepFolder:
    """The paths of a sweep's files. Creating one writes nothing.

    Args:
        root: the folder, which need not exist.

    Attributes:
        space: the resolved space, without a base.
        compute: the configuration of the first point, whose precision and attention kernels all trials use.
        trials: run folders of the trials.
        attempts: the history of each trial.
        tune: state of Ray Tune and of the search.
        search: state of an Optuna search when the driver started last; ``tune`` holds newer ones.
        results: ``sweep.json``.
        report: the HTML page.
        best: configuration of the best point, with one objective.
        pareto: configurations of the points on the front, with several objectives.
        parent_run: the sweep's own run in MLflow.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.space = self.root / SPACE
        self.compute = self.root / "compute.yaml"
        self.trials = self.root / TRIALS
        self.attempts = self.root / "attempts"
        self.tune = self.root / "tune"
        self.search = self.root / "search.json"
        self.results = self.root / "sweep.json"
        self.report = self.root / "report.html"
        self.best = self.root / "best.yaml"
        self.pareto = self.root / "pareto"
        self.parent_run = self.root / "mlflow.json"

    def check(self, space: Space, resume: bool) -> Space:
        """Check that the folder is free for this sweep, or holds it already if ``resume``. Writes nothing.

        Args:
            space: the sweep's space.
            resume: whether the sweep is to be continued.

        Returns:
            The space to run: in the spelling of the folder's, where it holds one (`grown_space`).

        Raises:
            UserError: it holds something else or another sweep, or ``resume`` does not fit.
        """
        where = str(self.root)
        check_claim(where, list_names(self.root), self.space.name, "sweep", resume)
        if self.space.exists():
            space = grown_space(self.load(), space, where)
            if any(self.tune.glob("searcher-state-*.pkl")) and not self.search_states():
                fix = "holds an Optuna search that an older version saved as a pickle: start it again in another folder"
                raise UserError("--out", where, fix)
        return space

    def claim(self, space: Space, resume: bool) -> None:
        """Check the folder as `check` does, then create it and write the space.

        Args:
            space: the sweep's space.
            resume: whether the sweep is to be continued.

        Raises:
            UserError: see `check`; or it cannot be written.
        """
        space = self.check(space, resume)
        write_marker(self.space, space.to_yaml())
        if self.load() != space:
            self.write(self.space, space.to_yaml())
        self.trials.mkdir(exist_ok=True)
        self.attempts.mkdir(exist_ok=True)

    def locked(self) -> AbstractContextManager[None]:
        """Lock the folder against other processes that run this sweep, for as long as a block lasts.

        Raises:
            UserError: another process runs it.
        """
        return folder_lock(self.root, "--out")

    def load(self) -> Space:
        """Read the resolved space.

        Raises:
            UserError: the folder holds no sweep.
        """
        if not self.space.exists():
            raise UserError("SPACE", str(self.root), f"is not the folder of a sweep (no {SPACE} in it)")
        return resolved_space(read_yaml(self.space))

    def search_states(self) -> list[Path]:
        """Return the saved states of an Optuna search, oldest first."""
        saved = [*self.tune.glob("searcher-state-*.json")]
        started = [self.search] if self.search.exists() else []
        return started + sorted(saved, key=lambda path: path.stat().st_mtime)

    def trial(self, key: str) -> RunFolder:
        """Return the run folder of a trial."""
        return RunFolder(self.trials / key)

    def is_finished(self, key: str) -> bool:
        """Return whether a trial has its result."""
        return self.trial(key).summary_file.exists()

    def has_ended(self, key: str) -> bool:
        """Return whether a trial has its result or has been pruned."""
        return self.is_finished(key) or self.outcome(key) == "pruned"

    def outcome(self, key: str) -> Outcome | None:
        """Return how the last attempt of a trial ended that was not killed; None where there is none."""
        return next((event.outcome for event in reversed(self.history(key)) if event.outcome is not None), None)

    def add_event(self, key: str, event: AttemptEvent) -> None:
        """Append a line to a trial's history."""
        append_record(self.attempts / f"{key}.jsonl", event.model_dump(exclude_none=True))

    def history(self, key: str) -> list[AttemptEvent]:
        """Read a trial's history, oldest line first."""
        path = self.attempts / f"{key}.jsonl"
        try:
            return [AttemptEvent.model_validate(line) for line in read_records(path)]
        except ValidationError as error:
            problem = error.errors()[0]
            where = abbreviated(".".join(map(str, problem["loc"])), length=100)
            fix = f"is not the history of a trial ({where}: {problem['msg'].lower()}); delete it and resume the sweep"
            raise UserError("trial", str(path), fix) from None

    def started_trials(self) -> list[str]:
        """Return the keys of the trials that have a history, in alphabetical order."""
        return sorted(path.stem for path in self.attempts.glob("*.jsonl"))

    def write(self, path: Path, text: str) -> Path:
        """Write a file of the sweep in one step, so that a reader sees the old content or the new."""
        path.parent.mkdir(exist_ok=True)
        return write_atomically(path, text)
