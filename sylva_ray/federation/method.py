"""The two halves of a federated method: what a client does with a batch, what the coordinator does with the uploads.

Everything else is shared. `sylva_ray.federation.client` iterates batches, masks, clips and steps;
`sylva_ray.federation.stages` runs the rounds, carries uploads over the wire and counts bytes. A new method is one file
that states only its difference: usually `craft` and `sample_losses`, sometimes `client_weights` or `aggregate`
(docs/methods.md walks through one). `sylva_ray.federation.contract.Algorithm` adds of which stages its run is made.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import torch

from sylva_ray.aggregation.factors import merge_factors, orthonormal_rows, valid_uploads
from sylva_ray.aggregation.neighbours import (
    MERGING_THREADS,
    NeighbourGraph,
    global_graph,
    neighbour_graph,
    product_gram,
)
from sylva_ray.aggregation.robust import assumed_byzantine, min_clients
from sylva_ray.aggregation.robust_merge import robust_merge
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.sections import Section
from sylva_ray.core.types import AttackSpec, ClientState, ParameterStack, stack_digest
from sylva_ray.federation.context import Batch, ClientContext, RoundUploads
from sylva_ray.federation.parameters import MethodParameters
from sylva_ray.models.cohort import CohortModel
from sylva_ray.transport.postprocessor import Postprocessor
from sylva_ray.transport.registry import create_postprocessors


class Method:
    """One federated method. The base method trains benignly; subclasses override what differs.

    A toy: everybody's state is one number, nothing is attacked, the server averages. Three clients hold 1, 2 and 6 images.

    >>> toy = Method(Method.Parameters(adapters="global", heads="global"))
    >>> states = [{"x": np.float32([value])} for value in (0.0, 3.0, 3.0)]
    >>> merged = toy.aggregate(RoundUploads(1, states, states, dict(enumerate(states)), num_samples=[1, 2, 6]))
    >>> [float(state["x"][0].round(3)) for state in merged]
    [2.667, 2.667, 2.667]
    """

    class Parameters(MethodParameters):
        """No more than every method has."""

    name: ClassVar[str] = "algorithm"

    def __init__(self, parameters: Section) -> None:
        assert isinstance(parameters, MethodParameters)
        self.parameters = parameters
        self.head_names: tuple[str, ...] = ()

    # -- set-up, once per process ----------------------------------------------------------------------------------------

    def auxiliary_weights(self, num_classes: int) -> dict[str, np.ndarray]:
        """Return what the workers need beside the backbone's weights, e.g. a teacher's. The base method needs nothing.

        Raises:
            UserError: an auxiliary model does not fit the data.
        """
        del num_classes
        return {}

    def bind_model(
        self, model: CohortModel, num_classes: int, auxiliary: Mapping[str, np.ndarray], device: torch.device
    ) -> None:
        """Bind the method to the model that clients train. A subclass builds its auxiliary model here, from ``auxiliary``."""
        del num_classes, auxiliary, device
        self.head_names = model.head_names

    def initial_state(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        """What ``client`` starts from, made of the model's common initial ``state``."""
        del client
        if self.parameters.a_init == "kaiming":
            return dict(state)
        return {name: orthonormal_rows(value) if name.endswith(".lora_A") else value for name, value in state.items()}

    # -- client half -----------------------------------------------------------------------------------------------------

    def is_trained(self, name: str) -> bool:
        """Whether local training moves this parameter (the model's own frozen parts are not asked about)."""
        return not (self.parameters.factors == "b" and name.endswith(".lora_A"))

    def schedule(self, epochs: int, names: Sequence[str]) -> list[tuple[int, list[str]]]:
        """A round's local training: ``(epochs, trained names)`` one after the other, each with a fresh optimiser."""
        return [(epochs, list(names))]

    def warm_up_names(self) -> tuple[str, ...]:
        """What the benign warm-up trains: the heads."""
        return self.head_names

    def warm_up_losses(self, context: ClientContext, params: ParameterStack, batch: Batch) -> torch.Tensor:
        """The warm-up's loss of every image, ``[N]``: benign cross-entropy."""
        return cross_entropy(context.model.forward(params, batch.x, batch.owner), batch.y)

    def client_init(self, context: ClientContext) -> None:
        """Before the first batch of a task. The base method needs nothing."""

    def craft(self, context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        """The images that the loss is taken on, ``[N, 3, H, W]``, without a graph. The base method attacks nothing."""
        del context, params, attack
        return batch.x

    def sample_losses(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor
    ) -> torch.Tensor:
        """The loss of every image, ``[N]``; ``x_adv`` is what `craft` made."""
        return cross_entropy(context.model.forward(params, x_adv, batch.owner), batch.y)

    def gradients(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor, names: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Gradients of the parameters in ``names`` (each ``[C, ...]``) and the mean losses ``[C]``.

        The sum over clients of their own means is differentiated, so each client's gradient is that of training alone."""
        leaves = {name: params[name].detach().requires_grad_() for name in names}
        with context.model.training():
            losses_C = batch.mean_by_client(self.sample_losses(context, {**params, **leaves}, batch, x_adv))
        gradients = torch.autograd.grad(losses_C.sum(), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True)), losses_C.detach()

    def client_step(
        self, context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec, names: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Craft, then differentiate: what one optimiser step is made of."""
        x_adv = self.craft(context, params, batch, attack)
        return self.gradients(context, params, batch, x_adv, names)

    # -- what travels ----------------------------------------------------------------------------------------------------

    def sharing(self, name: str) -> str:
        """``neighbours``, ``global`` or ``local`` for one parameter name."""
        return self.parameters.heads if name in self.head_names else self.parameters.adapters

    def is_uploaded(self, name: str) -> bool:
        """Whether this parameter leaves the client. Declared bytes are counted from this; a test holds them to the wire."""
        stays = {"both": (), "b": (".lora_A",), "a": (".lora_B",)}[self.parameters.factors]
        return self.sharing(name) != "local" and not name.endswith(stays)

    def pack(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        """What ``client`` uploads of its ``state``."""
        del client
        return {name: value for name, value in state.items() if self.is_uploaded(name)}

    def is_refactored(self, name: str) -> bool:
        """Whether merging rewrites this factor in other coordinates, so that what an earlier upload lost means nothing now."""
        p = self.parameters
        is_factor = name.endswith((".lora_A", ".lora_B"))
        return is_factor and p.model == "lora" and p.factors == "both" and p.factor_rule == "product_svd"

    def unpack(self, client: int, upload: ClientState) -> dict[str, np.ndarray]:
        """The upload in the shapes of a state (the inverse of `pack`, where that changes shapes)."""
        del client
        return dict(upload)

    def postprocessors(self, config: ExperimentConfig) -> list[Postprocessor]:
        """Return what is applied to uploads and answers on their way, the one nearest to the model first.

        By default what the configuration asks for: Byzantine clients and compression. A method with noise or masks of its own
        appends them here.
        """
        return create_postprocessors(config, self)

    # -- server half -----------------------------------------------------------------------------------------------------

    def client_weights(self, uploads: RoundUploads, clients: Sequence[int]) -> np.ndarray:
        """Weights of ``clients`` in the mean, up to a factor: by images (FedAvg, McMahan et al. 2017), or alike."""
        if self.parameters.weighting == "uniform":
            return np.ones(len(clients))
        return np.asarray([uploads.num_samples[client] for client in clients], np.float64)

    def aggregate(self, uploads: RoundUploads) -> list[dict[str, np.ndarray]]:
        """New states of all K clients.

        A client that sent nothing keeps its own state (under ``global`` sharing it receives the merged one, as it would when
        it next connects). Uploads that are not finite or not of the right shape are left out. Where a robust rule has too
        few left, everybody keeps what he received.
        """
        clients = sorted(uploads.by_client)
        present = [clients[index] for index in valid_uploads([uploads.by_client[client] for client in clients])]
        result = [dict(state) for state in uploads.states]
        if not present:
            return result
        names = uploads.by_client[present[0]]
        weights = self.client_weights(uploads, present)
        for sharing in sorted({self.sharing(name) for name in names}):
            own = [name for name in names if self.sharing(name) == sharing]
            graph = self.graph(uploads, sharing, present, weights)
            if sharing == "global":  # one merge for all: everybody holds the same bits
                common = self.merge(uploads, own, present, graph.weights[0], present[0])
                result = [state | common for state in result]
                continue
            groups = graph.group_receivers([self._receiver_key(uploads, own, client) for client in present])

            def merged(
                rows: Sequence[int], own: Sequence[str] = own, graph: NeighbourGraph = graph
            ) -> dict[str, np.ndarray]:
                members = [present[j] for j in graph.members[rows[0]]]
                return self.merge(uploads, own, members, graph.weights[rows[0]], present[rows[0]])

            with ThreadPoolExecutor(MERGING_THREADS) as threads:  # the same bits: a merge is one thread's work
                for rows, common in zip(groups, threads.map(merged, groups), strict=True):
                    for row in rows:
                        result[present[row]] |= common
        return result

    def merge(
        self, uploads: RoundUploads, names: Sequence[str], members: Sequence[int], weights: np.ndarray, receiver: int
    ) -> dict[str, np.ndarray]:
        """The parameters in ``names`` for ``receiver``, from the uploads of ``members`` with ``weights`` (summing to 1)."""
        sent = [{name: uploads.by_client[client][name] for name in names} for client in members]
        anchor = {name: uploads.by_client[receiver][name] for name in names}
        robust = self.parameters.robust
        if robust.rule == "mean":
            return merge_factors(anchor, sent, weights, self.parameters.factor_rule)
        origin = {name: uploads.received[receiver][name] for name in names}
        num_byzantine = self.assumed_byzantine(len(members))
        inputs = math.ceil(len(members) / robust.bucket_size)
        if inputs < min_clients(robust.rule, num_byzantine)[0]:
            return origin
        return robust_merge(
            anchor,
            origin,
            sent,
            weights,
            members.index(receiver),
            self.parameters.factor_rule,
            robust.rule,
            num_byzantine,
            robust.bucket_size,
            frozen=self._frozen(uploads.received[receiver]),
            draw=(uploads.seed, uploads.round),
        )

    def _receiver_key(self, uploads: RoundUploads, names: Sequence[str], receiver: int) -> Hashable:
        """What, beside members and weights, decides a merge: receivers with equal parts share one.

        A mean is the same whoever receives it. A robust rule measures updates from what the receiver had; self-centred
        clipping starts from the receiver itself. The anchor does not count: it decides roundings, and which rows of A
        stay where nothing has been learnt (any will do)."""
        rule = self.parameters.robust.rule
        if rule == "mean":
            return None
        if rule == "self_centred_clipping":
            return receiver
        received = uploads.received[receiver]
        return stack_digest({name: received[name] for name in names} | self._frozen(received))

    def _frozen(self, state: ClientState) -> dict[str, np.ndarray]:
        """The factors that are the same for all (a personal B, under ``factors=a``, is not: the coordinator never sees one)."""
        if self.parameters.factors != "b":
            return {}
        return {name: value for name, value in state.items() if name.endswith(".lora_A")}

    def assumed_byzantine(self, num_members: int) -> int:
        """How many of ``num_members`` uploads a robust rule reckons to be bad."""
        return assumed_byzantine(self.parameters.robust.assumed_fraction or 0.0, num_members)

    def graph(self, uploads: RoundUploads, sharing: str, clients: Sequence[int], weights: np.ndarray) -> NeighbourGraph:
        """Who is averaged with whom. In round 1 the adapters' products are close to zero and distances mean nothing."""
        if sharing == "global" or uploads.round <= 1:
            return global_graph(weights)
        known = [{**uploads.received[client], **uploads.by_client[client]} for client in clients]
        return neighbour_graph(product_gram(known), weights, self.parameters.num_neighbours)

    def phase2_graph(self, adapters: Sequence[ClientState], num_samples: Sequence[int]) -> NeighbourGraph:
        """Whose game values and guard outcomes speak for whom in phase 2; a client that shares nothing stays alone."""
        samples = np.asarray(num_samples)
        if self.parameters.adapters == "local" or self.parameters.factors == "a":
            return neighbour_graph(np.eye(len(samples)), samples, k=1)
        return neighbour_graph(product_gram(adapters), samples, self.parameters.num_neighbours)
