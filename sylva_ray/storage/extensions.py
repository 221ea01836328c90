"""The file ``extensions.json`` of a run folder: which rounds were added to the run."""

from __future__ import annotations

from pathlib import Path

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.records import Extension
from sylva_ray.storage.atomic import write_json
from sylva_ray.storage.reading import read_json


class ExtensionsFile:
    """What was added to a run. Creating the object does not access the disk.

    Args:
        path: the file; where it does not exist, nothing was added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> list[Extension]:
        """Return what was added, the first first.

        Raises:
            UserError: the file is damaged.
        """
        if not self.path.exists():
            return []
        fix = "start the run again in another folder"
        entries = read_json(self.path, self.path.stem, fix)
        if not isinstance(entries, list):
            raise UserError(self.path.stem, str(self.path), f"must be a list; {fix}")
        return [Extension.from_json(entry, str(self.path)) for entry in entries]

    def add(self, extension: Extension) -> None:
        """Write one more."""
        write_json(self.path, [entry.to_json() for entry in (*self.load(), extension)])

    def applied(self, before: ExperimentConfig, now: ExperimentConfig) -> ExperimentConfig:
        """Return an earlier configuration of the run with the rounds of the present one, if these were added to it.

        Args:
            before: for example the copy in a checkpoint.
            now: of the run.
        """
        old, new = before.training.rounds, now.training.rounds
        numbers = {number for extension in self.load() for number in (extension.before, extension.rounds)}
        if old >= new or not {old, new} <= numbers:
            return before
        return before.model_copy(update={"training": before.training.model_copy(update={"rounds": new})})

    def rounds_before(self, step: int, rounds: int) -> int | None:
        """Return how many rounds the run had before a step; None: as many.

        Args:
            step: of a stage that is run now.
            rounds: that the run has now.
        """
        return next((entry.before for entry in self.load() if entry.step == step and entry.rounds <= rounds), None)
