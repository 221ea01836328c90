"""A finished run, made once, of which every test gets a copy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import sylva_ray
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY

ONE_PHASE: dict[str, Any] = TINY | {
    "algorithm": {"name": "sylva", "phase2": {"enabled": False}},
    "training": TINY["training"] | {"rounds": 1},
}


@pytest.fixture(scope="session")
def one_phase_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one phase") / "run"
    sylva_ray.run(ONE_PHASE, out=folder, show="nothing")
    return folder


@pytest.fixture
def finished(one_phase_run: Path, tmp_path: Path) -> RunFolder:
    """A copy of a run with three clients and the stages warmup, phase1 and personalise."""
    return RunFolder(shutil.copytree(one_phase_run, tmp_path / "run"))


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file, hidden ones too."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
