"""The contract of a federated method: its two halves (`sylva_ray.federation.method`), and the stages of its run."""

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
    """One federated method. The base method trains benignly; subclasses override what differs."""

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
