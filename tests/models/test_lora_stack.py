"""The stack of adapters is C separate PEFT models, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import AlgorithmSection, BackboneSection, ExperimentConfig, LoraSection
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import generator
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import ClientData, ClientState, Split, stack_states, unstack_states
from sylva_ray.federation.client.batches import ClientStream, CohortBatches
from sylva_ray.federation.client.training import TrainSettings, TrainTask, train_cohort
from sylva_ray.federation.context import ClientContext
from sylva_ray.models.backbone import Backbone, create_backbone
from sylva_ray.models.cohort import FunctionalStack, repeat_owner, to_arrays, to_parameters
from sylva_ray.models.lora import LoraStack, adapter_layout, target_layers, trained_layers
from sylva_ray.models.peft_format import load_adapter, save_adapter
from sylva_ray.models.stacked_layers import LinearWithUpdates, OwnerLayout
from sylva_ray.preparation.resolve import resolve_config

BACKBONE = BackboneSection()
LORA = LoraSection(rank=4, target_modules=("attn.qkv", "attn.proj"))
EVERYWHERE = build(LoraSection, {"rank": 4, "target_modules": "all_linear"}, "lora")
EVERYTHING = build(
    LoraSection, {"rank": 3, "target_modules": ["all_linear", "patch_embed.proj"], "train_norms": True}, "lora"
)
CLASSES = 10


def random_states(stack: LoraStack, count: int, scale: float = 0.05) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    start = stack.initial_state(generator(0, "initial state"))
    return [
        {name: (value + scale * rng.normal(size=value.shape)).astype(np.float32) for name, value in start.items()}
        for _ in range(count)
    ]


def peft_model(
    state: ClientState,
    folder: Path,
    dtype: torch.dtype,
    trainable: bool = False,
    lora: LoraSection = LORA,
) -> tuple[PeftModel, Backbone]:
    """An ordinary PEFT model of one client, and the backbone that normalises for it."""
    backbone = create_backbone(BACKBONE, CLASSES)
    save_adapter(state, folder, BACKBONE, lora, adapter_layout(backbone, lora))
    backbone = backbone.to(dtype)
    return PeftModel.from_pretrained(backbone.model, str(folder), is_trainable=trainable).to(dtype).eval(), backbone


@pytest.mark.parametrize("lora", [LORA, EVERYWHERE, EVERYTHING], ids=["attention", "all linear layers", "everything"])
@pytest.mark.parametrize("counts", [[3, 3], [2, 5, 1], [4, 0, 1]], ids=["even", "uneven", "one without images"])
def test_forward_equals_peft(counts: list[int], lora: LoraSection, tmp_path: Path) -> None:
    stack = LoraStack(create_backbone(BACKBONE, CLASSES).double(), lora)
    states = random_states(stack, len(counts))
    x = torch.rand(sum(counts), 3, 32, 32, dtype=torch.float64, generator=generator(0, "x"))
    owner = repeat_owner(counts)
    logits = stack.forward(to_parameters(stack_states(states), "cpu", torch.float64), x, owner)
    for client, state in enumerate(states):
        folder = tmp_path / str(client)
        model, backbone = peft_model(state, folder, torch.float64, lora=lora)
        expected = model(backbone.preprocess(x[owner == client]))
        torch.testing.assert_close(logits[owner == client], expected, rtol=0, atol=1e-12)


def test_all_linear_layers_are_those_of_the_blocks() -> None:
    names = list(target_layers(create_backbone(BACKBONE, CLASSES), EVERYWHERE))
    assert names == [f"blocks.{n}.{end}" for n in range(6) for end in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    with pytest.raises(UserError, match="matches no layer"):
        target_layers(create_backbone(BackboneSection(name="resnet18", image_size=32), CLASSES), EVERYWHERE)


@pytest.mark.parametrize("lora", [LORA, EVERYTHING], ids=["attention", "everything"])
def test_peft_round_trip_is_exact(lora: LoraSection, tmp_path: Path) -> None:
    layout = adapter_layout(create_backbone(BACKBONE, CLASSES), lora)
    (state,) = random_states(LoraStack(create_backbone(BACKBONE, CLASSES), lora), 1)
    back = load_adapter(save_adapter(state, tmp_path, BACKBONE, lora, layout))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("lora", [LORA, EVERYTHING], ids=["attention", "everything"])
def test_an_adapter_saved_by_peft_is_read(lora: LoraSection, tmp_path: Path) -> None:
    (state,) = random_states(LoraStack(create_backbone(BACKBONE, CLASSES), lora), 1)
    model, _ = peft_model(state, tmp_path / "ours", torch.float32, lora=lora)
    model.save_pretrained(str(tmp_path / "theirs"))
    back = load_adapter(tmp_path / "theirs")
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


def test_trained_norms_start_as_the_backbones_and_belong_to_their_blocks() -> None:
    plain, stack = create_backbone(BACKBONE, CLASSES), LoraStack(create_backbone(BACKBONE, CLASSES), EVERYTHING)
    state = stack.initial_state(generator(0, "initial state"))
    norm = plain.model.get_submodule("blocks.2.norm1")
    assert isinstance(norm, torch.nn.LayerNorm)
    np.testing.assert_array_equal(state["blocks.2.norm1.weight"], norm.weight.detach().numpy())
    assert {"blocks.2.norm1.weight", "blocks.2.norm2.bias"} <= set(stack.players["blocks.2"])
    assert next(iter(stack.players)) == "patch_embed.proj"
    assert stack.num_blocks is None  # the embedding differs between clients, so the game runs whole forward passes
    params = to_parameters(stack_states([state]), "cpu", torch.float32)
    x = torch.rand(2, 3, 32, 32, generator=generator(0, "x"))
    head = {name: torch.from_numpy(state[name]) for name in stack.head_names}
    plain.model.load_state_dict(head, strict=False)
    torch.testing.assert_close(stack.forward(params, x, repeat_owner([2])), plain(x), rtol=0, atol=1e-5)


def test_a_convolution_that_computes_with_other_weights_has_no_adapter() -> None:
    section = BackboneSection(name="vit_tiny_r_s16_p8_224", image_size=32)
    backbone = create_backbone(section, CLASSES)
    with pytest.raises(
        UserError, match=r"backbone\.conv, a StdConv2dSame: an adapter needs a linear layer or a plain conv"
    ):
        target_layers(backbone, LoraSection(rank=2, target_modules=("backbone.conv",)))
    assert list(target_layers(backbone, LoraSection(rank=2, target_modules=("patch_embed.proj",)))) == [
        "patch_embed.proj"
    ]


def clients_of_unequal_size(count: int) -> list[ClientData]:
    rng = np.random.default_rng(1)
    data = []
    for client in range(count):
        n = 10 + 6 * (client % 3)
        split = Split(rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), rng.integers(0, CLASSES, n))
        data.append(ClientData(split, split, split, split))
    return data


def train_with_peft(
    state: ClientState,
    folder: Path,
    data: ClientData,
    stream: ClientStream,
    config: ExperimentConfig,
    task: TrainTask,
    dtype: torch.dtype,
) -> dict[str, np.ndarray]:
    """The same training written plainly for one client: PEFT, torch's own AdamW and clipping, textbook PGD."""
    model, backbone = peft_model(state, folder, dtype, trainable=True)
    params = [p for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name]
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in params))
    optimizer = torch.optim.AdamW(params, lr=task.settings.lr, weight_decay=config.training.weight_decay)
    spec = config.attack.spec(task.settings.epsilon)
    loss = torch.nn.CrossEntropyLoss()
    batches = CohortBatches([data], [stream], config.training.batch_size, "none", dtype, "cpu")
    for _ in range(task.settings.epochs):
        for batch in batches.epoch():
            x_adv = (batch.x + spec.epsilon * batch.noise).clamp(0, 1)
            for _ in range(spec.steps):
                x_adv = x_adv.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(loss(model(backbone.preprocess(x_adv)), batch.y), x_adv)
                x_adv = x_adv.detach() + spec.step_size * gradient.sign()
                x_adv = torch.max(torch.min(x_adv, batch.x + spec.epsilon), batch.x - spec.epsilon).clamp(0, 1)
            optimizer.zero_grad()
            loss(model(backbone.preprocess(x_adv)), batch.y).backward()
            assert config.training.clip_norm is not None
            torch.nn.utils.clip_grad_norm_(params, config.training.clip_norm)
            optimizer.step()
    trained = {name: p for name, p in model.named_parameters() if any(p is q for q in params)}
    own = {}
    for name, value in trained.items():
        short = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        short = short.replace(".default.weight", "")
        own[short] = value.detach().numpy()
    return own


@pytest.mark.long
@pytest.mark.parametrize("num_clients", [1, 3, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "epochs", "lr", "tolerance"),
    [(torch.float64, 2, 1e-3, 1e-9), (torch.float32, 1, 1e-4, 1e-5)],
    ids=["float64", "float32"],
)
def test_training_equals_separate_peft_models(
    num_clients: int, dtype: torch.dtype, epochs: int, lr: float, tolerance: float, tmp_path: Path
) -> None:
    """Adversarial training with clipping, AdamW and unequal batch counts: 4 to 6 steps in float64, 2 to 3 in float32.

    In float32, sign() and Adam's first steps turn rounding into full steps, so the learning rate there is small.
    """
    sections = {
        "attack": {"epsilon": "4/255", "steps": 2},
        "training": {"batch_size": 8, "clip_norm": 0.5, "weight_decay": 0.01},
        "partition": {"num_clients": num_clients},
    }
    config = resolve_config(build(ExperimentConfig, sections))
    stack = LoraStack(create_backbone(BACKBONE, CLASSES).to(dtype), LORA)
    states, data = random_states(stack, num_clients), clients_of_unequal_size(num_clients)
    task = TrainTask(
        1, tuple(range(num_clients)), stack_states(states), TrainSettings(epsilon=4 / 255, lr=lr, epochs=epochs)
    )
    params = to_parameters(task.states, "cpu", dtype)
    counts = torch.stack([torch.from_numpy(d.class_counts(CLASSES)) for d in data])
    context = ClientContext(stack, counts, {}, Stopwatch())
    train_cohort(context, create_algorithm(AlgorithmSection(name="sylva")), params, data, task, config)
    for client in range(num_clients):
        stream = ClientStream(config.seed, "train", client, task.step)
        expected = train_with_peft(states[client], tmp_path / str(client), data[client], stream, config, task, dtype)
        assert expected.keys() == params.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(params[name][client].numpy(), value, rtol=0, atol=tolerance, err_msg=name)


def test_functional_stack_with_merged_weights_equals_lora_stack() -> None:
    """W + (alpha / r) B A as a full model gives the adapter's logits: the two stacks sit behind one seam."""
    stack = LoraStack(create_backbone(BACKBONE, CLASSES), LORA)
    states = random_states(stack, 2)
    full = FunctionalStack(create_backbone(BACKBONE, CLASSES))
    merged = []
    for state in states:
        weights = full.initial_state(generator(0, "initial state")) | {n: state[n] for n in stack.head_names}
        for name in state:
            if name.endswith(".lora_A"):
                module = name.removesuffix(".lora_A")
                update = LORA.alpha / LORA.rank * state[f"{module}.lora_B"] @ state[name]
                weights[f"{module}.weight"] = weights[f"{module}.weight"] + update
        merged.append(weights)
    x, owner = torch.rand(5, 3, 32, 32, generator=generator(0, "x")), repeat_owner([3, 2])
    a = stack.forward(to_parameters(stack_states(states), "cpu", torch.float32), x, owner)
    b = full.forward(to_parameters(stack_states(merged), "cpu", torch.float32), x, owner)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_first_gradient_reaches_b_and_not_a() -> None:
    """B = 0 at the start: the update is silent, its A has no gradient yet, its B has one."""
    stack = LoraStack(create_backbone(BACKBONE, CLASSES), LORA)
    params = to_parameters(stack_states([stack.initial_state(generator(0, "initial state"))]), "cpu", torch.float32)
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    total = stack.forward(leaves, torch.rand(2, 3, 32, 32), repeat_owner([2])).logsumexp(1).sum()
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert all(not gradient.any() for n, gradient in gradients.items() if n.endswith("lora_A"))
    assert all(gradient.any() for n, gradient in gradients.items() if n.endswith("lora_B"))


def test_states_survive_the_way_through_tensors() -> None:
    stack = LoraStack(create_backbone(BACKBONE, CLASSES), LORA)
    states = random_states(stack, 3)
    back = unstack_states(to_arrays(to_parameters(stack_states(states), "cpu", torch.float32)))
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(states, back, strict=True) for name in a)


def test_arrays_of_transposed_tensors_are_in_c_order() -> None:
    """Files of arrays hold their memory as it is."""
    (array,) = to_arrays({"a": torch.arange(24.0).view(2, 4, 3).mT}).values()
    assert array.flags.c_contiguous
    assert array.flags.owndata
    assert array[1, 2].tolist() == [14, 17, 20, 23]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"target_modules": ["norm1"]}, "a LayerNorm: an adapter needs"),
        ({"target_modules": ["atn.qkv"]}, "matches no layer"),
        ({"target_modules": ["head"]}, "the classifier: an adapter needs"),
        ({"rank": 193}, "at most 192"),
    ],
)
def test_wrong_targets_and_ranks_are_named(section: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        target_layers(create_backbone(BACKBONE, CLASSES), LoraSection(**section))


def test_another_image_size_resamples_the_position_embedding() -> None:
    backbone = create_backbone(BackboneSection(image_size=64), CLASSES)
    assert backbone.image_size == 64
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, CLASSES)


def test_any_timm_vision_transformer_can_be_stacked() -> None:
    """Swin folds windows into the batch and has no plain chain of blocks: stacking it must still be exact."""
    section = BackboneSection(name="swin_tiny_patch4_window7_224", image_size=56)
    torch.manual_seed(0)
    backbone = create_backbone(section, CLASSES)
    stack = LoraStack(backbone, LoraSection(rank=2))
    states = random_states(stack, 2)
    params = to_parameters(stack_states(states), "cpu", torch.float32)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        together = stack.forward(params, x, repeat_owner([1, 2]))
        alone = stack.forward({n: v[1:] for n, v in params.items()}, x[1:], repeat_owner([2]))
    assert stack.num_blocks is None
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("counts", [[2, 2], [3, 1], [4, 0]])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("needed", ["xab", "x", "a", "b"])
def test_gradients_of_an_updated_layer_are_those_of_differences(
    counts: list[int], with_bias: bool, needed: str
) -> None:
    """In float64, for images, A and B, together and alone, with and without padding."""
    layout = OwnerLayout.from_owner(repeat_owner(counts), 2, torch.device("cpu"))
    drawn = {"x": torch.randn(4, 3, 5), "a": torch.randn(2, 5, 2), "b": torch.randn(2, 2, 4)}
    x, a, b = (value.double().requires_grad_(name in needed) for name, value in drawn.items())
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64) if with_bias else None

    def layer(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        updated: torch.Tensor = LinearWithUpdates.apply(x, weight, bias, a, b, 1.5, layout)
        return updated.transpose(1, 2)  # a gradient that is not contiguous

    owner = repeat_owner(counts)
    expected = x @ weight.T + 1.5 * (x @ a[owner] @ b[owner]) + (0 if bias is None else bias)
    torch.testing.assert_close(layer(x, a, b), expected.transpose(1, 2))
    assert torch.autograd.gradcheck(layer, (x, a, b))


def test_an_updated_layer_has_no_second_derivative_rather_than_a_wrong_one() -> None:
    layout = OwnerLayout.from_owner(repeat_owner([1]), 1, torch.device("cpu"))
    x = torch.randn(1, 2, 3, requires_grad=True)
    y = LinearWithUpdates.apply(x, torch.randn(4, 3), None, torch.randn(1, 3, 2), torch.randn(1, 2, 4), 1.0, layout)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_norms_of_feature_maps_are_not_trained() -> None:
    """They are subclasses of LayerNorm whose dimension of channels is another one."""
    backbone = create_backbone(BackboneSection(name="convnext_atto"), 3)
    section = LoraSection(target_modules=("mlp.fc1",), train_norms=True)
    assert not [name for name in trained_layers(backbone, section) if "norm" in name]
    ours = create_backbone(BackboneSection(name="vit_micro"), 3)
    assert [name for name in trained_layers(ours, LoraSection(train_norms=True)) if "norm" in name]
