"""The Python interface: every command of the command line as a function.

::

    import sylva_ray

    summary = sylva_ray.run("configs/digits.yaml", ["training.rounds=5"], out="runs/five")
    sylva_ray.evaluate("runs/five", attacks=["pgd:steps=100"], checks=True)
    sylva_ray.export("runs/five", to="adapters")

A run is named by its folder: a path, or a URL such as ``s3://bucket/runs/a``. Wrong input raises `UserError` before
anything is written; a failure while running raises `RunError` and can be resumed, also after Ctrl-C (`Interrupted`) and
SIGTERM (`Stopped`). Importing this module is quick: torch, Ray and the rest are imported by the function that needs
them.
"""

from __future__ import annotations

from sylva_ray.api.arguments import check_source
from sylva_ray.api.exports import export
from sylva_ray.api.guide import KINDS, catalogue, describe, init, listed, setting_keys, where_to_read
from sylva_ray.api.results import compare, evaluate, report, track
from sylva_ray.api.runs import (
    Config,
    LoadedRun,
    add_dataset,
    load_config,
    load_run,
    repair,
    resume,
    run,
    sweep,
)
from sylva_ray.api.tools import check_cluster, check_gpus, dry_run, pretrain, traffic
from sylva_ray.core.errors import Interrupted, RunError, Stopped, UserError

__all__ = [
    "KINDS",
    "Config",
    "Interrupted",
    "LoadedRun",
    "RunError",
    "Stopped",
    "UserError",
    "add_dataset",
    "catalogue",
    "check_cluster",
    "check_gpus",
    "check_source",
    "compare",
    "describe",
    "dry_run",
    "evaluate",
    "export",
    "init",
    "listed",
    "load_config",
    "load_run",
    "pretrain",
    "repair",
    "report",
    "resume",
    "run",
    "setting_keys",
    "sweep",
    "track",
    "traffic",
    "where_to_read",
]
