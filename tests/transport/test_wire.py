"""What travels: bytes, compression with error feedback, malicious uploads, and postprocessors in their order."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from sylva_ray.algorithms.hetlora import HetLoraAT
from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.algorithms.sylva import Sylva
from sylva_ray.attacks.byzantine import alie_z, flip_labels
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import RunError
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import ClientState, stack_states, state_bytes
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.client.training import TrainOutcome, TrainSettings, TrainTask
from sylva_ray.federation.client.worker import build_model
from sylva_ray.federation.contract import Algorithm
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.layer_game.client import Phase2Client
from sylva_ray.models.cohort import to_parameters
from sylva_ray.preparation.experiment import Prepared, create_worker, initial_states, prepare
from sylva_ray.preparation.traffic import declared_traffic
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.checkpoint import CheckpointFolder
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.transport.byzantine import ByzantineUploads, byzantine_clients
from sylva_ray.transport.codecs import array_shapes, create_codec
from sylva_ray.transport.compression import Compression
from sylva_ray.transport.postprocessor import Direction, Message, Postprocessor
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
    return wire_of(algorithm, raw)


def wire_of(algorithm: Algorithm, raw: dict[str, Any]) -> Wire:
    return Wire(algorithm, algorithm.postprocessors(build(ExperimentConfig, raw)))


def upload(
    link: Wire, client: int, received: ClientState, own: ClientState, names: Sequence[str] | None = None
) -> ClientState:
    """What the coordinator decodes of one client's upload; nothing: {}."""
    return link.upload(1, [received] * (client + 1), {client: own}, names).get(client, {})


def trained(received: ClientState, seed: int, scale: float = 0.01) -> dict[str, np.ndarray]:
    return {name: value + state(seed, scale)[name] for name, value in received.items()}


def same(a: ClientState, b: ClientState) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)


# -- without compression -----------------------------------------------------------------------------------------------


def test_without_compression_the_wire_is_the_identity_and_counts_what_it_carries() -> None:
    link, received = wire(), state(0)
    own = trained(received, 1)
    arrived = upload(link, 0, received, own)
    sent = {name: own[name] for name in ("m.lora_A", "m.lora_B")}
    assert same(arrived, sent), "heads stay at home"
    assert link.traffic.upload == state_bytes(sent) == 4 * (200 + 148)
    assert link.traffic.upload_payload == len(save(sent)) > link.traffic.upload
    merged = own | {"m.lora_A": state(7)["m.lora_A"]}
    assert same(link.download(1, 0, received, merged), merged)
    assert link.traffic.download == 4 * (200 + 148)
    assert link.traffic.download_payload == len(save({n: merged[n] for n in sent}))
    assert link.residuals == {}
    before = dataclasses.replace(link.traffic)
    link.download(1, 1, received, merged, counted=False)
    assert link.traffic == before, "who did not take part is not answered"


def test_only_what_is_named_travels() -> None:
    link, received = wire(heads="global", kind="int8"), state(0)
    arrived = upload(link, 0, received, trained(received, 1), HEADS)
    assert set(arrived) == set(HEADS) == set(link.residuals[0])
    upload(link, 0, received, trained(received, 2))
    assert set(link.residuals[0]) == set(received)


def test_a_method_that_shares_nothing_sends_nothing() -> None:
    algorithm = Algorithm(Algorithm.Parameters(adapters="local", heads="local"))
    algorithm.head_names = HEADS
    link = wire_of(algorithm, {"compression": {"kind": "int8"}})
    assert upload(link, 0, state(0), state(1)) == {}
    assert (link.traffic.upload, link.traffic.upload_payload, link.residuals) == (0, 0, {})


# -- compression -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CODECS)
def test_no_residual_is_kept_of_pairs_that_merging_writes_in_other_coordinates(kind: str) -> None:
    link, received = wire(heads="global", factor_rule="product_svd", kind=kind), state(0)
    upload(link, 0, received, trained(received, 1))
    assert set(link.residuals[0]) == set(HEADS)
    codec, again = create_codec(kind, fraction=0.05), trained(received, 2)
    update = {name: again[name] - received[name] for name in received}
    target = {name: value + link.residuals[0].get(name, 0) for name, value in update.items()}
    arrived = upload(link, 0, received, again)
    decoded = codec.decode(codec.encode(target), array_shapes(target))
    for name, value in decoded.items():
        np.testing.assert_allclose(arrived[name], received[name] + value, atol=1e-6)


@pytest.mark.parametrize("kind", CODECS)
def test_error_feedback_over_rounds_is_the_textbooks(kind: str) -> None:
    """What arrives is received + C(update + residual); the residual is what C lost; nothing is lost over the server."""
    link, codec = wire(kind=kind, fraction=0.1), create_codec(kind, fraction=0.1)
    received: ClientState = {name: value for name, value in state(0).items() if name not in HEADS}
    residual = {name: np.zeros_like(value) for name, value in received.items()}
    meant, told = ({n: np.zeros(v.shape) for n, v in received.items()} for _ in range(2))
    for round in range(1, 5):
        full = state(0) | dict(received)
        own = trained(full, round)
        arrived = upload(link, 3, full, own)
        target = {n: (own[n] - received[n]) + residual[n] for n in received}
        decoded = codec.decode(codec.encode(target), array_shapes(target))
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
def test_without_error_feedback_there_is_no_residual(kind: str) -> None:
    link, received = wire(kind=kind, error_feedback=False), state(0)
    first = upload(link, 0, received, trained(received, 1))
    assert link.residuals == {}
    assert same(upload(link, 0, received, trained(received, 1)), first)


@pytest.mark.parametrize("kind", CODECS)
def test_declared_bytes_are_those_of_the_arrays_and_the_file(kind: str) -> None:
    link, received = wire(kind=kind), state(0)
    own = trained(received, 1)
    upload(link, 0, received, own)
    codec = create_codec(kind, fraction=0.05)
    update = {name: own[name] - received[name] for name in ("m.lora_A", "m.lora_B")}
    encoded = codec.encode(update)
    assert (
        link.traffic.upload == sum(value.nbytes for value in encoded.values()) == codec.num_bytes(array_shapes(update))
    )
    assert link.traffic.upload_payload == len(save(encoded))
    by_hand = {"int8": 348 + 2 * 7, "int4": 174 + 2 * 7, "topk": 8 * 17}  # 348 entries; 4 + 3 blocks of 64; 5 %
    assert link.traffic.upload == by_hand[kind]


def test_clients_of_other_ranks_pay_for_their_own_slots() -> None:
    algorithm = HetLoraAT(HetLoraAT.Parameters(ranks=(1, 4)))
    algorithm.head_names = HEADS
    link = wire_of(algorithm, {"compression": {"kind": "int8"}})
    starts = [algorithm.initial_state(client, state(0)) for client in range(2)]
    arrived = upload(link, 0, starts[0], trained(starts[0], 1))
    assert link.traffic.upload == 87 + 2 * 2  # one slot of A and of B: 50 + 37 entries, a block each
    assert {name: value.shape for name, value in arrived.items()} == {"m.lora_A": (4, 50), "m.lora_B": (37, 4)}
    assert not arrived["m.lora_A"][1:].any()
    assert not arrived["m.lora_B"][:, 1:].any()
    assert link.residuals[0]["m.lora_A"].shape == (1, 50)
    assert upload(link, 1, starts[1], trained(starts[1], 1))["m.lora_A"][1:].any()


def test_an_update_that_is_not_finite_arrives_as_such_and_leaves_no_trace() -> None:
    link, received = wire(kind="int8"), state(0)
    upload(link, 0, received, trained(received, 1))
    kept = {name: value.copy() for name, value in link.residuals[0].items()}
    broken = trained(received, 2)
    broken["m.lora_A"][0, 0] = np.nan
    assert not np.isfinite(upload(link, 0, received, broken)["m.lora_A"]).all()
    assert same(link.residuals[0], kept)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_client_and_server_agree_on_a_compressed_answer(kind: str) -> None:
    """The server knows what a client received and what it sent: it can say to the bit what the client holds."""
    link, received, merged = wire(kind=kind), state(0), trained(state(0), 5, 0.1)
    held = link.download(1, 0, received, merged)
    codec = create_codec(kind)
    update = {name: merged[name] - received[name] for name in ("m.lora_A", "m.lora_B")}
    coded = codec.encode(update)
    for name, value in codec.decode(coded, array_shapes(update)).items():
        assert np.array_equal(held[name], received[name] + value)
        assert 0 < np.abs(held[name] - merged[name]).max() < 0.1
    assert all(np.array_equal(held[name], merged[name]) for name in HEADS), "what stays at home is not touched"
    assert link.traffic.download == sum(value.nbytes for value in coded.values())
    assert link.residuals == {}, "the coordinator knows the merged state in full next time"
    assert same(link.download(1, 1, received, dict(received)), received), "no news, not a bit"


@pytest.mark.parametrize("compression", [{"kind": "topk"}, {"kind": "int8", "download": False}])
def test_answers_that_are_not_compressed_arrive_as_they_are(compression: dict[str, Any]) -> None:
    link, merged = wire(**compression), trained(state(0), 5)
    assert same(link.download(1, 0, state(0), merged), merged)
    assert link.traffic.download == 4 * (200 + 148)


# -- attackers ---------------------------------------------------------------------------------------------------------


def byzantine_wire(attack: str) -> tuple[Wire, list[int]]:
    """Five clients, two of them malicious."""
    raw: dict[str, Any] = {"partition": {"num_clients": 5}, "byzantine": {"fraction": 0.4, "attack": attack}}
    malicious = byzantine_clients(build(ExperimentConfig, raw))
    assert len(malicious) == 2
    return wire(byzantine=raw["byzantine"]), malicious


def uploads_of(link: Wire, round: int = 1, clients: Sequence[int] = range(5)) -> dict[int, ClientState]:
    return link.upload(round, [state(0)] * 5, {c: trained(state(0), c + 1) for c in clients})


def expected_update(attack: str, own: np.ndarray, honest: list[np.ndarray]) -> np.ndarray:
    """What one of two attackers among five uploads in place of ``own``."""
    updates: dict[str, np.ndarray] = {
        "sign_flip": -own,
        "ipm": -2 * np.mean(honest, axis=0),
        "mimic": honest[0],
        "alie": np.mean(honest, axis=0) - alie_z(5, 2) * np.std(honest, axis=0),
        "nan": np.full_like(own, np.nan),
        "label_flip": own,
    }
    return updates[attack]


@pytest.mark.parametrize("attack", ["sign_flip", "ipm", "mimic", "alie", "nan", "label_flip"])
def test_the_uploads_of_malicious_clients_are_replaced_and_no_others(attack: str) -> None:
    link, malicious = byzantine_wire(attack)
    received, attacked, uploads = state(0), uploads_of(link), uploads_of(wire())
    assert attacked.keys() == uploads.keys()
    update = {c: upload["m.lora_A"] - received["m.lora_A"] for c, upload in uploads.items()}
    honest = [update[c] for c in sorted(set(uploads) - set(malicious))]
    for client in uploads:
        if client in malicious:
            expected = received["m.lora_A"] + expected_update(attack, update[client], honest)
            np.testing.assert_allclose(attacked[client]["m.lora_A"], expected, atol=1e-6)
            assert {n: v.dtype for n, v in attacked[client].items()} == {n: v.dtype for n, v in uploads[client].items()}
        else:
            assert same(attacked[client], uploads[client])


def test_without_malicious_clients_and_compression_arrays_travel_as_they_are() -> None:
    link, own = wire(), trained(state(0), 1)
    assert link.postprocessors == ()
    arrived = upload(link, 0, state(0), own)
    assert all(value is own[name] for name, value in arrived.items())


def test_noise_is_drawn_per_client_and_round() -> None:
    link, (a, b) = byzantine_wire("gaussian")
    first, again, later = (uploads_of(link, round) for round in (3, 3, 4))
    assert same(first[a], again[a])
    assert not same(first[a], first[b])
    assert not same(first[a], later[a])


def test_malicious_clients_count_where_they_take_part() -> None:
    """One of two attackers takes part: ALIE hides among the four that do; alone, a client attacks all the same."""
    link, (absent, present) = byzantine_wire("alie")
    clients = [client for client in range(5) if client != absent]
    uploads = uploads_of(wire(), 1, clients)
    honest = [uploads[c]["m.lora_A"] - state(0)["m.lora_A"] for c in clients if c != present]
    expected = np.mean(honest, axis=0) - alie_z(4, 1) * np.std(honest, axis=0)
    attacked = uploads_of(link, 1, clients)
    assert absent not in attacked
    np.testing.assert_allclose(attacked[present]["m.lora_A"], state(0)["m.lora_A"] + expected, atol=1e-6)
    assert np.isnan(uploads_of(byzantine_wire("nan")[0], 1, [present])[present]["m.lora_A"]).all()


def test_a_malicious_upload_is_no_larger_than_what_its_client_may_send() -> None:
    """A client of rank 1 that copies one of rank 4 still has one slot."""
    algorithm = HetLoraAT(HetLoraAT.Parameters(ranks=(1, 4)))
    algorithm.head_names = HEADS
    raw: dict[str, Any] = {
        "partition": {"num_clients": 4},
        "byzantine": {"fraction": 0.5, "attack": "gaussian"},
    }
    seed = next(s for s in range(99) if 0 in byzantine_clients(build(ExperimentConfig, raw | {"seed": s})))
    received = [algorithm.initial_state(client, state(0)) for client in range(4)]
    own = {client: trained(received[client], client) for client in range(4)}
    attacked = wire_of(algorithm, raw | {"seed": seed}).upload(1, received, own)
    assert not same(attacked[0], Wire(algorithm).upload(1, received, own)[0])
    assert not attacked[0]["m.lora_A"][1:].any()
    assert not attacked[0]["m.lora_B"][:, 1:].any()


# -- a postprocessor of one's own --------------------------------------------------------------------------------------


class Offset(Postprocessor):
    """Adds 8 to everything that travels; the receiver subtracts it. Both are exact for small integers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, float]] = []

    def encode(self, arrays: ClientState, message: Message) -> ClientState:
        del message
        return {name: value + 8 for name, value in arrays.items()}

    def decode(self, arrays: ClientState, message: Message) -> ClientState:
        self.seen.append((message.direction, message.client, message.step, float(arrays["m.lora_A"].min())))
        return {name: value - 8 for name, value in arrays.items()}


class OffsetMethod(Algorithm):
    """A method that masks what it sends, and leaves the rest as it is."""

    def postprocessors(self, config: ExperimentConfig) -> list[Postprocessor]:
        return [*super().postprocessors(config), Offset()]


def test_a_method_adds_a_postprocessor_that_the_coordinator_reverses() -> None:
    algorithm = OffsetMethod(OffsetMethod.Parameters(adapters="global", heads="local"))
    algorithm.head_names = HEADS
    link = wire_of(algorithm, {})
    (offset,) = link.postprocessors
    assert isinstance(offset, Offset)
    received = {name: np.round(value) for name, value in state(0).items()}
    own = {name: value + 1 for name, value in received.items()}
    sent = {name: value for name, value in own.items() if name not in HEADS}
    assert same(upload(link, 2, received, own), sent)
    assert same(link.download(1, 2, received, own), own)
    masked = float(own["m.lora_A"].min()) + 8
    assert offset.seen == [("upload", 2, 1, masked), ("download", 2, 1, masked)]
    assert link.traffic.upload == link.traffic.download == state_bytes(sent)


class Signed(Postprocessor):
    """Adds a signature of 16 bytes, which the receiver takes off."""

    def encode(self, arrays: ClientState, message: Message) -> ClientState:
        del message
        return {**arrays, "signature": np.zeros(16, np.uint8)}

    def decode(self, arrays: ClientState, message: Message) -> ClientState:
        del message
        return {name: value for name, value in arrays.items() if name != "signature"}

    def num_bytes(self, before: int, state: ClientState, direction: Direction) -> int:
        del state, direction
        return before + 16


class SignedMethod(Algorithm):
    """A method that signs what it sends."""

    def postprocessors(self, config: ExperimentConfig) -> list[Postprocessor]:
        return [*super().postprocessors(config), Signed()]


@pytest.mark.parametrize(
    "compression", [{}, {"kind": "int8"}, {"kind": "int8", "download": False}, {"kind": "topk", "fraction": 0.1}]
)
def test_declared_bytes_are_those_that_the_postprocessors_of_a_method_send(compression: dict[str, Any]) -> None:
    config = build(ExperimentConfig, {"partition": {"num_clients": 2}, "compression": compression})
    algorithm = SignedMethod(SignedMethod.Parameters(adapters="global", heads="local"))
    algorithm.head_names = HEADS
    states = [state(0), state(1)]
    declared = declared_traffic(config, algorithm, states, full_model=1)
    link = Wire(algorithm, algorithm.postprocessors(config))
    link.upload(1, states, dict(enumerate(states)))
    for client, own in enumerate(states):
        link.download(1, client, own, own)
    assert (link.traffic.upload, link.traffic.download) == (2 * declared.upload, 2 * declared.download)


class Recorder(Postprocessor):
    """Changes nothing and notes when it was asked."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def encode(self, arrays: ClientState, message: Message) -> ClientState:
        self.calls.append(f"encode {self.name}")
        return super().encode(arrays, message)

    def decode(self, arrays: ClientState, message: Message) -> ClientState:
        self.calls.append(f"decode {self.name}")
        return super().decode(arrays, message)


def test_postprocessors_are_applied_in_order_and_reversed_from_the_last_one() -> None:
    calls: list[str] = []
    algorithm = Algorithm(Algorithm.Parameters(adapters="global"))
    link, own = Wire(algorithm, [Recorder("a", calls), Recorder("b", calls)]), trained(state(0), 1)
    upload(link, 0, state(0), own)
    assert calls == ["encode a", "encode b", "decode b", "decode a"]
    link.download(1, 0, state(0), own)
    assert calls[4:] == calls[:4]


def test_byzantine_clients_come_before_compression() -> None:
    """The coordinator meets their updates after decoding: a codec does not change them."""
    raw = {"partition": {"num_clients": 5}, "compression": {"kind": "int8"}, "byzantine": {"fraction": 0.4}}
    link = wire_of(Algorithm(Algorithm.Parameters()), raw)
    assert [type(postprocessor) for postprocessor in link.postprocessors] == [ByzantineUploads, Compression]


# -- whole rounds ------------------------------------------------------------------------------------------------------

BRIEF = TINY | {
    "algorithm": {"name": "sylva", "head_warmup_epochs": 0, "final_local_epochs": 0, "phase2": {"enabled": False}},
    "evaluation": {"attacks": [], "checks": False},
}


def prepared(**sections: Any) -> Prepared:
    return prepare(build(ExperimentConfig, BRIEF | sections))


def server_of(made: Prepared, folder: Path) -> Server:
    """A coordinator without workers, for one exchange."""
    algorithm = create_algorithm(made.config.algorithm)
    worker = create_worker(made.config, made.fleet, made.backbone)
    model = build_model(create_algorithm(made.config.algorithm), made.config, made.fleet.num_classes, made.backbone)
    initial = initial_states(algorithm, model, made.config, made.fleet.num_classes, made.backbone)
    return Server(made.config, algorithm, made.fleet, initial, {}, InProcessPool(worker), RunFolder(folder), Observer())


@pytest.fixture(scope="module")
def quantised() -> Prepared:
    return prepared(compression={"kind": "int4"}, algorithm=BRIEF["algorithm"] | {"factor_rule": "naive"})


@pytest.mark.long
def test_a_run_with_residuals_resumes_with_the_same_bits(
    quantised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What compression owes is part of the state: without it the resumed run would be another one."""
    summary = run(quantised, tmp_path / "whole")
    whole = newest(tmp_path / "whole")
    assert set(whole.residuals) == {0, 1, 2}
    assert all(value.any() for own in whole.residuals.values() for name, value in own.items() if "lora_B" in name)
    manifests: list[Path] = []

    def full_disk(path: Path, content: bytes, durable: bool = False) -> None:
        manifests.extend([path] * (path.name == "manifest.json"))
        if len(manifests) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, content, durable)

    monkeypatch.setattr("sylva_ray.storage.manifest.write_atomically", full_disk)
    with pytest.raises(RunError, match="No space left"):
        run(quantised, tmp_path / "cut")
    monkeypatch.setattr("sylva_ray.storage.manifest.write_atomically", write_atomically)
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
    sent = whole.states[0]
    assert [r["upload_bytes"] for r in records] == [0, *[3 * codec.num_bytes(array_shapes(sent))] * 2]
    assert [r["download_bytes"] for r in records] == [r["upload_bytes"] for r in records]
    assert records[1]["upload_payload_bytes"] > records[1]["upload_bytes"]
    assert summary.communication.upload_bytes_per_client_round == codec.num_bytes(array_shapes(sent))


def test_checkpoints_keep_residuals_by_client_and_may_have_none(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    kept = {client: {"a.x": np.full((2, 2), client, np.float32), "b": np.ones(1, np.float32)} for client in (2, 10)}
    checkpoints.save(0, [{"x": np.zeros(1, np.float32)}], [], None)
    first = checkpoints.latest()
    assert first is not None
    assert first.residuals == {}
    checkpoints.save(1, [{"x": np.zeros(1, np.float32)}], [], None, kept)
    second = checkpoints.latest()
    assert second is not None
    back = second.residuals
    assert back.keys() == kept.keys()
    assert all(same(back[client], kept[client]) for client in kept)
    (tmp_path / "round_0001" / "residuals.safetensors").write_bytes(b"half")
    third = checkpoints.latest()
    assert third is not None
    assert third.step == 0, "residuals are vouched for like the states"


@pytest.mark.parametrize("sharing", ["global", "neighbours"])
@pytest.mark.parametrize("compression", ["none", "int8"])
def test_an_attack_by_nan_is_the_round_without_that_client(sharing: str, compression: str, tmp_path: Path) -> None:
    method = BRIEF["algorithm"] | {"adapters": sharing, "heads": "local"}
    attacked = prepared(
        algorithm=method, byzantine={"fraction": 0.34, "attack": "nan"}, compression={"kind": compression}
    )
    honest = prepared(algorithm=method, compression={"kind": compression})
    (malicious,) = byzantine_clients(attacked.config)
    states = []
    for made, sends in ((attacked, {0, 1, 2}), (honest, {0, 1, 2} - {malicious})):
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


@pytest.mark.parametrize("method", [{}, {"class_balance": 0.99}, {"name": "calfat"}])
def test_a_label_flipper_trains_on_flipped_labels_and_nobody_else_does(method: dict[str, Any]) -> None:
    algorithm = BRIEF["algorithm"] | method if "name" not in method else method
    flipping = prepared(byzantine={"fraction": 0.34, "attack": "label_flip"}, algorithm=algorithm)
    plain = prepared(algorithm=algorithm)
    (malicious,) = byzantine_clients(flipping.config)
    train = plain.fleet.dataset.train
    rows = plain.fleet.clients[malicious].train
    labels = train.labels.copy()
    labels[rows] = flip_labels(labels[rows], 10)
    dataset = dataclasses.replace(plain.fleet.dataset, train=dataclasses.replace(train, labels=labels))
    by_hand = dataclasses.replace(plain.fleet, dataset=dataset)
    workers = [create_worker(flipping.config, flipping.fleet, flipping.backbone)]
    workers += [create_worker(plain.config, fleet, plain.backbone) for fleet in (by_hand, plain.fleet)]
    start = stack_states([workers[0].model.initial_state(generator(0, "initial state"))] * 3)
    task = TrainTask(1, (0, 1, 2), start, TrainSettings(epsilon=4 / 255, lr=0.005, epochs=1))
    flipped, expected, honest = (worker.run(task).outcomes for worker in workers)
    for client in range(3):
        assert same(flipped[client].state, expected[client].state)
        assert same(flipped[client].state, honest[client].state) == (client != malicious)
    assert np.array_equal(workers[0].fleet.client(malicious).train.labels, plain.fleet.client(malicious).train.labels)
    if "name" in method:
        return
    params = to_parameters(start, workers[0].device, torch.float32)
    phase2 = Phase2Client.from_task(workers[0], task, params, Sylva.Parameters().phase2)
    for client, own in enumerate(phase2.data):
        true = plain.fleet.client(client)
        assert np.array_equal(own.train.labels, true.train.labels) == (client != malicious)
        assert np.array_equal(own.guard.labels, true.guard.labels)


@pytest.mark.parametrize(("sharing", "heads"), [("global", "local"), ("neighbours", "local"), ("neighbours", "global")])
def test_a_client_whose_upload_was_refused_gets_no_coded_copy_of_its_own_state(
    sharing: str, heads: str, tmp_path: Path
) -> None:
    made = prepared(algorithm=BRIEF["algorithm"] | {"adapters": sharing, "heads": heads}, compression={"kind": "int4"})
    server = server_of(made, tmp_path)
    received = server.states.copy()
    rng = np.random.default_rng(0)
    after = [{n: (v + 0.01 * rng.normal(size=v.shape)).astype(np.float32) for n, v in s.items()} for s in received]
    outcomes = {c: TrainOutcome(state, 10, {"loss": 1.0}) for c, state in enumerate(after)}
    far = {n: v * np.float32(1e30) for n, v in after[1].items() if n.endswith(".lora_A")}
    outcomes[1] = TrainOutcome(after[1] | far, 10, {"loss": 1.0})  # a product of such factors has no finite size
    server.adopt_states(outcomes)
    server.exchange(2, outcomes, received)
    assert list(server.costs.refused) == [1]
    codec = create_codec("int4")
    names = [n for n in after[0] if server.algorithm.is_uploaded(n)]
    answer = codec.num_bytes(array_shapes({n: after[0][n] for n in names}))
    if sharing == "neighbours":
        own = [n for n in after[0] if not (heads == "global" and n in server.algorithm.head_names)]
        assert same({n: server.states[1][n] for n in own}, {n: outcomes[1].state[n] for n in own})
        head = codec.num_bytes(array_shapes({n: after[0][n] for n in after[0] if n not in own}))
        assert server.costs.download_bytes == 2 * answer + head
    else:
        assert server.costs.download_bytes == 3 * answer


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_coordinates_that_merging_has_turned_do_not_spoil_a_coded_answer(kind: str) -> None:
    """What is coded is then as small as the change of the product."""
    received = state(0)
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    a, b = (received[name] + trained(received, 2)[name] - received[name] for name in ("m.lora_A", "m.lora_B"))
    merged = received | {"m.lora_A": (turn @ a).astype(np.float32), "m.lora_B": (b @ turn.T).astype(np.float32)}

    def error(factor_rule: str) -> float:
        link = wire(factor_rule=factor_rule, kind=kind)
        got = link.download(1, 0, received, merged, None, counted=True)
        return float(np.linalg.norm(got["m.lora_B"] @ got["m.lora_A"] - b @ a))

    change = float(np.linalg.norm(b @ a - received["m.lora_B"] @ received["m.lora_A"]))
    assert error("product_svd") < 0.2 * change
    assert error("naive") > error("product_svd")
