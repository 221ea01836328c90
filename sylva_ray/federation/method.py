"""The two halves of a federated method: what a client does with a batch, what the coordinator does with the uploads.

Everything else is shared by all methods. `sylva_ray.federation.client` iterates batches, masks, clips and steps;
`sylva_ray.federation.stages` runs the rounds; `sylva_ray.transport` carries uploads and counts bytes. A new method is
one file that contains only its differences: usually `Method.craft` and `Method.sample_losses`, sometimes
`Method.client_weights` or `Method.aggregate` (docs/methods.md describes one). `sylva_ray.federation.contract.Algorithm`
adds the stages of a run.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from sylva_ray.aggregation.factors import merge_factors, orthonormal_rows
from sylva_ray.aggregation.neighbours import (
    NeighbourGraph,
    global_graph,
    nearest_clients,
    neighbour_graph,
)
from sylva_ray.aggregation.receivers import Each, Mixture, long_modules, merge_for_receivers
from sylva_ray.aggregation.robust import assumed_byzantine, min_clients
from sylva_ray.aggregation.robust_merge import RobustRule, robust_merge
from sylva_ray.aggregation.threads import in_threads
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.lazy import torch
from sylva_ray.core.sections import Section
from sylva_ray.core.types import AttackSpec, ClientState, ParameterStack, stack_digest
from sylva_ray.federation.context import Batch, ClientContext, Merge, RoundUploads
from sylva_ray.federation.parameters import MethodParameters, Sharing
from sylva_ray.models.cohort import CohortModel, client_gradients
from sylva_ray.transport.postprocessor import Postprocessor
from sylva_ray.transport.registry import create_postprocessors


class Method:
    """A federated method without its stages.

    The base method trains benignly and averages; subclasses override what differs.
    Every public method below may be overridden. Those of the client half get C clients at once, stacked in one forward,
    so they must not loop over clients.

    A toy, whose state is one number per client, whose loss is ``(w - x)^2`` and whose server weighs clients by the
    square root of their images:

    >>> class Toy(Method):
    ...     def sample_losses(self, context, params, batch, x_adv):
    ...         return (context.to_images(params["w"], batch) - x_adv) ** 2
    ...
    ...     def client_weights(self, uploads, clients):
    ...         return np.sqrt(super().client_weights(uploads, clients))
    >>> toy = Toy(Toy.Parameters(adapters="global", heads="global"))

    The client half: client 0 has the images 1 and 3, client 1 has the image 2. A gradient is the mean over the client's
    own images.

    >>> from contextlib import nullcontext
    >>> from sylva_ray.core.seeding import ImageDraws
    >>> from sylva_ray.core.timing import Stopwatch
    >>> class NoModel:
    ...     training = staticmethod(nullcontext)
    >>> x, owner = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 1])
    >>> batch = Batch(x, y=x, owner=owner, num_clients=2, active=torch.tensor([True, True]), draws=ImageDraws(owner))
    >>> context = ClientContext(NoModel(), class_counts=x, received={}, stopwatch=Stopwatch())
    >>> gradients, losses = toy.gradients(context, {"w": torch.zeros(2)}, batch, batch.x, ["w"])
    >>> gradients["w"].tolist(), losses.tolist()
    ([-4.0, -4.0], [5.0, 4.0])

    The server half: three clients with 1, 4 and 9 images have the weights 1/6, 2/6 and 3/6.

    >>> states = [{"w": np.float32([value])} for value in (0, 3, 6)]
    >>> merged = toy.aggregate(RoundUploads(1, states, states, dict(enumerate(states)), num_samples=[1, 4, 9]))
    >>> [float(state["w"][0]) for state in merged]
    [4.0, 4.0, 4.0]
    """

    class Parameters(MethodParameters):
        """The parameters that every method has."""

    name: ClassVar[str] = "algorithm"
    papers: ClassVar[tuple[str, ...]] = ()
    """The papers that the method implements, as they are to be cited: authors, year, title, place.

    A subclass does not inherit them, because what it changes is not in them.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.papers = vars(cls).get("papers", ())

    def __init__(self, parameters: Section) -> None:
        assert isinstance(parameters, MethodParameters)
        self.parameters = parameters
        self.head_names: tuple[str, ...] = ()

    # -- set-up, once per process -------------------------------------------------------------------------------------

    def auxiliary_weights(self, num_classes: int) -> dict[str, np.ndarray]:
        """Return weights that workers need beside the backbone's, e.g. a teacher's. The base method needs none.

        Raises:
            UserError: they do not fit the data.
        """
        del num_classes
        return {}

    def bind_model(
        self, model: CohortModel, num_classes: int, auxiliary: Mapping[str, np.ndarray], device: torch.device
    ) -> None:
        """Prepare the method for the model that clients train.

        A subclass with weights of its own builds what they belong to here, from ``auxiliary``.
        """
        del num_classes, auxiliary, device
        self.head_names = model.head_names

    def initial_state(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        """Return the state that ``client`` starts from, given the common initial ``state`` of the model."""
        del client
        if self.parameters.a_init == "kaiming":
            return dict(state)
        return {name: orthonormal_rows(value) if name.endswith(".lora_A") else value for name, value in state.items()}

    # -- client half ------------------------------------------------------------------------------------------

    def is_trained(self, name: str) -> bool:
        """Return whether local training changes this parameter, which is one that the model can train."""
        return not (self.parameters.factors == "b" and name.endswith(".lora_A"))

    def schedule(self, epochs: int, names: Sequence[str]) -> list[tuple[int, list[str]]]:
        """Return a round's local training: ``(epochs, trained names)`` in order, each with a fresh optimiser."""
        return [(epochs, list(names))]

    def warm_up_names(self) -> tuple[str, ...]:
        """Return the parameters that the benign warm-up trains: the heads."""
        return self.head_names

    def warm_up_losses(self, context: ClientContext, params: ParameterStack, batch: Batch) -> torch.Tensor:
        """Return the warm-up's loss of every image, ``[N]``: benign cross-entropy."""
        return benign_losses(context, params, batch)

    def refinement_losses(self, context: ClientContext, params: ParameterStack, batch: Batch) -> torch.Tensor:
        """Return the loss of phase 2's benign epochs of every image, ``[N]``: benign cross-entropy."""
        return benign_losses(context, params, batch)

    def image_weights(self, class_counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return how much each held-out image of a client counts when phase 2 decides, with mean 1; here all alike.

        Args:
            class_counts: the client's training images per class, ``[num_classes]``.
            labels: of the held-out images, ``[n]``.

        Returns:
            ``[n]`` float64.
        """
        del class_counts
        return np.ones(len(labels))

    def client_init(self, context: ClientContext) -> None:
        """Prepare a task, before its first batch. The base method does nothing."""

    def craft(self, context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        """Return the images that the loss is computed on; by default those of the batch.

        Args:
            context: of the cohort.
            params: parameters of the C clients, each ``[C, ...]``.
            batch: N images of the C clients.
            attack: the training attack; epsilon is that of the stage, in pixel units.

        Returns:
            ``[N, 3, H, W]`` in [0, 1], without a graph.
        """
        del context, params, attack
        return batch.x

    @property
    def is_adversarial(self) -> bool:
        """Whether clients train on images that `craft` makes; the base method's are those of the batch."""
        return type(self).craft is not Method.craft

    def sample_losses(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of every image, ``[N]``; ``x_adv`` is the result of `craft`."""
        return cross_entropy(context.model.forward(params, x_adv, batch.owner), batch.y)

    def gradients(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor, names: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the gradients of the parameters in ``names``, each ``[C, ...]``, and the mean losses ``[C]``.

        The sum over clients of their own mean losses is differentiated, so the gradient of each client is that of
        training alone.

        Args:
            context: of the cohort.
            params: parameters of the C clients, each ``[C, ...]``.
            batch: N images of the C clients.
            x_adv: the result of `craft`, ``[N, 3, H, W]`` in [0, 1].
            names: the parameters that are trained.
        """

        def losses(p: ParameterStack) -> torch.Tensor:
            with context.model.training():
                return batch.mean_by_client(self.sample_losses(context, p, batch, x_adv))

        return client_gradients(params, names, losses)

    def client_step(
        self, context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec, names: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Compute one optimiser step: `craft`, then `gradients`.

        Args:
            context: of the cohort.
            params: parameters of the C clients, each ``[C, ...]``.
            batch: N images of the C clients.
            attack: the training attack; epsilon is that of the stage, in pixel units.
            names: the parameters that are trained.

        Returns:
            The gradients of the parameters in ``names``, each ``[C, ...]``, and the mean losses ``[C]``.
        """
        x_adv = self.craft(context, params, batch, attack)
        return self.gradients(context, params, batch, x_adv, names)

    # -- what travels ------------------------------------------------------------------------------------------

    def sharing(self, name: str) -> Sharing:
        """Return with whom a parameter is shared."""
        return self.parameters.heads if name in self.head_names else self.parameters.adapters

    def is_uploaded(self, name: str) -> bool:
        """Return whether a parameter leaves the client. Declared bytes are counted from this."""
        local_factors = {"both": (), "b": (".lora_A",), "a": (".lora_B",)}[self.parameters.factors]
        return self.sharing(name) != "local" and not name.endswith(local_factors)

    def pack(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        """Return the arrays of ``state`` that ``client`` uploads."""
        del client
        return {name: value for name, value in state.items() if self.is_uploaded(name)}

    def unpack(self, client: int, upload: ClientState) -> dict[str, np.ndarray]:
        """Return an upload in the shapes of a state: the inverse of `pack`, where that changes shapes."""
        del client
        return dict(upload)

    def is_refactored(self, name: str) -> bool:
        """Return whether merging rewrites this factor in other coordinates, where an older residual has no meaning."""
        p = self.parameters
        is_factor = name.endswith((".lora_A", ".lora_B"))
        return is_factor and p.model == "lora" and p.factors == "both" and p.factor_rule == "product_svd"

    def postprocessors(self, config: ExperimentConfig) -> list[Postprocessor]:
        """Return what is applied to uploads and downloads, the one nearest to the model first.

        By default what the configuration asks for: Byzantine clients and compression. A method with noise or masks of
        its own appends them here.
        """
        return create_postprocessors(config, self)

    # -- server half ------------------------------------------------------------------------------------------

    def client_weights(self, uploads: RoundUploads, clients: Sequence[int]) -> np.ndarray:
        """Return the weights of ``clients`` in the mean, up to a common factor.

        By default the numbers of images (FedAvg, McMahan et al. 2017), or ones.
        """
        if self.parameters.weighting == "uniform":
            return np.ones(len(clients))
        return np.asarray([uploads.num_samples[client] for client in clients], np.float64)

    def aggregate(self, uploads: RoundUploads) -> list[dict[str, np.ndarray]]:
        """Return the new states of all K clients.

        A client that uploaded nothing keeps its own state; under ``global`` sharing it gets the merged one, which it
        would receive when it next connects. Where a robust rule has too few uploads, clients keep what they received;
        so they do with ``global`` sharing where no upload is valid, since one model for all stays one.
        """
        present = sorted(uploads.by_client)
        result = [dict(state) for state in uploads.states]
        if not present:
            for client, state in enumerate(result):
                shared = [name for name in self.pack(client, state) if self.sharing(name) == "global"]
                state |= {name: uploads.received[client][name] for name in shared}
            return result
        weights = self.client_weights(uploads, present)
        for sharing in sorted({self.sharing(name) for name in uploads.by_client[present[0]]}):
            names = [name for name in uploads.by_client[present[0]] if self.sharing(name) == sharing]
            for client, common in self.merge_for_all(uploads, names, sharing, weights).items():
                result[client] |= common
        return result

    def merge_for_all(
        self, uploads: RoundUploads, names: Sequence[str], sharing: Sharing, weights: np.ndarray
    ) -> dict[int, dict[str, np.ndarray]]:
        """Merge parameters for every client that receives the result.

        Args:
            uploads: of the round; at least one.
            names: the parameters, which every client has uploaded.
            sharing: ``global``: one merge for all K clients, so that all have the same bits; ``neighbours``: one for
                each client that has uploaded.
            weights: the result of `client_weights` for the clients that have uploaded, in ascending order.

        Returns:
            ``{client: {name: array}}``.
        """
        present = sorted(uploads.by_client)
        graph = self.graph(uploads, sharing, present, weights)
        if sharing == "global":
            common = self.merge(uploads, names, present, graph.weights[0], present[0])
            return dict.fromkeys(range(len(uploads.states)), common)
        groups = graph.group_receivers([self._receiver_key(uploads, names, client) for client in present])

        merges = [
            Merge([present[member] for member in graph.members[row]], graph.weights[row], present[row])
            for row in (rows[0] for rows in groups)
        ]
        merged = self.merge_each(uploads, names, merges)
        return {present[row]: common for rows, common in zip(groups, merged, strict=True) for row in rows}

    def merge_each(
        self, uploads: RoundUploads, names: Sequence[str], merges: Sequence[Merge]
    ) -> list[dict[str, np.ndarray]]:
        """Return the results of `merge` for each of ``merges``, which run where the uploads say."""
        if uploads.run_merges is not None:
            return uploads.run_merges(uploads, names, merges)
        return self.merge_here(uploads, names, merges)

    def merge_here(
        self, uploads: RoundUploads, names: Sequence[str], merges: Sequence[Merge], each: Each = in_threads
    ) -> list[dict[str, np.ndarray]]:
        """Return the results of `merge` for each of ``merges``, computed in this process.

        Plain means of many clients are computed together, up to an error that
        `sylva_ray.aggregation.receivers.merge_for_receivers` states.

        Args:
            uploads: of the round, on a worker as for `merge`.
            names: the parameters to merge.
            merges: any of those of the round: what one receiver gets does not depend on the others.
            each: runs the pieces of work.
        """
        is_plain = type(self).merge is Method.merge and self.parameters.robust.rule == "mean"
        if is_plain and self.parameters.factor_rule == "product_svd":
            clients = sorted(uploads.by_client)
            first = {name: uploads.by_client[clients[0]][name] for name in names}
            if any(long_modules(first, size) for size in {len(merge.members) for merge in merges}):
                states = [{name: uploads.by_client[client][name] for name in names} for client in clients]
                place = {client: index for index, client in enumerate(clients)}
                mixtures = [
                    Mixture(np.array([place[j] for j in merge.members]), merge.weights, place[merge.receiver])
                    for merge in merges
                ]
                return merge_for_receivers(states, mixtures, each)
        return each(lambda one: self.merge(uploads, names, one.members, one.weights, one.receiver), merges)

    def merge(
        self, uploads: RoundUploads, names: Sequence[str], members: Sequence[int], weights: np.ndarray, receiver: int
    ) -> dict[str, np.ndarray]:
        """Merge the parameters in ``names`` for one client.

        This may run on a worker, which has the method as `bind_model` prepares it.

        Args:
            uploads: of the round; on a worker ``states`` is empty, and ``received`` holds the clients that uploaded.
            names: the parameters to merge.
            members: the clients whose uploads are merged; ``receiver`` is one of them.
            weights: one per member; they sum to 1.
            receiver: the client that gets the result.
        """
        states = [{name: uploads.by_client[client][name] for name in names} for client in members]
        own, robust, factor_rule = members.index(receiver), self.parameters.robust, self.parameters.factor_rule
        if robust.rule == "mean":
            return merge_factors(states[own], states, weights, factor_rule)
        origin = {name: uploads.received[receiver][name] for name in names}
        num_byzantine = self.assumed_byzantine(len(members))
        if robust.num_inputs(len(members)) < min_clients(robust.rule, num_byzantine)[0]:
            return origin
        rule = RobustRule(
            robust.rule, num_byzantine, robust.bucket_size, uploads.seed, uploads.round, uploads.lora_scale
        )
        frozen = self._frozen_factors(uploads.received[receiver])
        return robust_merge(rule, states, weights, own, origin, factor_rule, frozen)

    def assumed_byzantine(self, num_members: int) -> int:
        """Return how many of ``num_members`` uploads a robust rule assumes to be malicious."""
        return assumed_byzantine(self.parameters.robust.assumed_fraction or 0.0, num_members)

    def graph(
        self, uploads: RoundUploads, sharing: Sharing, clients: Sequence[int], weights: np.ndarray
    ) -> NeighbourGraph:
        """Return the neighbourhoods within which uploads are merged.

        In round 1 and before it all clients are neighbours: the products of their adapters are close to zero, and
        distances mean nothing.

        Args:
            uploads: of the round.
            sharing: ``neighbours`` or ``global``.
            clients: the k clients that have uploaded, in ascending order.
            weights: ``[k]``, the result of `client_weights` for them.

        Returns:
            The graph over these clients; its members are positions in ``clients``.
        """
        if sharing == "global" or uploads.round <= 1:
            return global_graph(weights)
        known = [{**uploads.received[client], **uploads.by_client[client]} for client in clients]
        return nearest_clients(known, weights, self.parameters.num_neighbours)

    def phase2_graph(self, adapters: Sequence[ClientState], num_samples: Sequence[int]) -> NeighbourGraph:
        """Return the neighbourhoods over which game values and paired outcomes are pooled in phase 2.

        A client that shares no adapters is its own neighbourhood.
        """
        samples = np.asarray(num_samples)
        if self.parameters.adapters == "local" or self.parameters.factors == "a":
            return neighbour_graph(np.eye(len(samples)), samples, k=1)
        return nearest_clients(adapters, samples, self.parameters.num_neighbours)

    def _receiver_key(self, uploads: RoundUploads, names: Sequence[str], receiver: int) -> Hashable:
        """Return what a merge depends on beside members and weights; receivers with equal keys share one merge.

        A mean does not depend on the receiver. A robust rule measures updates relative to what the receiver had, and
        self-centred clipping starts from the receiver's own upload. The anchor is not part of the key: it decides
        roundings, and which rows of A are kept where B is 0.
        """
        rule = self.parameters.robust.rule
        if rule == "mean":
            return None
        if rule == "self_centred_clipping":
            return receiver
        received = uploads.received[receiver]
        return stack_digest({name: received[name] for name in names} | self._frozen_factors(received))

    def _frozen_factors(self, state: ClientState) -> dict[str, np.ndarray]:
        """Return the factors that do not travel and are the same for all clients.

        Under ``factors=a`` there are none: B is personal, and the coordinator never receives one.
        """
        if self.parameters.factors != "b":
            return {}
        return {name: value for name, value in state.items() if name.endswith(".lora_A")}


def benign_losses(context: ClientContext, params: ParameterStack, batch: Batch) -> torch.Tensor:
    """Return the cross-entropy of every unperturbed image of the batch, ``[N]``."""
    return cross_entropy(context.model.forward(params, batch.x, batch.owner), batch.y)
