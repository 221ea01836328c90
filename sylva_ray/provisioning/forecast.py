"""Foretell what a run needs before anything is started: memory, time and checkpoints, from its configuration alone.

::

    config ──► model with random weights ──► bytes and FLOPs of an image ──► windows on a card, seconds, price
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.errors import UserError
from sylva_ray.federation.contract import stages_of_run
from sylva_ray.federation.stages.federated_round import FederatedRound
from sylva_ray.models.device_memory import GPU_PROCESS_BYTES
from sylva_ray.preparation.memory import MemoryPlan, plan_memory
from sylva_ray.preparation.memory_budget import GPU_FRACTION
from sylva_ray.preparation.memory_costs import MemoryCosts, measure_costs
from sylva_ray.preparation.sketch import Sketch, sketch_experiment
from sylva_ray.preparation.traffic import TrafficEstimate, traffic_of
from sylva_ray.preparation.work import Passes, StageWork, run_work
from sylva_ray.provisioning.cards import CARDS, Card

EFFICIENCY = {"bfloat16": 0.2, "float32": 0.5}
"""The part of a card's dense rate that training reaches: of ViT-B on an H200, in bfloat16 without what a task needs
besides its steps (benchmarks/results/gpu_profile_h200.txt), in float32 by `benchmarks/gpu_proof.py`."""

LAUNCHES_PER_BLOCK, LAUNCH_S = 21, 1e-4
"""Kernels of a block in one pass (5,604 of a PGD-10 step of ViT-B), and the seconds that the host needs for each, on
average: with 100 us, ViT-B, ViT-S and vit_micro on the virtual machine of that H200 are foretold within 35 %.
"""

CPU_SHARE = 0.33
"""The part of the rate of products of 256 rows and columns that a run reaches on CPUs. The recipe digits did 7.0 TFLOP
in 233 seconds of computation, that is 30 GFLOP/s a thread, on cores where these products reach 92 GFLOP/s."""

CUDA_HOST_BYTES = 3_000_000_000
"""Assumed RAM of an actor on a GPU: torch with CUDA's libraries and context, timm, Ray."""


@dataclass(frozen=True)
class Gpus:
    """GPUs of one kind.

    Attributes:
        card: their kind.
        count: how many.
        actors: processes on each, which launch kernels side by side.
    """

    card: Card
    count: float = 1
    actors: int = 1


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before it starts.

    Attributes:
        asked: the experiment.
        config: the same, resolved without measurements.
        sketch: its model and states.
        traffic: bytes of what is sent.
        costs: measured bytes of an image in every kind of pass.
        flops: of one image's forward pass.
        blocks: blocks of the model, for the number of kernels.
        work: passes of every kind of stage.
    """

    asked: ExperimentConfig
    config: ResolvedConfig
    sketch: Sketch
    traffic: TrafficEstimate
    costs: MemoryCosts
    flops: int
    blocks: int
    work: Sequence[StageWork]

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: the states of all clients, and the residuals of compressed uploads."""
        compression = self.config.compression
        copies = 2 if compression.kind != "none" and compression.error_feedback else 1
        return copies * self.config.partition.num_clients * self.traffic.state_bytes

    @property
    def host_bytes(self) -> int:
        """RAM of an actor on a GPU: its process, and the states of its cohort as a task and as a result."""
        return CUDA_HOST_BYTES + 2 * self.config.training.cohort_size * self.traffic.state_bytes

    def plan(self, budget: int) -> MemoryPlan:
        """Return the windows of an actor with ``budget`` bytes of a GPU.

        Raises:
            UserError: not even one image fits.
        """
        base = GPU_PROCESS_BYTES + self.costs.model
        return plan_memory(self.config, self.sketch.algorithm, self.costs, budget, base)

    def fits(self, card: Card, share: float = 1.0) -> bool:
        """Return whether an actor with a share of a card can work at all."""
        try:
            self.plan(share_bytes(card, share))
        except UserError:
            return False
        return True

    def actors_on(self, card: Card, most: int = 8) -> int:
        """Return how many actors of a card have work at once, and windows for a whole step of training.

        A card that holds no such actor gets the fewest that it holds at all; 0: not even one.
        """
        most = min(most, max(stage.cohorts for stage in self.work))
        step = self.config.training.cohort_size * self.config.training.batch_size
        fitting = [k for k in range(1, most + 1) if self.fits(card, 1 / k)]
        whole = [k for k in fitting if self.plan(share_bytes(card, 1 / k)).windows.train >= step]
        return max(whole, default=min(fitting, default=0))

    def stage_seconds(self, passes: Passes, gpus: Gpus) -> float:
        """Return the seconds of a stage on one of the GPUs: of its products or of its launches, whatever is more."""
        training, evaluation = self.config.training.precision, self.config.evaluation.precision
        by_precision = ((passes.training, training), (passes.evaluation, evaluation), (passes.float32, "float32"))
        products = sum(
            count * self.flops / (EFFICIENCY[precision] * gpus.card.rates[precision])
            for count, precision in by_precision
        )
        launches = passes.batches * self.blocks * LAUNCHES_PER_BLOCK * LAUNCH_S / gpus.actors
        return max(products, launches, 1e-9)

    def cpu_seconds(self, rates: Mapping[str, float], actors: int, only_round: bool = False) -> float:
        """Estimate the seconds of all stages and evaluations on CPUs; a stage uses one actor per cohort at most.

        Args:
            rates: measured FLOP/s of products by an actor, by precision.
            actors: how many work side by side.
            only_round: whether to count one round of phase 1 only; 0 for a method without rounds.
        """
        training, evaluation = self.config.training.precision, self.config.evaluation.precision
        total = 0.0
        for stage in self.work:
            if only_round and stage.title != FederatedRound.title:
                continue
            passes = stage.each
            by_precision = ((passes.training, training), (passes.evaluation, evaluation), (passes.float32, "float32"))
            one = sum(count * self.flops / (CPU_SHARE * rates[precision]) for count, precision in by_precision)
            total += (1 if only_round else stage.count) * one / min(actors, stage.cohorts)
        return total

    def round_seconds(self, gpus: Sequence[Gpus]) -> float:
        """Return the seconds of a round of phase 1, without aggregation; 0 for a method without rounds."""
        rounds = [replace(work, count=1) for work in self.work if work.title == FederatedRound.title]
        return self.run_seconds(gpus, rounds)

    def run_seconds(self, gpus: Sequence[Gpus], work: Sequence[StageWork] | None = None) -> float:
        """Return the seconds of all stages and evaluations, or of some, on GPUs that share the tasks.

        A stage with fewer cohorts than GPUs leaves some of them idle, and one with fewer than actors some of these.
        """
        total, num_gpus = 0.0, sum(group.count for group in gpus)
        for stage in self.work if work is None else work:
            busy = math.ceil(stage.cohorts / num_gpus)
            active = [replace(group, actors=min(group.actors, busy)) for group in gpus]
            rate = sum(group.count / self.stage_seconds(stage.each, group) for group in active)
            total += stage.count / (rate * min(1.0, stage.cohorts / num_gpus))
        return total


def forecast(config: ExperimentConfig) -> Forecast:
    """Build the model with random weights, and measure one image and four of every kind of pass on the CPU.

    Raises:
        UserError: the configuration cannot run.
    """
    return forecast_of(sketch_experiment(config))


def forecast_of(sketch: Sketch) -> Forecast:
    """Return the forecast of an experiment whose model has been built."""
    from sylva_ray.models.flops import count_flops  # PyTorch
    from sylva_ray.models.lora import LoraStack

    config, model = sketch.config, sketch.model
    stages = stages_of_run(sketch.algorithm, config)
    for stage in stages:
        stage.check(model)
    flops = count_flops(model, sketch.states[0], sketch.size.image_size)
    players = len(model.players) if isinstance(model, LoraStack) else 1
    blocks = max(players - 1, len(list(getattr(model.backbone.model, "blocks", ()))), 1)
    costs = measure_costs(config, sketch.algorithm, model, sketch.states[0], sketch.size.image_size)
    work = run_work(config, sketch.algorithm, model, stages, sketch.size.num_train)
    return Forecast(sketch.asked, config, sketch, traffic_of(sketch), costs, flops, blocks, work)


def share_bytes(card: Card, share: float) -> int:
    """Return the bytes that an actor with a share of a card may use."""
    return int(GPU_FRACTION * min(1.0, share) * card.memory)


def cards_that_fit(found: Forecast, share: float) -> list[str]:
    """Return the cards of which such a share is enough for one image."""
    return [name for name, card in CARDS.items() if found.fits(card, share)]
