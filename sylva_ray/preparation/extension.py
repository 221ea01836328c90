"""More rounds for a run: the one setting of its results that a resumed run may change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.comparison import difference
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.records import Extension
from sylva_ray.federation.contract import Algorithm, stages_of_run
from sylva_ray.federation.stages.federated_round import FederatedRound
from sylva_ray.federation.stages.stage import Stage
from sylva_ray.preparation.experiment import as_stored
from sylva_ray.preparation.resolve import resolve_config
from sylva_ray.storage.run_folder import RunFolder

KEY = "training.rounds"


@dataclass(frozen=True)
class PlannedExtension:
    """More rounds for a run, of which nothing has been written yet.

    Attributes:
        config: of the run, with as many rounds as it gets.
        extension: what changes.
    """

    config: ExperimentConfig
    extension: Extension

    def apply(self, folder: RunFolder) -> str:
        """Write it to a folder that the caller has locked, when all else is checked; return what was done, in words."""
        folder.extend(self.config, self.extension)
        change = f"with {self.extension.rounds} rounds instead of {self.extension.before}"
        return f"the run continues after its step {self.extension.step - 1}, {change}"


def plan_extension(folder: RunFolder, config: ExperimentConfig) -> PlannedExtension | None:
    """Plan more rounds for a run, if these are the only difference between its configuration and ``config``.

    It would continue after its last checkpoint that a run of so many rounds would have, too, and what followed is
    deleted. Its states become those of a run that had as many rounds from the start.

    Args:
        folder: of the run.
        config: what it is to be continued with.

    Returns:
        The plan; None: the two agree, or differ in something else.

    Raises:
        UserError: the run has more rounds; or no checkpoint is left that can be continued, because schedules depend on
            the number of rounds, or what came before them was deleted.
    """
    stored = folder.load_config()
    asked = as_stored(config, stored)
    before, rounds = stored.training.rounds, asked.training.rounds
    longer = stored.model_copy(update={"training": stored.training.model_copy(update={"rounds": rounds})})
    if before == rounds or difference(longer, asked):
        return None
    if rounds < before:
        raise UserError(KEY, rounds, f"the run in {folder} has {before} rounds: it can get more, not fewer")
    algorithm = create_algorithm(stored.algorithm)
    stages = stages_of_run(algorithm, resolve_config(stored))
    shared = _num_shared(algorithm, resolve_config(stored), resolve_config(longer))
    usable = [step for step in folder.checkpoints.steps() if step < shared]
    if not usable:
        raise UserError(KEY, rounds, _why_not(folder, stored, shared > _num_before_rounds(stages)))
    return PlannedExtension(longer, Extension(before=before, rounds=rounds, step=usable[-1] + 1))


def _num_before_rounds(stages: Sequence[Stage]) -> int:
    return sum(1 for _ in takewhile(lambda stage: not isinstance(stage, FederatedRound), stages))


def _why_not(folder: RunFolder, config: ExperimentConfig, has_equal_rounds: bool) -> str:
    """Return why a run cannot get more rounds, and how one begins that can."""
    if has_equal_rounds:
        schedule, kept = config.training.lr_schedule, config.cluster.keep_checkpoints
        causes = f"training.lr_schedule={schedule}, cluster.keep_checkpoints={kept}"
        return f"the checkpoint of {folder} from which more rounds would go on was deleted ({causes}); start a new run"
    return (
        f"{folder} cannot get more rounds: already its first one would be another, as the learning rate "
        f"(training.lr_schedule={config.training.lr_schedule}) or the budget (algorithm.epsilon_warmup) depends on "
        "their number; start a new run, with training.lr_schedule=constant and algorithm.epsilon_warmup=0"
    )


def _num_shared(algorithm: Algorithm, one: ResolvedConfig, other: ResolvedConfig) -> int:
    """Return how many stages two experiments begin with that compute the same."""
    plans = [_described(algorithm, config, stages_of_run(algorithm, config)) for config in (one, other)]
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*plans, strict=False)))


def _described(algorithm: Algorithm, config: ResolvedConfig, stages: Sequence[Stage]) -> list[tuple[object, ...]]:
    """Return of each stage what tells it from others: its name and, of a round, its epsilon and learning rate."""
    return [
        (stage.name, *(stage.amounts(config, algorithm.parameters) if isinstance(stage, FederatedRound) else ()))
        for stage in stages
    ]
