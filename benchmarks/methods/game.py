"""Is the layer game worth its cost? What ranks the layers, how many coalitions are needed, and what the surrogate says.

    python benchmarks/methods/game.py [--seeds 0 1 2] [--part rankings] [--epsilon 2/255] [--alpha 0.1]  # -> game.json

1. Phase 2 with every ranking, from one and the same end of phase 1: the guard and the refinement are equal.
2. Shapley values of sampled permutations against the exact ones.
3. The surrogate of the game, which mixes layers of theta_r and theta_b, against what it stands for: theta_r with the
   layers of a coalition refined anew. Spearman's rank correlation of the values of random coalitions.

Everything is measured on training images that no client trains on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from game_table import game_tables
from ledger import HERE, Ledger
from scipy.stats import spearmanr

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.attacks.losses import true_class_probability
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build, merged
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ParameterStack
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.observer import Observer, StageStarted
from sylva_ray.federation.stages.layer_game.client import Phase2Client, SelectionImages
from sylva_ray.federation.stages.layer_game.coalitions import mix
from sylva_ray.federation.stages.layer_game.rankings.ranking import GamePlan
from sylva_ray.federation.stages.layer_game.rankings.registry import RANKINGS
from sylva_ray.federation.stages.layer_game.rankings.shapley import ShapleyRanking, shapley_values
from sylva_ray.federation.stages.layer_game.selection import nested_candidates
from sylva_ray.federation.stages.layer_game.shapley import (
    all_coalitions,
    antithetic_permutations,
    prefix_coalitions,
)
from sylva_ray.federation.stages.layer_game.stage import LayerGame
from sylva_ray.federation.stages.layer_game.tasks import GameTask
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.preparation.experiment import Prepared, create_worker, prepare
from sylva_ray.storage.checkpoint import Checkpoint, CheckpointFolder
from sylva_ray.storage.run_folder import RunFolder

RESULT = HERE / "game.json"
PARTS = ("rankings", "sampling", "surrogate")
NUM_COALITIONS = 16
PAIRS = (2, 8, 32)
"""Antithetic pairs of permutations; each pair visits 2 (n - 1) coalitions besides the empty one and the full one."""

EPSILON = "4/255"
"""The ledger's."""

ALPHA = 0.3
"""The concentration of the headline's Dirichlet partition."""

PHASE1 = "phase1"
"""The run from whose end all measurements go on."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where everything is measured.

    Attributes:
        seed: of the experiment.
        epsilon: of the attacks in training and in evaluation, as in a configuration.
        scale: of the ablation's files; None: as it is.
        alpha: concentration of the Dirichlet partition.
    """

    seed: int
    epsilon: str = EPSILON
    scale: str | None = None
    alpha: float = ALPHA

    def prepared(self, phase2: Settings, out: Path) -> Prepared:
        """Return the experiment of the ablation's Sylva with other settings of phase 2.

        What is measured on this machine, such as the attention kernel, is as in the phase 1 in ``out``, if any.
        """
        config = Ledger(HERE / "ablation").configuration("sylva", "", {}, self.scale, self.seed)
        attacks = [attack | {"epsilon": self.epsilon} for attack in config["evaluation"]["attacks"]]
        changes = {
            "attack": {"epsilon": self.epsilon},
            "evaluation": {"attacks": attacks},
            "partition": {"alpha": self.alpha},
        }
        experiment = build(ExperimentConfig, merged(config, changes, {"algorithm": {"phase2": phase2}}))
        return prepare(experiment, RunFolder(self.folder(out, PHASE1)))

    def folder(self, out: Path, name: str) -> Path:
        """Return the folder of a run."""
        return out / f"{name}-{self.seed}-eps{self.epsilon.partition('/')[0]}-alpha{self.alpha}"


def epsilon_argument(text: str) -> str:
    """Return an argument that is an epsilon as in a configuration; argparse reports any other in one line."""
    try:
        build(ExperimentConfig, {"attack": {"epsilon": text}})
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


class StopBeforePhase2(Observer):
    """Interrupts a run where the layer game would begin; its checkpoint is the end of phase 1."""

    def on_stage(self, started: StageStarted) -> None:
        """See `Observer.on_stage`."""
        if started.title == LayerGame.title:
            raise KeyboardInterrupt


def run(made: Prepared, folder: Path, observer: Observer) -> None:
    """Run an experiment, or go on where its folder ends."""
    pool = InProcessPool(create_worker(made.config, made.fleet, made.backbone))
    run_experiment(made, RunFolder(folder), pool, observer)


def end_of_phase1(setting: Setting, out: Path) -> Checkpoint:
    """Return the checkpoint from which all rankings go on; ``out`` has the folders of all runs."""
    folder = setting.folder(out, PHASE1)
    checkpoints = CheckpointFolder(folder / "checkpoint")
    if (done := folder / "phase1_done").exists() and (found := checkpoints.latest()) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run(setting.prepared({}, out), folder, StopBeforePhase2())
    except KeyboardInterrupt:
        done.touch()
    found = checkpoints.latest()
    assert found is not None, "phase 1 ends with a checkpoint"
    return found


def rank_and_refine(selection: str, setting: Setting, end: Checkpoint, out: Path) -> Settings:
    """Run phase 2 with a ranking; return what it cost and reached."""
    folder = setting.folder(out, selection)
    run_folder = RunFolder(folder)
    if not run_folder.summary_file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        CheckpointFolder(folder / "checkpoint").save(end.step, end.states, end.records, end.game, end.residuals)
        run(setting.prepared({"selection": selection}, out), folder, Observer())
    summary, records = run_folder.load_summary(), run_folder.load_records()
    assert summary is not None
    assert summary.phase1 is not None
    assert summary.layer_game is not None
    game, (stage,) = summary.layer_game, [record for record in records if record.stage == LayerGame.name]
    row: Settings = {
        "ranking": selection,
        "layers": float(np.sum(game.selected, axis=1).mean()),
        "strength": float(np.mean(game.strength)),
        "seconds": stage.seconds["wall"],
        "block_evaluations": game.block_evaluations,
    }
    for kind in ("accuracy", "balanced_accuracy"):
        for name, after in (("benign", summary.final), ("before_benign", summary.phase1)):
            row[f"{name}_{kind}"] = getattr(after, f"benign_{kind}").mean
        for name, after in (("robust", summary.final), ("before_robust", summary.phase1)):
            row[f"{name}_{kind}"] = next(iter(getattr(after, f"robust_{kind}").values())).mean
    return row


# -- sampled and exact values -----------------------------------------------------------------------------------------


def sampled_values(made: Prepared, end: Checkpoint, seed: int) -> list[Settings]:
    """Compare Shapley values from sampled permutations with the exact ones, client by client."""
    worker, phase2 = create_worker(made.config, made.fleet, made.backbone), phase2_of(made)
    clients = tuple(range(made.fleet.num_clients))
    states = {name: np.stack([state[name] for state in end.states]) for name in end.states[0]}
    num_players = len(worker.model.players)  # type: ignore[union-attr]
    table = all_coalitions(num_players)
    task = GameTask(end.step + 1, clients, states, phase2, table, ShapleyRanking())
    values = [outcome.values for outcome in worker.run(task).outcomes]
    rng, rows = np.random.default_rng(seed), []
    for pairs in PAIRS:
        permutations = antithetic_permutations(num_players, pairs, rng)
        coalitions = prefix_coalitions(permutations)
        positions = coalitions @ (1 << np.arange(num_players))
        for own in values:
            exact, _ = shapley_values(GamePlan(table, None), own)
            sampled, _ = shapley_values(GamePlan(coalitions, permutations), own[positions])
            rows.append(
                {
                    "pairs": pairs,
                    "coalitions": len(coalitions),
                    "largest_error": float(np.abs(sampled - exact).max() / np.abs(exact).max()),
                    "same_candidates": bool(np.array_equal(nested_candidates(sampled), nested_candidates(exact))),
                }
            )
    return rows


# -- the surrogate -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SurrogateTask(CohortTask):
    """Values of coalitions by mixing, and by refining the coalition's layers anew.

    Attributes:
        coalitions: ``[m, n] bool``, the same for all clients.
        made: of the experiment.
    """

    coalitions: np.ndarray
    made: Prepared

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[np.ndarray]:
        """Return ``[2 (mixed, refined), 2 (benign, robust), m]`` per client."""
        player = Phase2Client.from_task(worker, self, params, phase2_of(self.made))
        benign = player.benign_end_point()
        images = player.selection_images(benign)
        splits = player.selection_splits
        values = []
        for coalition in self.coalitions:
            everywhere = np.tile(coalition, (len(self.clients), 1))
            surrogate = mix(player.robust, benign, everywhere, player.model.players)
            refined = player.refined(everywhere)
            anew = player.adversarial(refined, images, splits)
            values.append(
                [
                    [probability(player, surrogate, images, x) for x in (images.x, *images.against)],
                    [probability(player, refined, images, x) for x in (images.x, anew, anew)],
                ]
            )
        table = np.array(values)  # [m, 2, 3, N]
        robust = np.minimum(table[:, :, 1], table[:, :, 2])
        both = np.stack([table[:, :, 0], robust], axis=2)  # [m, 2 (mixed, refined), 2 (benign, robust), N]
        owner = images.owner.numpy()
        return [both[..., owner == client].mean(-1).transpose(1, 2, 0) for client in range(len(self.clients))]


@torch.no_grad()
def probability(player: Phase2Client, params: ParameterStack, images: SelectionImages, x: torch.Tensor) -> np.ndarray:
    """Return the probability of the true class of every image, ``[N]``."""
    return true_class_probability(player.model.forward(params, x, images.owner), images.y).cpu().numpy()


def surrogate_correlations(made: Prepared, end: Checkpoint, seed: int) -> list[Settings]:
    """Return Spearman's correlations of mixed and refined coalitions, client by client."""
    worker = create_worker(made.config, made.fleet, made.backbone)
    num_players = len(worker.model.players)  # type: ignore[union-attr]
    chosen = np.random.default_rng(seed).choice(np.arange(1, 2**num_players), NUM_COALITIONS, replace=False)
    states = {name: np.stack([state[name] for state in end.states]) for name in end.states[0]}
    clients = tuple(range(made.fleet.num_clients))
    task = SurrogateTask(end.step + 1, clients, states, all_coalitions(num_players)[np.sort(chosen)], made)
    return [
        {
            "client": client,
            "benign": float(spearmanr(mixed[0], refined[0]).statistic),
            "robust": float(spearmanr(mixed[1], refined[1]).statistic),
            "both": float(spearmanr(mixed.sum(0), refined.sum(0)).statistic),
        }
        for client, (mixed, refined) in enumerate(worker.run(task).outcomes)
    ]


def phase2_of(made: Prepared) -> Any:
    """Return the checked parameters of phase 2."""
    return create_algorithm(made.config.algorithm).parameters.phase2


def with_rows(earlier: Sequence[Settings], measured: Sequence[Settings]) -> list[Settings]:
    """Return the rows of a part of the result: new ones in the place of those of the same ranking, setting and seed.

    Raises:
        SystemExit: if rankings of one seed and setting do not go on from the same end of phase 1.
    """

    def key(row: Settings) -> tuple[int, float, str, int]:
        ranking = list(RANKINGS).index(row["ranking"]) if "ranking" in row else 0
        return ranking, -row["alpha"], row["epsilon"], row["seed"]

    replaced = {key(row) for row in measured}
    rows = sorted([*(row for row in earlier if key(row) not in replaced), *measured], key=key)
    starts: dict[tuple[float, str, int], Settings] = {}
    for row in rows:
        start = {name: value for name, value in row.items() if name.startswith("before_")}
        if starts.setdefault(key(row)[1:], start) != start:
            raise SystemExit(
                f"the rankings of seed {row['seed']} in {RESULT.name} and {row['ranking']} do not go on from one end "
                "of phase 1: remove the rows of this seed there, or measure all rankings anew (--result FILE)"
            )
    return rows


def main() -> None:
    """Measure all three; what is finished in the folder is not measured again, and other seeds' results stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one (may be given again)")
    parser.add_argument("--ranking", action="append", choices=list(RANKINGS), help="only this one (may be given again)")
    parser.add_argument(
        "--epsilon", type=epsilon_argument, default=EPSILON, help="of all attacks; default: the ledger's, %(default)s"
    )
    parser.add_argument("--alpha", type=float, default=ALPHA, help="of the Dirichlet partition; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/game"), help="run folders")
    parser.add_argument("--result", type=Path, help="default: game.json here, or in --out with --scale")
    parser.add_argument("--scale", choices=["smoke"], help="a few digits: does it run?")
    arguments = parser.parse_args()
    parts: list[str] = arguments.part or list(PARTS)
    result: Path = arguments.result or (arguments.out / RESULT.name if arguments.scale else RESULT)
    earlier = json.loads(result.read_text()) if result.exists() else {}
    found: dict[str, list[Settings]] = {part: earlier.get(part, []) for part in PARTS}

    def add(part: str, setting: Setting, rows: Sequence[Settings]) -> None:
        labels = {"alpha": setting.alpha, "epsilon": setting.epsilon, "seed": setting.seed}
        labelled = [labels | row for row in rows]
        found[part] = with_rows(found[part], labelled)
        result.write_text(json.dumps(found, indent=1) + "\n")

    torch.set_num_threads(1)
    for part, seed in product(parts, arguments.seeds):
        setting = Setting(seed, arguments.epsilon, arguments.scale, arguments.alpha)
        end = end_of_phase1(setting, arguments.out)
        if part == "rankings":
            for selection in arguments.ranking or RANKINGS:
                row = rank_and_refine(selection, setting, end, arguments.out)
                print(row, flush=True)
                add(part, setting, [row])
        else:
            measure = sampled_values if part == "sampling" else surrogate_correlations
            done = setting.folder(arguments.out, part).with_suffix(".json")
            if not done.exists():
                done.write_text(json.dumps(measure(setting.prepared({}, arguments.out), end, seed)) + "\n")
            add(part, setting, json.loads(done.read_text()))
    print(game_tables(found))


if __name__ == "__main__":
    main()
