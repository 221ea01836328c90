"""The contract of a federated method: its two halves and the stages of its run.

The halves are in `sylva_ray.federation.method`, which stages import; stages are in `sylva_ray.federation.stages`.
"""

from __future__ import annotations

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.federation.method import Method
from sylva_ray.federation.stages.federated_round import federated_rounds
from sylva_ray.federation.stages.layer_game.rankings.registry import create_ranking
from sylva_ray.federation.stages.layer_game.refine import Refine
from sylva_ray.federation.stages.layer_game.stage import LayerGame
from sylva_ray.federation.stages.local_epochs import local_epochs
from sylva_ray.federation.stages.stage import Stage
from sylva_ray.federation.stages.warm_up import WarmUp


class Algorithm(Method):
    """A federated method. The base method trains benignly and averages; subclasses override what differs.

    What a run is made of is a list of stages:

    >>> from sylva_ray.config.experiment import ExperimentConfig
    >>> class NoWarmUp(Algorithm):
    ...     def stages(self, config):
    ...         return federated_rounds(config)
    >>> method = NoWarmUp(NoWarmUp.Parameters())
    >>> [stage.title for stage in method.stages(ExperimentConfig(training={"rounds": 2}))]
    ['phase 1: adversarial', 'phase 1: adversarial']

    The hooks of the client half and of the server half, with an example, are those of
    `sylva_ray.federation.method.Method`.
    """

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """What a run is made of, in order. A method with another course overrides this.

        Args:
            config: the experiment.
        """
        phase2 = self.parameters.phase2
        return [
            WarmUp(),
            *federated_rounds(config),
            *local_epochs(self.parameters.final_local_epochs),
            *([LayerGame(create_ranking(phase2.selection)), Refine()] if phase2.enabled else []),
        ]
