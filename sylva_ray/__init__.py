"""sylva_ray: personal adversarial defences for a fleet of edge clients, simulated on a Ray cluster.

The functions of `sylva_ray.api` are imported when they are first used, so that importing the package takes little time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sylva_ray.core.version import __version__ as __version__

if TYPE_CHECKING:
    from sylva_ray.api import (
        KINDS,
        Config,
        Interrupted,
        LoadedRun,
        RunError,
        Stopped,
        UserError,
        add_dataset,
        catalogue,
        check_cluster,
        check_gpus,
        check_source,
        compare,
        describe,
        dry_run,
        evaluate,
        export,
        init,
        listed,
        load_config,
        load_run,
        pretrain,
        repair,
        report,
        resume,
        run,
        setting_keys,
        sweep,
        track,
        traffic,
        where_to_read,
    )

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


def __getattr__(name: str) -> Any:
    if name in __all__:
        from sylva_ray import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
