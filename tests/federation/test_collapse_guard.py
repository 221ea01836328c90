"""Fast adversarial training: one step of 1.25 epsilon; a client that collapses is taken back, the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from sylva_ray.algorithms.adversarial import AdversarialTraining
from sylva_ray.algorithms.undefended import Undefended
from sylva_ray.attacks.pgd import pgd
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.config.schema import build
from sylva_ray.config.training import AttackSection
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import AttackSpec, ClientData, ParameterStack, Split
from sylva_ray.federation.client.batches import split_draws
from sylva_ray.federation.client.collapse_guard import MAX_ACCURACY_DROP, CollapseGuard
from sylva_ray.federation.client.training import TrainSettings, TrainTask, train_cohort
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.federation.contract import Algorithm
from sylva_ray.preparation.resolve import resolve_config
from tests.fake_model import FakeModel

CLASSES, PIXELS = 3, 3 * 2 * 2


class LinearStack(FakeModel):
    """C linear classifiers of 2 x 2 images."""

    def initial_state(self, rng: torch.Generator) -> dict[str, np.ndarray]:
        return {"w": (torch.randn(CLASSES, PIXELS, generator=rng) * 0.01).numpy(), "b": np.zeros(CLASSES, np.float32)}

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        own = owner.to(x.device)
        return torch.einsum("nd,ncd->nc", x.flatten(1) - 0.5, params["w"][own]) + params["b"][own]


def images(seed: int, n: int = 24) -> Split:
    """Class c is bright in channel c, by far more than epsilon."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    x = rng.integers(60, 100, (n, 3, 2, 2))
    x[np.arange(n), labels] += 100
    return Split(x.astype(np.uint8), labels)


DATA = [ClientData(*[images(seed)] * 4) for seed in range(3)]
EPSILON = 8 / 255
FAST = {"name": "fgsm_rs"}


def config(attack: dict[str, Any], **training: Any) -> ResolvedConfig:
    sections = {
        "partition": {"num_clients": 3},
        "attack": {"epsilon": EPSILON} | attack,
        "training": {"batch_size": 12, "optimizer": "sgd", "clip_norm": None, "weight_decay": 0} | training,
    }
    return resolve_config(build(ExperimentConfig, sections))


def good() -> dict[str, torch.Tensor]:
    """Three clients that know their images and resist."""
    w = torch.zeros(3, CLASSES, 3, 4)
    for c in range(CLASSES):
        w[:, c, c] = 1.0
    return {"w": w.flatten(2), "b": torch.zeros(3, CLASSES)}


def guard_over(params: dict[str, torch.Tensor], watched: int = 12) -> CollapseGuard:
    return watching(params, DATA, watched)


def watching(params: ParameterStack, data: Sequence[ClientData], watched: int = 12) -> CollapseGuard:
    splits = [Split(own.train.images[:watched], own.train.labels[:watched]) for own in data]
    return CollapseGuard(LinearStack(), params, splits, EPSILON, split_draws(0, "guard", [0, 1, 2], splits))


# -- the attack --------------------------------------------------------------------------------------------------------


def test_fgsm_rs_is_one_step_of_five_quarters_epsilon_from_a_random_start() -> None:
    section = AttackSection(name="fgsm_rs", epsilon=8 / 255, steps=10, step_size=1 / 255)
    assert section.spec() == AttackSpec("pgd", 8 / 255, 1, 10 / 255, random_start=True)
    assert section.spec(2 / 255) == AttackSpec("pgd", 2 / 255, 1, 2.5 / 255, random_start=True)  # while epsilon ramps
    assert section.spec(loss="kl").loss == "kl"


def test_fgsm_rs_stays_in_the_ball_and_reaches_its_border() -> None:
    """A start at a quarter of epsilon the wrong way just gets to the border; beyond that the step falls short."""
    spec = AttackSection(name="fgsm_rs", epsilon=0.1).spec()
    x = torch.full((3, 1), 0.5)
    x_adv = pgd(lambda u: u.sum(1), x, spec, torch.tensor([[1.0], [-0.25], [-1.0]]))
    torch.testing.assert_close(x_adv, torch.tensor([[0.6], [0.6], [0.525]]))


# -- the guard ---------------------------------------------------------------------------------------------------------


def test_a_client_that_collapses_gets_its_state_back_bit_for_bit_and_stops() -> None:
    params = good()
    guard = guard_over(params)
    assert guard.accuracy_C.tolist() == [1, 1, 1]
    params["w"] += 0.01  # a good epoch
    after_first = {name: value.clone() for name, value in params.items()}
    guard.after_epoch()
    assert not guard.stopped_C.any()
    params["w"][1] *= -1  # client 1 collapses, the others learn
    params["w"][[0, 2]] *= 1.1
    params["b"] += 0.003
    expected = {name: value.clone() for name, value in params.items()}
    guard.after_epoch()
    assert guard.stopped_C.tolist() == [False, True, False]
    for name, value in params.items():
        assert torch.equal(value[1], after_first[name][1])
        assert torch.equal(value[[0, 2]], expected[name][[0, 2]])
    params["w"] *= 1.2  # a third epoch: a client that was stopped stays where it is, however good the epoch
    moved = params["w"].clone()
    guard.after_epoch()
    assert torch.equal(params["w"][1], after_first["w"][1])
    assert torch.equal(params["w"][[0, 2]], moved[[0, 2]])
    assert guard.stopped_C.tolist() == [False, True, False]


def test_what_counts_is_the_accuracy_under_pgd_not_the_benign_one() -> None:
    """Huge weights on the difference of two pixels, equal in every clean image: harmless until somebody attacks."""
    twins = [d.train.images.copy() for d in DATA]
    for twin in twins:
        twin[..., 0, 1] = twin[..., 0, 0]
    splits = [Split(x, d.train.labels) for x, d in zip(twins, DATA, strict=True)]
    data, params = [ClientData(*[split] * 4) for split in splits], good()
    guard = watching(params, data)
    brittle = params["w"][2].view(CLASSES, 3, 4)
    brittle[0, :, 0] += 200
    brittle[0, :, 1] -= 200
    x, owner = torch.from_numpy(twins[2]).float() / 255, torch.full((24,), 2)
    assert LinearStack().forward(params, x, owner).argmax(1).tolist() == DATA[2].train.labels.tolist()
    guard.after_epoch()
    assert guard.stopped_C.tolist() == [False, False, True]
    assert torch.equal(params["w"], good()["w"])


@pytest.mark.parametrize(("wrong", "stops"), [(2, False), (3, True)])
def test_a_drop_of_a_fifth_is_the_most_that_is_allowed(
    wrong: int, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 watched images 2 may fall. The comparison is with the epoch before: a slow decline is no collapse."""
    assert MAX_ACCURACY_DROP == 0.2
    params = good()
    guard = guard_over(params, watched=10)
    scores = iter([[1.0, 1 - wrong / 10, 1.0], [1.0, 1 - wrong / 10 - 0.15, 1.0]])
    monkeypatch.setattr(guard, "_accuracy", lambda: torch.tensor(next(scores), dtype=torch.float64))
    guard.after_epoch()
    assert guard.stopped_C.tolist() == [False, stops, False]
    guard.after_epoch()
    assert guard.stopped_C.tolist() == [False, stops, False]


# -- in training -------------------------------------------------------------------------------------------------------


class Saboteur(AdversarialTraining):
    """From its second epoch on client 1 unlearns what it knows."""

    steps_per_epoch = 2

    def __init__(self) -> None:
        super().__init__(AdversarialTraining.Parameters())
        self.steps = 0

    def sample_losses(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor
    ) -> torch.Tensor:
        losses = super().sample_losses(context, params, batch, x_adv)
        self.steps += 1
        if self.steps <= self.steps_per_epoch:
            return losses
        return torch.where(batch.owner == 1, -50 * losses, losses)


def trained(
    algorithm: Algorithm, epochs: int, attack: dict[str, Any] = FAST, epsilon: float = EPSILON
) -> tuple[ParameterStack, Any]:
    params = {key: value.clone() for key, value in good().items()}
    stacked = {key: value.numpy() for key, value in params.items()}
    counts = torch.stack([torch.from_numpy(d.class_counts(CLASSES)) for d in DATA])
    context = ClientContext(LinearStack(), counts, {}, Stopwatch())
    task = TrainTask(1, (0, 1, 2), stacked, TrainSettings(epsilon=epsilon, lr=0.1, epochs=epochs))
    return params, train_cohort(context, algorithm, params, DATA, task, config(attack))


def test_training_takes_back_who_collapses_and_trains_the_others_on() -> None:
    one, _ = trained(AdversarialTraining(AdversarialTraining.Parameters()), 1)
    three, undisturbed = trained(AdversarialTraining(AdversarialTraining.Parameters()), 3)
    mixed, metrics = trained(Saboteur(), 3)
    assert metrics["rolled_back"].tolist() == [0, 1, 0]
    assert undisturbed["rolled_back"].tolist() == [0, 0, 0]
    for name in mixed:
        assert torch.equal(mixed[name][1], one[name][1])
        assert torch.equal(mixed[name][[0, 2]], three[name][[0, 2]])
        assert not torch.equal(mixed[name][0], one[name][0])


def test_only_fast_training_with_an_epsilon_is_guarded() -> None:
    plain = AdversarialTraining(AdversarialTraining.Parameters())
    assert set(trained(plain, 1)[1]) == {"loss", "rolled_back"}
    assert set(trained(plain, 1, {"name": "pgd"})[1]) == {"loss"}
    assert set(trained(plain, 1, epsilon=0.0)[1]) == {"loss"}
    assert set(trained(Undefended(Undefended.Parameters()), 1)[1]) == {"loss"}, "benign training cannot overfit to FGSM"
    unguarded, metrics = trained(Saboteur(), 3, {"name": "pgd"})
    assert set(metrics) == {"loss"}
    x = torch.from_numpy(DATA[1].train.images).float() / 255
    predictions = LinearStack().forward(unguarded, x, torch.ones(24, dtype=torch.long)).argmax(1)
    assert (predictions.numpy() == DATA[1].train.labels).mean() < 0.5, "without the guard client 1 is lost"


def test_the_guards_noise_is_not_the_trainings() -> None:
    """Its draws come from a stream of their own: with a guard that never fires, the weights are those without one."""
    guarded, _ = trained(AdversarialTraining(AdversarialTraining.Parameters()), 2)
    same_step = {"name": "pgd", "steps": 1, "step_size": 1.25 * EPSILON}
    free, metrics = trained(AdversarialTraining(AdversarialTraining.Parameters()), 2, same_step)
    assert set(metrics) == {"loss"}
    assert all(torch.equal(guarded[name], free[name]) for name in free)
