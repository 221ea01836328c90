"""Count the passes of images through the model in every stage of a run: what its time is estimated from.

A pass is one image forward or one backward; with frozen weights, both take about the same products. Counted are the
attack and the loss of adversarial training, evaluations, and both halves of phase 2. What a method adds (a teacher, a
second loss) is not, images that an attack has beaten are counted to its end, and clients have equal numbers of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.types import AttackSpec
from sylva_ray.federation.client.measuring import EVALUATION_ROWS
from sylva_ray.federation.contract import Algorithm
from sylva_ray.federation.evaluator import evaluation_scope
from sylva_ray.federation.parameters import MixtureParameters
from sylva_ray.federation.stages.federated_round import FederatedRound
from sylva_ray.federation.stages.layer_game.cost import crafting_steps, game_cost, phase1_cost
from sylva_ray.federation.stages.layer_game.rankings.ranking import GamePlan
from sylva_ray.federation.stages.layer_game.refine import Refine
from sylva_ray.federation.stages.layer_game.stage import LayerGame
from sylva_ray.federation.stages.local_epochs import LocalEpochs
from sylva_ray.federation.stages.mixture.stage import Mixture
from sylva_ray.federation.stages.stage import Stage
from sylva_ray.federation.stages.warm_up import WarmUp
from sylva_ray.metrics.checks import S4_IMAGES, UNBOUNDED
from sylva_ray.models.cohort import CohortModel


@dataclass(frozen=True)
class Passes:
    """Passes of images, and how many passes of whole batches they come in, one after the other.

    Attributes:
        training: images in ``training.precision``.
        evaluation: images in ``evaluation.precision``.
        float32: images in float32.
        batches: passes of a batch or a window.
    """

    training: float = 0.0
    evaluation: float = 0.0
    float32: float = 0.0
    batches: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        """Return the sum."""
        return Passes(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    @property
    def parts(self) -> tuple[float, float, float, float]:
        """All fields."""
        return self.training, self.evaluation, self.float32, self.batches


@dataclass(frozen=True)
class StageWork:
    """The work of stages of one kind.

    Attributes:
        title: of the stages.
        count: how many there are.
        each: passes of one of them.
        cohorts: how many tasks of it can run side by side.
    """

    title: str
    count: int
    each: Passes
    cohorts: int


@dataclass(frozen=True)
class _Sizes:
    """Numbers of images of the mean client."""

    train: int
    selection: int
    guard: int
    test: int


def run_work(
    config: ResolvedConfig, algorithm: Algorithm, model: CohortModel, stages: Sequence[Stage], num_train: int
) -> list[StageWork]:
    """Return the work of a run, by kind of stage, the evaluations last.

    Args:
        config: the experiment.
        algorithm: the method.
        model: that clients train.
        stages: of the run.
        num_train: training images of the data set.
    """
    per_client = max(1, num_train // config.partition.num_clients)
    valid = max(2, round(config.partition.valid_fraction * per_client))
    sizes = _Sizes(max(1, per_client - valid), valid // 2, valid - valid // 2, config.partition.test_samples)
    counter = _Counter(config, algorithm, model, sizes)
    by_title: dict[str, StageWork] = {}
    for index, stage in enumerate(stages):
        works = [(stage.title, counter.stage(stage))]
        scope = evaluation_scope(config.evaluation, stages, index)
        if scope is not None:
            works.append((f"evaluation {scope}", counter.evaluation(scope, index + 1 == len(stages))))
        for title, passes in works:
            clients = config.partition.num_clients
            if isinstance(stage, FederatedRound) and title == stage.title:
                clients = config.training.clients_per_round or clients
            cohorts = -(-clients // config.training.cohort_size)
            known = by_title.get(title, StageWork(title, 0, Passes(), cohorts))
            total = Passes(*(known.count * part for part in known.each.parts)) + passes
            count = known.count + 1
            by_title[title] = StageWork(title, count, Passes(*(part / count for part in total.parts)), cohorts)
    return sorted(by_title.values(), key=lambda work: work.title.startswith("evaluation"))


@dataclass(frozen=True)
class _Counter:
    """Counts passes of one experiment, whose clients all have the same sizes."""

    config: ResolvedConfig
    algorithm: Algorithm
    model: CohortModel
    sizes: _Sizes

    @property
    def everyone(self) -> int:
        return self.config.partition.num_clients

    def stage(self, stage: Stage) -> Passes:
        """Return the passes of a stage without its evaluation; none for a stage of the user's own."""
        training, train = self.config.training, self.sizes.train
        if isinstance(stage, WarmUp):  # the heads alone are trained, so nothing is passed backward
            return self.training(self.everyone, train, self.algorithm.parameters.head_warmup_epochs, 1)
        if isinstance(stage, FederatedRound):
            clients = training.clients_per_round or self.everyone
            return self.training(clients, train, training.local_epochs, self.adversarial)
        if isinstance(stage, LocalEpochs):
            passes = self.training(self.everyone, train, stage.epochs, self.adversarial)
            return passes + self.mixture(stage.mixture) if isinstance(stage, Mixture) else passes
        if isinstance(stage, LayerGame):
            return self.game(stage)
        if isinstance(stage, Refine):
            passes = self.training(self.everyone, train, stage.phase2.refine_epochs, 2)
            return passes + self.attacked(self.sizes.guard, 1 + len(stage.phase2.strengths), stage.phase2.attack_steps)
        return Passes()

    @property
    def adversarial(self) -> int:
        """Passes of an image in a step: forward and backward for every step of the attack, and for the loss."""
        is_full = self.algorithm.parameters.model == "full"
        return 2 * crafting_steps(self.config, self.algorithm) + (3 if is_full else 2)

    def training(self, clients: int, images: int, epochs: int, passes: int) -> Passes:
        """Return the passes of epochs over so many images of every client."""
        training = self.config.training
        cohorts, steps = -(-clients // training.cohort_size), -(-images // training.batch_size)
        return Passes(training=clients * images * epochs * passes, batches=cohorts * steps * epochs * passes)

    def attacked(self, images: int, models: int, steps: int) -> Passes:
        """Return the passes of so many images of every client under attacks against several models.

        Each is benign in float32 first.
        """
        total = self.everyone * images
        rows = min(EVALUATION_ROWS, self.config.training.windows.of("evaluate"))
        batches = -(-total // rows) * models * (1 + 2 * steps)
        return Passes(evaluation=total * models * 2 * steps, float32=total * models, batches=batches)

    def mixture(self, mixture: MixtureParameters) -> Passes:
        """Return the passes of the candidates, first of adapters and then of heads."""
        tried = 1 + len(mixture.own_shares) * len(mixture.partners or (1,))
        return self.attacked(min(self.sizes.selection, mixture.max_images), 2 * tried, mixture.attack_steps)

    def evaluation(self, scope: str, is_last: bool) -> Passes:
        """Return the passes of an evaluation, ``in full`` or ``in part``."""
        section, limit = self.config.evaluation, self.sizes.test
        specs: Sequence[AttackSpec] = section.specs
        if scope == "in part":
            specs, limit = specs[:1], min(limit, section.max_samples or limit)
        passes = Passes(float32=self.everyone * limit)
        for spec in specs:
            passes += self.attacked(limit, 1, spec.steps * spec.restarts)
        if scope == "in part" and section.clients is not None:
            passes = Passes(*(part * min(1, section.clients / self.everyone) for part in passes.parts))
        if is_last and section.checks:
            passes += self.attacked(min(limit, S4_IMAGES), 1, UNBOUNDED.steps)
        return passes

    def game(self, stage: LayerGame) -> Passes:
        """Return the passes of theta^b, of the game's attacked images, of its coalitions and of its candidates."""
        phase2, images = stage.phase2, min(self.sizes.selection, stage.phase2.max_images)
        passes = self.training(self.everyone, self.sizes.train, phase2.benign_epochs, 2)
        passes += self.attacked(images, 2, phase2.attack_steps)
        num_players = len(getattr(self.model, "players", ()))
        if stage.ranking.evaluates_coalitions and num_players > 1:
            blocks, is_chain = num_players - 1, getattr(self.model, "num_blocks", None) is not None
            sizes = [self.sizes.train] * self.everyone
            before = max(1, phase1_cost(self.config, self.algorithm, sizes, blocks))

            def relative_cost(coalitions: np.ndarray) -> float:
                return game_cost(coalitions, [images] * self.everyone, is_chain) / before

            limit = None if stage.ranking.needs_all_coalitions else relative_cost
            plan = GamePlan.from_settings(num_players, phase2, np.random.default_rng(0), limit)
            total = game_cost(plan.coalitions, [images] * self.everyone, is_chain) / blocks
            stack = min(phase2.max_stack, self.config.training.windows.of("walk"))
            passes += Passes(float32=total, batches=total / stack)
        return passes + self.attacked(self.sizes.selection, num_players + 1, phase2.attack_steps)
