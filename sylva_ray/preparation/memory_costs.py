"""Measure the memory of an experiment's passes: training, attacks, evaluation, the layer game."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.attacks.pgd import PgdAttack
from sylva_ray.attacks.registry import attack_stack
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.lazy import torch
from sylva_ray.core.precision import at_precision, torch_dtype
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import ClientImages, ClientState, ParameterStack
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.federation.contract import Algorithm
from sylva_ray.federation.stages.layer_game.rankings.registry import create_ranking
from sylva_ray.models.cohort import FunctionalStack, as_client, to_parameters

if TYPE_CHECKING:
    from sylva_ray.models.lora import LoraStack
    from sylva_ray.models.memory import PassCost


@dataclass(frozen=True)
class MemoryCosts:
    """Bytes that an experiment's model needs.

    Attributes:
        passes: by the names of `Windows`; without ``walk`` where no coalitions are evaluated.
        model: the backbone's weights, and their copy in a lower precision.
        state: the parameters of one client.
        image: one image in float32.
        couples_images: whether a training step cannot divide the images of a client, because of batch statistics.
    """

    passes: Mapping[str, PassCost]
    model: int
    state: int
    image: int
    couples_images: bool = False


def measure_costs(
    config: ResolvedConfig,
    algorithm: Algorithm,
    model: LoraStack | FunctionalStack,
    state: ClientState,
    image_size: int,
) -> MemoryCosts:
    """Measure the memory of every kind of pass with one image and with four, on the device of the model.

    Args:
        config: the experiment, its precisions and kernels resolved.
        algorithm: the method, bound to the model.
        model: on the device where it is to be measured.
        state: of a client.
        image_size: side of the data set's images in pixels.
    """
    from sylva_ray.models.memory import measure_pass

    probe = _Probe(config, algorithm, model, state, image_size)
    precisions = {config.training.precision, config.evaluation.precision}
    with at_precision(model, torch.float32):
        for precision in sorted({*precisions, "float32"}):
            model.precision = torch_dtype(precision)
            probe.forward(1)  # a copy in a lower precision is made at its first use
        costs = {}
        plays = probe.phase2.enabled and create_ranking(probe.phase2.selection).evaluates_coalitions
        for name in ("forward", "evaluate", "train", "attack", *(["walk"] if plays else [])):
            is_training = name in ("train", "attack")
            model.precision = torch_dtype(config.training.precision) if is_training else torch.float32
            costs[name] = measure_pass(getattr(probe, name), probe.device)
        model.precision = torch.float32
        if probe.phase2.enabled and probe.phase2.selection == "gates":
            costs["train"] |= measure_pass(probe.gates, probe.device)
    weights = sum(value.numel() * value.element_size() for value in model.backbone.state_dict().values())
    low = weights // 2 if "bfloat16" in precisions and algorithm.parameters.model == "lora" else 0
    with model.training():
        couples_images = model.couples_images
    of_state = sum(value.nbytes for value in state.values())
    return MemoryCosts(costs, weights + low, of_state, 12 * image_size**2, couples_images)


class _Probe:
    """Passes of a number of images of one client, each as the run makes it.

    Args:
        config: the experiment.
        algorithm: the method.
        model: of the clients.
        state: of the client.
        image_size: side of the data set's images in pixels.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        algorithm: Algorithm,
        model: LoraStack | FunctionalStack,
        state: ClientState,
        image_size: int,
    ) -> None:
        self.config, self.algorithm, self.model, self.size = config, algorithm, model, image_size
        self.phase2 = algorithm.parameters.phase2
        self.device = next(iter(model.backbone.parameters())).device
        self.params = to_parameters(as_client(state), self.device, torch.float32)
        self.num_classes = len(self.params[model.head_names[1]][0])

    def images(self, num_images: int) -> ClientImages:
        """Return images of one client."""
        x = torch.full((num_images, 3, self.size, self.size), 0.5, device=self.device)
        y = torch.zeros(num_images, dtype=torch.long, device=self.device)
        return ClientImages(x, y, torch.zeros(num_images, dtype=torch.long), 1)

    def forward(self, num_images: int) -> None:
        """Compute logits without gradients."""
        images = self.images(num_images)
        with torch.no_grad():
            self.model.forward(self.params, images.x, images.owner)

    def evaluate(self, num_images: int) -> None:
        """Attack as an evaluation in float32 does, the costlier precision."""
        spec = PgdAttack(epsilon=self.config.attack.epsilon, steps=1).spec()
        draws, images = ImageDraws(torch.arange(num_images)).to(self.device), self.images(num_images)
        with torch.no_grad():  # images that are misclassified already would not be attacked
            y = self.model.forward(self.params, images.x, images.owner).argmax(1)
        attack_stack(self.model, self.params, replace(images, y=y), spec, draws)

    def attack(self, num_images: int) -> None:
        """Craft images as training does, for a loss that every method's own resembles."""
        images = self.images(num_images)
        leaf = images.x.requires_grad_()
        loss = cross_entropy(self.model.forward(self.params, leaf, images.owner), images.y).sum()
        torch.autograd.grad(loss, leaf)

    def train(self, num_images: int) -> None:
        """Compute the gradients of a training step."""
        context, batch, names = self._step(num_images)
        attack = self.config.attack.spec()
        self.algorithm.client_init(context)
        self.algorithm.client_step(context, self.params, batch, replace(attack, steps=1), names)

    def gates(self, num_images: int) -> None:
        """Compute the three forwards of a step on gates, all of them with gradients."""
        images = self.images(num_images)
        leaves: ParameterStack = {name: value.clone().requires_grad_() for name, value in self.params.items()}
        losses = [cross_entropy(self.model.forward(leaves, images.x, images.owner), images.y) for _ in range(3)]
        torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()), allow_unused=True)

    def walk(self, num_images: int) -> None:
        """Run the layer game's blocks with as many stacks of tokens as the walk over coalitions keeps."""
        images = self.images(num_images)
        num_blocks = getattr(self.model, "num_blocks", None)
        if num_blocks is None:
            mixed = {name: value.repeat(num_images, *[1] * (value.ndim - 1)) for name, value in self.params.items()}
            with torch.no_grad():
                self.model.forward(mixed, images.x, torch.arange(num_images))
            return
        from sylva_ray.models.lora import LoraStack  # timm

        assert isinstance(self.model, LoraStack), "only its forward comes in blocks"
        with torch.no_grad():
            kept = [self.model.embed(images.x)]
            for block in range(num_blocks):
                flat = kept[-1].clone()
                kept.append(self.model.run_block(block, self.params, flat, images.owner))

    def _step(self, num_images: int) -> tuple[ClientContext, Batch, list[str]]:
        images = self.images(num_images)
        counts = torch.ones(1, self.num_classes, dtype=torch.long, device=self.device)
        context = ClientContext(self.model, counts, dict(self.params), Stopwatch())
        active = torch.ones(1, dtype=torch.bool, device=self.device)
        draws = ImageDraws(torch.arange(num_images, device=self.device))
        batch = Batch(images.x, images.y, images.owner, 1, active, draws)
        names = [n for n in self.params if self.model.trainable(n) and self.algorithm.is_trained(n)]
        return context, batch, self.algorithm.schedule(self.config.training.local_epochs, names)[-1][1]
