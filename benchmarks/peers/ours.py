"""The work of a round here: `sylva_ray` with two Ray actors, by its Python API.

python benchmarks/peers/ours.py CLIENTS IMAGES STEPS ROUNDS MARKS
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from client_work import BATCH, LR, mark, parse_arguments

import sylva_ray
from sylva_ray.federation.observer import Observer, StageStarted

VALID_FRACTION = 0.2


class Marks(Observer):
    """Notes when rounds begin."""

    def __init__(self) -> None:
        self.marks: list[dict[str, Any]] = []

    def on_stage(self, started: StageStarted) -> None:
        """See `Observer.on_stage`."""
        if "round" in started.title:  # not the warm-up of heads, which has no epochs here
            self.marks.append(mark())


def main() -> None:
    """Run the rounds."""
    given = parse_arguments(__doc__)
    config = {
        "name": "peers",
        "algorithm": {
            "name": "sylva_paper_like" if given.steps else "undefended",
            "factor_rule": "naive",
            "head_warmup_epochs": 0,
            "epsilon_warmup": 0,
            "final_local_epochs": 0,
            "phase2": {"enabled": False},
        },
        "backbone": {"name": "vit_micro"},
        "lora": {"target_modules": ["attn.qkv", "attn.proj"]},
        "dataset": {
            "name": f"parquet:{os.environ['PEERS_PARQUET']}",
            "max_train": round(given.num_clients * given.num_images / (1 - VALID_FRACTION)),
            "max_test": max(100, given.num_clients),
        },
        "partition": {
            "kind": "iid",
            "num_clients": given.num_clients,
            "valid_fraction": VALID_FRACTION,
            "min_samples": 5,
            "test_samples": 1,
        },
        "attack": {"epsilon": "4/255", "steps": max(given.steps, 1)},
        "training": {
            "rounds": given.rounds,
            "batch_size": BATCH,
            "lr": LR,
            "lr_schedule": "constant",
            "precision": os.environ["PEERS_PRECISION"],
        },
        "evaluation": {"attacks": [], "initial": False, "checks": False, "precision": "float32"},
        "cluster": {"num_actors": 2, "max_exported": 0},
        "tracking": {"enabled": False},
    }
    assert given.num_images % 4 == 0, "four fifths of a client's images are for training"
    observer = Marks()
    with tempfile.TemporaryDirectory() as folder:
        sylva_ray.run(config, out=Path(folder) / "run", observer=observer, show="nothing")
    given.marks.write_text(json.dumps(observer.marks))


if __name__ == "__main__":
    main()
