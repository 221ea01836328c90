"""`sylva-ray evaluate` on a real, tiny run: what it finds, what it keeps, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from sylva_ray.attacks import registry
from sylva_ray.attacks.base import LinfAttack
from sylva_ray.attacks.state import AttackState
from sylva_ray.config.attacks import parse_attack
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core import types
from sylva_ray.core.errors import UserError
from sylva_ray.core.evaluation import AttackSettings
from sylva_ray.core.own_code import importing_from
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, stack_states
from sylva_ray.evaluation.cache import MeasurementCache
from sylva_ray.evaluation.plan import EvaluationRequest, suite
from sylva_ray.evaluation.request import Extras, build_request
from sylva_ray.evaluation.run import prepare_evaluation, run_evaluation
from sylva_ray.evaluation.tables import Cost, Measured, attack_row, condition_row, worst_answers
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.execution.run import run_prepared
from sylva_ray.federation.client.measuring import EvaluateOutcome, EvaluateTask
from sylva_ray.federation.observer import Observer
from sylva_ray.metrics.intervals import fleet_interval
from sylva_ray.metrics.predictions import read_correct
from sylva_ray.observers.metrics import evaluation_metrics
from sylva_ray.preparation.experiment import Prepared, create_worker, prepare
from sylva_ray.preparation.resolve import resolve_config
from sylva_ray.reports.pages.run import write_report
from sylva_ray.reports.terminal import evaluation_lines
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY

pytestmark = pytest.mark.long

EPSILON = 4 / 255
QUICK = EvaluationRequest(
    (parse_attack("pgd:epsilon=4/255,steps=2"), parse_attack("fgsm:epsilon=4/255")), EPSILON, subset_images=3
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three clients, one round, no phase 2."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    sections = {
        "algorithm": {"name": "sylva", "phase2": {"enabled": False}},
        "training": TINY["training"] | {"rounds": 1},
    }
    run_prepared(prepare(build(ExperimentConfig, TINY | sections)), RunFolder(folder), False, Observer())
    return folder


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Silent:
    """Shows no progress."""

    def on_measurement(self, name: str, num_tasks: int, num_known: int) -> None:
        pass

    def on_task_measured(self, name: str) -> None:
        pass


class Spy(InProcessPool):
    """Counts tasks, and dies after some."""

    def __init__(self, prepared: Prepared, lives: int = 10**9) -> None:
        super().__init__(create_worker(prepared.config, prepared.fleet, prepared.backbone))
        self.done, self.lives = 0, lives

    def run(
        self, tasks: Sequence[Any], deadline_s: float | None = None, on_done: Any = None, shared: object = None
    ) -> Any:
        def count(task: Any, result: Any) -> None:
            on_done(task, result)
            self.done += 1
            if self.done == self.lives:
                raise KeyboardInterrupt

        return super().run(tasks, deadline_s, count, shared)


def evaluated(
    run_dir: Path,
    request: EvaluationRequest = QUICK,
    images: int | None = None,
    lives: int = 10**9,
    overrides: Sequence[str] = (),
    surrogates: Sequence[Path] = (),
) -> Any:
    given = prepare_evaluation(RunFolder(run_dir), images, list(map(RunFolder, surrogates)), overrides)
    pool = Spy(given.prepared, lives)
    return run_evaluation(given, request, pool, Silent()), pool


def test_the_runs_own_attack_gives_the_runs_own_numbers(run_dir: Path) -> None:
    found, _ = evaluated(run_dir)
    summary = RunFolder(run_dir).load_summary()
    assert summary is not None
    assert found.benign.accuracy == summary.final.benign_accuracy
    assert found.attacks["pgd2-eps4"].accuracy == summary.final.robust_accuracy["pgd2-eps4"]
    assert found.images == 36
    assert found.attacks["pgd2-eps4"].accuracy.per_client == [
        float(own.mean()) for own in read_correct(RunFolder(run_dir), "pgd2-eps4")
    ]
    worst = found.worst_case["linf-eps4"]
    assert worst.attacks == ["pgd2-eps4", "fgsm-eps4"]
    assert worst.accuracy.mean <= min(row.accuracy.mean for row in found.attacks.values())
    low, high = found.benign.interval
    assert low < found.benign.accuracy.mean < high
    RunFolder(run_dir).write_evaluation(found)
    assert "Every class" in write_report(RunFolder(run_dir)).read_text(), (
        "a report without checks, curves and certificates"
    )


@pytest.mark.slow
def test_another_precision_is_measured_anew_and_says_so(run_dir: Path) -> None:
    exact, _ = evaluated(run_dir)
    coarse, pool = evaluated(run_dir, overrides=["evaluation.precision=bfloat16"])
    assert pool.done > 0, "float32's measurements do not stand for bfloat16's"
    assert coarse.benign == exact.benign, "benign answers are float32's"
    for label, row in exact.attacks.items():
        assert coarse.attacks[label].accuracy.mean == pytest.approx(row.accuracy.mean, abs=0.06), label
    assert exact.threat_model["precision"] == "float32 at evaluation"
    assert "bfloat16" in coarse.threat_model["precision"]
    assert "only if the float32 model" in coarse.threat_model["precision"]
    _, again = evaluated(run_dir)
    assert again.done == 0, "and they are still there"


def test_what_was_measured_is_not_measured_again_and_a_cut_evaluation_goes_on(run_dir: Path) -> None:
    more = parse_attack("mim:epsilon=4/255,steps=1"), parse_attack("noise:epsilon=4/255")
    request = replace(QUICK, attacks=(*QUICK.attacks, *more))
    whole, pool = evaluated(run_dir, request, images=4)
    assert pool.done > 4
    shutil.rmtree(RunFolder(run_dir).measurements)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run_dir, request, images=4, lives=3)
    resumed, second = evaluated(run_dir, request, images=4)
    assert second.done == pool.done - 3
    for part in ("benign", "worst_case", "per_class", "gallery"):
        assert getattr(resumed, part) == getattr(whole, part), part
    _, third = evaluated(run_dir, request, images=4)
    assert third.done == 0
    damaged = next((RunFolder(run_dir).measurements).iterdir())
    damaged.write_bytes(damaged.read_bytes()[:40])
    again, fourth = evaluated(run_dir, request, images=4)
    assert fourth.done == 1
    assert again.attacks.keys() == whole.attacks.keys()
    assert again.worst_case == whole.worst_case


def test_more_images_are_more_of_the_same_classes(run_dir: Path) -> None:
    found, _ = evaluated(run_dir, images=40)
    assert found.images == 120
    assert found.attacks["fgsm-eps4"].interval[0] > 0 or found.attacks["fgsm-eps4"].accuracy.mean == 0


@pytest.mark.slow
def test_everything_at_once_fills_the_report_and_mlflows_metrics(run_dir: Path) -> None:
    request = EvaluationRequest(
        QUICK.attacks, EPSILON, checks=True, curves=True, transfer=True, sigmas=(0.1,), num_draws=20, subset_images=3
    )
    found, _ = evaluated(run_dir, request, surrogates=[run_dir])
    assert [check.name for check in found.checks] == [f"S{number}" for number in range(1, 15)]
    checks = {check.name: check for check in found.checks}
    assert not checks["S12"].passed, "36 images are too few"
    assert "below 1,000" in checks["S12"].meaning
    curve = found.curves.epsilon
    assert curve.x[0] == 0
    assert curve.mean == sorted(curve.mean, reverse=True)
    matrix = np.array(found.transfer.matrix)
    assert matrix.shape == (3, 3)
    assert found.transfer.own == pytest.approx(np.diag(matrix).mean())
    assert found.transfer.surrogates[str(run_dir)] == pytest.approx(np.diag(matrix).mean()), "its own model"
    certified = found.certified[0]
    assert certified.mean == sorted(certified.mean, reverse=True)
    assert len(found.gallery) <= 12
    for item in found.gallery:
        assert item.label != item.answer
        delta = np.array(item.adversarial) - np.array(item.clean)
        assert np.abs(delta).max() <= 255 * EPSILON + 0.1
    curves, transfer, certificates = evaluation_lines(found)
    assert curves.startswith(f"curves   % by epsilon (of 255): {100 * curve.mean[0]:.1f} at 0, ")
    assert f"{100 * found.transfer.own:.1f} % on those for the client itself" in transfer
    assert certificates.startswith(f"certify  sigma 0.1: % by L2 radius: {100 * certified.mean[0]:.1f} at 0, ")
    RunFolder(run_dir).write_evaluation(found)
    page = write_report(RunFolder(run_dir)).read_text()
    for words in ("Evaluation by", "Every class", "Transfer attacks", "Certified", "S13", "data:image/png"):
        assert words in page
    metrics = evaluation_metrics(found)
    assert metrics["evaluation/benign/accuracy/mean"] == found.benign.accuracy.mean
    assert metrics["evaluation/check/S12/passed"] == 0
    assert "evaluation/certified/sigma0.1/radius0.1" in metrics


@pytest.mark.slow
def test_other_weights_than_the_exported_ones_are_noticed(run_dir: Path) -> None:
    adapter = run_dir / "adapters" / "client_001" / "adapter_model.safetensors"
    shutil.copy(run_dir / "adapters" / "client_000" / "adapter_model.safetensors", adapter)
    found, _ = evaluated(run_dir, EvaluationRequest(QUICK.attacks, EPSILON, checks=True, subset_images=2))
    check = next(check for check in found.checks if check.name == "S12")
    assert "not the ones that were exported" in check.meaning


def test_the_worst_case_is_per_image() -> None:
    measured = Measured([np.array([0, 1, 2])])
    measured.answers = {"a": [np.array([0, 5, 2])], "b": [np.array([7, 1, 2])]}
    assert worst_answers(measured, ["a", "b"])[0].tolist() == [7, 5, 2]


def test_the_interval_is_of_the_mean_over_clients() -> None:
    """A client of two images counts as much as one of fifty, so that the mean is as uncertain as its accuracy."""
    labels = [np.zeros(50, int), np.zeros(2, int)]
    row = condition_row([np.ones(50, int), np.zeros(2, int)], labels, left_out=[])
    assert row.accuracy.mean == 0.5
    assert row.interval == fleet_interval(0.5, [50, 2])
    assert condition_row([labels[0], labels[1] + 1], labels, left_out=[0]).interval == fleet_interval(0.0, [2])


def test_attackers_count_in_no_number_of_the_fleet(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacker = 1
    monkeypatch.setattr("sylva_ray.evaluation.measurements.byzantine_clients", lambda _: [attacker])
    request = replace(QUICK, transfer=True, sigmas=(0.25,), num_draws=20)
    found, _ = evaluated(run_dir, request)
    honest = [client for client in range(3) if client != attacker]
    assert found.images == sum(found.per_class.images) == 24
    pooled = sum(n * (recall or 0) for n, recall in zip(found.per_class.images, found.per_class.benign, strict=True))
    assert pooled / 24 == pytest.approx(found.benign.accuracy.mean), "equally many images of each client"
    matrix, shared = found.transfer.matrix, [(source, target) for source in honest for target in honest]
    assert found.transfer.own == pytest.approx(np.mean([matrix[client][client] for client in honest]))
    others = [matrix[source][target] for source, target in shared if source != target]
    assert found.transfer.others_mean == pytest.approx(np.mean(others))
    (level,) = found.certified
    assert level.images == 3 * len(honest)
    np.testing.assert_allclose(level.mean, np.mean([level.per_client[client] for client in honest], axis=0))
    assert attacker not in {image.client for image in found.gallery}


def test_distances_of_attackers_do_not_count() -> None:
    measured = Measured([np.zeros(2, int), np.zeros(2, int)])
    measured.answers = {"benign": [np.zeros(2, int)] * 2, (spec := QUICK.attacks[0]).label: [np.ones(2, int)] * 2}
    measured.distances = {spec.label: [np.array([0.1, 0.1]), np.array([0.3, 0.3])]}
    measured.costs = {spec.label: Cost()}
    assert attack_row(spec, measured, left_out=[0]).median_distance == 0.3
    assert attack_row(spec, measured, left_out=[]).median_distance == pytest.approx(0.2)


def test_suites_grow_and_know_the_number_of_classes() -> None:
    quick, standard, full = (
        [spec.label for spec in suite(name, EPSILON, 10)] for name in ("quick", "standard", "full")
    )
    assert set(quick) < set(standard) < set(full)
    assert "autoattack-eps4" in standard
    assert not any(spec.loss == "targeted" for spec in suite("full", EPSILON, 3))


def test_requests_from_the_command_line(tiny_config: ExperimentConfig) -> None:
    def request(
        attacks: Sequence[str] = (),
        suite_name: str | None = None,
        epsilon: str | None = None,
        extras: Extras | None = None,
        classes: int = 10,
        clients: int = 3,
    ) -> EvaluationRequest:
        return build_request(tiny_config, attacks, suite_name, epsilon, extras or Extras(), clients, classes)

    assert request().epsilon == pytest.approx(4 / 255)
    assert [spec.name for spec in request().attacks] == ["noise", "fgsm", "pgd", "cw"]
    attacks = ["square:queries=7", "fgsm:epsilon=8/255", "apgd:norm=l2"]
    assert [spec.label for spec in request(attacks).attacks] == ["square7-eps8", "fgsm-eps8", "apgd100-l2-eps0.5"]
    assert [spec.label for spec in request(["fgsm", "pgd:epsilon=1/255"], epsilon="2/255").attacks] == [
        "fgsm-eps2",
        "pgd20-eps1",
    ]
    both = request(["pgd:steps=3,epsilon =2/255"], "quick")
    assert {spec.epsilon for spec in both.attacks} == {both.epsilon} == {2 / 255}
    assert request(epsilon="2/255").attacks[0].epsilon == pytest.approx(2 / 255)
    full = request(suite_name="full")
    assert full.checks
    assert full.curves
    assert full.transfer
    assert full.sigmas == (0.12,)
    assert request(extras=Extras(surrogates=True), clients=1).transfer, "models of other runs, not of other clients"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"suite_name": "standrad"}, "did you mean 'standard'"),
        ({"epsilon": "8"}, r"\[0, 1\] pixel units"),
        ({"attacks": ["apgd:loss=dlr"], "classes": 2}, "needs at least 3 classes"),
        ({"attacks": ["apgd:loss=targeted"], "classes": 3}, "needs at least 4 classes"),
        ({"extras": Extras(sigmas=(0.0,))}, "above 0"),
        ({"extras": Extras(sigmas=(float("nan"),))}, "above 0"),
        ({"extras": Extras(sigmas=(float("inf"),))}, "above 0"),
        ({"extras": Extras(transfer=True), "clients": 1}, "at least two clients"),
        ({"attacks": ["pgd:loss=ce"], "classes": 1}, "at least 2 classes and the data set has 1$"),
        ({"attacks": ["pgd:norm=l2,epsilon=inf"]}, "epsilon"),
        ({"attacks": ["deepfool:overshoot=nan"]}, "overshoot"),
        ({"attacks": ["mim:restarts=3"]}, "unknown key"),
    ]
    for arguments, message in wrong:
        with pytest.raises(UserError, match=message):
            request(**arguments)


def test_the_budget_of_the_checks_is_that_of_the_attacks_asked_for(tiny_config: ExperimentConfig) -> None:
    """Otherwise S14 would speak of images that nobody attacked."""

    def request(*attacks: str) -> EvaluationRequest:
        return build_request(tiny_config, attacks, None, None, Extras(checks=True), 3, 10)

    assert request("pgd:epsilon=2/255").epsilon == pytest.approx(2 / 255)
    nearest = request("deepfool")
    assert [spec.label for spec in nearest.attacks] == ["deepfool50-l2", "pgd20-eps4"]


def test_other_settings_are_other_attacks() -> None:
    labels = [
        parse_attack(f"pgd:epsilon=8/255{more}").label for more in ("", ",step_size=2/255", ",random_start=false")
    ]
    assert labels == ["pgd20-eps8", "pgd20-step2-eps8", "pgd20-fixed1-eps8"]


def test_images_that_are_misclassified_anyway_have_no_distance() -> None:
    """Two images need 0.1 and 0.3, one is robust, and three are wrong without an attack."""
    wrong = np.array([9, 9, 9, 0, 0, 0])
    measured = Measured([np.zeros(6, int)], {"benign": [wrong], "fgsm-eps4": [wrong]})
    measured.distances = {"fgsm-eps4": [np.array([0, 0, 0, 0.1, 0.3, np.inf])]}
    measured.costs = {"fgsm-eps4": Cost()}
    assert attack_row(parse_attack("fgsm:epsilon=4/255"), measured, []).median_distance == pytest.approx(0.3)
    measured.answers["benign"] = [np.full(6, 9)]
    assert attack_row(parse_attack("fgsm:epsilon=4/255"), measured, []).median_distance is None


def test_attackers_of_the_aggregation_are_nobodys_headline() -> None:
    measured = Measured([np.zeros(4, int), np.zeros(2, int)], {"benign": [np.zeros(4, int), np.ones(2, int)]})
    assert measured.mean("benign") == 0.5
    assert measured.without([1]).mean("benign") == 1


def test_an_l2_attack_alone_is_the_worst_case(run_dir: Path) -> None:
    attack = parse_attack("pgd:norm=l2,epsilon=30,steps=3")
    found, _ = evaluated(run_dir, EvaluationRequest((attack,), EPSILON))
    assert sum(r * n for r, n in zip(found.per_class.worst_case, found.per_class.images, strict=True) if n) < (
        sum(r * n for r, n in zip(found.per_class.benign, found.per_class.images, strict=True) if n)
    )
    assert found.collapsed
    assert found.warnings == [
        "training used L-infinity epsilon 4/255, but only pgd3-l2-eps30 was measured; "
        "for that: sylva-ray evaluate RUN --attack pgd:epsilon=4/255"
    ]


def test_a_run_without_adapters_is_refused(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "adapters" / "client_002")
    with pytest.raises(UserError, match="has no adapters of client 2"):
        prepare_evaluation(RunFolder(run_dir), None, [], [])


def test_wrong_runs_are_one_clear_line(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        prepare_evaluation(RunFolder(tmp_path / "nowhere"), None, [], [])
    with pytest.raises(UserError, match="would change the run"):
        prepare_evaluation(RunFolder(run_dir), None, [], ["lora.rank=4"])
    (run_dir / "summary.json").unlink()
    with pytest.raises(UserError, match="is not finished; first: sylva-ray run"):
        prepare_evaluation(RunFolder(run_dir), None, [], [])


def test_a_surrogate_of_another_kind_is_refused(run_dir: Path, tmp_path: Path) -> None:
    sections = {"algorithm": {"name": "per_lora"}, "training": TINY["training"] | {"rounds": 1}, "lora": {"rank": 1}}
    run_prepared(prepare(build(ExperimentConfig, TINY | sections)), RunFolder(tmp_path / "other"), False, Observer())
    with pytest.raises(UserError, match="another number of clients or another kind of model"):
        prepare_evaluation(RunFolder(run_dir), None, [RunFolder(tmp_path / "other")], [])


@pytest.mark.parametrize("epsilon", [EPSILON, 0.0])
def test_the_settings_in_the_file_say_which_attack_it_was(epsilon: float) -> None:
    specs = suite("full", epsilon, 10)
    assert any(np.isinf(spec.epsilon) for spec in specs)
    texts = [json.dumps(AttackSettings.from_spec(spec).to_json(), allow_nan=False) for spec in specs]
    assert [AttackSettings.from_json(json.loads(text), "").to_spec() for text in texts] == list(specs)


def test_a_measurement_has_the_name_that_earlier_versions_gave_it(tmp_path: Path) -> None:
    """Fields of tasks and settings are hashed into it; those that were renamed, under their first name."""
    config = resolve_config(
        build(
            ExperimentConfig,
            TINY
            | {
                "backbone": {"name": "vit_micro_patch8_32"},
                "partition": TINY["partition"] | {"leftovers": "first"},
                "lora": {"rank": 2, "target_modules": ["attn.qkv", "attn.proj"]},
            },
        )
    )
    task = EvaluateTask(2, (0, 1), {"w": np.ones((2, 3), np.float32)}, (parse_attack("fgsm"),), 8)
    cache = MeasurementCache(tmp_path, config)
    cache.save(task, [EvaluateOutcome({"predictions/benign": np.zeros(8, int)}, {})] * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["0b67d2bcd460f833345c667941504a88.safetensors"]


@pytest.mark.parametrize(
    ("attack", "precision", "revision", "before"),
    [
        ("pgd:norm=l2", "float32", "REVISED_NORMS", {}),
        ("mim", "float32", "REVISED_ATTACKS", {}),
        ("fab", "float32", "REVISED_ATTACKS", {}),
        ("apgd", "bfloat16", "REVISED_IN_BFLOAT16", {}),
        ("pgd:restarts=2,random_start=false", "float32", "REVISED_RESTARTS", ""),
    ],
)
def test_measurements_of_an_attack_that_finds_more_than_before_are_made_again(
    attack: str, precision: str, revision: str, before: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = TINY | {"evaluation": TINY["evaluation"] | {"precision": precision}}
    config = resolve_config(build(ExperimentConfig, raw))
    task = EvaluateTask(2, (0,), {"w": np.ones((1, 3), np.float32)}, (parse_attack(attack),), 8)
    cache = MeasurementCache(tmp_path, config)
    with monkeypatch.context() as earlier:
        earlier.setattr(f"sylva_ray.evaluation.cache.{revision}", before)
        cache.save(task, [EvaluateOutcome({"predictions/benign": np.zeros(8, int)}, {})])
        assert cache.load(task) is not None
    assert cache.load(task) is None


class OneStep(LinfAttack):
    """A random point."""

    display_name: ClassVar[str] = "one step"
    counts_steps: ClassVar[bool] = False

    def spec(self) -> AttackSpec:
        return AttackSpec(self.name, self.epsilon, 1, 0.0, random_start=True)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        rows = state.remaining()
        noise = spec.epsilon * draws.select(rows).signed(0, state.x.shape[1:])
        state.logits((state.x[rows] + noise).clamp(0, 1), rows)


def test_the_draws_of_an_attack_of_ones_own_do_not_depend_on_what_a_process_knew_before(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker gets a specification by pickle, and learns from the class whether its label has the steps."""
    given = prepare_evaluation(RunFolder(run_dir), None, [], [])
    spec = parse_attack(f"{__name__}:OneStep:epsilon=64/255")
    task = EvaluateTask(0, (0, 1, 2), stack_states(given.states), (spec,))
    worker = create_worker(given.prepared.config, given.prepared.fleet, given.prepared.backbone)
    monkeypatch.setattr(registry, "ATTACKS_WITHOUT_STEPS", unknown := set[str]())
    monkeypatch.setattr(types, "ATTACKS_WITHOUT_STEPS", unknown)
    first, second = worker.run(task).outcomes, worker.run(task).outcomes
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.values["distances/OneStep-eps64"], other.values["distances/OneStep-eps64"])
    found = np.concatenate([outcome.values["distances/OneStep-eps64"] for outcome in first])
    assert (np.isfinite(found) & (found > 0)).any(), "random points of which some are adversarial"


MINE = """
from sylva_ray.attacks.pgd import PgdAttack
class Mine(PgdAttack):
    name: str
"""


def test_two_attacks_of_one_name_are_refused(tmp_path: Path) -> None:
    config = build(ExperimentConfig, TINY)
    for module in ("one_mine", "two_mine"):
        (tmp_path / f"{module}.py").write_text(MINE)

    def requested(*attacks: str) -> EvaluationRequest:
        return build_request(config, attacks, None, None, Extras(), 3, 10)

    assert len(requested("pgd:steps=3", "pgd:steps=3", "pgd:steps=4").attacks) == 2
    with (
        importing_from([tmp_path]),
        pytest.raises(UserError, match=r"results of two attacks that differ \(one_mine:Mine and two_mine:Mine\)"),
    ):
        requested("one_mine:Mine", "two_mine:Mine")


def test_a_measurement_by_another_code_of_an_attack_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve_config(build(ExperimentConfig, TINY))
    task = EvaluateTask(2, (0,), {"w": np.ones((1, 3), np.float32)}, (parse_attack("pgd"),), 8)
    cache = MeasurementCache(tmp_path, config)
    cache.save(task, [EvaluateOutcome({"predictions/benign": np.zeros(8, int)}, {})])
    assert cache.load(task) is not None
    monkeypatch.setattr("sylva_ray.evaluation.cache._own_code", lambda _: "corrected")
    assert cache.load(task) is None
