"""Fixtures of all tests: small real experiments on the embedded digits, and one thread, so that bits are stable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sylva_ray.preparation.experiment import Prepared

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import hypothesis
import pytest
import torch

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.config.schema import build
from sylva_ray.config.training import AttentionKernels, Windows
from sylva_ray.models.compute_choice import ComputeChoice
from sylva_ray.preparation.memory import plan_windows

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of ours
hypothesis.settings.load_profile("untimed")

TINY: dict[str, Any] = {
    "name": "tiny",
    "dataset": {"name": "digits", "max_train": 150, "max_test": 60},
    "backbone": {"image_size": 16},
    "partition": {"num_clients": 3, "alpha": 0.5, "min_samples": 20, "test_samples": 12},
    "algorithm": {
        "name": "sylva",
        "mixture": {"attack_steps": 1, "own_shares": [0.5]},
        "phase2": {"benign_epochs": 1, "refine_epochs": 1, "attack_steps": 2, "max_images": 4},
    },
    "lora": {"rank": 2},
    "attack": {"epsilon": "4/255", "steps": 1},
    "training": {
        "rounds": 2,
        "batch_size": 16,
        "lr": 0.005,
        "precision": "float32",
        "attention": "fused",
        "windows": Windows().model_dump(),
    },
    "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 2}], "precision": "float32"},
    "cluster": {"pool": "in_process"},
    "tracking": {"enabled": False},
}
"""Three clients, two rounds and both phases in a few seconds."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Divide the tests among pytest-xdist's workers: whole files, and everything that starts Ray to one worker."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        folder = item.path.parent.name
        group = "ray" if folder in ("execution", "sweeps") else item.path.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail where pytest-xdist has not read the marks: every worker would start Ray and set up every file."""
    if hasattr(session.config, "workerinput") and getattr(session.config.option, "loadgroup", False):
        assert all("@" in item.nodeid for item in session.items), "this pytest and pytest-xdist lose groups"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_measurement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` depends on the machine, and takes as long as a tiny run; what each test gets is the same everywhere.

    That is float32, fused attention and the largest windows. Windows are planned for a test that sets a budget, or uses
    the fixture ``planned``; the tests of the choice of precision bring their own.
    """
    monkeypatch.setattr(
        "sylva_ray.preparation.resolve.fastest", lambda *_: ComputeChoice("float32", AttentionKernels(), {})
    )
    if "planned" not in request.fixturenames:
        monkeypatch.setattr("sylva_ray.preparation.experiment.plan_windows", _planned_for_a_budget)


def _planned_for_a_budget(asked: ExperimentConfig, resolved: ResolvedConfig, *model_and_data: Any) -> ResolvedConfig:
    if asked.training.windows != "auto" or asked.cluster.memory_per_actor != "auto":
        return plan_windows(asked, resolved, *model_and_data)
    training = resolved.training.model_copy(update={"windows": Windows()})
    return resolved.model_copy(update={"training": training})


@pytest.fixture
def planned() -> None:
    """Plan the windows of the experiments of this test."""


@pytest.fixture(autouse=True)
def _no_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing its report takes as long as the rest of a tiny run; a test that reads it uses the fixture ``page``."""
    if "page" not in request.fixturenames:
        monkeypatch.setattr(
            "sylva_ray.execution.experiment._write_report", lambda run: run.report_file.write_text("a test")
        )


@pytest.fixture
def page() -> None:
    """Draw ``report.html`` of the runs of this test."""


@pytest.fixture(scope="session")
def tiny_config() -> ExperimentConfig:
    """`TINY`, validated."""
    return build(ExperimentConfig, TINY)


@pytest.fixture(scope="session")
def tiny(tiny_config: ExperimentConfig) -> Prepared:
    """`TINY`, prepared: data dealt, backbone loaded."""
    from sylva_ray.preparation.experiment import prepare

    return prepare(tiny_config)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store to copy; creating its tables takes MLflow seconds."""
    mlflow = pytest.importorskip("mlflow")
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One small Ray for the whole session: two CPUs and no GPU."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
