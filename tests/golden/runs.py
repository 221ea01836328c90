"""Small runs whose results a refactor must leave as they are, bit for bit, and digests of what they leave behind.

    python -m tests.golden.runs --out FILE.json [NAME ...]

`tests/golden/digests.json` holds what was recorded last, after a change that was meant to change results.

A digest covers what a user can measure: the adapters' files, the clients' newest states, every record and the summary,
without times, memory, versions and hardware. It belongs to one torch version and one processor: floating-point kernels
differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.execution.run import run_prepared
from sylva_ray.federation.observer import Observer
from sylva_ray.preparation.experiment import prepare
from sylva_ray.storage.run_folder import RunFolder

SMALL: dict[str, Any] = {
    "name": "golden",
    "dataset": {"name": "digits", "max_train": 120, "max_test": 60},
    "partition": {"num_clients": 3, "alpha": 0.5, "min_samples": 20, "test_samples": 10},
    "lora": {"rank": 4},
    "attack": {"epsilon": "4/255", "steps": 1},
    "training": {"rounds": 2, "batch_size": 16, "lr": 0.005, "precision": "float32", "attention": "fused"},
    "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 2}], "every": 1, "max_samples": 4, "precision": "float32"},
    "cluster": {"pool": "in_process"},
    "tracking": {"enabled": False},
}
PHASE2 = {
    "benign_epochs": 1,
    "refine_epochs": 2,
    "attack_steps": 2,
    "max_images": 4,
    "guard_tolerance": 1.0,
    "benign_tolerance": 1.0,
}
BYZANTINE = {
    "partition": {"num_clients": 5, "alpha": 1.0, "min_samples": 10, "test_samples": 6},
    "algorithm": {
        "name": "sylva",
        "phase2": PHASE2,
        "adapters": "neighbours",
        "heads": "local",
        "robust": {"rule": "geometric_median"},
        "num_neighbours": 3,
    },
    "byzantine": {"fraction": 0.2, "attack": "sign_flip"},
    "compression": {"kind": "int4"},
}
LOW = {"training": SMALL["training"] | {"precision": "bfloat16", "attention": "plain"}}
RAY = {"cluster": {"pool": "ray", "num_actors": 1}}

RUNS: dict[str, dict[str, Any]] = {
    "sylva": {"algorithm": {"name": "sylva", "phase2": PHASE2}},
    "sylva_bfloat16": {"algorithm": {"name": "sylva", "phase2": PHASE2}} | LOW,
    "lorica": {"algorithm": {"name": "lorica", "phase2": PHASE2 | {"gate_steps": 5}}},
    "pm_afl": {"algorithm": {"name": "pm_afl"}},
    "fedavg_at": {"algorithm": {"name": "fedavg_at"}},
    "byzantine_int4": BYZANTINE,
    "mixed_ranks": {"algorithm": {"name": "hetlora_at", "ranks": [1, 2, 4]}},
    "sylva_ray": {"algorithm": {"name": "sylva", "phase2": PHASE2}} | RAY,
    "byzantine_int4_ray": BYZANTINE | RAY,
}
"""What each run has besides `SMALL`; the last two are `sylva` and `byzantine_int4` on Ray."""

UNCOUNTED = {"seconds", "peak_memory_bytes", "peak_memory_bytes_per_actor", "versions", "hardware"}
"""Keys of records and summary that differ between equal runs."""


def digests(name: str, folder: Path) -> dict[str, str]:
    """Run ``RUNS[name]`` in ``folder`` and digest ``adapters``, ``states``, ``records`` and ``summary``."""
    config = build(ExperimentConfig, SMALL | RUNS[name])
    run_prepared(prepare(config), RunFolder(folder), False, Observer())
    states = RunFolder(folder).load_states()
    arrays = hashlib.sha256()
    for state in states:
        for key, value in state.items():
            arrays.update(f"{key}{value.dtype}{value.shape}".encode() + value.tobytes())
    files = hashlib.sha256()
    for path in sorted(folder.glob("adapters/*/*")):
        files.update(f"{path.relative_to(folder)}".encode() + path.read_bytes())
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "adapters": files.hexdigest(),
        "states": arrays.hexdigest(),
        "records": digest_json([counted(record) for record in records]),
        "summary": digest_json(counted(summary)),
    }


def counted(found: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys in `UNCOUNTED`."""
    return {key: value for key, value in found.items() if key not in UNCOUNTED}


def digest_json(value: Any) -> str:
    """Of a JSON value, keys in any order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def main() -> None:
    """Write ``{run: {part: digest}}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("names", nargs="*", default=list(RUNS), metavar="NAME")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in given.names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = digests(name, Path(folder) / "run")
        print(name, found[name], flush=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
