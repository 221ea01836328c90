"""The files of a sweep: its results, the chosen configurations, and the report."""

from __future__ import annotations

import json

from sylva_ray.config.tracking import TrackingSection
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.results import Point, Sweep, SweepSummary, value_cell


def write_results(folder: SweepFolder, sweep: Sweep) -> None:
    """Write ``sweep.json``, the chosen configurations as YAML that `sylva-ray run` takes, and ``report.html``."""
    from sylva_ray.sweeps.report import render

    folder.write(folder.results, json.dumps(SweepSummary.from_sweep(sweep).to_json(), indent=1) + "\n")
    several = len(sweep.space.objectives) > 1
    for old in [folder.best, *folder.pareto.glob("*.yaml")]:
        old.unlink(missing_ok=True)
    for point in sweep.chosen:
        path = folder.pareto / f"{point.name}.yaml" if several else folder.best
        folder.write(path, chosen_config(folder, sweep, point))
    folder.write(folder.report, render(sweep))


def chosen_config(folder: SweepFolder, sweep: Sweep, point: Point) -> str:
    """Return the resolved configuration of a point's first seed as YAML, without what ties it to the sweep.

    Comments above it state the point's objectives and what they were measured on.
    """
    config = folder.trial(f"{point.name}-s{point.seeds[0]}").load_config()
    given = sweep.space.experiment.get("tracking") or {}
    config = config.model_copy(update={"tracking": TrackingSection(**given), "cluster": sweep.space.cluster})
    values = ", ".join(f"{o.metric} {value_cell(o.metric, point.metrics[o.metric])}" for o in sweep.space.objectives)
    lines = [
        f"# {point.label}: {values}; mean of seeds {', '.join(map(str, point.seeds))} in sweep {sweep.space.name}."
    ]
    if config.dataset.test_pool == "train":
        lines.append("# Chosen on images held out of training; for the number to report: dataset.test_pool=test")
    else:
        lines.append(
            "# Chosen on the test images: its accuracy is the best of many, which tends to be too high. "
            "Confirm with other seeds."
        )
    return "\n".join([*lines, config.to_yaml()])
