"""The files of a sweep: what it found, the chosen configurations, and the report."""

from __future__ import annotations

import json
from dataclasses import asdict

from sylva_ray.config.experiment import TrackingSection, load_run_config
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.results import Point, Sweep, value_cell


def write_results(folder: SweepFolder, sweep: Sweep) -> None:
    """``sweep.json``, the chosen configs as YAML that `sylva-ray run` takes, and ``report.html``."""
    from sylva_ray.sweeps.report import render

    content = {
        "name": sweep.space.name,
        "objectives": [objective.model_dump() for objective in sweep.space.objectives],
        "workers": sweep.workers,
        "seconds": sweep.seconds,
        "busy_share": sweep.busy_share,
        "points": [asdict(point) for point in sweep.points],
        "trials": [asdict(trial) for trial in sweep.trials],
    }
    folder.write(folder.results, json.dumps(content, indent=1) + "\n")
    several = len(sweep.space.objectives) > 1
    for old in [folder.best, *folder.pareto.glob("*.yaml")]:
        old.unlink(missing_ok=True)
    for point in sweep.chosen:
        path = folder.pareto / f"{point.name}.yaml" if several else folder.best
        folder.write(path, runnable(folder, sweep, point))
    folder.write(folder.report, render(sweep))


def runnable(folder: SweepFolder, sweep: Sweep, point: Point) -> str:
    """The resolved config of a point's first seed, without what ties it to the sweep, under a comment on what it earned."""
    config = load_run_config(folder.trial(f"{point.name}-s{point.seeds[0]}"))
    given = sweep.space.experiment.get("tracking") or {}
    config = config.model_copy(update={"tracking": TrackingSection(**given), "cluster": sweep.space.cluster})
    earned = ", ".join(f"{o.metric} {value_cell(o.metric, point.metrics[o.metric])}" for o in sweep.space.objectives)
    lines = [
        f"# {point.label}: {earned}; mean of seeds {', '.join(map(str, point.seeds))} in sweep {sweep.space.name}."
    ]
    if config.dataset.test_pool == "train":
        lines.append("# Chosen on images held out of training; for the number to report: dataset.test_pool=test")
    else:
        lines.append(
            "# Chosen on the test images: its accuracy is the best of many and flatters it. Confirm with other seeds."
        )
    return "\n".join([*lines, config.to_yaml()])
