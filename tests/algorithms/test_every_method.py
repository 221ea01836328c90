"""Every registered method through the whole machine: one tiny round, and the bytes declared against those sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sylva_ray.algorithms.registry import ALGORITHMS, create_algorithm
from sylva_ray.config.experiment import AlgorithmSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import state_bytes
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.observer import Observer
from sylva_ray.preparation.experiment import Prepared
from sylva_ray.storage.run_folder import RunFolder
from tests.algorithms.toys import starting_states, tiny_experiment, tiny_worker

SMALL = {
    "backbone": {"name": "test_vit.r160_in1k", "image_size": 32},
    "training": {"rounds": 1, "batch_size": 32, "lr": 0.005, "local_epochs": 2},
    "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 1}], "checks": False},
}
PHASE2 = {"benign_epochs": 1, "refine_epochs": 1, "attack_steps": 1, "max_images": 2, "gate_steps": 2}
LOCAL = {"per_lora", "per_adv"}
HEADER = 120
"""Bytes that the file may add per array, for its name, shape and place."""


def small(name: str) -> Prepared:
    phase2 = create_algorithm(AlgorithmSection(name=name)).parameters.phase2
    extra: dict[str, Any] = {"phase2": PHASE2 | {"selection": phase2.selection}} if phase2.enabled else {}
    extra |= {"ranks": [1, 2, 4]} if name == "hetlora_at" else {}
    return tiny_experiment(name, extra, **SMALL)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_round_runs_and_sends_what_is_declared(name: str, tmp_path: Path) -> None:
    prepared = small(name)
    worker = tiny_worker(prepared)
    start = starting_states(worker)
    packed = [worker.algorithm.pack(client, state) for client, state in enumerate(start)]
    summary = run_experiment(prepared, _claimed(tmp_path, prepared), InProcessPool(worker), Observer())

    records = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    (phase1,) = (record for record in records if record["stage"] == "phase1")
    declared = [state_bytes(upload) for upload in packed]
    said = summary.communication
    assert phase1["upload_bytes"] == phase1["download_bytes"] == sum(declared)
    assert said.upload_bytes_per_client_round == said.download_bytes_per_client_round == round(sum(declared) / 3)
    if name == "hetlora_at":
        assert [4 * size for size in declared] == [declared[2], 2 * declared[2], 4 * declared[2]]
    else:
        assert len(set(declared)) == 1
    arrays = sum(len(upload) for upload in packed)
    assert 0 <= phase1["upload_payload_bytes"] - sum(declared) <= HEADER * arrays
    assert (phase1["upload_bytes"] == 0) == (name in LOCAL)
    assert (phase1["upload_payload_bytes"] == 0) == (name in LOCAL)

    assert not phase1["dropped"]
    assert all(np.isfinite(loss) for loss in phase1["metrics"]["loss"].values())
    accuracy = summary.final.benign_accuracy.per_client
    assert len(accuracy) == 3
    assert all(0 <= value <= 1 for value in accuracy)
    states = RunFolder(tmp_path).load_states()
    for before, after in zip(start, states, strict=True):
        assert before.keys() == after.keys()
        assert all(after[key].shape == value.shape for key, value in before.items())
        assert any(not np.array_equal(after[key], value) for key, value in before.items())


def _claimed(folder: Path, prepared: Prepared) -> RunFolder:
    run = RunFolder(folder)
    run.claim(prepared.config, resume=False)
    return run


@pytest.mark.parametrize("name", ALGORITHMS)
def test_unknown_parameters_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=r"algorithm\.adaptors = 'global': unknown key; did you mean 'adapters'\?"):
        create_algorithm(AlgorithmSection(name=name, adaptors="global"))
    with pytest.raises(UserError, match=r"algorithm\.phase2\.shapely = 1: unknown key"):
        create_algorithm(AlgorithmSection(name=name, phase2={"shapely": 1}))


def test_a_methods_resolved_parameters_build_the_same_method_again() -> None:
    for name in ALGORITHMS:
        once = create_algorithm(AlgorithmSection(name=name))
        again = create_algorithm(AlgorithmSection(name=name, **once.parameters.model_dump(mode="json")))
        assert again.parameters == once.parameters
