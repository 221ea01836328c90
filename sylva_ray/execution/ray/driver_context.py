"""What the processes that Ray starts for a run take over from its driver."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sylva_ray.core.own_code import allow, allowed_directories

FORWARDED_VARIABLES = ("MLFLOW_", "AWS_", "FSSPEC_", "GOOGLE_", "AZURE_")
"""Prefixes of the environment variables that are passed on: those of the tracker and the storage."""


@dataclass(frozen=True)
class DriverContext:
    """The surroundings of a driver.

    Attributes:
        process: its process id.
        working_dir: where relative paths in the configuration start.
        environment: settings of the tracker and the storage.
        imports: directories of the user's own code.
    """

    process: int
    working_dir: Path
    environment: Mapping[str, str]
    imports: tuple[str, ...]

    @classmethod
    def of_this_process(cls) -> DriverContext:
        """Return that of this process, which is the driver."""
        environment = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED_VARIABLES)}
        return cls(os.getpid(), Path.cwd(), environment, allowed_directories())

    def enter(self) -> None:
        """Make it that of this process, which works for the driver."""
        os.chdir(self.working_dir)
        os.environ.update(self.environment)
        allow(self.imports)
