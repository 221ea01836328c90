"""The contract of a federated method: what a client does with a batch, what the coordinator does with the uploads.

Everything else is shared. `sylva_ray.client` iterates batches, masks, clips and steps the optimiser; `sylva_ray.coordinator`
runs the rounds, counts bytes and writes checkpoints. A new method is one file that states only its difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from sylva_ray.aggregation.factors import drop_bad, merge_factors
from sylva_ray.aggregation.neighbours import NeighbourGraph, global_graph, neighbour_graph, product_gram
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.config import Section
from sylva_ray.models.cohort import CohortModel
from sylva_ray.timing import Stopwatch
from sylva_ray.types import AttackSpec, ClientState, ParameterStack


@dataclass(frozen=True)
class Batch:
    """``x [N, 3, H, W] in [0, 1]``, ``y [N]``, sorted ``owner [N]`` (on the CPU), ``noise`` like x, uniform in [-1, 1];
    ``active [C] bool`` says which clients have images in this step."""

    x: torch.Tensor
    y: torch.Tensor
    owner: torch.Tensor
    noise: torch.Tensor
    active: torch.Tensor

    def mean_per_client(self, values_N: torch.Tensor) -> torch.Tensor:
        """Mean of per-image values over each client's own images, ``[C]`` (0 for the inactive)."""
        owner = self.owner.to(values_N.device)
        counts = torch.bincount(owner, minlength=len(self.active)).clamp(min=1)
        sums = values_N.new_zeros(len(self.active)).index_add(0, owner, values_N)
        return sums / counts


@dataclass(frozen=True)
class Cohort:
    """What a client's half may know: the model, its class counts ``[C, num_classes]``, and the state it received.

    ``clock("attack")`` books the seconds spent on crafting."""

    model: CohortModel
    class_counts: torch.Tensor
    received: ParameterStack
    clock: Stopwatch


class Phase2Parameters(Section):
    """Phase 2: the layer game, its guard, and the benign refinement of what it selected."""

    enabled: bool = True
    benign_epochs: int = Field(3, ge=1, description="of all layers, to make theta^b, the game's benign end point")
    benign_lr: float = Field(1e-3, gt=0)
    refine_epochs: int = Field(3, ge=1, description="of the selected layers only")
    refine_lr: float = Field(1e-3, gt=0)
    attack_steps: int = Field(20, ge=1, description="of the PGD behind game values and guard, at the training epsilon")
    max_images: int = Field(128, ge=2, description="of a client's selection split in the game")
    sampled_pairs: int = Field(64, ge=2, description="antithetic permutation pairs beyond 13 players")
    max_stack: int = Field(2048, ge=1, description="images times coalitions held in one forward (memory)")
    shrink_strength: float = Field(
        64.0, ge=0, description="images at which own and neighbourhood values weigh the same"
    )
    guard_tolerance: float = Field(0.05, ge=0, le=1, description="robust accuracy that the guard's bound may lose")
    guard_confidence: float = Field(0.9, gt=0.5, lt=1, description="of the one-sided paired bound")
    guard_pool: int = Field(200, ge=1, description="guard images below which neighbours' outcomes are pooled")


class Algorithm:
    """One federated method. Subclasses override what differs: usually `sample_losses`, sometimes `aggregate`.

    A toy: everybody's state is one number, nothing is attacked, the server averages. Three clients hold 1, 2 and 6 images.

    >>> toy = Algorithm(Algorithm.Parameters(adapters="global", heads="global"))
    >>> states = [{"x": np.float32([value])} for value in (0.0, 3.0, 3.0)]
    >>> merged = toy.aggregate(1, states, uploads=dict(enumerate(states)), num_samples=[1, 2, 6])
    >>> [float(state["x"][0].round(3)) for state in merged]
    [2.667, 2.667, 2.667]
    """

    class Parameters(Section):
        """What every method can be told; a subclass adds its own and changes defaults."""

        model: Literal["lora", "full"] = Field("lora", description="what trains: adapters and head, or everything")
        adapters: Literal["neighbours", "global", "local"] = Field("global", description="who shares the adapters")
        heads: Literal["neighbours", "global", "local"] = Field("local", description="who shares the heads")
        factor_rule: Literal["product_svd", "naive"] = Field("product_svd", description="how LoRA factors are averaged")
        num_neighbours: int | None = Field(None, ge=1, description="including oneself; None: ceil(sqrt K), at least 2")
        head_warmup_epochs: int = Field(1, ge=0, description="benign epochs of the head before round 1")
        head_warmup_lr: float = Field(1e-2, gt=0)
        epsilon_warmup: float = Field(
            0.3, ge=0, le=1, description="share of the rounds over which epsilon ramps from 0"
        )
        final_local_epochs: int = Field(1, ge=0, description="on the merged state, at the end: what is deployed")
        phase2: Phase2Parameters = Phase2Parameters(enabled=False)

        @model_validator(mode="after")
        def _geometry_needs_adapters(self) -> Self:
            if self.model == "full" and "neighbours" in (self.adapters, self.heads):
                raise ValueError("neighbours are found by their adapters: with model=full use global or local sharing")
            return self

    name: ClassVar[str] = "algorithm"

    def __init__(self, parameters: Section) -> None:
        assert isinstance(parameters, Algorithm.Parameters)
        self.parameters = parameters
        self.head_names: tuple[str, ...] = ()  # set by the experiment, which knows the backbone

    # -- client half ---------------------------------------------------------------------------------------------------

    def client_init(self, cohort: Cohort) -> None:
        """Before the first batch of a task. The base method needs nothing."""

    def sample_losses(self, cohort: Cohort, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        """Craft what the method crafts and return the loss of every image, ``[N]``. The base method trains benignly."""
        del attack
        return cross_entropy(cohort.model.forward(params, batch.x, batch.owner), batch.y)

    def client_step(
        self, cohort: Cohort, params: ParameterStack, batch: Batch, attack: AttackSpec, names: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Gradients of the parameters in ``names`` (each ``[C, ...]``) and the mean losses ``[C]``.

        The sum over clients of their own means is differentiated, so each client's gradient is that of training alone."""
        leaves = {name: params[name].detach().requires_grad_() for name in names}
        losses_C = batch.mean_per_client(self.sample_losses(cohort, {**params, **leaves}, batch, attack))
        gradients = torch.autograd.grad(losses_C.sum(), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True)), losses_C.detach()

    # -- server half ---------------------------------------------------------------------------------------------------

    def sharing(self, name: str) -> str:
        """``neighbours``, ``global`` or ``local`` for one parameter name."""
        return self.parameters.heads if name in self.head_names else self.parameters.adapters

    def uploads(self, name: str) -> bool:
        """Whether this parameter leaves the client. Declared bytes are counted from this; a test holds them to the wire."""
        return self.sharing(name) != "local"

    def aggregate(
        self,
        round: int,
        states: Sequence[ClientState],
        uploads: Mapping[int, ClientState],
        num_samples: Sequence[int],
    ) -> list[dict[str, np.ndarray]]:
        """New states of all K clients from their present ``states`` and the ``uploads`` that arrived.

        A client that sent nothing keeps its own state (under ``global`` sharing it receives the merged one, as it would when
        it next connects). Uploads that are not finite or not of the right shape are left out.
        """
        sane = drop_bad([uploads[client] for client in sorted(uploads)])
        present = [sorted(uploads)[index] for index in sane]
        result = [dict(state) for state in states]
        if not present:
            return result
        for sharing in sorted({self.sharing(name) for name in uploads[present[0]]}):
            shared = [{n: v for n, v in uploads[c].items() if self.sharing(n) == sharing} for c in present]
            graph = self.graph(round, sharing, [uploads[c] for c in present], [num_samples[c] for c in present])
            if sharing == "global":  # one merge for all: everybody holds the same bits
                common = merge_factors(shared[0], shared, graph.weights[0], self.parameters.factor_rule)
                result = [state | common for state in result]
                continue
            for row, client in enumerate(present):
                members = [shared[j] for j in graph.members[row]]
                result[client] |= merge_factors(shared[row], members, graph.weights[row], self.parameters.factor_rule)
        return result

    def graph(
        self, round: int, sharing: str, uploads: Sequence[ClientState], num_samples: Sequence[int]
    ) -> NeighbourGraph:
        """Who is averaged with whom. In round 1 the adapters' products are close to zero and distances mean nothing."""
        if sharing == "global" or round <= 1:
            return global_graph(np.asarray(num_samples))
        return neighbour_graph(product_gram(uploads), np.asarray(num_samples), self.parameters.num_neighbours)

    def phase2_graph(self, adapters: Sequence[ClientState], num_samples: Sequence[int]) -> NeighbourGraph:
        """Whose game values and guard outcomes speak for whom in phase 2; a client that shares nothing stays alone."""
        samples = np.asarray(num_samples)
        if self.parameters.adapters == "local":
            return neighbour_graph(np.eye(len(samples)), samples, k=1)
        return neighbour_graph(product_gram(adapters), samples, self.parameters.num_neighbours)
