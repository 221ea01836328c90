"""PM-AFL: mixture distillation against its closed forms, a teacher that never travels, blends that stay at home."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sylva_ray.algorithms.pm_afl import PROBE, PmAfl, mixtures
from sylva_ray.attacks.losses import kl_divergence
from sylva_ray.config.experiment import BackboneSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.core.windows import WindowLimits
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.models.backbone import create_backbone
from tests.algorithms.toys import (
    NOTHING,
    SMALL,
    alone,
    arrive,
    equal,
    method,
    moved,
    starting_states,
    tiny_experiment,
    tiny_worker,
    toy,
    trained,
    watch,
)

RESNET = {"name": "test_resnet.r160_in1k", "image_size": 32}


class Teacher(torch.nn.Module):
    """The softmax regression of a toy's client."""

    def __init__(self, params: ParameterStack, client: int) -> None:
        super().__init__()
        self.w, self.b = (torch.nn.Parameter(params[name][client].clone()) for name in "wb")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.w.T + self.b


def taught(
    same_as_student: bool = False, seed: int = 0, **parameters: Any
) -> tuple[ClientContext, ParameterStack, Batch, PmAfl]:
    """A toy context, its batch, and the method with a teacher (a stranger, or what all students are)."""
    context, params, b = toy(seed=seed)
    if same_as_student:
        params = {name: value[:1].repeat(2, *[1] * (value.ndim - 1)) for name, value in params.items()}
        context = replace(context, received={name: value.clone() for name, value in params.items()})
    made = method("pm_afl", teacher_probe=False, **parameters)
    made.teacher = Teacher(params if same_as_student else toy(seed=9)[1], 0)
    return context, params, b, made


def loss(
    context: ClientContext, params: ParameterStack, b: Batch, made: PmAfl, attack: AttackSpec = SMALL
) -> torch.Tensor:
    return made.sample_losses(context, params, b, made.craft(context, params, b, attack))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_without_an_attack() -> None:
    context, params, b, made = taught(same_as_student=True)
    torch.testing.assert_close(loss(context, params, b, made, NOTHING), torch.zeros(12), atol=1e-5, rtol=0)
    assert (loss(context, params, b, made) > 1e-4).all()
    assert (loss(*taught(), NOTHING) > 1e-4).all()


def with_uniforms(batch: Batch, uniforms: torch.Tensor) -> Batch:
    """The batch with chosen numbers instead of drawn ones."""
    chosen = replace(batch)
    vars(chosen)["uniforms"] = uniforms
    return chosen


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_blend_of_one_image_is_that_image(share: float) -> None:
    context, params, b, made = taught(adversarial_weight=0, consistency_weight=0)
    b = with_uniforms(b, torch.stack([b.uniforms[:, 0], torch.full((12,), share)], 1))
    student = context.model.forward(params, b.x, b.owner)
    ends = made.distill(made.teacher(b.x), student).detach()
    found = loss(context, params, b, made, NOTHING) - ends
    if share == 1.0:
        torch.testing.assert_close(found, ends)
    else:  # the partners are a permutation of each client's images
        torch.testing.assert_close(b.mean_by_client(found), b.mean_by_client(ends))
        assert not torch.allclose(found, ends)


def test_without_budget_the_adversarial_half_is_the_vanilla_one() -> None:
    vanilla = loss(*taught(adversarial_weight=0, consistency_weight=0), NOTHING)
    both = loss(*taught(adversarial_weight=1, consistency_weight=0), NOTHING)
    torch.testing.assert_close(both, 2 * vanilla)


def test_the_loss_is_the_sum_over_pairs_as_written() -> None:
    context, params, b, made = taught(temperature=3.0, adversarial_weight=0.7, consistency_weight=0.2)
    x_adv = made.craft(context, params, b, SMALL)
    blend, blend_adv = context.scratch["mixtures"]
    torch.testing.assert_close(blend, mixtures(b))

    def student(x: torch.Tensor) -> torch.Tensor:
        return context.model.forward(params, x, b.owner)

    def kd(clean: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        p, q = ((z / 3).softmax(1) for z in (made.teacher(clean), student(seen)))
        return 9 * (p * (p / q).log()).sum(1)

    partner = torch.argsort(b.owner + b.uniforms[:, 0])
    halves = [kd(b.x, seen) for seen in (b.x, x_adv)]
    first, second = (0.5 * (k + k[partner]) + kd(blend, s) for k, s in zip(halves, (blend, blend_adv), strict=True))
    broadcast = context.model.forward(context.received, b.x, b.owner)
    expected = first + 0.7 * second + 0.2 * kl_divergence(broadcast, student(x_adv))
    found = b.mean_by_client(made.sample_losses(context, params, b, x_adv))
    torch.testing.assert_close(found, b.mean_by_client(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("against", ["student", "teacher"])
def test_both_attacks_start_from_their_clean_images_and_lead_away_from_the_teachers_answer(against: str) -> None:
    context, params, b, made = taught(craft_against=against)
    x_adv = made.craft(context, params, b, replace(SMALL, random_start=False))
    for clean, found in ((b.x, x_adv), context.scratch["mixtures"]):
        assert 0.04 < (found - clean).abs().max() <= SMALL.epsilon + 1e-6

        def answer(u: torch.Tensor) -> torch.Tensor:
            return made.teacher(u) if against == "teacher" else context.model.forward(params, u, b.owner)

        target = made.teacher(clean)
        random = (clean + SMALL.epsilon * b.noise).clamp(0, 1)
        assert (kl_divergence(target, answer(found)) > kl_divergence(target, answer(random))).all()
        assert not found.requires_grad


def test_the_teacher_sees_no_more_images_at_once_than_a_window_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    context, params, b, made = taught()
    whole = made.teach(context, params, b.x, b)
    seen: list[int] = []
    made.teacher.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    monkeypatch.setattr(context.model, "windows", WindowLimits({"forward": 2}), raising=False)
    torch.testing.assert_close(made.teach(context, params, b.x, b), whole)
    assert max(seen) == 2
    assert sum(seen) == len(b.x)


def test_no_gradient_reaches_the_teacher_or_the_broadcast_model() -> None:
    context, params, b, made = taught()
    for value in context.received.values():
        value.requires_grad_()
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    total = loss(context, leaves, b, made).sum()
    outsiders = [*made.teacher.parameters(), *context.received.values()]
    assert all(g is None for g in torch.autograd.grad(total, outsiders, allow_unused=True, retain_graph=True))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(total, list(leaves.values())))


def test_blends_stay_inside_a_clients_own_images_and_do_not_depend_on_company() -> None:
    context, params, b = toy(owned=(5, 0, 7), counts=((1, 1, 1),) * 3)
    marked = replace(b, x=b.owner.float().view(-1, 1, 1, 1).expand_as(b.x) / 2)
    torch.testing.assert_close(mixtures(marked), marked.x)  # a stranger's image would shift the level
    together = mixtures(b)
    assert not torch.equal(together, b.x)
    for client in (0, 2):
        *_, own = alone(context, params, b, client)
        assert torch.equal(mixtures(own), together[b.owner == client])
    ties = with_uniforms(b, torch.zeros_like(b.uniforms))
    assert torch.equal(mixtures(ties), b.x)


def test_a_cohorts_gradient_is_each_clients_own() -> None:
    context, params, b, made = taught()
    both, losses_C = made.client_step(context, params, b, SMALL, ["w", "b"])
    for client in range(2):
        own, own_loss = made.client_step(*alone(context, params, b, client), SMALL, ["w", "b"])
        torch.testing.assert_close(losses_C[client], own_loss[0])
        for name, gradient in own.items():
            torch.testing.assert_close(both[name][client], gradient[0], rtol=1e-4, atol=1e-6)


# -- with a real teacher -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lora", "full"])
def worker(request: pytest.FixtureRequest) -> CohortWorker:
    return tiny_worker(tiny_experiment("pm_afl", {"model": request.param}))


def test_the_probe_learns_in_the_warm_up_and_never_again_and_nothing_of_the_teacher_travels(
    worker: CohortWorker,
) -> None:
    made: Any = worker.algorithm
    start = starting_states(worker)
    frozen = {name: value.clone() for name, value in made.teacher.model.state_dict().items()}
    assert all(not start[0][name].any() for name in PROBE)
    warm = trained(worker, start, epochs=0, head_epochs=1, lr=0.05)
    assert moved(start[0], warm[0]) == {*PROBE, *worker.model.head_names}
    after = trained(worker, warm, clients=(0, 1))
    assert not moved(warm[0], after[0]) & set(PROBE)
    assert moved(warm[0], after[0]) == set(warm[0]) - set(PROBE)
    assert not any(made.is_uploaded(name) or worker.model.trainable(name) for name in PROBE)
    assert made.pack(0, after[0]).keys() == start[0].keys() - set(PROBE)
    merged = made.aggregate(arrive(made, [*after, warm[2]], received=warm))
    for own, state in zip(warm, merged, strict=True):
        assert equal({n: own[n] for n in PROBE}, {n: state[n] for n in PROBE})
    assert len({state[PROBE[0]].tobytes() for state in merged}) == 3
    assert all(torch.equal(value, frozen[name]) for name, value in made.teacher.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in made.teacher.parameters())


def test_the_probe_is_a_linear_head_on_the_teachers_features(worker: CohortWorker) -> None:
    made: Any = worker.algorithm
    states = starting_states(worker)
    context, params, b = toy(owned=(3, 0, 2), counts=((1,) * 3,) * 3)
    x = torch.rand(5, 3, 32, 32)
    g = torch.Generator().manual_seed(0)
    params = {name: torch.randn(3, *states[0][name].shape, generator=g) for name in PROBE}
    found = made.teach(context, params, x, b)
    model = create_backbone(BackboneSection(), 10)
    for client in (0, 2):
        head = model.classifier
        head.weight.data, head.bias.data = params[PROBE[0]][client], params[PROBE[1]][client]
        with torch.no_grad():
            torch.testing.assert_close(found[b.owner == client], model(x[b.owner == client]), rtol=1e-4, atol=1e-4)


def test_a_probe_that_nothing_would_fit_is_refused() -> None:
    with pytest.raises(UserError, match="head_warmup_epochs = 0: must be at least 1"):
        method("pm_afl", head_warmup_epochs=0)
    assert method("pm_afl", head_warmup_epochs=0, teacher_probe=False).parameters.head_warmup_epochs == 0


def test_a_teacher_of_other_classes_without_a_probe_is_refused_in_one_line(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from sylva_ray.models.backbone import backbone_arrays

    path = tmp_path / "four.safetensors"
    save_file(backbone_arrays(create_backbone(BackboneSection(), 4)), path)
    with pytest.raises(UserError, match=r"algorithm\.teacher = .*knows 4 classes, the data has 10") as refused:
        tiny_experiment("pm_afl", {"teacher_probe": False, "teacher": {"checkpoint": str(path)}})
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"algorithm\.teacher = .*knows no classes"):
        tiny_experiment("pm_afl", {"teacher_probe": False, "teacher": RESNET})
    path = tmp_path / "ten.safetensors"
    ten = create_backbone(BackboneSection(), 10)
    save_file(backbone_arrays(ten), path)
    prepared = tiny_experiment("pm_afl", {"teacher_probe": False, "teacher": {"checkpoint": str(path)}})
    made: Any = tiny_worker(prepared).algorithm
    x = torch.rand(2, 3, 32, 32)
    context, _, b = toy()
    with torch.no_grad():
        torch.testing.assert_close(made.teach(context, {}, x, b), ten(x))
    assert made.warm_up_names() == made.head_names


def test_a_batchnorm_students_statistics_are_its_own_and_move_in_training_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = tiny_worker(tiny_experiment("pm_afl", backbone=RESNET, training={"batch_size": 1000}))
    states = starting_states(worker)
    contexts, _ = watch(worker, monkeypatch)
    together = trained(worker, states, clients=(0, 2), lr=0.0)
    received = {name: value.clone() for name, value in contexts[0].received.items()}
    assert all(np.array_equal(value[0], states[0][name]) for name, value in received.items()), "the reference moved"
    for row, client in enumerate((0, 2)):
        (own,) = trained(worker, states, clients=(client,), lr=0.0)
        statistics = moved(states[client], own)
        assert statistics == {name for name in own if "running_" in name}
        for name in statistics:
            np.testing.assert_allclose(together[row][name], own[name], rtol=1e-4, atol=1e-5)
    name = next(iter(statistics))
    assert not np.allclose(together[0][name], together[1][name], atol=1e-5), "two clients, two sets of images"
