"""Ask Ray's own cluster launcher and autoscaler, which have no public interface, about a cluster file.

This module imports private modules of Ray; it was tested with version 2.60. What is computed from the answers is in
`sylva_ray.provisioning`, which does not import Ray.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sylva_ray.config.schema import build
from sylva_ray.core.errors import RunError, UserError
from sylva_ray.provisioning.launcher_config import LauncherConfig, unknown_key
from sylva_ray.provisioning.launcher_file import LauncherFile, Resources


class RayLauncher:
    """Ray's cluster launcher and autoscaler; a `sylva_ray.provisioning.launcher_file.ClusterLauncher`."""

    def validate(self, path: Path, raw: Mapping[str, object]) -> LauncherConfig:
        """Validate a cluster file, as `ClusterLauncher.validate` describes."""
        if "cluster_name" not in raw and {"dataset", "algorithm", "training", "partition"} & raw.keys():
            raise UserError("FILE", str(path), "is a configuration of an experiment, not of a cluster")
        for key in ("cluster_name", "provider"):
            if key not in raw:
                raise UserError(key, str(path), "is missing; Ray's cluster launcher needs cluster_name and provider")
        provider = raw["provider"]
        if not isinstance(provider, dict) or "type" not in provider:
            fix = "must be a mapping with a type, e.g. {type: aws, region: us-west-2}"
            raise UserError("provider", provider, fix)
        try:
            from jsonschema import ValidationError
            from ray.autoscaler._private.cli_logger import cli_logger
            from ray.autoscaler._private.util import prepare_config, validate_config
        except ImportError as error:
            raise RunError(f"this version of Ray has no cluster launcher ({error}); install Ray 2.60") from error
        for logger in ("ray.autoscaler._private.util", "ray.autoscaler._private.docker"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        cli_logger.configure(verbosity=0)  # type: ignore[no-untyped-call]
        try:
            config = prepare_config(dict(raw))
            validate_config(config)
        except ValidationError as error:
            raise _schema_error(error) from None
        except Exception as error:  # Ray raises errors of many types
            raise UserError("cluster file", str(path), f"Ray refuses it ({' '.join(str(error).split())})") from None
        if not config.get("available_node_types"):
            fix = "is missing; it lists every node type and its resources"
            raise UserError("available_node_types", str(path), fix)
        return build(LauncherConfig, config)

    def nodes_for(self, file: LauncherFile, bundles: Sequence[Resources]) -> tuple[dict[str, int], int]:
        """Place bundles, first on the head, as `ClusterLauncher.nodes_for` describes."""
        try:
            from ray.autoscaler._private import resource_demand_scheduler
            from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
        except ImportError as error:
            raise RunError(f"this version of Ray has no autoscaler ({error}); install Ray 2.60") from error
        scheduler: Any = resource_demand_scheduler
        logging.getLogger(scheduler.__name__).setLevel(logging.ERROR)
        types = {k.name: {"resources": dict(k.resources), "max_workers": k.max_workers} for k in file.node_types}
        left, _ = scheduler.get_bin_pack_residual([dict(file.head.resources)], [dict(bundle) for bundle in bundles])
        score = functools.partial(
            scheduler._default_utilization_scorer,
            node_availability_summary=NodeAvailabilitySummary(node_availabilities={}),
        )
        added, waiting = scheduler.get_nodes_for(
            types, {file.head.name: 1}, file.head.name, file.max_workers, left, score
        )
        return dict(added), len(waiting)


def _schema_error(error: Any) -> UserError:
    """Convert an error of Ray's schema into one line; for a misspelt key it names the most similar one."""
    place = ".".join(map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        allowed = error.schema.get("properties", {})
        unknown = next(key for key in error.instance if key not in allowed)
        return unknown_key(f"{place}.{unknown}" if place else unknown, error.instance[unknown], unknown, allowed)
    return UserError(place or "cluster file", error.instance, error.message.splitlines()[0])
