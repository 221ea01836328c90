"""A model in windows computes what it computes at once: logits, gradients of images and of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import AlgorithmSection, BackboneSection, LoraSection
from sylva_ray.core.seeding import ImageDraws, generator
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import AttackSpec, ParameterStack, stack_states
from sylva_ray.core.windows import WindowLimits
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import FunctionalStack, repeat_owner, to_parameters
from sylva_ray.models.lora import LoraStack
from sylva_ray.models.memory import LiveBytes
from tests.models.test_lora_stack import random_states

CLASSES, COUNTS = 10, [3, 5, 1]
SMALL = WindowLimits({"train": 2, "attack": 2, "evaluate": 2, "forward": 2})


def lora() -> tuple[LoraStack, ParameterStack]:
    stack = LoraStack(create_backbone(BackboneSection(), CLASSES), LoraSection(rank=2))
    return stack, to_parameters(stack_states(random_states(stack, len(COUNTS))), "cpu", torch.float32)


def full(name: str = "vit_micro") -> tuple[FunctionalStack, ParameterStack]:
    torch.manual_seed(0)
    stack = FunctionalStack(create_backbone(BackboneSection(name=name), CLASSES))
    states = [stack.initial_state(generator(0, "state", client)) for client in range(len(COUNTS))]
    return stack, to_parameters(stack_states(states), "cpu", torch.float32)


def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = sum(COUNTS)
    rng = generator(0, "x")
    return torch.rand(total, 3, 32, 32, generator=rng), torch.arange(total) % CLASSES, repeat_owner(COUNTS)


def gradients(
    stack: LoraStack | FunctionalStack, params: ParameterStack
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x, y, owner = images()
    leaf = x.clone().requires_grad_()
    leaves = {n: v.detach().requires_grad_() for n, v in params.items() if stack.trainable(n)}
    logits = stack.forward({**params, **leaves}, leaf, owner)
    # a loss of which every term depends on all images
    loss = torch.nn.functional.cross_entropy(logits, y) * logits.logsumexp(1).mean()
    for_x, *others = torch.autograd.grad(loss, [leaf, *leaves.values()], allow_unused=True)
    return logits.detach(), for_x, {n: g for n, g in zip(leaves, others, strict=True) if g is not None}


@pytest.mark.parametrize("make", [lora, full], ids=["adapters", "full model"])
def test_windows_change_no_logit_and_no_gradient(
    make: Callable[[], tuple[LoraStack | FunctionalStack, ParameterStack]],
) -> None:
    stack, params = make()
    expected = gradients(stack, params)
    stack.windows = SMALL
    found = gradients(stack, params)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-7)
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("make", [lora, full], ids=["adapters", "full model"])
def test_windows_that_are_kept_have_the_bits_of_those_that_are_computed_again(
    make: Callable[[], tuple[LoraStack | FunctionalStack, ParameterStack]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, params = make()
    windows: list[int] = []
    forward = stack._forward

    def counted(own: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        windows.append(len(x))
        return forward(own, x, owner)

    monkeypatch.setattr(stack, "_forward", counted)
    stack.windows = WindowLimits({"train": 2})
    again = gradients(stack, params)
    computed = windows.copy()
    windows.clear()
    stack.windows = WindowLimits({"train": 15}, at_once=2)
    kept = gradients(stack, params)
    assert computed == 2 * windows, "those of the forward pass alone"
    assert windows == [2, 1, 2, 2, 1, 1]
    assert torch.equal(kept[0], again[0])
    assert torch.equal(kept[1], again[1])
    assert all(torch.equal(kept[2][name], value) for name, value in again[2].items())


def test_windows_that_do_not_fit_together_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, params = lora()
    stack.windows = WindowLimits({"train": 2})
    expected = gradients(stack, params)
    forward, attempts = stack._forward, [0]

    def with_room_for_three(own: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            attempts[0] += 1
            if attempts[0] == 4:
                raise MemoryError
        return forward(own, x, owner)

    monkeypatch.setattr(stack, "_forward", with_room_for_three)
    stack.windows = WindowLimits({"train": 100}, at_once=2)
    found = gradients(stack, params)
    assert (stack.windows.of("train"), stack.windows.reduced) == (2, {"train": 4})
    assert torch.equal(found[1], expected[1])


def test_windows_that_leave_no_room_for_gradients_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, params = lora()
    stack.windows = WindowLimits({"train": 2})
    expected = gradients(stack, params)
    grad, calls = torch.autograd.grad, [0]

    def with_room_at_the_second_attempt(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:  # the first is that of the loss, within which the windows are differentiated
            raise torch.OutOfMemoryError("CUDA out of memory")
        return grad(*arguments, **named)

    monkeypatch.setattr(torch.autograd, "grad", with_room_at_the_second_attempt)
    stack.windows = WindowLimits({"train": 15}, at_once=2)
    found = gradients(stack, params)
    assert stack.windows.reduced == {"train": 4}, "the windows stay as they were, and are not kept together"
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert all(torch.equal(found[2][name], value) for name, value in expected[2].items())


def test_windows_bound_the_memory_of_a_gradient() -> None:
    stack, params = lora()
    gradients(stack, params)

    def peak() -> int:
        with LiveBytes() as counter:
            gradients(stack, params)
        return counter.peak

    whole = peak()
    stack.windows = WindowLimits({"train": 1})
    assert peak() < whole / 2


def test_batch_statistics_are_those_of_whole_clients() -> None:
    """Images of a client that a BatchNorm couples are not divided, and running statistics are updated once."""
    stack, params = full("resnet10t")
    copy = {name: value.clone() for name, value in params.items()}
    with stack.training():
        expected = gradients(stack, params)
    stack.windows = SMALL
    with stack.training():
        found = gradients(stack, copy)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    for name, value in params.items():
        torch.testing.assert_close(copy[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["sylva", "lorica", "calfat", "dbfat", "pm_afl", "fedavg_at"])
def test_every_method_steps_as_with_one_window(name: str) -> None:
    """Also those whose loss depends on the other images of a client."""
    section = AlgorithmSection.model_validate({"name": name} | ({"model": "lora"} if name == "pm_afl" else {}))
    algorithm = create_algorithm(section)
    stack, params = lora()
    algorithm.bind_model(stack, CLASSES, algorithm.auxiliary_weights(CLASSES), torch.device("cpu"))
    states = [algorithm.initial_state(0, {n: v[c].numpy() for n, v in params.items()}) for c in range(len(COUNTS))]
    params = to_parameters(stack_states(states), "cpu", torch.float32)
    names = [n for n in params if stack.trainable(n) and algorithm.is_trained(n)]
    x, y, owner = images()
    batch = Batch(x, y, owner, len(COUNTS), torch.ones(len(COUNTS), dtype=torch.bool), ImageDraws(torch.arange(len(x))))

    def step() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        counts = torch.ones(len(COUNTS), CLASSES, dtype=torch.long)
        context = ClientContext(stack, counts, dict(params), Stopwatch())
        return algorithm.client_step(context, params, batch, AttackSpec("pgd", 1 / 255, 1, 1 / 255), names)

    expected, losses = step()
    stack.windows = SMALL
    found, losses_in_windows = step()
    torch.testing.assert_close(losses_in_windows, losses, rtol=1e-3, atol=1e-5)  # a sign of PGD may differ
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 0.02 * value.norm() + 1e-6, key
