"""Repair a run folder from its newest checkpoint: ``sylva-ray repair RUN``.

Every checkpoint holds the settings that the results depend on, the digests of the inputs, and all records. From them
come ``config.yaml``, ``inputs.json`` and ``rounds.jsonl``, with the files in ``clients/`` that it names, again. Results
that cannot be read are set aside, and the commands that write them can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sylva_ray.config.comparison import FREE_SECTIONS, difference
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import RawConfig, build, read_yaml
from sylva_ray.core.errors import UserError
from sylva_ray.core.inputs import Inputs
from sylva_ray.core.text import as_argument
from sylva_ray.storage.atomic import write_atomically, write_json
from sylva_ray.storage.checkpoint import Checkpoint
from sylva_ray.storage.manifest import folder_name
from sylva_ray.storage.run_folder import RunFolder


def repair_run(folder: RunFolder) -> list[str]:
    """Restore what can be restored. What is as it should be is not written.

    Args:
        folder: of the run, which the caller has locked.

    Returns:
        One sentence for everything that was done; none where nothing was necessary.

    Raises:
        UserError: there is no checkpoint to repair from.
    """
    checkpoint = folder.checkpoints.latest()
    if checkpoint is None:
        raise UserError("RUN", str(folder), "has no checkpoint, and nothing to repair it from")
    return [
        *_remove_drafts(folder),
        *_restore_config(folder, checkpoint),
        *_restore_inputs(folder, checkpoint),
        *_restore_records(folder, checkpoint),
        *_remove_damaged(folder, checkpoint),
        *_set_aside(folder.summary_file, folder.load_summary, f"sylva-ray run {as_argument(folder)} --resume"),
        *_set_aside(folder.evaluation_file, folder.load_evaluation, f"sylva-ray evaluate {as_argument(folder)}"),
    ]


def _remove_drafts(folder: RunFolder) -> list[str]:
    """Remove what writes left that were interrupted."""
    done = []
    for path in [*sorted(folder.path.glob(".*")), *folder.client_tables.drafts()]:
        written = path.with_name(path.name.removeprefix("."))
        if path.is_file() and (written in folder.files or written.parent == folder.client_tables.folder):
            path.unlink()
            done.append(f"{path.name}: removed, a write that was interrupted")
    return done


def _restore_config(folder: RunFolder, checkpoint: Checkpoint) -> list[str]:
    path = folder.config_file
    if path.is_dir():
        raise UserError("config", str(path), "is a folder; move it away, and repair again")
    reason, stored = _read_config(folder)
    if checkpoint.config is None:
        if reason:
            fix = "a checkpoint of this version holds no copy: write the file again with the run's settings"
            raise UserError("config", str(path), f"{reason}, and {fix}")
        return []
    config = build(ExperimentConfig, checkpoint.config)
    if config.partition.num_clients != len(checkpoint.states):
        found = f"the settings of {config.partition.num_clients} clients and the states of {len(checkpoint.states)}"
        place = f"{folder.checkpoints.root}/{folder_name(checkpoint.step)}"
        raise UserError("checkpoint", place, f"holds {found}, so nothing can be repaired from it; remove it")
    if stored is not None:
        changed = difference(folder.extensions.applied(config, stored), stored)
        if not changed:
            return []
        reason = f"differed from the checkpoint ({changed})"
    config, kept = _with_free_sections(config, folder)
    write_atomically(path, config.to_yaml(), durable=True)
    return [f"{path.name}: {reason}; restored from {folder_name(checkpoint.step)}, {kept}"]


def _read_config(folder: RunFolder) -> tuple[str, ExperimentConfig | None]:
    """Return what is wrong with ``config.yaml`` ('' for nothing), and its content if it can be read."""
    if not folder.config_file.exists():
        return "was missing", None
    try:
        return "", folder.load_config()
    except UserError:
        return "could not be read", None


def _with_free_sections(config: ExperimentConfig, folder: RunFolder) -> tuple[ExperimentConfig, str]:
    """Add those sections of the old file that the checkpoint does not hold, if they can be read.

    Otherwise they have their defaults, but that a run which was not tracked is not tracked from now on either.
    """
    raw: RawConfig = config.model_dump(mode="json")
    try:
        old = read_yaml(folder.config_file)
        for name in FREE_SECTIONS:
            raw[name] = old[name] | ({"threads_per_actor": raw[name]["threads_per_actor"]} if name == "cluster" else {})
        return build(ExperimentConfig, raw), f"{' and '.join(FREE_SECTIONS)} as they were"
    except (UserError, KeyError, TypeError):
        is_tracked = folder.tracking_file.exists()
        tracking = config.tracking.model_copy(update={"enabled": is_tracked})
        kept = f"{' and '.join(FREE_SECTIONS)} with defaults, tracking {'on' if is_tracked else 'off'}"
        return config.model_copy(update={"tracking": tracking}), kept


def _restore_inputs(folder: RunFolder, checkpoint: Checkpoint) -> list[str]:
    if checkpoint.inputs is None:
        return []
    inputs = Inputs.from_json(checkpoint.inputs, f"{folder.checkpoints.root}/{folder_name(checkpoint.step)}")
    try:
        stored = folder.load_inputs()
    except UserError:
        stored = None
    if stored == inputs:
        return []
    write_json(folder.inputs_file, inputs.to_json(), durable=True)
    return [f"{folder.inputs_file.name}: restored from {folder_name(checkpoint.step)}"]


def _restore_records(folder: RunFolder, checkpoint: Checkpoint) -> list[str]:
    try:
        if folder.load_records() == checkpoint.records:
            return []
    except UserError:
        pass
    folder.write_records(checkpoint.records)
    count = len(checkpoint.records)
    return [f"{folder.records_file.name}: written again with the {count} records of {folder_name(checkpoint.step)}"]


def _remove_damaged(folder: RunFolder, checkpoint: Checkpoint) -> list[str]:
    """Remove newer checkpoints that are damaged or incomplete; the run computes their stages again."""
    done = []
    for step in folder.checkpoints.steps():
        if step > checkpoint.step:
            folder.checkpoints.remove(step)
            done.append(f"{folder_name(step)}: removed, damaged or not complete")
    if done:
        done.append(f"continue with: sylva-ray run {as_argument(folder)} --resume")
    return done


def _set_aside(path: Path, load: Callable[[], object], command: str) -> list[str]:
    """Rename a file that cannot be read."""
    try:
        load()
    except UserError:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        return [f"{path.name}: could not be read and is now {aside.name}; write it again with: {command}"]
    return []
