"""What travels: counted as it is, compressed with nothing lost for ever, and forged for the attackers alone."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from sylva_ray.algorithms.hetlora import HetLoraAT
from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import RunError
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import ClientState, stack_states, state_bytes
from sylva_ray.federation.client.training import TrainOutcome, TrainTask
from sylva_ray.federation.client.worker import build_model
from sylva_ray.federation.contract import Algorithm
from sylva_ray.federation.server import Server
from sylva_ray.preparation.experiment import Prepared, create_worker, initial_states, prepare
from sylva_ray.storage import checkpoint as checkpoint_module
from sylva_ray.storage.checkpoint import CheckpointFolder
from sylva_ray.transport.byzantine import alie_z, byzantine_clients, flip_labels
from sylva_ray.transport.codecs import create_codec, shapes_of
from sylva_ray.transport.wire import Wire
from tests.conftest import TINY
from tests.federation.runs import newest, records_of, run

HEADS = ("head.weight", "head.bias")
CODECS = ["int8", "int4", "topk"]


def state(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"m.lora_A": (4, 50), "m.lora_B": (37, 4), "head.weight": (3, 50), "head.bias": (3,)}
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def wire(
    clients: int = 5,
    heads: str = "local",
    byzantine: dict[str, Any] | None = None,
    factor_rule: str = "naive",
    **compression: Any,
) -> Wire:
    """The link of a method that shares adapters with all, and heads as told."""
    raw = {"partition": {"num_clients": clients}, "compression": compression, "byzantine": byzantine or {}}
    algorithm = Algorithm(Algorithm.Parameters(adapters="global", heads=heads, factor_rule=factor_rule))
    algorithm.head_names = HEADS
    return Wire(build(ExperimentConfig, raw), algorithm)


def trained(received: ClientState, seed: int, scale: float = 0.01) -> dict[str, np.ndarray]:
    return {name: value + state(seed, scale)[name] for name, value in received.items()}


def same(a: ClientState, b: ClientState) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)


# -- without compression -------------------------------------------------------------------------------------------------


def test_without_compression_the_wire_is_the_identity_and_counts_what_it_carries() -> None:
    link, received = wire(), state(0)
    own = trained(received, 1)
    arrived = link.up(0, received, own, None)
    sent = {name: own[name] for name in ("m.lora_A", "m.lora_B")}
    assert same(arrived, sent), "heads stay at home"
    assert link.traffic.upload == state_bytes(sent) == 4 * (200 + 148)
    assert link.traffic.upload_payload == len(save(sent)) > link.traffic.upload
    merged = own | {"m.lora_A": state(7)["m.lora_A"]}
    assert same(link.down(0, received, merged, None), merged)
    assert link.traffic.download == 4 * (200 + 148)
    assert link.traffic.download_payload == len(save({n: merged[n] for n in sent}))
    assert link.residuals == {}
    before = dataclasses.replace(link.traffic)
    link.down(1, received, merged, None, counted=False)
    assert link.traffic == before, "who did not take part is not answered"


def test_only_what_is_named_travels() -> None:
    link, received = wire(heads="global", kind="int8"), state(0)
    arrived = link.up(0, received, trained(received, 1), HEADS)
    assert set(arrived) == set(HEADS) == set(link.residuals[0])
    link.up(0, received, trained(received, 2), None)
    assert set(link.residuals[0]) == set(received)


def test_a_method_that_shares_nothing_sends_nothing() -> None:
    algorithm = Algorithm(Algorithm.Parameters(adapters="local", heads="local"))
    algorithm.head_names = HEADS
    link = Wire(build(ExperimentConfig, {"compression": {"kind": "int8"}}), algorithm)
    assert link.up(0, state(0), state(1), None) == {}
    assert (link.traffic.upload, link.traffic.upload_payload, link.residuals) == (0, 0, {})


# -- compression ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CODECS)
def test_nothing_is_owed_of_pairs_that_merging_writes_in_other_coordinates(kind: str) -> None:
    link, received = wire(heads="global", factor_rule="product_svd", kind=kind), state(0)
    link.up(0, received, trained(received, 1), None)
    assert set(link.residuals[0]) == set(HEADS)
    codec, again = create_codec(kind, fraction=0.05), trained(received, 2)
    update = {name: again[name] - received[name] for name in received}
    target = {name: value + link.residuals[0].get(name, 0) for name, value in update.items()}
    arrived = link.up(0, received, again, None)
    decoded = codec.decode(codec.encode(target), shapes_of(target))
    for name, value in decoded.items():
        np.testing.assert_allclose(arrived[name], received[name] + value, atol=1e-6)


@pytest.mark.parametrize("kind", CODECS)
def test_error_feedback_over_rounds_is_the_textbooks(kind: str) -> None:
    """What arrives is received + C(update + residual); the residual is what C lost; nothing is lost over the server."""
    link, codec = wire(kind=kind, fraction=0.1), create_codec(kind, fraction=0.1)
    received = {name: value for name, value in state(0).items() if name not in HEADS}
    residual = {name: np.zeros_like(value) for name, value in received.items()}
    meant, told = (dict.fromkeys(received, 0.0) for _ in range(2))
    for round in range(1, 5):
        full = state(0) | received
        own = trained(full, round)
        arrived = link.up(3, full, own, None)
        target = {n: (own[n] - received[n]) + residual[n] for n in received}
        decoded = codec.decode(codec.encode(target), shapes_of(target))
        residual = {n: target[n] - decoded[n] for n in target}
        for name in received:
            np.testing.assert_array_equal(arrived[name], received[name] + decoded[name])
            np.testing.assert_array_equal(link.residuals[3][name], residual[name])
            meant[name] = meant[name] + own[name].astype(float) - received[name]
            told[name] = told[name] + decoded[name]
        received = arrived
    assert set(link.residuals) == {3}
    for name in received:
        np.testing.assert_allclose(told[name] + residual[name], meant[name], atol=1e-6)
        assert np.abs(residual[name]).max() > 1e-6


@pytest.mark.parametrize("kind", CODECS)
def test_without_error_feedback_nothing_is_owed(kind: str) -> None:
    link, received = wire(kind=kind, error_feedback=False), state(0)
    first = link.up(0, received, trained(received, 1), None)
    assert link.residuals == {}
    assert same(link.up(0, received, trained(received, 1), None), first)


@pytest.mark.parametrize("kind", CODECS)
def test_declared_bytes_are_those_of_the_arrays_and_the_file(kind: str) -> None:
    link, received = wire(kind=kind), state(0)
    own = trained(received, 1)
    link.up(0, received, own, None)
    codec = create_codec(kind, fraction=link.config.compression.fraction)
    update = {name: own[name] - received[name] for name in ("m.lora_A", "m.lora_B")}
    encoded = codec.encode(update)
    assert link.traffic.upload == sum(value.nbytes for value in encoded.values()) == codec.num_bytes(shapes_of(update))
    assert link.traffic.upload_payload == len(save(encoded))
    by_hand = {"int8": 348 + 2 * 7, "int4": 174 + 2 * 7, "topk": 8 * 17}  # 348 entries; 4 + 3 blocks of 64; 5 %
    assert link.traffic.upload == by_hand[kind]


def test_clients_of_other_ranks_pay_for_their_own_slots() -> None:
    algorithm = HetLoraAT(HetLoraAT.Parameters(ranks=(1, 4)))
    algorithm.head_names = HEADS
    link = Wire(build(ExperimentConfig, {"compression": {"kind": "int8"}}), algorithm)
    starts = [algorithm.initial_state(client, state(0)) for client in range(2)]
    arrived = link.up(0, starts[0], trained(starts[0], 1), None)
    assert link.traffic.upload == 87 + 2 * 2  # one slot of A and of B: 50 + 37 entries, a block each
    assert {name: value.shape for name, value in arrived.items()} == {"m.lora_A": (4, 50), "m.lora_B": (37, 4)}
    assert not arrived["m.lora_A"][1:].any()
    assert not arrived["m.lora_B"][:, 1:].any()
    assert link.residuals[0]["m.lora_A"].shape == (1, 50)
    assert link.up(1, starts[1], trained(starts[1], 1), None)["m.lora_A"][1:].any()


def test_an_update_that_is_not_finite_arrives_as_such_and_leaves_no_trace() -> None:
    link, received = wire(kind="int8"), state(0)
    link.up(0, received, trained(received, 1), None)
    owed = {name: value.copy() for name, value in link.residuals[0].items()}
    broken = trained(received, 2)
    broken["m.lora_A"][0, 0] = np.nan
    assert not np.isfinite(link.up(0, received, broken, None)["m.lora_A"]).all()
    assert same(link.residuals[0], owed)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_client_and_server_agree_on_a_compressed_answer(kind: str) -> None:
    """The server knows what a client received and what it sent: it can say to the bit what the client holds."""
    link, received, merged = wire(kind=kind), state(0), trained(state(0), 5, 0.1)
    held = link.down(0, received, merged, None)
    codec = create_codec(kind)
    update = {name: merged[name] - received[name] for name in ("m.lora_A", "m.lora_B")}
    coded = codec.encode(update)
    for name, value in codec.decode(coded, shapes_of(update)).items():
        assert np.array_equal(held[name], received[name] + value)
        assert 0 < np.abs(held[name] - merged[name]).max() < 0.1
    assert all(np.array_equal(held[name], merged[name]) for name in HEADS), "what stays at home is not touched"
    assert link.traffic.download == sum(value.nbytes for value in coded.values())
    assert link.residuals == {}, "the merged state is known in full next time; nothing is owed"
    assert same(link.down(1, received, dict(received), None), received), "no news, not a bit"


@pytest.mark.parametrize("compression", [{"kind": "topk"}, {"kind": "int8", "download": False}])
def test_answers_that_are_not_compressed_arrive_as_they_are(compression: dict[str, Any]) -> None:
    link, merged = wire(**compression), trained(state(0), 5)
    assert same(link.down(0, state(0), merged, None), merged)
    assert link.traffic.download == 4 * (200 + 148)


# -- attackers -----------------------------------------------------------------------------------------------------------


def uploads_of(link: Wire, count: int = 5) -> tuple[list[ClientState], Any]:
    received = [state(0) for _ in range(count)]
    return received, {c: link.up(c, received[c], trained(received[c], c + 1), None) for c in range(count)}


def lie(attack: str, own: np.ndarray, honest: list[np.ndarray]) -> np.ndarray:
    """What one of two attackers among five should say in place of ``own``."""
    return {
        "sign_flip": -own,
        "ipm": -2 * np.mean(honest, axis=0),
        "mimic": honest[0],
        "alie": np.mean(honest, axis=0) - alie_z(5, 2) * np.std(honest, axis=0),
        "nan": np.full_like(own, np.nan),
        "label_flip": own,
    }[attack]


@pytest.mark.parametrize("attack", ["sign_flip", "ipm", "mimic", "alie", "nan", "label_flip"])
def test_the_attackers_uploads_are_replaced_and_no_others(attack: str) -> None:
    link = wire(byzantine={"fraction": 0.4, "attack": attack})
    liars = byzantine_clients(link.config)
    assert len(liars) == 2
    received, uploads = uploads_of(link)
    forged = link.forged(3, uploads, received)
    assert forged.keys() == uploads.keys()
    update = {c: upload["m.lora_A"] - received[c]["m.lora_A"] for c, upload in uploads.items()}
    honest = [update[c] for c in sorted(set(uploads) - set(liars))]
    for client in uploads:
        if client in liars:
            expected = received[client]["m.lora_A"] + lie(attack, update[client], honest)
            np.testing.assert_allclose(forged[client]["m.lora_A"], expected, atol=1e-6)
            assert {n: v.dtype for n, v in forged[client].items()} == {n: v.dtype for n, v in uploads[client].items()}
        else:
            assert same(forged[client], uploads[client])


def test_without_attackers_no_update_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    link = wire()
    received, uploads = uploads_of(link)
    monkeypatch.setattr("sylva_ray.transport.wire._difference", None)
    forged = link.forged(1, uploads, received)
    assert forged.keys() == uploads.keys()
    assert all(forged[client] is upload for client, upload in uploads.items())


def test_noise_is_drawn_per_client_and_round() -> None:
    link = wire(byzantine={"fraction": 0.4, "attack": "gaussian"})
    a, b = byzantine_clients(link.config)
    received, uploads = uploads_of(link)
    first, again, later = (link.forged(round, uploads, received) for round in (3, 3, 4))
    assert same(first[a], again[a])
    assert not same(first[a], first[b])
    assert not same(first[a], later[a])


def test_attackers_count_where_they_take_part() -> None:
    """One of two attackers is there: ALIE hides among the four that are; alone, an attacker lies all the same."""
    link = wire(byzantine={"fraction": 0.4, "attack": "alie"})
    absent, present = byzantine_clients(link.config)
    received, uploads = uploads_of(link)
    del uploads[absent]
    honest = [uploads[c]["m.lora_A"] - received[c]["m.lora_A"] for c in uploads if c != present]
    expected = np.mean(honest, axis=0) - alie_z(4, 1) * np.std(honest, axis=0)
    forged = link.forged(1, uploads, received)
    assert absent not in forged
    np.testing.assert_allclose(forged[present]["m.lora_A"], received[present]["m.lora_A"] + expected, atol=1e-6)
    broken = wire(byzantine={"fraction": 0.4, "attack": "nan"})
    alone = broken.forged(1, {present: uploads[present]}, received)
    assert np.isnan(alone[present]["m.lora_A"]).all()


def test_a_lie_is_no_larger_than_what_the_attacker_may_send() -> None:
    """A client of rank 1 that copies one of rank 4 still has one slot."""
    algorithm = HetLoraAT(HetLoraAT.Parameters(ranks=(1, 4)))
    algorithm.head_names = HEADS
    raw = {"partition": {"num_clients": 4}, "byzantine": {"fraction": 0.5, "attack": "gaussian"}}
    seed = next(s for s in range(99) if 0 in byzantine_clients(build(ExperimentConfig, raw | {"seed": s})))
    link = Wire(build(ExperimentConfig, raw | {"seed": seed}), algorithm)
    received = [algorithm.initial_state(client, state(0)) for client in range(4)]
    uploads = {c: link.up(c, received[c], trained(received[c], c), None) for c in range(4)}
    forged = link.forged(1, uploads, received)
    assert not same(forged[0], uploads[0])
    assert not forged[0]["m.lora_A"][1:].any()
    assert not forged[0]["m.lora_B"][:, 1:].any()


# -- whole rounds --------------------------------------------------------------------------------------------------------

BRIEF = TINY | {
    "algorithm": {"name": "sylva", "head_warmup_epochs": 0, "final_local_epochs": 0, "phase2": {"enabled": False}},
    "evaluation": {"attacks": [], "checks": False},
}


def prepared(**sections: Any) -> Prepared:
    return prepare(build(ExperimentConfig, BRIEF | sections))


def server_of(made: Prepared, folder: Path) -> Server:
    """A coordinator without workers, for one exchange."""
    algorithm = create_algorithm(made.config.algorithm)
    model = build_model(create_algorithm(made.config.algorithm), made.config, made.fleet.num_classes, made.backbone)
    initial = initial_states(algorithm, model, made.config, made.fleet.num_classes, made.backbone)
    return Server(made.config, algorithm, made.fleet, initial, {}, None, folder, lambda _: None)


@pytest.fixture(scope="module")
def quantised() -> Prepared:
    return prepared(compression={"kind": "int4"}, algorithm=BRIEF["algorithm"] | {"factor_rule": "naive"})


def test_a_run_with_residuals_resumes_with_the_same_bits(
    quantised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What compression owes is part of the state: without it the resumed run would be another one."""
    summary = run(quantised, tmp_path / "whole")
    whole = newest(tmp_path / "whole")
    assert set(whole.residuals) == {0, 1, 2}
    assert all(value.any() for own in whole.residuals.values() for name, value in own.items() if "lora_B" in name)
    write, manifests = checkpoint_module._write, []

    def full_disk(path: Path, content: bytes) -> None:
        manifests.extend([path] * (path.name == "manifest.json"))
        if len(manifests) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint_module, "_write", full_disk)
    with pytest.raises(RunError, match="No space left"):
        run(quantised, tmp_path / "cut")
    monkeypatch.setattr(checkpoint_module, "_write", write)
    after_one = newest(tmp_path / "cut")
    assert after_one.step == 1
    run(quantised, tmp_path / "cut")
    resumed = newest(tmp_path / "cut")
    assert all(same(a, b) for a, b in zip(resumed.states, whole.states, strict=True))
    assert resumed.residuals.keys() == whole.residuals.keys()
    assert all(same(resumed.residuals[c], whole.residuals[c]) for c in whole.residuals)
    kept = load_file(tmp_path / "whole" / "checkpoint" / "round_0001" / "residuals.safetensors")
    assert {int(key.partition(":")[0]) for key in kept} == {0, 1, 2}

    forgetful = CheckpointFolder(tmp_path / "forgets" / "checkpoint")
    forgetful.save(1, after_one.states, after_one.records, after_one.game, {})
    run(quantised, tmp_path / "forgets")
    other = newest(tmp_path / "forgets")
    assert not all(same(a, b) for a, b in zip(other.states, whole.states, strict=True))

    records = records_of(tmp_path / "whole")
    codec = create_codec("int4")
    sent = {name: value for name, value in whole.states[0].items() if not name.startswith("head")}
    assert [r["upload_bytes"] for r in records] == [0, *[3 * codec.num_bytes(shapes_of(sent))] * 2]
    assert [r["download_bytes"] for r in records] == [r["upload_bytes"] for r in records]
    assert records[1]["upload_payload_bytes"] > records[1]["upload_bytes"]
    assert summary["communication"]["upload_bytes_per_client_round"] == codec.num_bytes(shapes_of(sent))


def test_checkpoints_keep_residuals_by_client_and_may_have_none(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    owed = {client: {"a.x": np.full((2, 2), client, np.float32), "b": np.ones(1, np.float32)} for client in (2, 10)}
    checkpoints.save(0, [{"x": np.zeros(1, np.float32)}], [], None)
    assert checkpoints.latest().residuals == {}
    checkpoints.save(1, [{"x": np.zeros(1, np.float32)}], [], None, owed)
    back = checkpoints.latest().residuals
    assert back.keys() == owed.keys()
    assert all(same(back[client], owed[client]) for client in owed)
    (tmp_path / "round_0001" / "residuals.safetensors").write_bytes(b"half")
    assert checkpoints.latest().step == 0, "residuals are vouched for like the states"


@pytest.mark.parametrize("sharing", ["global", "neighbours"])
@pytest.mark.parametrize("compression", ["none", "int8"])
def test_an_attack_by_nan_is_the_round_without_that_client(sharing: str, compression: str, tmp_path: Path) -> None:
    method = BRIEF["algorithm"] | {"adapters": sharing}
    lying = prepared(algorithm=method, byzantine={"fraction": 0.34, "attack": "nan"}, compression={"kind": compression})
    honest = prepared(algorithm=method, compression={"kind": compression})
    (liar,) = byzantine_clients(lying.config)
    states = []
    for made, sends in ((lying, {0, 1, 2}), (honest, {0, 1, 2} - {liar})):
        server = server_of(made, tmp_path)
        received = server.states.copy()
        noise = [np.random.default_rng(c) for c in range(3)]
        after = [
            {n: (v + 0.01 * g.normal(size=v.shape)).astype(np.float32) for n, v in s.items()}
            for g, s in zip(noise, received)
        ]
        outcomes = {c: TrainOutcome(after[c], 10, {"loss": 1.0}) for c in range(3)}
        server.adopt_states(outcomes)
        server.exchange(2, {c: o for c, o in outcomes.items() if c in sends}, received)
        states.append(server.states)
    for with_nan, without in zip(*states, strict=True):
        assert same(with_nan, without)
    assert not same(states[0][0], states[0][1])


def test_a_label_flipper_trains_on_flipped_labels_and_nobody_else_does() -> None:
    flipping = prepared(byzantine={"fraction": 0.34, "attack": "label_flip"})
    plain = prepared()
    (liar,) = byzantine_clients(flipping.config)
    train = plain.fleet.dataset.train
    rows = plain.fleet.clients[liar].train
    labels = train.labels.copy()
    labels[rows] = flip_labels(labels[rows], 10)
    dataset = dataclasses.replace(plain.fleet.dataset, train=dataclasses.replace(train, labels=labels))
    by_hand = dataclasses.replace(plain.fleet, dataset=dataset)
    workers = [create_worker(flipping.config, flipping.fleet, flipping.backbone)]
    workers += [create_worker(plain.config, fleet, plain.backbone) for fleet in (by_hand, plain.fleet)]
    start = stack_states([workers[0].model.initial_state(generator(0, "initial state"))] * 3)
    task = TrainTask(1, (0, 1, 2), start, epsilon=4 / 255, lr=0.005, epochs=1)
    flipped, expected, honest = (worker.run(task).outcomes for worker in workers)
    for client in range(3):
        assert same(flipped[client].state, expected[client].state)
        assert same(flipped[client].state, honest[client].state) == (client != liar)
    assert np.array_equal(workers[0].fleet.client(liar).train.labels, plain.fleet.client(liar).train.labels)
