"""Clients of a run for other programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sylva_ray.api.arguments import check_clients, check_show
from sylva_ray.api.runs import LoadedRun, load_run
from sylva_ray.core.errors import UserError
from sylva_ray.core.locations import output_path
from sylva_ray.core.text import LogFormat, Show


def export(
    run: str | Path,
    to: str | Path,
    clients: Sequence[int] | None = None,
    *,
    merged: bool = False,
    onnx: bool = False,
    allow_changed: bool = False,
    show: Show = "progress",
    log_format: LogFormat | None = None,
) -> list[Path]:
    """Write clients for other programs: PEFT adapters, or whole models, with model cards and a script to load them.

    ``to/load.py`` loads any of them with timm and PEFT alone. A method that trains whole models has
    ``model.safetensors`` in place of an adapter.

    Args:
        run: the run folder, a path or a URL.
        to: the folder that gets ``client_000/``, ``client_001/``, ...
        clients: which clients; None: all.
        merged: whether to write the whole model with the adapter merged in, too.
        onnx: whether to write the whole model as ONNX, too, with resizing and normalisation inside.
        allow_changed: whether the backbone's weights may differ from those of the run; the model cards then say so.
        show: what is printed: a line per client with its number, seconds and time left, or its folder alone.
        log_format: None: lines; ``plain``: with time stamps; ``json``: one JSON object per client.

    Returns:
        One folder per client.

    Raises:
        UserError: no such run or client, other weights of the backbone than the run had, packages for ONNX are
            missing, or the folder holds other clients of another export or something else.
    """
    check_show(show, log_format)
    loaded = load_run(run)
    everyone = range(len(loaded.states))
    check_clients(clients, len(everyone))
    changed = _changed_backbone(run, loaded, allow_changed)
    chosen = everyone if clients is None else clients
    folder = output_path("--to", to, "folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "load.py").is_file():
        raise UserError("--to", str(folder), "is not empty and holds no export; name another folder")

    from sylva_ray.models.export import CARD, ExportOptions, export_clients  # PyTorch: after what needs no model
    from sylva_ray.reports.export_log import ExportLog
    from sylva_ray.reports.model_card import model_card
    from sylva_ray.storage.atomic import write_atomically

    summary = loaded.summary
    names, options = None if summary is None else summary.class_names, ExportOptions(merged, onnx)
    log = ExportLog(partial(print, flush=True), len(chosen), show, log_format)

    def finish(client: int, target: Path) -> None:
        if summary is not None:
            files = [path.name for path in target.iterdir()]
            write_atomically(target / CARD, model_card(loaded.config, summary, client, files, changed))
        log.on_client(target)

    return export_clients(loaded.config, loaded.states, chosen, folder, names, options, on_client=finish)


def _changed_backbone(run: str | Path, loaded: LoadedRun, allow_changed: bool) -> Sequence[str]:
    """Return how the backbone's weights differ from those of a run, in words, and print what the user should know.

    Raises:
        UserError: they differ, and ``allow_changed`` is false.
    """
    from sylva_ray.preparation.inputs import digest_backbone
    from sylva_ray.storage.remote_copy import run_folder_at

    now = digest_backbone(loaded.config, loaded.states[0])

    with run_folder_at(str(run), "read") as (folder, _):
        check = folder.check_inputs(loaded.config, now, allow_changed)
    for text in check.notices:
        print(f"warning: {text}", file=sys.stderr)
    return check.changed
