"""The last local epochs, after which every client chooses how much of others' models to mix into its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from sylva_ray.core.records import MIXED_IN
from sylva_ray.core.types import ClientState, stack_states
from sylva_ray.federation.client.training import TrainOutcome
from sylva_ray.federation.method import Method
from sylva_ray.federation.parameters import MethodParameters, MixtureParameters, Sharing
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.local_epochs import Collected, LocalEpochs, with_neighbours
from sylva_ray.federation.stages.mixture.choice import Gains, shrunk_gains
from sylva_ray.federation.stages.mixture.tasks import MixtureTask, mixed
from sylva_ray.federation.stages.stage import Stage, StageResult


class Mixture(LocalEpochs):
    """1 train locally, 2 collect others' models, 3 try mixtures of adapters, 4 choose, 5 the same for heads.

    A mixture of two models of adapters is theta + a (theta' - theta) of the products B A. Candidates are attacked on
    the selection split of the client. It reports one number for each and no image.

    What the clients had received before they trained costs nothing. Other partners are merged from one more upload:
    the neighbours' models where everybody's had been received, for instance.

    Args:
        epochs: of local training, at least 1.
        mixture: the settings.
    """

    name = "mixture"
    title = "phase 1: local epoch, mixture"

    def __init__(self, epochs: int, mixture: MixtureParameters) -> None:
        super().__init__(epochs)
        self.mixture = mixture

    def run(self, server: Server, step: int) -> StageResult:
        """See `Stage.run`."""
        received = server.states.copy()
        result, outcomes = self.train(server, step)
        heard = self.uploads_of_all(server, step, outcomes, received)
        if heard is not None:
            result = with_neighbours(result, server, received, heard)
        metrics = dict(result.metrics)
        groups = shared_groups(server.algorithm, server.states[0])
        for group, models in self._models_of_others(server, step, received, outcomes, groups, heard).items():
            metrics |= self._choose(server, step, group, groups[group], models)
        return replace(result, metrics=metrics)

    def _models_of_others(
        self,
        server: Server,
        step: int,
        received: Sequence[ClientState],
        outcomes: Mapping[int, TrainOutcome],
        groups: Mapping[str, Sequence[str]],
        heard: Collected | None,
    ) -> dict[str, dict[Sharing, Sequence[ClientState]]]:
        """Return the models of all partners for every group of parameters, ``{group: {partner: [K]}}``.

        The trained states are uploaded (unless ``heard`` has them already) and merged if the clients had not received
        such models, but nobody adopts them.
        """
        algorithm = server.algorithm
        usual = {group: algorithm.sharing(names[0]) for group, names in groups.items()}
        models: dict[str, dict[Sharing, Sequence[ClientState]]] = {
            group: dict.fromkeys(self.mixture.partners or (usual[group],), received) for group in groups
        }
        unknown = [(group, partner) for group in groups for partner in models[group] if partner != usual[group]]
        if unknown:
            with server.exchanging():
                uploads, sent = heard or server.collect(step, outcomes, received)
                present = sorted(uploads.by_client)
                weights = algorithm.client_weights(uploads, present) if present else np.empty(0)
                for group, partner in unknown:
                    names = groups[group]
                    merged = algorithm.merge_for_all(uploads, names, partner, weights) if present else {}
                    models[group][partner] = [
                        server.wire.download(
                            step, client, received[client], {**state, **merged.get(client, {})}, names, client in sent
                        )
                        for client, state in enumerate(server.states)
                    ]
        return models

    def _choose(
        self,
        server: Server,
        step: int,
        group: str,
        names: Sequence[str],
        models: Mapping[Sharing, Sequence[ClientState]],
    ) -> dict[str, dict[str, float]]:
        """Mix the parameters of a group for every client.

        Returns:
            The shares of all partners in the mixtures, ``{metric: {client: share}}``.
        """
        tasks = [
            MixtureTask(
                step,
                cohort,
                server.stack(cohort),
                tuple(stack_states([of_partner[client] for client in cohort]) for of_partner in models.values()),
                tuple(names),
                self.mixture,
            )
            for cohort in server.cohorts(server.everyone)
        ]
        reported: dict[int, Gains] = server.run(tasks)
        gains = shrunk_gains([reported[client] for client in server.everyone], self.mixture.shrink_strength)
        metrics = {f"{group}{MIXED_IN}{partner}": dict.fromkeys(map(str, server.everyone), 0.0) for partner in models}
        candidates = list(product(models, self.mixture.own_shares))
        for client, best in enumerate(gains.argmax(1)):
            if gains[client, best] > 0:
                partner, share = candidates[best]
                server.states[client] = dict(mixed(server.states[client], models[partner][client], names, share))
                metrics[f"{group}{MIXED_IN}{partner}"][str(client)] = 1 - share
        server.costs.upload_bytes += sum(own.means.nbytes for own in reported.values())
        server.costs.download_bytes += np.dtype(np.int64).itemsize * len(reported)  # the number of the candidate
        return metrics


def shared_groups(algorithm: Method, state: ClientState) -> dict[str, list[str]]:
    """Return the names of the parameters of ``state`` that travel, by group: adapters (or the body), and heads."""
    travelling = [name for name in state if algorithm.is_uploaded(name)]
    groups = {
        "adapters": [name for name in travelling if name not in algorithm.head_names],
        "heads": [name for name in travelling if name in algorithm.head_names],
    }
    return {group: names for group, names in groups.items() if names}


def final_epochs(parameters: MethodParameters) -> list[Stage]:
    """Return the local epochs at the end of phase 1, with a mixture if it is enabled; no stage without epochs."""
    epochs = parameters.final_local_epochs
    if not epochs:
        return []
    return [Mixture(epochs, parameters.mixture) if parameters.mixture.enabled else LocalEpochs(epochs)]
