"""``sylva-ray compare`` on run folders, files and a real MLflow store, with its page and its plots."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from sylva_ray.cli import app
from sylva_ray.config.data import DatasetSection
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.observers.mlflow.tracker import experiment_files, send_run
from sylva_ray.observers.sources import load_runs
from sylva_ray.reports.compare import compare
from sylva_ray.reports.compare.points import MAX_LABELS, _labelled
from sylva_ray.reports.compare.tables import page, plot
from sylva_ray.reports.compare.verdicts import warnings
from sylva_ray.reports.figures.labels import place_labels, text_extents
from sylva_ray.reports.figures.style import LIGHT, svg
from sylva_ray.reports.figures.tradeoff import MAX_NAME, Panel, PlotPoint, draw_tradeoff
from sylva_ray.reports.pages.compare import render
from sylva_ray.storage.run_folder import RunFolder
from tests.reports.synthetic_run import make_config, make_run


def experiment(method: str = "sylva", seed: int = 0, **sections: Any) -> ExperimentConfig:
    config = make_config(4, rounds=2)
    algorithm = config.algorithm.model_copy(update={"name": method})
    return config.model_copy(update={"algorithm": algorithm, "seed": seed, **sections})


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``runs/`` with two seeds of one method and one of another; the working folder is the one above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs"
    make_run(folder / "sylva-0", experiment())
    make_run(folder / "sylva-1", experiment(seed=1))
    make_run(folder / "local-0", experiment("local_lora"), phase2=False)
    summary = json.loads((folder / "local-0" / "summary.json").read_text())
    other = json.loads((folder / "sylva-0" / "summary.json").read_text())  # one seed deals one fleet
    (folder / "local-0" / "summary.json").write_text(json.dumps(summary | {"label_matrix": other["label_matrix"]}))
    return folder


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["compare", *arguments])
    return result.exit_code, result.stdout, result.stderr


def results(rows: list[Any]) -> set[tuple[str, tuple[int, ...]]]:
    return {(row.name, row.seeds) for row in rows if row.stage == "final"}


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("runs")
def test_a_folder_of_runs_becomes_a_table_and_files(tmp_path: Path) -> None:
    out = ["--out", "a.html", "--out", "b.csv", "--out", "c.md"]
    code, text, _ = call("runs", *out)
    assert code == 0
    for part in ("majority", "sylva, phase 1", "local_lora", "‡ check S14 FAILED", "dominated", "the seeds differ"):
        assert part in text
    assert text.splitlines()[-3:] == ["a.html", "b.csv", "c.md"]
    lines = list(csv.DictReader((tmp_path / "b.csv").open()))
    assert {line["row"] for line in lines} == {"majority", "sylva, phase 1", "sylva", "local_lora"}
    (mean,) = (line for line in lines if (line["row"], line["statistic"]) == ("sylva", "mean"))
    finals = [json.loads((tmp_path / f"runs/sylva-{s}/summary.json").read_text())["final"] for s in (0, 1)]
    expected = [final["benign_balanced_accuracy"]["mean"] for final in finals]
    assert float(mean["benign_balanced_accuracy"]) == pytest.approx(sum(expected) / 2, abs=1e-12)
    assert "| method |" in (tmp_path / "c.md").read_text()
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "a.html", "b.csv", "c.md"}


@pytest.mark.parametrize("sources", [["runs"], ["runs/sylva-0", "runs/sylva-1", "runs/local-0/summary.json"]])
@pytest.mark.usefixtures("runs")
def test_folders_and_files_give_the_same_rows(sources: list[str]) -> None:
    summaries, left_out = load_runs(sources)
    assert left_out == []
    assert results(compare(summaries)) == {("sylva", (0, 1)), ("local_lora", (0,))}


def test_the_config_beside_a_summary_tells_variants_apart(runs: Path) -> None:
    lora = experiment().lora.model_copy(update={"rank": 32})
    make_run(runs / "wide", experiment(lora=lora))
    assert results(compare(load_runs(["runs"])[0])) == {
        ("sylva (rank=8)", (0, 1)),
        ("sylva (rank=32)", (0,)),
        ("local_lora", (0,)),
    }


def test_image_folders_of_one_name_are_not_known_to_be_the_same(runs: Path) -> None:
    """They may be two copies of one data set; the paths of others, such as digits, say nothing."""
    for seed, place in enumerate(("/a/data", "/b/data")):
        config = experiment(seed=seed, dataset=DatasetSection(name=f"imagefolder:{place}"))
        make_run(runs / "folders" / str(seed), config)
    rows = compare(load_runs(["runs/folders"])[0])
    (warning,) = (text for text in warnings(rows) if "NOT KNOWN" in text)
    assert "in 2 folders of one name" in warning
    assert "imagefolder:/a/data, imagefolder:/b/data" in warning
    assert not [text for text in warnings(compare(load_runs(["runs/sylva-0", "runs/sylva-1"])[0])) if "NOT KN" in text]


def test_a_plain_file_may_name_its_method(runs: Path) -> None:
    summary = json.loads((runs / "sylva-0" / "summary.json").read_text())
    Path("result.json").write_text(json.dumps(summary | {"method": "Sylva, as published", "seed": 7}))
    assert results(compare(load_runs(["result.json"])[0])) == {("Sylva, as published", (7,))}


def test_an_unfinished_run_in_a_folder_is_left_out_with_a_warning(runs: Path) -> None:
    make_run(runs / "stopped", experiment(seed=5), finished=False)
    code, text, _ = call("runs", "--out", "a.html")
    assert code == 0
    said = f"{Path('runs/stopped')} has not finished and is left out"
    assert f"! {said}" in text
    assert said in Path("a.html").read_text()


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = {
    "nothing of that name": (("nowhere",), ["nowhere", "is not a file or folder", "run folder", "--uri"]),
    "an empty folder": (("empty",), ["empty", "is not a run folder and does not contain one", "FILE.json"]),
    "a file that is no JSON": (("notes.txt",), ["notes.txt", "is not JSON"]),
    "JSON that is no summary": (
        ("other.json",),
        ["other.json", "= 'other.json': is not a summary of a finished run", "algorithm"],
    ),
    "JSON that is a list": (("list.json",), ["list.json", "a JSON object is needed"]),
    "a binary file": (("binary.json",), ["binary.json", "not a text in UTF-8"]),
    "an unfinished run": (("stopped",), ["stopped", "has not finished", "sylva-ray run stopped --resume"]),
    "a folder of unfinished runs": (("half",), ["half", "holds no finished run", "run half/one --resume"]),
    "a sweep that was stopped before its first trial": (("sweep",), ["holds no finished run", "tune sweep --resume"]),
    "a sweep of unfinished trials": (("trials",), ["holds no finished run", "sylva-ray tune trials --resume"]),
    "a damaged config": (("damaged",), ["damaged", "config.yaml"]),
    "one bad among good ones": (("runs", "nowhere"), ["nowhere"]),
    "a format that we do not write": (("runs", "--out", "x.pdf"), ["--out", "x.pdf", ".html, .csv, .md"]),
    "a place that does not exist": (("runs", "--out", "no/x.csv"), ["--out", "no/x.csv", "does not exist"]),
    "a folder as target": (("runs", "--out", "folder.csv"), ["--out", "folder.csv", "is a folder"]),
    "a store that does not exist": (("name", "--uri", "sqlite:///no.db"), ["name", "no.db"]),
    "a store that is none": (("name", "--uri", "sqlite:///notes.txt"), ["--uri", "notes.txt"]),
    "no source": ((), ["Missing argument"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(case: str, runs: Path, tmp_path: Path) -> None:
    arguments, says = BAD[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "notes.txt").write_text("not a summary, and not a database, but long enough to look at" * 40)
    (tmp_path / "other.json").write_text('{"answer": 42}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    make_run(tmp_path / "stopped", experiment(), finished=False)
    make_run(tmp_path / "half" / "one", experiment(), finished=False)
    make_run(tmp_path / "trials" / "trials" / "p-s0", experiment(), finished=False)
    (tmp_path / "sweep").mkdir()
    for name in ("sweep", "trials"):
        (tmp_path / name / "space.yaml").write_text("name: sweep\n")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "summary.json").write_text((runs / "sylva-0" / "summary.json").read_text())
    (tmp_path / "damaged" / "config.yaml").write_text("training: [1, 2\n")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(*arguments)
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert out == ""
    for part in says:
        assert part in err, err
    assert sorted(tmp_path.rglob("*")) == before


# -- MLflow ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_mlflow_experiment_holds_the_same_rows(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    for name in ("sylva-0", "sylva-1", "local-0"):
        tracking = make_config(experiment="thesis").tracking
        config = experiment("local_lora" if "local" in name else "sylva", int(name[-1]), tracking=tracking)
        assert send_run(RunFolder(runs / name), config) == []
    store = f"sqlite:///{runs / 'mlflow.db'}"
    tracked = experiment_files("thesis", store, ("summary.json", "config.yaml"))
    assert tracked is not None
    assert {name: set(files) for name, files in tracked.values()} == {
        name: {"summary.json", "config.yaml"} for name in ("sylva-0", "sylva-1", "local-0")
    }
    assert json.loads(next(files for name, files in tracked.values() if name == "sylva-1")["summary.json"])["seed"] == 1
    assert experiment_files("nothing", store, ("summary.json",)) is None

    by_name, left_out = load_runs(["thesis"])  # runs/mlflow.db is the default
    assert left_out == []
    assert results(compare(by_name)) == results(compare(load_runs(["runs"])[0]))
    both = compare(load_runs(["runs", "thesis"])[0])  # every run twice
    assert results(both) == results(compare(by_name))
    assert {row.repeats for row in both if row.stage == "final"} == {1, 2}

    client = mlflow.MlflowClient(tracking_uri=store)
    known = client.get_experiment_by_name("thesis")
    client.create_run(known.experiment_id, run_name="stopped")
    assert load_runs(["thesis"], store)[1] == [
        "run 'stopped' of experiment 'thesis' has no summary.json and is left out"
    ]
    client.create_experiment("barren", artifact_location=(runs / "mlartifacts").as_uri())
    for name, says in (("barren", "has no run with a summary.json"), ("nothing", "no experiment of that name")):
        code, _, err = call(name)
        assert code == 2
        assert name in err
        assert says in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(runs / "sylva-0")
    assert len(load_runs(["thesis"])[0]) == 3


def test_an_unreachable_server_is_one_line(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="the request for experiment 'thesis' failed") as caught:
        load_runs([str(runs), "thesis"], "http://user:s3cret@127.0.0.1:9")
    assert "s3cret" not in str(caught.value)


# -- the page ----------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Tags, references and the visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def summaries(methods: list[str], num_seeds: int = 2) -> list[dict[str, Any]]:
    """Return summaries with random accuracies; those of the same seed have the same fleet."""
    draw = np.random.default_rng(1)
    summaries = []
    for method in methods:
        level = {
            "benign": draw.uniform(0.4, 0.7),
            "pgd20-eps4": draw.uniform(0.2, 0.4),
            "pgd20-eps8": draw.uniform(0, 0.3),
        }
        for seed in range(num_seeds):
            spreads = {}
            for condition, mean in level.items():
                value = float(np.clip(mean + draw.normal(0, 0.01), 0, 1))
                spreads[condition] = {"mean": value, "worst_decile": 0.7 * value}
            attacks = {name: s for name, s in spreads.items() if name != "benign"}
            upload = int(draw.choice([0, 221_184, 10_848_040]))
            summaries.append(
                {
                    "algorithm": method,
                    "seed": seed,
                    "dataset": "digits",
                    "num_clients": 10,
                    "final": {
                        "benign_accuracy": spreads["benign"],
                        "benign_balanced_accuracy": spreads["benign"],
                        "robust_accuracy": attacks,
                        "robust_balanced_accuracy": attacks,
                    },
                    "majority": {"mean": 0.4, "worst_decile": 0.3},
                    "communication": {"upload_bytes_per_client_round": upload, "total_bytes": 20 * upload},
                    "seconds": {"total": 60.0},
                }
            )
    return summaries


def test_the_page_is_self_contained_and_complete() -> None:
    described = {
        "partition": {"num_clients": 10},
        "evaluation": {"attacks": [{"epsilon": "4/255"}, {"epsilon": "8/255"}]},
    }
    runs = [run | {"config": described} for run in summaries(["sylva", "local_lora", "undefended"])]
    rows = compare(runs)
    html = render(page(rows, ["runs/x has not finished and is left out"]))
    tags = Tags(html)
    assert not {"script", "link", "iframe", "object", "img"} & set(tags.tags)
    assert all(reference.startswith(("#", "data:")) for reference in tags.references)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", html)
    assert tags.tags.count("svg") == 4  # each twice: wide, and for phones
    assert "prefers-color-scheme: dark" in html
    for row in rows:
        assert row.name in tags.text
    value = rows[1].accuracy["benign", "balanced_accuracy", "mean"]
    assert value.std is not None
    assert f"{100 * value.mean:.1f}±{100 * value.std:.1f}" in tags.text
    assert "PGD-20 at epsilon 8/255" in tags.text
    assert "balanced PGD-20 at epsilon 8/255 accuracy" in tags.text
    assert "runs/x has not finished" in tags.text
    number = "[0-9.]+ ± [0-9.]+ %"
    assert re.search(f"<title>{rows[1].name}: benign accuracy, balanced {number}, robust .* {number}</title>", html)


def test_all_svg_colours_follow_the_scheme() -> None:
    figure = svg(draw_tradeoff(page(compare(summaries(["a", "b"]))).panels["tradeoff"]), "tradeoff", "x")
    assert not [colour for colour in LIGHT.values() if colour in figure]
    assert "var(--series-1)" in figure


def test_hostile_names_are_text() -> None:
    html = render(page(compare(summaries(["<script>alert(1)</script>", "$\\frac{", '"&amp;'])), ["<b>left</b>"]))
    tags = Tags(html)
    assert "script" not in tags.tags
    assert "$\\frac{" in tags.text
    assert '"&amp;' in tags.text
    assert "<b>left</b>" in tags.text


def test_without_a_common_attack_there_is_a_table_and_no_plot() -> None:
    runs = summaries(["a", "b"], 1)
    for run, attack in zip(runs, ("pgd20-eps4", "pgd20-eps8"), strict=True):
        for kind in ("robust_accuracy", "robust_balanced_accuracy"):
            run["final"][kind] = {attack: run["final"][kind][attack]}
    tags = Tags(render(page(compare(runs))))
    assert "svg" not in tags.tags
    assert "No attack is common to all rows" in tags.text


# -- the plots ---------------------------------------------------------------------------------------------------------


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("num_methods", [1, 3, 25])
@pytest.mark.parametrize("kind", ["tradeoff", "bytes"])
def test_every_point_has_its_name_and_no_two_labels_overlap(num_methods: int, kind: str) -> None:
    methods = [f"method_{number}" for number in range(num_methods)]
    figure = draw_tradeoff(page(compare(summaries(methods))).panels[kind])
    assert sorted(texts_of(figure)) == sorted(2 * methods)
    assert no_overlap(figure)


def no_overlap(figure: Figure) -> bool:
    """Return whether no two labels overlap; assert that all of them are within the axes."""
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        frame = axes.get_window_extent()
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
        assert all(frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
        for index, box in enumerate(boxes):
            if any(box.overlaps(other) for other in boxes[index + 1 :]):
                return False
    return True


@pytest.mark.long
def test_where_names_would_overlap_points_are_numbered_as_in_the_table() -> None:
    draw_from = np.random.default_rng(0)
    places = draw_from.uniform(0.5, 0.512, (40, 2))
    names = [f"a long name of a method, number {number}" for number in range(40)]
    points = [PlotPoint(str(i + 1), names[i], x, 0.0, y, 0.0, False, False) for i, (x, y) in enumerate(places)]
    figure = draw_tradeoff([Panel("title", "x", "y", tuple(points))])
    assert sorted(texts_of(figure), key=int) == [str(number) for number in range(1, 41)]
    key = [text.get_text() for text in figure.texts]
    assert len(key) == 40
    assert key[6].startswith("7  a long name")
    assert all(len(line) <= MAX_NAME + 4 for line in key)
    assert no_overlap(figure)


def test_labels_that_fit_nowhere_are_refused() -> None:
    figure = Figure(figsize=(2, 1))
    axes = figure.subplots()
    texts = ["as wide as the whole figure, and more than that"] * 2
    assert text_extents(axes, texts, 8)[0, 0] > axes.get_window_extent().width
    assert place_labels(axes, np.array([[0.5, 0.5], [0.6, 0.6]]), np.zeros((2, 2)), texts, 8)[1] is False


def test_an_upload_of_zero_bytes_has_a_tick_on_the_logarithmic_axis() -> None:
    points = [
        PlotPoint("1", "local", 0.0, 0.0, 0.5, 0.0, True, False),
        PlotPoint("2", "sylva", 221_184.0, 0.0, 0.6, 0.1, True, False),
    ]
    (axes,) = draw_tradeoff([Panel("title", "upload", "accuracy", tuple(points), in_bytes=True)]).axes
    labels = {float(tick): axes.xaxis.get_major_formatter()(tick) for tick in axes.get_xticks()}
    assert labels[221_184 / 4] == "none"
    assert "200 kB" in labels.values()
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] < 221_184 / 4 < 221_184 < axes.get_xlim()[1]


def test_markers_grow_with_the_upload_and_are_equal_where_uploads_are() -> None:
    uploads = {"local": 0, "b_alone": 1_000, "both": 10_000, "full": 1_000_000}

    def panels(of_method: dict[str, int]) -> Sequence[Panel]:
        given = summaries(list(uploads), num_seeds=1)
        for one in given:
            one["communication"]["upload_bytes_per_client_round"] = of_method[one["algorithm"]]
        return page(compare(given)).panels["tradeoff"]

    equal = panels(dict.fromkeys(uploads, 1_000))
    assert {point.size for panel in equal for point in panel.points if not point.phase1} == {6.0}
    for panel in panels(uploads):
        sizes = {point.name: point.size for point in panel.points if not point.phase1}
        local, b_alone, both, full = (sizes[name] for name in uploads)
        assert local < b_alone < both < full
        assert full - both == pytest.approx(2 * (both - b_alone))  # as the logarithms


@pytest.mark.parametrize("kind", ["tradeoff", "bytes"])
def test_a_plot_is_a_png(kind: Any, tmp_path: Path) -> None:
    path = plot(compare(summaries(["a", "b"])), tmp_path / "x.png", kind)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_of_many_points_those_on_the_front_are_labelled() -> None:
    """To place labels takes a time that grows with the square of their number."""
    points = [PlotPoint(str(i), f"p{i}", i / 100, 0.0, 0.5, 0.0, i == 59, phase1=i < 20) for i in range(60)]
    labelled = [index for index, point in enumerate(_labelled(points)) if point.labelled]
    assert labelled == [*range(20, 20 + MAX_LABELS - 1), 59]
    assert all(point.labelled for point in _labelled(points[:MAX_LABELS]))
