"""The report of a run is complete, fetches nothing and escapes what comes from users."""

from __future__ import annotations

import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from sylva_ray.core.errors import UserError
from sylva_ray.core.evaluation import CertifiedLevel, PerClass
from sylva_ray.core.records import GameRecord
from sylva_ray.reports.attack_titles import attack_titles, attack_titles_from_config
from sylva_ray.reports.figures.plots import _layers, figures, robust_conditions
from sylva_ray.reports.figures.style import LIGHT, png, svg
from sylva_ray.reports.pages.evaluation import _certified, _classes, _transfer
from sylva_ray.reports.pages.run import write_report
from sylva_ray.storage.run_folder import RunFolder
from tests.reports.synthetic_run import make_config, make_run

SECTIONS = (
    "result",
    "fleet-accuracy",
    "threat-model",
    "fleet",
    "accuracy",
    "clients",
    "layers",
    "communication",
    "seconds",
    "config",
)
TITLES = attack_titles(make_config().evaluation.specs)
FIGURES = ["fleet", "accuracy", "clients", "layers", "communication", "seconds"]


class Page(HTMLParser):
    """Collects section ids, tags, references and the visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).replace("\xa0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "section":
            self.sections.append(str(values["id"]))
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(run_dir: Path, **options: Any) -> Page:
    make_run(run_dir, **options)
    return Page(write_report(RunFolder(run_dir)).read_text())


def test_a_finished_run_shows_every_section_and_figure(tmp_path: Path) -> None:
    page = report(tmp_path / "run")
    assert page.sections == list(SECTIONS)
    assert page.tags.count("svg") == 2 * len(FIGURES), "each is there in two widths"


def test_the_headline_carries_attack_epsilon_majority_and_failed_checks(tmp_path: Path) -> None:
    page = report(tmp_path / "run")
    summary = RunFolder(tmp_path / "run").load_summary()
    assert summary is not None
    head = page.text[: page.text.index("Accuracy of the fleet")]
    robust = summary.final.robust_accuracy["pgd20-eps8"].mean
    for expected in (f"{100 * robust:.1f} %", "PGD-20 at epsilon 8/255", f"{100 * summary.majority.mean:.1f} %"):
        assert expected in head
    assert "FAILED: no collapse (S14) : 1 client shows no defence" in head
    assert head.count("S14") == 1  # the warning that repeats the check is left out
    assert "step 3: client 2 missed the deadline" in head


def test_contents_lead_to_the_sections_and_failed_checks_to_their_explanation(tmp_path: Path) -> None:
    html = write_report(RunFolder(make_and_return(tmp_path / "run"))).read_text()
    targets = set(re.findall(r'href="#([\w-]+)"', html)) - set(re.findall(r'href="#([\w-]+)"', "".join(svgs_of(html))))
    assert {"result", "clients", "config", "check-S14"} <= targets
    assert targets <= set(re.findall(r'id="([\w-]+)"', html))


def svgs_of(html: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", html, re.DOTALL)


def test_a_reader_is_told_how_to_repeat_the_run(tmp_path: Path) -> None:
    page = report(tmp_path / "run")
    text = page.text[page.text.index("To repeat this run") :]
    assert f"sylva-ray run {tmp_path / 'run'} --out runs/synthetic-again" in text


def test_steps_are_named_by_their_stages_and_the_loss_is_drawn(tmp_path: Path) -> None:
    html = write_report(RunFolder(make_and_return(tmp_path / "run"))).read_text()
    texts = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", html))
    for expected in ("warm-up", "refinement", "training loss"):
        assert expected in texts


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    html = write_report(RunFolder(make_and_return(tmp_path / "run"))).read_text()
    page = Page(html)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", html)


def make_and_return(run_dir: Path) -> Path:
    make_run(run_dir)
    return run_dir


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = ["<script>alert(1)</script>-->", "$\\frac{", '"&amp;', *map(str, range(7))]
    config = make_config(run_name="</pre><script>alert(2)</script>")
    page = report(tmp_path / "run", config=config, class_names=hostile)
    assert "script" not in page.tags
    assert "$\\frac{" in page.text
    assert '"&amp;' in page.text
    assert "</pre><script>alert(2)</script>" in page.text


def test_a_password_in_the_tracking_uri_is_not_shown(tmp_path: Path) -> None:
    page = report(tmp_path / "run", config=make_config(uri="https://ada:s3cret@example.org"))
    assert "s3cret" not in page.text
    assert "https://***@example.org" in page.text


def test_without_a_second_phase_the_ends_before_and_after_phase_1_remain(tmp_path: Path) -> None:
    run_dir = make_and_return(tmp_path / "run")
    summary = json.loads((run_dir / "summary.json").read_text())
    summary |= {"final": None, "layer_game": None, "checks": []}
    summary["communication"] |= {"upload_bytes_per_client_round": 0, "total_bytes": 0, "full_model_ratio": None}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(RunFolder(run_dir)).read_text())
    assert page.sections == list(SECTIONS)
    assert page.tags.count("svg") == 2 * (len(FIGURES) - 1)
    for expected in (
        "before",
        "phase 1",
        "plays no layer game",
        "nothing is shared",
        "the robust accuracies are unverified",
    ):
        assert expected in page.text


@pytest.mark.long
def test_a_mixture_shows_what_every_client_kept_of_its_own(tmp_path: Path) -> None:
    run_dir = make_and_return(tmp_path / "run")
    assert "own share" not in Page(write_report(RunFolder(run_dir)).read_text()).text
    lines = (run_dir / "rounds.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    record["metrics"] |= {f"adapters_from_{name}": {str(i): 0.01 * i for i in range(6)} for name in ("global", "prior")}
    (run_dir / "rounds.jsonl").write_text("\n".join([*lines[:-1], json.dumps(record)]) + "\n")
    page = Page(write_report(RunFolder(run_dir)).read_text())
    assert "own share" in page.text
    assert re.findall(r"\b(?:100|9[02468]) %", page.text)[:6] == [f"{100 - 2 * i} %" for i in range(6)]


def test_a_run_without_attacks_is_about_benign_accuracy(tmp_path: Path) -> None:
    config = make_config()
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"attacks": ()})})
    page = report(tmp_path / "run", config=config)
    assert "attacked (" not in page.text
    assert "On unchanged images it classifies" in page.text


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    page = report(tmp_path / "run", finished=False)
    assert "This run has not finished. 6 stages are done, the last one is round 5 of phase 1" in page.text
    assert page.sections == ["result", "accuracy", "config"]
    assert page.tags.count("svg") == 2


def test_a_run_without_a_single_step_still_has_a_page(tmp_path: Path) -> None:
    assert "0 stages are done" in Page(write_report(RunFolder(tmp_path)).read_text()).text


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"name": ')
    with pytest.raises(UserError, match=r"summary\.json"):
        write_report(RunFolder(tmp_path))


@pytest.mark.long
def test_equal_files_give_equal_pages(tmp_path: Path) -> None:
    run_dir = make_and_return(tmp_path / "run")
    assert write_report(RunFolder(run_dir)).read_bytes() == write_report(RunFolder(run_dir)).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize(("num_clients", "num_classes"), [(1, 2), (100, 10), (300, 200)])
def test_any_size_draws_with_few_labels(tmp_path: Path, num_clients: int, num_classes: int) -> None:
    names = [f"class {c}" for c in range(num_classes)]
    make_run(tmp_path, make_config(num_clients, rounds=3), class_names=names)
    drawn = figures(RunFolder(tmp_path).load_summary(), RunFolder(tmp_path).load_records(), TITLES)
    assert list(drawn) == FIGURES
    for name, figure in drawn.items():
        element = ElementTree.fromstring(svg(figure, name, "a figure"))
        texts = [node for node in element.iter() if node.tag.endswith("text")]
        assert 0 < len(texts) <= 60
        assert len(svg(figure, name, "a figure")) < 500_000


def test_svg_leaves_the_colours_to_the_page_and_png_is_a_png(tmp_path: Path) -> None:
    make_run(tmp_path)
    drawn = figures(RunFolder(tmp_path).load_summary(), RunFolder(tmp_path).load_records(), TITLES)
    for name, figure in drawn.items():
        text = svg(figure, name, "a figure")
        assert not [colour for colour in LIGHT.values() if colour in text]
        assert "#000000" not in re.sub(r"clip-path[^;]*;", "", text)  # black text would vanish on a dark page
        assert "<text" in text
        assert png(figure).startswith(b"\x89PNG")


def test_attacks_made_for_checks_are_not_robust_accuracy(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert robust_conditions(RunFolder(tmp_path).load_records()) == ["pgd20-eps8", "pgd50x2-margin-eps4"]


def test_attacks_have_titles_from_the_config(tmp_path: Path) -> None:
    page = report(tmp_path / "run")
    for title in ("PGD-20 at epsilon 8/255", "PGD-50 (margin loss, 2 restarts) at epsilon 4/255"):
        assert title in page.text


def test_an_attack_that_no_config_defines_is_shown_by_its_label(tmp_path: Path) -> None:
    run_dir = make_and_return(tmp_path / "run")
    (run_dir / "config.yaml").write_text("evaluation: {attacks: [{name: unheard_of}]}")
    text = Page(write_report(RunFolder(run_dir)).read_text()).text
    assert "pgd20-eps8" in text
    assert "PGD-20" not in text


@pytest.mark.parametrize("text", ["", "[", "a: 1", "evaluation: {attacks: 3}", "evaluation: {attacks: [{name: [1]}]}"])
def test_a_config_without_valid_attacks_gives_the_title_of_the_unbounded_one(text: str) -> None:
    assert attack_titles_from_config(text) == {"pgd20-eps255": "PGD-20 at epsilon 255/255"}


def test_points_say_what_they_are_under_the_pointer(tmp_path: Path) -> None:
    page = report(tmp_path / "run", config=make_config(6))
    summary = RunFolder(tmp_path / "run").load_summary()
    assert summary is not None
    assert summary.initial is not None
    before, after = (end.benign_accuracy.per_client[3] for end in (summary.initial, summary.final))
    html = (tmp_path / "run" / "report.html").read_text()
    assert f"<title>client 3: {100 * before:.1f} % before, {100 * after:.1f} % after</title>" in html
    assert re.search(
        r"<title>benign, warm-up: [0-9.]+ %; middle 80 % of the clients [0-9.]+ to [0-9.]+ %</title>", html
    )
    assert re.search(r"<title>benign, round 2: [0-9.]+ %;", html)
    assert re.search(r"<title>training loss, round 2: [0-9.]+</title>", html)
    assert "hint:" not in html
    assert page.tags.count("svg") == 12


def large_page(folder: Path, num_clients: int = 600) -> str:
    make_run(folder, make_config(num_clients))
    return write_report(RunFolder(folder)).read_text()


def test_a_large_fleet_lists_its_worst_clients_and_holds_the_others_for_a_search(tmp_path: Path) -> None:
    page = large_page(tmp_path)
    summary = RunFolder(tmp_path).load_summary()
    assert summary is not None
    found = re.search(r'<script type="application/json" id="client-data">(.*?)</script>', page)
    assert found is not None
    data = json.loads(found[1])
    assert [row[0] for row in data] == list(range(600))
    robust = next(iter(summary.final.robust_accuracy.values())).per_client
    assert [row[9] for row in data] == [round(1000 * value) for value in robust], "before, phase 1 and 2; both kinds"
    table = page[page.index('<table id="client-table">') : page.index('<script type="application/json"')]
    listed = [int(number) for number in re.findall(r"<tr><td>(\d+)", table)]
    assert len(listed) == 50
    assert listed[0] == min(
        range(600), key=lambda client: (robust[client], summary.final.benign_accuracy.per_client[client])
    )
    assert max(robust[client] for client in listed) <= min(robust[c] for c in range(600) if c not in listed)
    assert "the mean of neighbouring clients" in page
    assert "each curve sorted on its own" in page


@pytest.mark.long
def test_the_page_grows_by_a_line_of_numbers_per_client(tmp_path: Path) -> None:
    sizes = [len(large_page(tmp_path / str(number), number)) for number in (600, 1200)]
    assert (sizes[1] - sizes[0]) / 600 < 80


def test_names_in_the_data_of_a_search_cannot_end_it(tmp_path: Path) -> None:
    make_run(tmp_path, make_config(600))
    text = (tmp_path / "summary.json").read_text()
    (tmp_path / "summary.json").write_text(text.replace('"head"', '"</script><b>"'))
    page = write_report(RunFolder(tmp_path)).read_text()
    assert "</script><b>" not in page
    assert "\\u003c/script>" in page


# -- figures of an evaluation ------------------------------------------------------------------------------------------


def test_a_certificate_is_drawn_no_further_than_it_reaches() -> None:
    """Between two radii, what the larger one certifies is known."""
    level = CertifiedLevel(
        sigma=0.12,
        draws=1000,
        alpha=0.001,
        images=10,
        abstained=0.0,
        radii=[0.0, 0.25, 0.3],
        mean=[1.0, 1.0, 0.0],
        per_client=[[1.0, 1.0, 0.0]],
    )
    (line,) = _certified([level]).axes[0].lines
    assert line.get_drawstyle() == "steps-pre"
    assert np.asarray(line.get_xydata()).tolist() == [[0.0, 1.0], [0.25, 1.0], [0.3, 0.0]]


def test_what_was_not_measured_is_grey_and_not_zero() -> None:
    (image,) = _transfer([[0.0, None], [1.0, 0.5]]).axes[0].images
    colours = np.asarray(image.get_array())
    assert tuple(colours[0, 1]) == pytest.approx(to_rgba(LIGHT["grid"]))
    assert colours[0, 0, 3] == 0.0, "an accuracy of 0 has no colour"


def test_long_names_of_classes_are_cut(recwarn: pytest.WarningsRecorder) -> None:
    name = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"
    figure = _classes(PerClass(images=[3, 4], benign=[0.5, 1.0], worst_case=[0.5, 0.0]), [name, "cat"])
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["great white shark… (3)", "cat (4)"]
    assert not [warning for warning in recwarn if "constrained" in str(warning.message)]


@pytest.mark.parametrize("num_clients", [2, 1000])
def test_a_client_without_values_is_grey_in_the_layers(num_clients: int) -> None:
    values = [[None, None], *[[0.1, -0.2]] * (num_clients - 1)]
    game = GameRecord(players=["blocks.0", "head"], shapley=values, selected=[[False, True]] * num_clients)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        figure = _layers(game, [])
        png(figure)
    colours = np.asarray(figure.axes[0].images[0].get_array())
    is_grey = [tuple(colour) == pytest.approx(to_rgba(LIGHT["grid"])) for colour in colours[0]]
    assert is_grey == [num_clients == 2] + [False] * (len(is_grey) - 1), "of many clients, a mean leaves it out"
