"""The number that we report, found again by a process that imports nothing of ours: PEFT, timm, others' attacks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sylva_ray.config.attacks import parse_attack
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.evaluation import Evaluation
from sylva_ray.evaluation.plan import EvaluationRequest
from sylva_ray.evaluation.run import prepare_evaluation, run_evaluation
from sylva_ray.execution.run import pool_for, run_prepared
from sylva_ray.federation.observer import Observer
from sylva_ray.models.export import export_clients
from sylva_ray.models.shipped import SHIPPED
from sylva_ray.preparation.experiment import prepare
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.evaluation.test_evaluate import Silent

WITNESS = Path(__file__).with_name("witness_attack.py")
EPSILON, STEP = "8/255", "1/255"
missing = [name for name in ("torchattacks", "pyautoattack") if importlib.util.find_spec(name) is None]
needs_oracles = pytest.mark.skipif(
    bool(missing), reason=f"{', '.join(missing)} not installed (make test installs them)"
)


def trained(folder: Path) -> Path:
    """Four clients, two adversarial rounds: half robust, so that every attack has something to find."""
    sections = {
        "dataset": {"name": "digits"},
        "backbone": {"image_size": 32},  # what the witness builds, and the size of its images
        "partition": {"num_clients": 4, "alpha": 1.0, "test_samples": 130},
        "attack": {"epsilon": EPSILON, "steps": 2},
        "training": {"rounds": 2, "batch_size": 32, "lr": 0.01},
        "algorithm": {"name": "sylva", "phase2": {"enabled": False}},
        "evaluation": {"attacks": [{"epsilon": EPSILON, "steps": 2}], "checks": False},
    }
    run_prepared(prepare(build(ExperimentConfig, TINY | sections)), RunFolder(folder), False, Observer())
    return folder


def hand_over(run_dir: Path, folder: Path, **settings: Any) -> None:
    """Everything that the witness gets: adapters, images, timm's own description of the backbone."""
    config, states = RunFolder(run_dir).load_config(), RunFolder(run_dir).load_states()
    export_clients(config, states, range(len(states)), folder)
    fleet = prepare(config).fleet
    arrays: dict[str, Any] = {}
    for client in range(fleet.num_clients):
        test = fleet.client(client).test
        arrays |= {f"x_{client}": test.images, f"y_{client}": test.labels}
    np.savez(folder / "images.npz", **arrays)
    (folder / "backbone.safetensors").write_bytes(SHIPPED["vit_micro"].checkpoint.read_bytes())
    architecture = SHIPPED["vit_micro"].architecture
    arguments = {**architecture.arguments, "num_classes": fleet.num_classes}
    name = arguments.pop("model_name")
    told = {"num_clients": fleet.num_clients, "timm_name": name, "timm_arguments": arguments}
    told |= {"mean": architecture.mean, "std": architecture.std, "threads": 1}
    (folder / "witness.json").write_text(json.dumps(told | settings))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("witness") / "run")


def both(run_dir: Path, folder: Path, attacks: list[str], autoattack_steps: int) -> tuple[Evaluation, dict[str, Any]]:
    """What we report, and what the witness found."""
    folder.mkdir()
    numbers = {"epsilon": 8 / 255, "step_size": 1 / 255, "steps": 20, "autoattack_steps": autoattack_steps}
    hand_over(run_dir, folder, **numbers)
    given = prepare_evaluation(RunFolder(run_dir), None, [], [])
    with pool_for(given.prepared, Observer()) as pool:
        found = run_evaluation(given, EvaluationRequest(tuple(map(parse_attack, attacks)), 8 / 255), pool, Silent())
    told = subprocess.run([sys.executable, str(WITNESS), str(folder)], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    return found, json.loads(told.stdout.splitlines()[-1])


def test_the_witness_imports_nothing_of_ours() -> None:
    assert "sylva_ray" not in WITNESS.read_text().split('"""', 2)[2]


@needs_oracles
@pytest.mark.slow
def test_plain_peft_and_torchattacks_find_the_accuracy_that_we_report(run_dir: Path, tmp_path: Path) -> None:
    found, witness = both(run_dir, tmp_path / "w", [f"pgd:epsilon={EPSILON},steps=20,step_size={STEP}"], 0)
    assert witness["images"] == found.images >= 500
    ours = {"benign": found.benign, "pgd": found.attacks["pgd20-eps8"]}
    assert ours["benign"].accuracy.mean == pytest.approx(witness["benign"], abs=1e-9)
    assert 0.05 < witness["pgd"] < 0.95
    assert ours["pgd"].accuracy.mean == pytest.approx(witness["pgd"], abs=0.01)


@pytest.mark.slow
@needs_oracles
def test_pyautoattack_finds_the_accuracy_that_we_report(run_dir: Path, tmp_path: Path) -> None:
    found, witness = both(run_dir, tmp_path / "w", [f"autoattack:epsilon={EPSILON},steps=20"], 20)
    ours = found.attacks["autoattack-steps20-eps8"].accuracy.mean
    assert ours == pytest.approx(witness["autoattack"], abs=0.01)
