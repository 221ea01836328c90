"""The contract of a federated method: its two halves and the stages of its run.

The halves are in `sylva_ray.federation.method`, which stages import; stages are in `sylva_ray.federation.stages`.
"""

from __future__ import annotations

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.errors import UserError
from sylva_ray.federation.method import Method
from sylva_ray.federation.stages.federated_round import federated_rounds
from sylva_ray.federation.stages.layer_game.phase import game_and_refinement
from sylva_ray.federation.stages.layer_game.stage import LayerGame
from sylva_ray.federation.stages.mixture.stage import final_epochs
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
        """Return what a run is made of, in order: a warm-up, federated rounds, and local epochs.

        A method with another course overrides this.

        Args:
            config: the experiment.
        """
        return [WarmUp(), *federated_rounds(config), *final_epochs(self.parameters)]


def stages_of_run(algorithm: Algorithm, config: ResolvedConfig) -> list[Stage]:
    """Return the stages of a method, with Sylva's phase 2 where only the settings ask for one.

    Args:
        algorithm: the method.
        config: the experiment.

    Raises:
        UserError: a stage needs neighbourhoods and no round comes before it.
    """
    stages, phase2 = algorithm.stages(config), algorithm.parameters.phase2
    if not any(isinstance(stage, LayerGame) for stage in stages):
        later = next((index for index, stage in enumerate(stages) if stage.phase > LayerGame.phase), len(stages))
        stages = [*stages[:later], *game_and_refinement(phase2), *stages[later:]]
    for index, stage in enumerate(stages):
        if stage.needs_neighbours and not any(earlier.exchanges for earlier in stages[:index]):
            fix = f"its stage {stage.name} needs the neighbourhoods of a federated round, and none comes before it"
            raise UserError("algorithm.name", config.algorithm.name, fix)
    return stages
