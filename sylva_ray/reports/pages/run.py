"""The report of a run, ``report.html``: one self-contained page made from the files of the run folder.

The functions here turn the files into texts and table rows, and `run.html.jinja` lays them out. The template escapes
everything that comes from a user, such as names of classes and paths in the configuration.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from sylva_ray.core.credentials import mask_yaml
from sylva_ray.core.evaluation import Evaluation
from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Spread, Summary
from sylva_ray.federation.stages.kinds import is_exchange, title_of
from sylva_ray.federation.stages.layer_game.rankings.registry import RANKINGS
from sylva_ray.metrics.check_titles import CHECK_TITLES
from sylva_ray.reports.attack_titles import attack_titles_from_config
from sylva_ray.reports.figures.plots import figures
from sylva_ray.reports.figures.style import DARK, LIGHT, NARROW, WIDTH, figure_width, svg
from sylva_ray.reports.headlines import interval_of
from sylva_ray.reports.pages.evaluation import EVALUATION_DESCRIPTIONS, attack_rows, evaluation_figures, gallery
from sylva_ray.reports.pages.wording import bytes_text, percent, significant
from sylva_ray.reports.phases import PhaseEnd, phase_ends
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
"""Alternative texts of the figures, for screen readers."""

CONTENTS = (
    ("result", "Result"),
    ("fleet-accuracy", "Fleet"),
    ("threat-model", "Threat model and checks"),
    ("evaluation", "Evaluation"),
    ("fleet", "Data"),
    ("accuracy", "Accuracy and loss"),
    ("clients", "Clients"),
    ("layers", "Layers"),
    ("communication", "Communication"),
    ("seconds", "Computing time"),
    ("config", "To repeat"),
)
"""Sections of the page and what the table of contents calls them."""


MAX_LISTED_CLIENTS, NUM_WORST = 500, 50
"""Up to how many clients all are listed; how many of a larger fleet are, the others being found by a search."""


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` of a run; replace it if it exists. The report of an unfinished run says so.

    Args:
        folder: the run folder.

    Returns:
        The path of the report.

    Raises:
        UserError: a file in the folder is damaged.
    """
    records, summary = folder.load_records(), folder.load_summary()
    if summary is not None and summary.byzantine is not None:  # records of earlier versions do not name them
        attackers = summary.byzantine.attackers
        records = [record.model_copy(update={"byzantine": attackers}) for record in records]
    evaluation = folder.load_evaluation() if summary is not None else None
    config = folder.config_file.read_text() if folder.config_file.exists() else ""
    titles = attack_titles_from_config(config)
    drawings: list[Callable[[], dict[str, Figure]]] = [partial(figures, summary, records, titles)]
    view: dict[str, object] = {
        "title": summary.name if summary else folder.path.name,
        "summary": summary,
        "evaluation": evaluation,
        "steps_done": len(records),
        "has_partial": any(record.in_part for record in records),
        "has_panel": any(record.panel is not None for record in records),
        "last": _stage_text(records) if records else "",
        "resume_command": f"sylva-ray run {shlex.quote(str(folder))} --resume",
        "report_command": f"sylva-ray report {shlex.quote(str(folder))}",
        "light": LIGHT,
        "dark": DARK,
        "config": mask_yaml(config),
    }
    if summary is not None:
        view |= _view_of_summary(summary, records, titles)
        view["contents"] = [item for item in CONTENTS if item[0] != "evaluation" or evaluation is not None]
        view["command"] = f"sylva-ray run {shlex.quote(str(folder))} --out {shlex.quote(f'runs/{summary.name}-again')}"
    if summary is not None and evaluation is not None:
        view |= _view_of_evaluation(evaluation)
        drawings.append(partial(evaluation_figures, evaluation, summary.class_names))
    view["figures"] = figure_elements(drawings, DESCRIPTIONS | EVALUATION_DESCRIPTIONS)
    page = page_environment().get_template("run.html.jinja").render(view)
    return write_atomically(folder.report_file, page)


def figure_elements(
    drawings: Sequence[Callable[[], Mapping[str, Figure]]], descriptions: Mapping[str, str], prefix: str = ""
) -> dict[str, Markup]:
    """Draw figures in both widths, of which the style sheet shows the one that fits the screen.

    Args:
        drawings: functions that return figures by name.
        descriptions: alternative texts by name, for screen readers.
        prefix: of identifiers in the elements.
    """
    elements: dict[str, Markup] = {}
    for kind, inches in (("wide", WIDTH), ("narrow", NARROW)):
        with figure_width(inches):
            drawn = {name: figure for draw in drawings for name, figure in draw().items()}
        for name, figure in drawn.items():
            element = svg(figure, f"{prefix}{name}-{kind}", descriptions[name])
            elements[name] = elements.get(name, Markup("")) + Markup(f'<div class="{kind}">{element}</div>')
    return elements


def page_environment() -> Environment:
    """Return the Jinja environment of all pages. It escapes every value, and an undefined name is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["check_title"] = lambda name: CHECK_TITLES[name].title if name in CHECK_TITLES else "check"
    environment.globals["significant"] = significant
    environment.filters |= {"percent": percent, "bytes": bytes_text}
    return environment


def _view_of_summary(summary: Summary, records: Sequence[StageRecord], titles: Mapping[str, str]) -> dict[str, object]:
    """Return the template's variables of a finished run."""
    stages, game = phase_ends(summary, records), summary.layer_game
    own_shares = {group: own for record in records for group, own in record.own_shares().items()}
    end = stages[-1].accuracies
    main_attack = next(iter(end.robust_accuracy), None)
    return {
        "stages": stages,
        "end": end,
        "bounds": partial(_bounds_text, summary),
        "main_attack": main_attack,
        "main_attack_title": titles.get(main_attack, main_attack) if main_attack else "",
        "fleet_rows": _fleet_rows(summary, stages, titles),
        **_client_view(_client_rows(summary, stages, own_shares)),
        "mixed_groups": list(own_shares),
        "failed": [check for check in summary.checks if not check.passed],
        "warnings": summary.other_warnings(),
        "ranking": RANKINGS[game.selection if game else "shapley"],
        "hardware": summary.hardware.to_json() if summary.hardware else {},
        "num_selected": sum(map(sum, game.selected)) if game else 0,
    }


def _stage_text(records: Sequence[StageRecord]) -> str:
    """Return what the newest stage is called, e.g. ``round 5 of phase 1``."""
    name = records[-1].stage
    return f"round {sum(is_exchange(r.stage) for r in records)} of phase 1" if is_exchange(name) else title_of(name)


def _bounds_text(summary: Summary, spread: Spread) -> str:
    """Return the 95 % interval of a mean in brackets, after a space; nothing where it is unknown."""
    interval = interval_of(summary, spread)
    return f" ({100 * interval[0]:.1f} – {percent(interval[1])})" if interval else ""


def _view_of_evaluation(evaluation: Evaluation) -> dict[str, object]:
    """Return the template's variables of an evaluation."""
    return {
        "attack_rows": attack_rows(evaluation),
        "failed_evaluation_checks": [check for check in evaluation.checks or () if not check.passed],
        "gallery": gallery(evaluation),
    }


@dataclass(frozen=True)
class _FleetRow:
    """A condition: mean accuracy after each phase, the last one's spread over the clients, and its balanced mean."""

    name: str
    means: Sequence[float | None]
    end: Spread
    balanced: float | None


@dataclass(frozen=True)
class _ClientRow:
    """A client: its data, accuracies after each phase, shares of its own parameters, and refined layers.

    ``mark`` stands beside its number: a cross if it has collapsed, a word if it is Byzantine.
    """

    client: int
    train: int
    majority_share: float
    mark: str
    benign: Sequence[float]
    robust: Sequence[float]
    own: Sequence[float]
    layers: str


def _fleet_rows(summary: Summary, stages: Sequence[PhaseEnd], titles: Mapping[str, str]) -> list[_FleetRow]:
    """Return one row per condition and, last, one for the majority class."""
    end = stages[-1].accuracies
    benign = [stage.accuracies.benign_accuracy.mean for stage in stages]
    rows = [_FleetRow("benign", benign, end.benign_accuracy, end.benign_balanced_accuracy.mean)]
    for label, spread in end.robust_accuracy.items():
        robust = [stage.accuracies.robust_accuracy.get(label) for stage in stages]
        means = [stage_spread.mean if stage_spread else None for stage_spread in robust]
        rows.append(_FleetRow(titles.get(label, label), means, spread, end.robust_balanced_accuracy[label].mean))
    majority = summary.majority
    rows.append(_FleetRow("always a client's majority class", [majority.mean] * len(stages), majority, None))
    return rows


def _client_view(rows: Sequence[_ClientRow]) -> dict[str, object]:
    """Return the rows that are listed, and those of a large fleet as the data of a search.

    Of a large fleet the clients with the lowest robust accuracy are listed (benign, where nothing attacked them). The
    data has one list per client in the order of the columns; accuracies are in tenths of a per cent.
    """
    if len(rows) <= MAX_LISTED_CLIENTS:
        return {"client_rows": rows, "client_data": None}
    worst = sorted(rows, key=lambda row: ((row.robust or row.benign)[-1], row.benign[-1], row.client))[:NUM_WORST]
    data = [
        [
            row.client,
            row.mark,
            row.train,
            *(round(1000 * value) for value in (row.majority_share, *row.benign, *row.robust, *row.own)),
            row.layers,
        ]
        for row in rows
    ]
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # names of layers may be anything
    return {"client_rows": worst, "client_data": Markup(text)}


def _client_rows(
    summary: Summary, stages: Sequence[PhaseEnd], own: Mapping[str, Mapping[int, float]]
) -> list[_ClientRow]:
    """Return one row per client; robust accuracies are those under the first attack."""
    attack = next(iter(stages[-1].accuracies.robust_accuracy), None)
    rows = []
    for client in summary.clients:
        i = client.client
        benign = [stage.accuracies.benign_accuracy.per_client[i] for stage in stages]
        robust = [stage.accuracies.robust_accuracy[attack].per_client[i] for stage in stages] if attack else []
        layers = "" if summary.layer_game is None else summary.layer_game.refined(i)
        mark = "✗" if client.collapsed else "Byzantine" if client.byzantine else ""
        shares = [of_group[i] for of_group in own.values()]
        rows.append(_ClientRow(i, client.train, client.majority_share, mark, benign, robust, shares, layers))
    return rows
