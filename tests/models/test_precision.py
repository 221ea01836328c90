"""What stays in float32 whatever a run chooses, and resizing by matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sylva_ray.attacks.pgd import PgdAttack
from sylva_ray.attacks.registry import attack_stack
from sylva_ray.config.data import DatasetSection
from sylva_ray.config.experiment import BackboneSection, LoraSection
from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.seeding import ImageDraws, generator, image_keys
from sylva_ray.core.types import ClientImages, stack_states
from sylva_ray.data.datasets import load_dataset
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import FunctionalStack, repeat_owner, to_parameters
from sylva_ray.models.lora import LoraStack
from sylva_ray.models.resize import Resize

CLASSES = 10


@pytest.mark.parametrize(("size", "target"), [((32, 32), 224), ((8, 8), 32), ((96, 64), 33), ((50, 20), 20)])
def test_resizing_is_torchs_own_and_so_is_its_gradient(size: tuple[int, int], target: int) -> None:
    x = torch.rand(2, 3, *size, generator=generator(0, "x")).requires_grad_()
    upper = torch.rand(2, 3, target, target, generator=generator(0, "g"))
    ours, theirs = Resize(target)(x), F.interpolate(x, size=(target, target), mode="bilinear")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad((upper * y).sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6 * float(gradients[1].abs().max()))


def test_an_image_of_the_right_size_is_not_touched() -> None:
    x = torch.rand(2, 3, 32, 32)
    assert Resize(32)(x) is x


class HeadProducts(TorchDispatchMode):
    """Collects the types of the factors of products with as many outputs as there are classes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm") and result.shape[-1] == CLASSES:
            self.types |= {value.dtype for value in args if isinstance(value, torch.Tensor)}
        return result


@pytest.mark.parametrize("kind", [LoraStack, FunctionalStack])
def test_the_product_of_the_head_is_in_float32(kind: type[LoraStack | FunctionalStack]) -> None:
    """Its factors, too: bfloat16 logits would differ by less than they resolve where a decision is close."""
    backbone = create_backbone(BackboneSection(), CLASSES)
    stack = LoraStack(backbone, LoraSection()) if kind is LoraStack else FunctionalStack(backbone)
    stack.precision = torch.bfloat16
    params = to_parameters(stack_states([stack.initial_state(generator(0, "state"))] * 2), "cpu", torch.float32)
    x = torch.rand(4, 3, 32, 32, generator=generator(0, "x"))
    with HeadProducts() as products, torch.no_grad():
        logits = stack.forward(params, x, repeat_owner([2, 2]))
    assert products.types == {torch.float32}
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.slow
def test_robust_accuracy_under_a_bfloat16_attack_is_that_under_a_float32_attack() -> None:
    """Within 0.2 points on 500 images: every success is confirmed in float32, and one image may resist one of both."""
    split = load_dataset(DatasetSection(name="digits"), 32, 0).train
    x, y = torch.from_numpy(split.images[:500]).float() / 255, torch.from_numpy(split.labels[:500])
    backbone = create_backbone(BackboneSection(name="vit_micro_robust"), CLASSES)
    with torch.no_grad():  # a head by ridge regression on the features
        tokens = backbone.model.forward_features(backbone.preprocess(x))  # type: ignore[operator]
        features = backbone.model.forward_head(tokens, pre_logits=True).double()  # type: ignore[operator]
    targets = F.one_hot(y, CLASSES).double() - 1 / CLASSES
    gram = features.T @ features + 10 * torch.eye(features.shape[1])
    stack = LoraStack(backbone, LoraSection(rank=2))
    stack.kernels = AttentionKernels(bfloat16="plain")
    params = to_parameters(stack_states([stack.initial_state(generator(0, "state"))] * 2), "cpu", torch.float32)
    weight = 10 * torch.linalg.solve(gram, features.T @ targets).T.float()
    params[stack.head_names[0]] = weight.repeat(2, 1, 1)
    images, draws = ClientImages(x, y, repeat_owner([200, 300]), 2), ImageDraws(image_keys(0, "x", 0, np.arange(500)))
    spec = PgdAttack(epsilon=4 / 255, steps=20).spec()
    found = []
    for precision in (torch.float32, torch.bfloat16):
        result = attack_stack(stack, params, images, spec, draws, precision)
        with torch.no_grad():
            confirmed = stack.forward(params, result.x_adv, images.owner).argmax(1)
        assert torch.equal(confirmed != y, result.predictions != y), "what is reported is the answer of float32"
        found.append(float((result.predictions == y).float().mean()))
    assert 0.1 < found[0] < 0.9
    assert abs(found[1] - found[0]) <= 0.002 + 1e-9, found
