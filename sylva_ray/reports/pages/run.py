"""``report.html``: one self-contained page about a run, from the files of its run folder only.

`_view` turns the files into words and rows, `run.html.jinja` lays them out; everything that comes from a user
(names of classes, paths in the config) is escaped there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sylva_ray.core.credentials import mask_credentials
from sylva_ray.federation.stages.layer_game.rankings.registry import RANKINGS
from sylva_ray.reports.attack_titles import titles_of_config
from sylva_ray.reports.figures.plots import figures
from sylva_ray.reports.figures.style import DARK, LIGHT, svg
from sylva_ray.reports.pages.attacked import ATTACKED, attack_rows, attacked_figures, gallery
from sylva_ray.reports.pages.wording import bytes_text, percent
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.jsonl import read_records
from sylva_ray.storage.run_files import read_evaluation, read_summary

DESCRIPTIONS = {
    "fleet": "Heatmap of training images per class and client",
    "accuracy": "Lines of benign and robust accuracy over rounds",
    "clients": "Accuracy of every client before and after the defence",
    "layers": "Heatmap of what ranked the layers, per layer and client",
    "communication": "Bars of transmitted bytes against full-model training",
    "seconds": "Bars of seconds by stage",
}
"""What a screen reader says of each figure."""


def write_report(run_dir: Path) -> Path:
    """Write (again) ``run_dir/report.html``; an unfinished run gets one that says so.

    Raises:
        UserError: the folder's files are damaged.
    """
    run_dir = Path(run_dir)
    records, summary = read_records(run_dir / "rounds.jsonl"), read_summary(run_dir)
    config = run_dir / "config.yaml"
    view = _view(summary, records, config.read_text() if config.exists() else "", run_dir.name)
    view |= _attacked(read_evaluation(run_dir), summary)
    view["figures"] |= view.pop("attacked_figures")
    page = page_environment().get_template("run.html.jinja").render(view)
    return write_atomically(run_dir / "report.html", page)


def page_environment() -> Environment:
    """Where our pages are rendered: everything is escaped, a name that is not defined is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "bytes": bytes_text}
    return environment


def _view(
    summary: Mapping[str, Any] | None, records: Sequence[Mapping[str, Any]], config: str, folder: str
) -> dict[str, Any]:
    """Everything that the template shows."""
    titles = titles_of_config(config)
    drawn = figures(summary, records, titles)
    view: dict[str, Any] = {
        "title": summary["name"] if summary else folder,
        "summary": summary,
        "steps_done": len(records),
        "last": records[-1] if records else None,
        "light": LIGHT,
        "dark": DARK,
        "figures": {name: Markup(svg(figure, name, DESCRIPTIONS[name])) for name, figure in drawn.items()},
        "config": mask_credentials(config),
    }
    if summary is not None:
        stages = _stages(summary)
        end = stages[-1][1]
        main_attack = next(iter(end["robust_accuracy"]), None)
        view |= {
            "stages": stages,
            "end": end,
            "main_attack": main_attack,
            "main_attack_title": titles.get(main_attack, main_attack) if main_attack else "",
            "fleet_rows": _fleet_rows(summary, stages, titles),
            "client_rows": _client_rows(summary, stages),
            "failed": [check for check in summary["checks"] if not check["passed"]],
            "warnings": _other_warnings(summary),
            "ranking": RANKINGS[(summary["layer_game"] or {}).get("selection", "shapley")],
            "num_selected": sum(map(sum, (summary["layer_game"] or {"selected": []})["selected"])),
        }
    return view


def _attacked(found: Mapping[str, Any] | None, summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `sylva-ray evaluate` adds."""
    if found is None or summary is None:
        return {"evaluation": None, "attacked_figures": {}}
    drawn = attacked_figures(found, summary["class_names"])
    return {
        "evaluation": found,
        "attacked_figures": {name: Markup(svg(f, f"attacked-{name}", ATTACKED[name])) for name, f in drawn.items()},
        "attack_rows": attack_rows(found),
        "attacked_failed": [check for check in found.get("checks", []) if not check["passed"]],
        "gallery": gallery(found),
    }


def _stages(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """``(heading, accuracies)`` in time's order; phase 1 is a stage of its own only if a phase 2 follows it."""
    initial, phase1, final = (summary.get(name) for name in ("initial", "phase1", "final"))
    named = [("before", initial)]
    named += [("phase 1", phase1), ("phase 2", final)] if summary["layer_game"] else [("after", final or phase1)]
    return [(heading, stage) for heading, stage in named if stage]


def _fleet_rows(
    summary: Mapping[str, Any], stages: Sequence[tuple[str, Mapping[str, Any]]], titles: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row per condition and one for the majority answer: mean per stage, then how the last stage spreads."""
    end = stages[-1][1]
    rows = [
        {
            "name": "benign",
            "means": [stage["benign_accuracy"]["mean"] for _, stage in stages],
            "end": end["benign_accuracy"],
            "balanced": end["benign_balanced_accuracy"]["mean"],
        }
    ]
    for label, spread in end["robust_accuracy"].items():
        rows.append(
            {
                "name": titles.get(label, label),
                "means": [stage["robust_accuracy"].get(label, {}).get("mean") for _, stage in stages],
                "end": spread,
                "balanced": end["robust_balanced_accuracy"][label]["mean"],
            }
        )
    majority = summary["majority"]
    name = "always a client's majority class"
    rows.append({"name": name, "means": [majority["mean"]] * len(stages), "end": majority, "balanced": None})
    return rows


def _client_rows(summary: Mapping[str, Any], stages: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row per client: sizes, accuracies per stage, what was refined."""
    attack = next(iter(stages[-1][1]["robust_accuracy"]), None)
    rows = []
    for client in summary["clients"]:
        index = client["client"]
        benign = [stage["benign_accuracy"]["per_client"][index] for _, stage in stages]
        robust = [stage["robust_accuracy"][attack]["per_client"][index] for _, stage in stages] if attack else []
        rows.append({**client, "benign": benign, "robust": robust, "layers": _layers(summary["layer_game"], index)})
    return rows


def _layers(game: Mapping[str, Any] | None, client: int) -> str:
    """Names of a client's selected layers."""
    if game is None:
        return ""
    chosen = [name for name, on in zip(game["players"], game["selected"][client], strict=True) if on]
    names = ", ".join(name.removeprefix("blocks.") for name in chosen) or "none"
    return f"{names} (not kept)" if chosen and not game["refined_epochs"][client] else names


def _other_warnings(summary: Mapping[str, Any]) -> list[str]:
    """Warnings but those that repeat a check."""
    checks = tuple(f"check {check['name']} " for check in summary["checks"])
    return [text for text in summary["warnings"] if not (checks and text.startswith(checks))]
