"""The last local epochs with a mixture: what clients end with, what travels, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sylva_ray.aggregation.interpolation import interpolate
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.federation.parameters import MethodParameters
from sylva_ray.federation.stages.mixture import stage as mixture_stage
from sylva_ray.preparation.experiment import prepare
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.federation.runs import records_of, run

pytestmark = pytest.mark.long

SHORT = TINY | {
    "dataset": TINY["dataset"] | {"max_train": 90, "max_test": 30},
    "partition": TINY["partition"] | {"min_samples": 16, "test_samples": 6},
    "training": TINY["training"] | {"rounds": 1},
    "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 1}], "checks": False},
}


def finished(
    folder: Path, mixture: dict[str, Any], num_rounds: int = 1, **method: Any
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
    """The states at the end of a run, and the record of its last stage."""
    algorithm = {
        "name": "fedavg_at_ft",
        "model": "lora",
        "mixture": {"enabled": False, "attack_steps": 1} | mixture,
    } | method
    training = {"training": SHORT["training"] | {"rounds": num_rounds}}
    run(prepare(build(ExperimentConfig, SHORT | training | {"algorithm": algorithm})), folder)
    return [dict(state) for state in RunFolder(folder).load_states()], records_of(folder)[-1]


def test_every_client_ends_where_its_record_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own states and received ones are those of a run without; every client is made to like a candidate of its own."""
    own, last = finished(tmp_path / "own", {})
    shared, _ = finished(tmp_path / "shared", {}, final_local_epochs=0)
    assert last["stage"] == "personalise"

    def preferred(reported: list[Any], strength: float) -> np.ndarray:
        del strength
        gains = np.full((len(reported), 2), -1.0)
        gains[1, 0], gains[2, 1] = 0.1, 0.1  # client 0 likes neither
        return gains

    monkeypatch.setattr(mixture_stage, "shrunk_gains", preferred)
    mixed, record = finished(tmp_path / "mixed", {"enabled": True, "own_shares": [0.5, 0.0]})
    assert record["stage"] == "mixture"
    shares = {"0": 0.0, "1": 0.5, "2": 1.0}
    for client, share in shares.items():
        for metric in ("adapters_from_global", "heads_from_global"):
            assert record["metrics"][metric][client] == share
        start, end, found = (states[int(client)] for states in (own, shared, mixed))
        adapters = [name for name in start if "lora" in name]
        heads = [name for name in start if "lora" not in name]
        expected = interpolate(interpolate(start, end, adapters, share), end, heads, share)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    kept = {0: 1.0, 1: 0.5, 2: 0.0}
    assert RunFolder(tmp_path / "mixed").load_records()[-1].own_shares() == {"adapters": kept, "heads": kept}


def test_what_was_received_costs_no_upload_and_others_cost_one(tmp_path: Path) -> None:
    _, free = finished(tmp_path / "free", {"enabled": True, "own_shares": [0.5]})
    _, paid = finished(tmp_path / "paid", {"enabled": True, "own_shares": [0.5], "partners": ["global", "neighbours"]})
    rounds = records_of(tmp_path / "paid")[1]
    num_clients, number = len(free["participants"]), 8
    assert free["upload_bytes"] == 2 * num_clients * number  # adapters and heads, one candidate
    assert paid["upload_bytes"] == rounds["upload_bytes"] + 2 * num_clients * 2 * number
    assert free["download_bytes"] == 2 * num_clients * 8
    assert paid["download_bytes"] == rounds["download_bytes"] + 2 * num_clients * 8
    assert set(paid["metrics"]) >= {f"{g}_from_{p}" for g in ("adapters", "heads") for p in ("global", "neighbours")}


def test_trying_mixtures_is_work_not_waiting(tmp_path: Path) -> None:
    finished(tmp_path, {"enabled": True, "own_shares": [0.5]})
    summary, records = RunFolder(tmp_path).load_summary(), RunFolder(tmp_path).load_records()
    assert summary is not None
    spent = summary.seconds
    assert spent.mixture == records[-1].seconds["mixture"] > 0
    work = spent.train + spent.attack + spent.mixture + spent.evaluate + spent.aggregate
    assert spent.setup + work + spent.idle == pytest.approx(spent.total), "one worker"


def test_losses_weigh_the_neighbours_models(tmp_path: Path) -> None:
    """SFAT's weights need the metrics of the uploads, from the second exchange on."""
    mixture = {"enabled": True, "own_shares": [0.5], "partners": ["neighbours"]}
    _, record = finished(tmp_path, mixture, num_rounds=2, name="sfat", final_local_epochs=1)
    assert set(record["metrics"]) == {"loss", "adapters_from_neighbours", "heads_from_neighbours"}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_client_of_a_lower_rank_keeps_it(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_stage, "shrunk_gains", lambda reported, _: np.ones((len(reported), 1)))
    mixture = {"enabled": True, "own_shares": [share], "partners": ["neighbours"]}
    states, _ = finished(tmp_path, mixture, name="hetlora_at", ranks=[1, 2], final_local_epochs=1)
    for client, rank in enumerate([1, 2, 1]):
        used = {np.count_nonzero(a.any(1)) for name, a in states[client].items() if name.endswith(".lora_A")}
        assert max(used) == rank


def test_a_head_that_stays_at_home_is_not_mixed(tmp_path: Path) -> None:
    _, record = finished(tmp_path, {"enabled": True, "own_shares": [0.5]}, heads="local")
    assert [name for name in record["metrics"] if "_from_" in name] == ["adapters_from_global"]


def test_a_whole_model_is_mixed_like_a_head(tmp_path: Path) -> None:
    _, record = finished(tmp_path, {"enabled": True, "own_shares": [0.5]}, model="full")
    assert set(record["metrics"]) == {"loss", "adapters_from_global", "heads_from_global"}


@pytest.mark.parametrize("method", [{"final_local_epochs": 0}, {"adapters": "local", "heads": "local"}])
def test_where_nothing_can_be_mixed_nothing_is(method: dict[str, Any], tmp_path: Path) -> None:
    states, record = finished(tmp_path / "with", {"enabled": True}, **method)
    without, _ = finished(tmp_path / "without", {}, **method)
    assert not [name for name in record["metrics"] if "_from_" in name]
    for state, other in zip(states, without, strict=True):
        assert all(np.array_equal(state[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"model": "full", "mixture": {"enabled": True, "partners": ["neighbours"]}}, "global or local sharing"),
        ({"mixture": {"enabled": True, "own_shares": [1.0]}}, "less than 1"),
    ],
)
def test_what_cannot_be_mixed_is_refused(changes: dict[str, Any], fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        build(MethodParameters, {"mixture": {"enabled": True}} | changes)
