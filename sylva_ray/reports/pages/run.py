"""``report.html``: one self-contained page about a run, from the files of its run folder only.

Functions here turn the files into words and rows, `run.html.jinja` lays them out; everything that comes from a user
(names of classes, paths in the config) is escaped there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sylva_ray.core.credentials import mask_credentials
from sylva_ray.core.evaluation import Evaluation
from sylva_ray.core.records import GameRecord
from sylva_ray.core.summary import Spread, StageAccuracies, Summary
from sylva_ray.federation.stages.layer_game.rankings.registry import RANKINGS
from sylva_ray.reports.attack_titles import attack_titles_from_config
from sylva_ray.reports.figures.plots import figures
from sylva_ray.reports.figures.style import DARK, LIGHT, svg
from sylva_ray.reports.pages.evaluation import EVALUATION_DESCRIPTIONS, attack_rows, evaluation_figures, gallery
from sylva_ray.reports.pages.wording import bytes_text, percent
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.run_folder import RunFolder

DESCRIPTIONS = {
    "fleet": "Heatmap of training images per class and client",
    "accuracy": "Lines of benign and robust accuracy over rounds",
    "clients": "Accuracy of every client before and after the defence",
    "layers": "Heatmap of what ranked the layers, per layer and client",
    "communication": "Bars of transmitted bytes against full-model training",
    "seconds": "Bars of seconds by stage",
}
"""What a screen reader says of each figure."""


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` of a run (again); of an unfinished run one that says so.

    Args:
        folder: of the run.

    Returns:
        The report's path.

    Raises:
        UserError: one of the folder's files is damaged.
    """
    records, summary = folder.load_records(), folder.load_summary()
    evaluation = folder.load_evaluation() if summary is not None else None
    config = folder.config_file.read_text() if folder.config_file.exists() else ""
    titles = attack_titles_from_config(config)
    drawn = {name: (figure, DESCRIPTIONS[name]) for name, figure in figures(summary, records, titles).items()}
    view: dict[str, object] = {
        "title": summary.name if summary else folder.path.name,
        "summary": summary,
        "evaluation": evaluation,
        "steps_done": len(records),
        "last": records[-1] if records else None,
        "light": LIGHT,
        "dark": DARK,
        "config": mask_credentials(config),
    }
    if summary is not None:
        view |= _view_of_summary(summary, titles)
    if summary is not None and evaluation is not None:
        view |= _view_of_evaluation(evaluation)
        attacked = evaluation_figures(evaluation, summary.class_names)
        drawn |= {name: (figure, EVALUATION_DESCRIPTIONS[name]) for name, figure in attacked.items()}
    view["figures"] = {name: Markup(svg(figure, name, description)) for name, (figure, description) in drawn.items()}
    page = page_environment().get_template("run.html.jinja").render(view)
    return write_atomically(folder.report_file, page)


def page_environment() -> Environment:
    """Return the environment that renders pages: everything is escaped, a name that is not defined is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "bytes": bytes_text}
    return environment


def _view_of_summary(summary: Summary, titles: Mapping[str, str]) -> dict[str, object]:
    """Collect what the template shows of a finished run."""
    stages, game = _stages(summary), summary.layer_game
    end = stages[-1].accuracies
    main_attack = next(iter(end.robust_accuracy), None)
    return {
        "stages": stages,
        "end": end,
        "main_attack": main_attack,
        "main_attack_title": titles.get(main_attack, main_attack) if main_attack else "",
        "fleet_rows": _fleet_rows(summary, stages, titles),
        "client_rows": _client_rows(summary, stages),
        "failed": [check for check in summary.checks if not check.passed],
        "warnings": summary.other_warnings(),
        "ranking": RANKINGS[game.selection if game else "shapley"],
        "hardware": summary.hardware.to_json() if summary.hardware else {},
        "num_selected": sum(map(sum, game.selected)) if game else 0,
    }


def _view_of_evaluation(found: Evaluation) -> dict[str, object]:
    """Collect what `sylva-ray evaluate` adds."""
    return {
        "attack_rows": attack_rows(found),
        "failed_evaluation_checks": [check for check in found.checks or () if not check.passed],
        "gallery": gallery(found),
    }


class _Stage(NamedTuple):
    """A part of the run that the tables have a column for."""

    heading: str
    accuracies: StageAccuracies


@dataclass(frozen=True)
class _FleetRow:
    """One condition: mean accuracy per stage, and how the last stage spreads over clients."""

    name: str
    means: Sequence[float | None]
    end: Spread
    balanced: float | None


@dataclass(frozen=True)
class _ClientRow:
    """One client: sizes, accuracies per stage, and what was refined."""

    client: int
    train: int
    majority_share: float
    collapsed: bool
    benign: Sequence[float]
    robust: Sequence[float]
    layers: str


def _stages(summary: Summary) -> list[_Stage]:
    """List the stages in time's order; phase 1 is one of its own only if a phase 2 follows it."""
    named = [("before", summary.initial)]
    named += (
        [("phase 1", summary.phase1), ("phase 2", summary.final)] if summary.layer_game else [("after", summary.final)]
    )
    return [_Stage(heading, stage) for heading, stage in named if stage]


def _fleet_rows(summary: Summary, stages: Sequence[_Stage], titles: Mapping[str, str]) -> list[_FleetRow]:
    """Make one row per condition, and one for the majority answer."""
    end = stages[-1].accuracies
    benign = [stage.accuracies.benign_accuracy.mean for stage in stages]
    rows = [_FleetRow("benign", benign, end.benign_accuracy, end.benign_balanced_accuracy.mean)]
    for label, spread in end.robust_accuracy.items():
        robust = [stage.accuracies.robust_accuracy.get(label) for stage in stages]
        means = [found.mean if found else None for found in robust]
        rows.append(_FleetRow(titles.get(label, label), means, spread, end.robust_balanced_accuracy[label].mean))
    majority = summary.majority
    rows.append(_FleetRow("always a client's majority class", [majority.mean] * len(stages), majority, None))
    return rows


def _client_rows(summary: Summary, stages: Sequence[_Stage]) -> list[_ClientRow]:
    attack = next(iter(stages[-1].accuracies.robust_accuracy), None)
    rows = []
    for client in summary.clients:
        i = client.client
        benign = [stage.accuracies.benign_accuracy.per_client[i] for stage in stages]
        robust = [stage.accuracies.robust_accuracy[attack].per_client[i] for stage in stages] if attack else []
        layers = _layers(summary.layer_game, i)
        collapsed = bool(client.collapsed)
        rows.append(_ClientRow(i, client.train, client.majority_share, collapsed, benign, robust, layers))
    return rows


def _layers(game: GameRecord | None, client: int) -> str:
    """Name a client's selected layers."""
    if game is None:
        return ""
    chosen = game.selected_layers(client)
    names = ", ".join(chosen) or "none"
    return f"{names} (not kept)" if chosen and not game.refined_epochs[client] else names
