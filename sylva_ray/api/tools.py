"""Functions besides runs: pre-train a backbone, compute bytes per method, check a cluster file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sylva_ray.api.arguments import check_count, check_list, check_show, check_texts
from sylva_ray.api.runs import Config, load_config
from sylva_ray.config.experiment import AlgorithmSection, BackboneSection, LoraSection
from sylva_ray.config.recipes import asked_for, recipe_or_path
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError, asked_as
from sylva_ray.core.locations import local_path, output_path
from sylva_ray.core.own_code import importing_from
from sylva_ray.core.resumable import resumable
from sylva_ray.core.text import PROGRESS, LogFormat, Show, with_fractions

if TYPE_CHECKING:
    from sylva_ray.reports.traffic import TrafficRow


def pretrain(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path = "runs/pretrain",
    resume: bool = False,
    allow_changed: bool = False,
    show: Show = "progress",
    log_format: LogFormat | None = None,
) -> Path:
    """Train a backbone where none can be downloaded.

    Args:
        config: a YAML file, or the name of a recipe.
        overrides: ``KEY=VALUE`` with dotted keys.
        out: the folder of checkpoints, log and result.
        resume: whether to go on from the newest checkpoint; one that has finished is left as it is.
        allow_changed: whether data and initial weights may differ from those that the pre-training began with; the
            model card then says so.
        show: what is printed; a line per epoch, unless it is the result only.
        log_format: None: lines; ``plain``: with time stamps; ``json``: one JSON object per event and nothing else
            (`sylva_ray.pretraining.progress.PretrainLog`).

    Returns:
        The backbone, a safetensors file.

    Raises:
        UserError: a mistake in the configuration, a folder that is not free, or data that have changed.
        RunError: the training diverged.
    """
    check_show(show, log_format)
    if allow_changed and not resume:
        raise UserError("--allow-changed", config, "has no effect on a new pre-training: use it with --resume")
    check_texts("overrides", overrides)
    from sylva_ray.data.datasets import find_dataset
    from sylva_ray.models.availability import check_available
    from sylva_ray.preparation.resolve import check_device
    from sylva_ray.pretraining.config import load_pretrain_config
    from sylva_ray.pretraining.folder import PretrainFolder
    from sylva_ray.pretraining.progress import PretrainLog

    path = recipe_or_path("CONFIG", config, "pretraining")
    with asked_for("CONFIG", path, "pretraining"), asked_as("CONFIG", "file"):
        settings = load_pretrain_config(path, overrides)
    folder = output_path("--out", out, "folder")
    PretrainFolder(folder).check_claim(settings, resume)
    check_device(settings.training.device)
    check_available(settings.backbone)
    if not resume:
        find_dataset(settings.dataset)

    from sylva_ray.pretraining import trainer  # PyTorch: after what needs no model

    log = PretrainLog(partial(print, flush=True), settings.training.epochs, log_format, quiet=show not in PROGRESS)
    instruction = f"The finished epochs are kept. {_resume_command(config, overrides, out)}"
    with resumable(PretrainFolder(folder).config_file, instruction):
        backbone = trainer.pretrain(settings, folder, resume, log.on_epoch, log.on_notice, allow_changed)
    if show != "nothing":
        log.tell_result(backbone)
    return backbone


def _resume_command(config: str | Path, overrides: Sequence[str], out: str | Path) -> str:
    words = ["sylva-ray", "pretrain", str(config), *overrides, "--out", str(out), "--resume"]
    return f"Resume with: {shlex.join(words)}"


def traffic(  # noqa: PLR0913  # a keyword for each option of the command
    backbone: str | None = None,
    *,
    ranks: Sequence[int] = (),
    target_modules: Sequence[str] = (),
    num_classes: int = 10,
    methods: Sequence[str] = (),
    num_clients: int = 10,
    csv: str | Path | None = None,
    imports: Sequence[str | Path] = (),
    show: Show = "progress",
) -> list[TrafficRow]:
    """Compute the bytes per client and round of every method, and compare them to the full model.

    Args:
        backbone: a timm model with a linear classifier; None: the one that ships with this package.
        ranks: LoRA ranks; none: the default rank.
        target_modules: adapted layers; none: the default ones.
        num_classes: classes of the data set, at least 2.
        methods: names of methods; none: all.
        num_clients: how many clients' factors FLoRA and FedEx-LoRA send down, at least 1.
        csv: a file that gets the table, too.
        imports: directories of your own methods' code; what a configuration names is imported from no other.
        show: what is printed: ``tasks``, ``progress``, ``result`` or ``nothing`` (`sylva_ray.core.text.Show`).

    Returns:
        One row per method, rank and compression.

    Raises:
        UserError: an unknown backbone or method, a rank that does not fit, a number out of range, a file that cannot be
            written.
    """
    check_show(show)
    check_texts("methods", methods)
    check_texts("target_modules", target_modules)
    check_list("ranks", ranks)
    check_count("num_classes", num_classes, at_least=2)
    check_count("num_clients", num_clients)
    lora = LoraSection(**({"target_modules": tuple(target_modules)} if target_modules else {}))
    ranks = ranks or [lora.rank]
    with asked_as("--rank", "lora.rank"):
        for rank in ranks:
            build(LoraSection, {"rank": rank}, "lora")
    csv = None if csv is None else output_path("--csv", csv, "file")

    from sylva_ray.algorithms.registry import create_algorithm
    from sylva_ray.models.availability import check_available

    section = BackboneSection(name=backbone) if backbone else BackboneSection()
    with asked_as("--backbone", "backbone.name"):
        check_available(section)
    with importing_from(imports), asked_as("--method", "algorithm.name"):
        for name in methods:
            create_algorithm(AlgorithmSection(name=name))

    from sylva_ray.reports.console import create_console, print_lines
    from sylva_ray.reports.traffic import terminal_table, traffic_table, write_csv

    with (
        importing_from(imports),
        asked_as("--backbone", "backbone.name"),
        asked_as("--rank", "lora.rank"),
        asked_as("--target-module", "lora.target_modules"),
    ):
        rows = traffic_table(section, lora, ranks, num_classes, methods or None, num_clients)
    title = f"{section.name}, {num_classes} classes, {', '.join(lora.target_modules)}: bytes per client and round"
    console = create_console(show)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 112  # room for the methods' names
    console.print(terminal_table(rows, title, console.width))
    if csv is not None:
        write_csv(rows, csv)
        print_lines(console, [csv])
    return rows


def dry_run(
    config: Config, overrides: Sequence[str] = (), *, columns: int = 80, imports: Sequence[str | Path] = ()
) -> list[str]:
    """Foretell what a run asks for: its resolved settings, what travels, memory and time. Nothing is written.

    Images and pre-trained weights are not needed: bytes and operations are those of a model with random weights.

    Args:
        config: an experiment, see `Config`.
        overrides: ``KEY=VALUE`` of the experiment.
        columns: of the terminal, characters; text is wrapped at 40 at least.
        imports: directories of your own methods' code; what a configuration names is imported from no other.

    Returns:
        Lines of text: the settings in YAML, then the forecast.

    Raises:
        UserError: the run would be refused, or its actors do not fit this machine.
    """
    from sylva_ray.provisioning.forecast import forecast
    from sylva_ray.provisioning.forecast_lines import planned_config, run_lines
    from sylva_ray.provisioning.placement import check_resources, this_machine

    with importing_from(imports):
        experiment = load_config(config, overrides)
        if experiment.cluster.address is None and experiment.cluster.pool == "ray":
            check_resources(experiment.cluster, [this_machine()])
        found = forecast(experiment)
        lines = run_lines(found, columns)
    return [*with_fractions(planned_config(found).to_yaml()).splitlines(), "", *lines]


def check_gpus() -> list[str]:
    """Check that every GPU of this machine can be used: first the driver, then one tensor on each.

    Returns:
        One line per GPU: name, memory, driver, CUDA.

    Raises:
        UserError: there is none, its driver is too old for this PyTorch, or it cannot compute.
    """
    from sylva_ray.core import gpu

    return gpu.check_gpus()


def check_cluster(
    file: str | Path,
    config: Config | None = None,
    overrides: Sequence[str] = (),
    *,
    columns: int = 80,
    imports: Sequence[str | Path] = (),
) -> list[str]:
    """Check a cluster file offline, and say what a run would ask of the cluster. Nothing is started.

    Args:
        file: a ``cluster.yaml`` for ``ray up``.
        config: an experiment; None: the file alone is checked.
        overrides: ``KEY=VALUE`` of the experiment.
        columns: of the terminal, characters; text is wrapped at 40 at least.
        imports: directories of your own methods' code; what a configuration names is imported from no other.

    Returns:
        Lines of text.

    Raises:
        UserError: a mistake in one of the files.
    """
    check_texts("overrides", overrides)
    if overrides and config is None:
        raise UserError("override", overrides[0], "changes a run's config, and there is none: add --config CONFIG")

    from sylva_ray.execution.ray.launcher import RayLauncher
    from sylva_ray.provisioning.demand import demand_lines, estimate_demand, file_lines
    from sylva_ray.provisioning.forecast_lines import cluster_lines, wrapped
    from sylva_ray.provisioning.launcher_file import load_launcher_file

    launcher = RayLauncher()
    with asked_as("FILE", "file", "cluster file"):
        loaded = load_launcher_file(local_path("FILE", file), launcher)
    lines = file_lines(loaded)
    if config is not None:
        from sylva_ray.provisioning.fit import check_fit
        from sylva_ray.provisioning.forecast import forecast_of

        with importing_from(imports), asked_as("--config", "CONFIG"):
            demand = estimate_demand(load_config(config, overrides), loaded, launcher)
            found = forecast_of(demand.sketch)
        check_fit(demand, found, loaded)
        lines += [*demand_lines(demand, loaded), *cluster_lines(demand, found, loaded)]
    return wrapped(lines, columns)
