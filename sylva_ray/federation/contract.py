"""The contract of a federated method: what a client does with a batch, what the coordinator does with the uploads.

Everything else is shared. `sylva_ray.client` iterates batches, masks, clips and steps; `sylva_ray.coordinator` runs the
rounds, carries uploads over the wire, counts bytes and writes checkpoints. A new method is one file that states only its
difference: usually `craft` and `sample_losses`, sometimes `client_weights` or `aggregate` (docs/methods.md walks through
one).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from sylva_ray.aggregation.factors import drop_bad, merge_factors, orthonormal_rows
from sylva_ray.aggregation.neighbours import NeighbourGraph, global_graph, neighbour_graph, product_gram
from sylva_ray.aggregation.robust import COORDINATE_RULES, assumed_bad, least_clients
from sylva_ray.aggregation.robust_merge import robust_merge
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.core.sections import Section
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import AttackSpec, ClientState, ParameterStack, stack_digest
from sylva_ray.models.cohort import CohortModel

Sharing = Literal["neighbours", "global", "local"]


@dataclass(frozen=True)
class Batch:
    """``x [N, 3, H, W] in [0, 1]``, ``y [N]``, sorted ``owner [N]`` (on the CPU); ``active [C] bool`` says which clients have
    images in this step. Random numbers from every client's own stream: ``noise`` like x, uniform in [-1, 1], where attacks
    start; ``draws [N, 2]``, uniform in [0, 1), for what else a method draws per image."""

    x: torch.Tensor
    y: torch.Tensor
    owner: torch.Tensor
    noise: torch.Tensor
    active: torch.Tensor
    draws: torch.Tensor

    def mean_per_client(self, values_N: torch.Tensor) -> torch.Tensor:
        """Mean of per-image values over each client's own images, ``[C]`` (0 for the inactive)."""
        owner = self.owner.to(values_N.device)
        counts = torch.bincount(owner, minlength=len(self.active)).clamp(min=1)
        sums = values_N.new_zeros(len(self.active)).index_add(0, owner, values_N)
        return sums / counts


@dataclass(frozen=True)
class Cohort:
    """What a client's half may know: the model, its class counts ``[C, num_classes]``, and the state it received.

    ``clock("attack")`` books the seconds spent on crafting. ``memory`` lasts for one task (one client, one round)."""

    model: CohortModel
    class_counts: torch.Tensor
    received: ParameterStack
    clock: Stopwatch
    memory: dict[str, Any] = field(default_factory=dict)

    def of_owner(self, values_C: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Per-client values ``[C, ...]`` -> per image ``[N, ...]``."""
        return values_C[batch.owner.to(values_C.device)]


@dataclass(frozen=True)
class Arrived:
    """What the coordinator holds when a round's uploads are in.

    Attributes:
        round: from 1 (0 is the warm-up).
        states: the K clients' own states after training (the simulator knows them; a method sends only what it declares).
        received: the K states that the clients started from, which both sides know.
        uploads: by client, after the wire: what arrived, decoded, perhaps forged.
        num_samples: training images of all K clients.
        metrics: ``{client: {name: value}}`` that came along, e.g. the mean ``loss``.
        seed: of the experiment, for rules that draw.
    """

    round: int
    states: Sequence[ClientState]
    received: Sequence[ClientState]
    uploads: Mapping[int, ClientState]
    num_samples: Sequence[int]
    metrics: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    seed: int = 0


class RobustParameters(Section):
    """Aggregation that survives Byzantine uploads: the rule takes the mean's place, inside each neighbourhood."""

    rule: Literal[
        "mean",
        "coordinate_median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "geometric_median",
        "centred_clipping",
        "self_centred_clipping",
        "norm_clipping",
    ] = "mean"
    assumed_fraction: float | None = Field(
        None, ge=0, lt=1, description="bad clients that the rule reckons with; None: byzantine.fraction"
    )
    bucket_size: int = Field(1, ge=1, description="uploads averaged at random before the rule; 1: none")


class Phase2Parameters(Section):
    """Phase 2: which layers may be refined on benign data, the guard over the choice, and the refinement."""

    enabled: bool = True
    selection: Literal["shapley", "gates", "shift", "all", "head", "random"] = Field(
        "shapley", description="what ranks the layers; the guard decides how many of them"
    )
    benign_epochs: int = Field(3, ge=1, description="of all layers, to make theta^b, the game's benign end point")
    benign_lr: float = Field(1e-3, gt=0)
    refine_epochs: int = Field(3, ge=1, description="of the selected layers only")
    refine_lr: float = Field(1e-3, gt=0)
    attack_steps: int = Field(20, ge=1, description="of the PGD behind game values and guard, at the training epsilon")
    max_images: int = Field(128, ge=2, description="of a client's selection split in the game")
    sampled_pairs: int = Field(64, ge=2, description="antithetic permutation pairs beyond 13 players")
    max_stack: int = Field(2048, ge=1, description="images times coalitions held in one forward (memory)")
    gate_steps: int = Field(200, ge=1, description="of Adam on the gates (selection=gates)")
    shrink_strength: float = Field(
        64.0, ge=0, description="images at which own and neighbourhood values weigh the same"
    )
    guard_tolerance: float = Field(0.05, ge=0, le=1, description="robust accuracy that the guard's bound may lose")
    guard_confidence: float = Field(0.9, gt=0.5, lt=1, description="of the one-sided paired bound")
    guard_pool: int | None = Field(
        None,
        ge=1,
        description="guard images below which neighbours' outcomes are pooled; None: as few as the bound needs",
    )


class Algorithm:
    """One federated method. The base method trains benignly; subclasses override what differs.

    A toy: everybody's state is one number, nothing is attacked, the server averages. Three clients hold 1, 2 and 6 images.

    >>> toy = Algorithm(Algorithm.Parameters(adapters="global", heads="global"))
    >>> states = [{"x": np.float32([value])} for value in (0.0, 3.0, 3.0)]
    >>> merged = toy.aggregate(Arrived(1, states, states, dict(enumerate(states)), num_samples=[1, 2, 6]))
    >>> [float(state["x"][0].round(3)) for state in merged]
    [2.667, 2.667, 2.667]
    """

    class Parameters(Section):
        """What every method can be told; a subclass adds its own and changes defaults."""

        model: Literal["lora", "full"] = Field("lora", description="what trains: adapters and head, or everything")
        adapters: Sharing = Field("global", description="who shares the adapters (with model=full: the body)")
        heads: Sharing = Field("local", description="who shares the heads")
        factors: Literal["both", "b", "a"] = Field(
            "both", description="b: A is frozen (FFA-LoRA, LoRA-FA); a: A is shared, B personal (FedSA-LoRA)"
        )
        a_init: Literal["kaiming", "orthonormal"] = Field("kaiming", description="orthonormal: rows of norm 1/sqrt 3")
        factor_rule: Literal["product_svd", "naive"] = Field("product_svd", description="how LoRA factors are averaged")
        weighting: Literal["samples", "uniform"] = Field("samples", description="of clients in the mean")
        robust: RobustParameters = RobustParameters()
        num_neighbours: int | None = Field(None, ge=1, description="including oneself; None: ceil(sqrt K), at least 2")
        head_warmup_epochs: int = Field(1, ge=0, description="benign epochs of the head before round 1")
        head_warmup_lr: float = Field(1e-2, gt=0)
        epsilon_warmup: float = Field(
            0.3, ge=0, le=1, description="share of the rounds over which epsilon ramps from 0"
        )
        final_local_epochs: int = Field(1, ge=0, description="on the merged state, at the end: what is deployed")
        phase2: Phase2Parameters = Phase2Parameters(enabled=False)

        @model_validator(mode="after")
        def _fits_together(self) -> Self:
            by_neighbours = "neighbours" in (self.adapters, self.heads)
            if self.model == "full" and by_neighbours:
                raise ValueError(
                    "algorithm.model=full has no adapters to find neighbours by: use global or local sharing"
                )
            if self.model == "full" and self.phase2.enabled:
                fix = "use algorithm.model=lora, or algorithm.phase2.enabled=false"
                raise ValueError(f"algorithm.phase2.enabled=true plays with adapters: {fix}")
            if self.adapters == "local" and self.heads == "neighbours":
                raise ValueError(
                    "algorithm.heads=neighbours finds neighbours by adapters, which adapters=local keeps at home: use global"
                )
            if self.robust.rule == "self_centred_clipping" and "global" in (self.adapters, self.heads):
                raise ValueError(
                    "algorithm.robust.rule=self_centred_clipping gives every client a centre of its own, so nothing can be "
                    "shared globally: use neighbours or local sharing, or centred_clipping"
                )
            if self.factors == "a" and by_neighbours:
                raise ValueError(
                    "algorithm.factors=a keeps B at home, and neighbours are found by B A: use global sharing"
                )
            pairs_travel = self.model == "lora" and self.factors == "both" and self.factor_rule == "product_svd"
            if self.robust.rule in COORDINATE_RULES and pairs_travel and self.adapters != "local":
                raise ValueError(
                    f"algorithm.robust.rule={self.robust.rule} needs coordinates that mean the same for all, and LoRA pairs "
                    "have none: set algorithm.factors=b, factor_rule=naive or model=full"
                )
            return self

    name: ClassVar[str] = "algorithm"

    def __init__(self, parameters: Section) -> None:
        assert isinstance(parameters, Algorithm.Parameters)
        self.parameters = parameters
        self.head_names: tuple[str, ...] = ()

    # -- set-up, once per process ----------------------------------------------------------------------------------------

    def companion_weights(self, num_classes: int) -> dict[str, np.ndarray]:
        """Weights that travel to the workers beside the backbone's (a teacher's). The base method has no companion.

        Raises:
            UserError: the companion does not fit the data."""
        del num_classes
        return {}

    def attach(
        self, model: CohortModel, num_classes: int, companion: Mapping[str, np.ndarray], device: torch.device
    ) -> None:
        """Meet the model that clients train. A subclass with a companion builds it here from ``companion``."""
        del num_classes, companion, device
        self.head_names = model.head_names

    def initial_state(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        """What ``client`` starts from, made of the model's common initial ``state``."""
        del client
        if self.parameters.a_init == "kaiming":
            return dict(state)
        return {name: orthonormal_rows(value) if name.endswith(".lora_A") else value for name, value in state.items()}

    # -- client half -----------------------------------------------------------------------------------------------------

    def trains(self, name: str) -> bool:
        """Whether local training moves this parameter (the model's own frozen parts are not asked about)."""
        return not (self.parameters.factors == "b" and name.endswith(".lora_A"))

    def schedule(self, epochs: int, names: Sequence[str]) -> list[tuple[int, list[str]]]:
        """A round's local training: ``(epochs, trained names)`` one after the other, each with a fresh optimiser."""
        return [(epochs, list(names))]

    def warm_up_names(self) -> tuple[str, ...]:
        """What the benign warm-up trains: the heads."""
        return self.head_names

    def warm_up_losses(self, cohort: Cohort, params: ParameterStack, batch: Batch) -> torch.Tensor:
        """The warm-up's loss of every image, ``[N]``: benign cross-entropy."""
        return cross_entropy(cohort.model.forward(params, batch.x, batch.owner), batch.y)

    def client_init(self, cohort: Cohort) -> None:
        """Before the first batch of a task. The base method needs nothing."""

    def craft(self, cohort: Cohort, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        """The images that the loss is taken on, ``[N, 3, H, W]``, without a graph. The base method attacks nothing."""
        del cohort, params, attack
        return batch.x

    def sample_losses(self, cohort: Cohort, params: ParameterStack, batch: Batch, x_adv: torch.Tensor) -> torch.Tensor:
        """The loss of every image, ``[N]``; ``x_adv`` is what `craft` made."""
        return cross_entropy(cohort.model.forward(params, x_adv, batch.owner), batch.y)

    def gradients(
        self, cohort: Cohort, params: ParameterStack, batch: Batch, x_adv: torch.Tensor, names: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Gradients of the parameters in ``names`` (each ``[C, ...]``) and the mean losses ``[C]``.

        The sum over clients of their own means is differentiated, so each client's gradient is that of training alone."""
        leaves = {name: params[name].detach().requires_grad_() for name in names}
        with cohort.model.training():
            losses_C = batch.mean_per_client(self.sample_losses(cohort, {**params, **leaves}, batch, x_adv))
        gradients = torch.autograd.grad(losses_C.sum(), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True)), losses_C.detach()

    def client_step(
        self, cohort: Cohort, params: ParameterStack, batch: Batch, attack: AttackSpec, names: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Craft, then differentiate: what one optimiser step is made of."""
        x_adv = self.craft(cohort, params, batch, attack)
        return self.gradients(cohort, params, batch, x_adv, names)

    # -- what travels ----------------------------------------------------------------------------------------------------

    def sharing(self, name: str) -> str:
        """``neighbours``, ``global`` or ``local`` for one parameter name."""
        return self.parameters.heads if name in self.head_names else self.parameters.adapters

    def uploads(self, name: str) -> bool:
        """Whether this parameter leaves the client. Declared bytes are counted from this; a test holds them to the wire."""
        stays = {"both": (), "b": (".lora_A",), "a": (".lora_B",)}[self.parameters.factors]
        return self.sharing(name) != "local" and not name.endswith(stays)

    def pack(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        """What ``client`` uploads of its ``state``."""
        del client
        return {name: value for name, value in state.items() if self.uploads(name)}

    def is_refactored(self, name: str) -> bool:
        """Whether merging rewrites this factor in other coordinates, so that what an earlier upload lost means nothing now."""
        p = self.parameters
        is_factor = name.endswith((".lora_A", ".lora_B"))
        return is_factor and p.model == "lora" and p.factors == "both" and p.factor_rule == "product_svd"

    def unpack(self, client: int, upload: ClientState) -> dict[str, np.ndarray]:
        """The upload in the shapes of a state (the inverse of `pack`, where that changes shapes)."""
        del client
        return dict(upload)

    # -- server half -----------------------------------------------------------------------------------------------------

    def client_weights(self, arrived: Arrived, clients: Sequence[int]) -> np.ndarray:
        """Weights of ``clients`` in the mean, up to a factor: by images (FedAvg, McMahan et al. 2017), or alike."""
        if self.parameters.weighting == "uniform":
            return np.ones(len(clients))
        return np.asarray([arrived.num_samples[client] for client in clients], np.float64)

    def aggregate(self, arrived: Arrived) -> list[dict[str, np.ndarray]]:
        """New states of all K clients.

        A client that sent nothing keeps its own state (under ``global`` sharing it receives the merged one, as it would when
        it next connects). Uploads that are not finite or not of the right shape are left out. Where a robust rule has too
        few left, everybody keeps what he received.
        """
        clients = sorted(arrived.uploads)
        present = [clients[index] for index in drop_bad([arrived.uploads[client] for client in clients])]
        result = [dict(state) for state in arrived.states]
        if not present:
            return result
        names = arrived.uploads[present[0]]
        weights = self.client_weights(arrived, present)
        for sharing in sorted({self.sharing(name) for name in names}):
            own = [name for name in names if self.sharing(name) == sharing]
            graph = self.graph(arrived, sharing, present, weights)
            if sharing == "global":  # one merge for all: everybody holds the same bits
                common = self.merge(arrived, own, present, graph.weights[0], present[0])
                result = [state | common for state in result]
                continue
            for rows in graph.alike([self._own_part(arrived, own, client) for client in present]):
                members = [present[j] for j in graph.members[rows[0]]]
                merged = self.merge(arrived, own, members, graph.weights[rows[0]], present[rows[0]])
                for row in rows:
                    result[present[row]] |= merged
        return result

    def merge(
        self, arrived: Arrived, names: Sequence[str], members: Sequence[int], weights: np.ndarray, receiver: int
    ) -> dict[str, np.ndarray]:
        """The parameters in ``names`` for ``receiver``, from the uploads of ``members`` with ``weights`` (summing to 1)."""
        uploads = [{name: arrived.uploads[client][name] for name in names} for client in members]
        anchor = {name: arrived.uploads[receiver][name] for name in names}
        robust = self.parameters.robust
        if robust.rule == "mean":
            return merge_factors(anchor, uploads, weights, self.parameters.factor_rule)
        origin = {name: arrived.received[receiver][name] for name in names}
        num_bad = self.assumed_bad(len(members))
        inputs = math.ceil(len(members) / robust.bucket_size)
        if inputs < least_clients(robust.rule, num_bad)[0]:
            return origin
        return robust_merge(
            anchor,
            origin,
            uploads,
            weights,
            members.index(receiver),
            self.parameters.factor_rule,
            robust.rule,
            num_bad,
            robust.bucket_size,
            frozen=self._frozen(arrived.received[receiver]),
            draw=(arrived.seed, arrived.round),
        )

    def _own_part(self, arrived: Arrived, names: Sequence[str], receiver: int) -> Hashable:
        """What, beside members and weights, decides a merge: receivers with equal parts share one.

        A mean is the same whoever receives it. A robust rule measures updates from what the receiver had; self-centred
        clipping starts from the receiver itself. The anchor does not count: it decides roundings, and which rows of A
        stay where nothing has been learnt (any will do)."""
        rule = self.parameters.robust.rule
        if rule == "mean":
            return None
        if rule == "self_centred_clipping":
            return receiver
        received = arrived.received[receiver]
        return stack_digest({name: received[name] for name in names} | self._frozen(received))

    def _frozen(self, state: ClientState) -> dict[str, np.ndarray]:
        """The factors that are the same for all (a personal B, under ``factors=a``, is not: the coordinator never sees one)."""
        if self.parameters.factors != "b":
            return {}
        return {name: value for name, value in state.items() if name.endswith(".lora_A")}

    def assumed_bad(self, num_members: int) -> int:
        """How many of ``num_members`` uploads a robust rule reckons to be bad."""
        return assumed_bad(self.parameters.robust.assumed_fraction or 0.0, num_members)

    def graph(self, arrived: Arrived, sharing: str, clients: Sequence[int], weights: np.ndarray) -> NeighbourGraph:
        """Who is averaged with whom. In round 1 the adapters' products are close to zero and distances mean nothing."""
        if sharing == "global" or arrived.round <= 1:
            return global_graph(weights)
        known = [{**arrived.received[client], **arrived.uploads[client]} for client in clients]
        return neighbour_graph(product_gram(known), weights, self.parameters.num_neighbours)

    def phase2_graph(self, adapters: Sequence[ClientState], num_samples: Sequence[int]) -> NeighbourGraph:
        """Whose game values and guard outcomes speak for whom in phase 2; a client that shares nothing stays alone."""
        samples = np.asarray(num_samples)
        if self.parameters.adapters == "local" or self.parameters.factors == "a":
            return neighbour_graph(np.eye(len(samples)), samples, k=1)
        return neighbour_graph(product_gram(adapters), samples, self.parameters.num_neighbours)
