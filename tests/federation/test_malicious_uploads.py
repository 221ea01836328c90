"""Every method with every rule under every attack at every scale ends with finite states of the honest clients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from sylva_ray.algorithms.registry import ALGORITHMS, create_algorithm
from sylva_ray.attacks.byzantine import BYZANTINE_ATTACKS
from sylva_ray.config.experiment import AlgorithmSection, ByzantineSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ClientState
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.client.training import TrainOutcome
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.parameters import RobustParameters
from sylva_ray.federation.server import Server
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.transport.byzantine import ByzantineUploads
from sylva_ray.transport.postprocessor import Message, Postprocessor
from sylva_ray.transport.wire import Wire
from tests.algorithms.toys import starting_states, tiny_experiment, tiny_worker
from tests.federation.runs import records_of, run

RULES = get_args(get_args(RobustParameters.model_fields["rule"].annotation)[0])
SCALES = {"small": 1e-3, "huge": 1e30, "inf": np.inf, "nan": np.nan}
"""What a malicious client multiplies its upload by, after the attack."""
NUM_CLIENTS, LIARS = 5, (1,)
EXTRA: dict[str, dict[str, Any]] = {"hetlora_at": {"ranks": [1, 2, 4]}}
FLEET = {
    "dataset": {"name": "digits", "max_train": 200, "max_test": 40},
    "partition": {"num_clients": NUM_CLIENTS, "alpha": 1.0, "min_samples": 10, "test_samples": 4},
    "backbone": {"name": "test_vit.r160_in1k", "image_size": 32},
    "training": {"rounds": 2, "batch_size": 16, "local_epochs": 2},
}


class Scaled(Postprocessor):
    """Multiplies what the malicious clients upload, after everything else."""

    def __init__(self, scale: float) -> None:
        self.scale = np.float32(scale)

    def decode_round(
        self, uploads: Mapping[int, ClientState], messages: Mapping[int, Message]
    ) -> Mapping[int, ClientState]:
        del messages
        return {client: self._of(upload) if client in LIARS else upload for client, upload in uploads.items()}

    def _of(self, upload: ClientState) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", over="ignore"):
            return {name: value * self.scale for name, value in upload.items()}


@cache
def server_of(name: str) -> Server:
    """A coordinator of a method, with states of one transformer block and the head, which is enough for merging."""
    made = tiny_experiment(name, EXTRA.get(name, {}), **FLEET)
    worker = tiny_worker(made)
    states = [
        {n: value for n, value in state.items() if "blocks." not in n or "blocks.0." in n}
        for state in starting_states(worker)
    ]
    pool = InProcessPool(worker)
    return Server(made.config, worker.algorithm, made.fleet, states, {}, pool, RunFolder("unused"), Observer())


def section_of(name: str, rule: str) -> AlgorithmSection:
    return AlgorithmSection(name=name, robust={"rule": rule, "assumed_fraction": 0.2}, **EXTRA.get(name, {}))


def takes(name: str, rule: str) -> bool:
    """Whether the method can be combined with the rule."""
    try:
        create_algorithm(section_of(name, rule))
    except UserError:
        return False
    return True


def trained(states: list[dict[str, np.ndarray]]) -> dict[int, TrainOutcome]:
    """What the clients are after training: where they started, plus a little of their own."""
    outcomes = {}
    for client, state in enumerate(states):
        rng = np.random.default_rng(client)
        after = {n: (v + 0.01 * rng.normal(size=v.shape)).astype(v.dtype) for n, v in state.items()}
        outcomes[client] = TrainOutcome(after, 10, {"loss": 1.0 + client})
    return outcomes


CASES = [(name, rule) for name in ALGORITHMS for rule in RULES if takes(name, rule)]
QUICK = [case for case in CASES if "mean" in case or "sylva" in case]


@pytest.mark.parametrize(
    ("name", "rule"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_honest_clients_stay_finite_and_what_is_refused_is_known(name: str, rule: str) -> None:
    server = server_of(name)
    server.parameters = create_algorithm(section_of(name, rule)).parameters
    server.algorithm.parameters = server.parameters
    algorithm, start = server.algorithm, [dict(state) for state in server.states]
    outcomes = trained(start)
    for attack in BYZANTINE_ATTACKS:
        for word, scale in SCALES.items():
            server.states = [dict(state) for state in start]
            malicious = ByzantineUploads(ByzantineSection(attack=attack), 0, LIARS, algorithm)
            server.wire = Wire(algorithm, [Scaled(scale), malicious])  # decoded from the last to the first
            server.adopt_states(outcomes)
            server.costs.refused = {}
            uploads = server.exchange(2, outcomes, start)
            case = f"{attack}, {word}"
            assert all(
                np.isfinite(value).all()
                for client, state in enumerate(server.states)
                if client not in LIARS
                for value in state.values()
            ), case
            if not algorithm.pack(0, start[0]):
                assert not uploads, case
                continue
            is_refused = word != "small" or attack == "nan"
            assert set(server.costs.refused) == (set(LIARS) if is_refused else set()), case
            assert set(uploads) == set(range(NUM_CLIENTS)) - set(server.costs.refused), case
            if algorithm.parameters.adapters == "neighbours":
                assert np.isfinite(server.neighbourhood(start, uploads).weights).all(), case
    server.states = start


@pytest.mark.long
@pytest.mark.parametrize(
    "attack", [{"attack": "nan"}, pytest.param({"attack": "sign_flip", "strength": 1e30}, marks=pytest.mark.slow)]
)
def test_a_whole_run_with_both_phases_ends_and_says_who_was_refused(attack: dict[str, Any], tmp_path: Path) -> None:
    """The neighbourhoods of phase 2 are taken from the uploads of the last round."""
    phase2 = {"benign_epochs": 1, "refine_epochs": 1, "attack_steps": 1, "max_images": 4, "sampled_pairs": 2}
    fleet = FLEET | {"byzantine": {"fraction": 0.2} | attack}
    made = tiny_experiment("sylva", {"phase2": phase2}, **fleet)
    summary = run(made, tmp_path / "run")
    rounds = [record for record in records_of(tmp_path / "run") if record["stage"] == "phase1"]
    assert summary.byzantine is not None
    (liar,) = summary.byzantine.attackers
    assert [list(record["refused"]) for record in rounds] == [[str(liar)]] * 2
    assert any(f"client {liar} was not merged in 3 rounds" in warning for warning in summary.warnings)
    for client, state in enumerate(RunFolder(tmp_path / "run").load_states()):
        assert client == liar or all(np.isfinite(value).all() for value in state.values())
