"""The first sentence of a comparison with its interval, and which row is which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sylva_ray.metrics.intervals import fleet_interval
from sylva_ray.metrics.predictions import write_predictions
from sylva_ray.reports.compare import columns, compare, remarks
from sylva_ray.reports.compare.legend import legend
from sylva_ray.reports.compare.result import paired_interval, result_sentence, unpaired_interval
from sylva_ray.reports.compare.rows import Row
from sylva_ray.reports.compare.verdicts import notes
from sylva_ray.storage.run_folder import RunFolder
from tests.reports.test_comparison import config, summary

ATTACK = "pgd20-eps8"
TEST = [{"client": c, "collapsed": False, "test": 100} for c in range(2)]


def run(method: str, robust: float, seed: int = 0, source: str = "", **changes: Any) -> dict[str, Any]:
    """With this accuracy of both clients; that of `summary` is the balanced one, which is 0.1 lower."""
    balanced = (robust - 0.1, robust - 0.1)
    made = summary(method, seed, robust=balanced, attacks=(ATTACK,), clients=TEST, **changes)
    return made | {"source": source}


def rows_of(*runs: dict[str, Any]) -> list[Row]:
    return compare(runs)


def test_rows_have_letters_and_references_have_none() -> None:
    rows = rows_of(*(run(f"method_{number}", 0.3) for number in range(28)))
    assert [row.letter for row in rows][:3] == ["", "A", "B"]
    assert [row.letter for row in rows][-3:] == ["Z", "AA", "AB"]


def test_the_sentence_names_the_best_row_its_lead_and_the_interval() -> None:
    rows = rows_of(run("sylva", 0.40), run("per_lora", 0.20))
    low, high = fleet_interval(0.4, [100, 100])
    text = result_sentence(rows)
    assert text.startswith(f"Under {ATTACK}, row A (sylva) classifies 40.0 % ({100 * low:.1f} to {100 * high:.1f})")
    assert "20.0 points more than row B (per_lora); 95 % interval of the difference: " in text
    assert "chance" not in text
    assert "may be due to chance" in result_sentence(rows_of(run("sylva", 0.40), run("per_lora", 0.38)))
    assert remarks(rows)[0] == ("bold", [text])


def test_the_sentence_of_one_row_has_no_lead_and_without_images_no_interval() -> None:
    assert "points" not in result_sentence(rows_of(run("sylva", 0.4)))
    unknown = compare([summary("a", robust=(0.3, 0.3)), summary("b", robust=(0.1, 0.1))])
    assert "(a) classifies 40.0 % of the images" in result_sentence(unknown)
    assert "interval" not in result_sentence(unknown)


def test_there_is_no_sentence_about_different_fleets_or_attacks() -> None:
    assert not result_sentence(rows_of(run("a", 0.4), run("b", 0.2, dataset="cifar10")))
    other = summary("b", attacks=("pgd20-eps4",))
    assert not result_sentence(compare([run("a", 0.4), other]))


def test_seeds_that_may_share_test_images_do_not_make_an_interval_narrower() -> None:
    """All seeds draw their images from one test set; how much they differ over seeds widens the interval."""
    (one,) = compare([run("sylva", 0.4, test_images=100)])[1:]
    three = compare([run("sylva", 0.4, seed, test_images=100) for seed in range(3)])[-1]
    assert one.distinct == three.distinct == 100
    low, high = fleet_interval(0.4, [100, 100], 100)
    alike = result_sentence(rows_of(*(run("sylva", 0.4, seed, test_images=100) for seed in range(3))))
    assert f"40.0 % ({100 * low:.1f} to {100 * high:.1f}) of" in alike
    spread_out = [run("sylva", 0.4 + step, seed, test_images=100) for seed, step in enumerate((-0.2, 0.0, 0.2))]
    wide = 1.96 * 0.2 / 3**0.5
    expected = f"({100 * (0.4 - np.hypot(0.4 - low, wide)):.1f} to {100 * (0.4 + np.hypot(high - 0.4, wide)):.1f})"
    assert expected in result_sentence(rows_of(*spread_out))


def predictions(folder: Path, hits: list[int], labels: np.ndarray) -> str:
    """Write predictions of two clients of which the first so many are right."""
    folder.mkdir()
    wrong = [np.where(np.arange(len(labels)) < count, labels, labels + 1) for count in hits]
    write_predictions(RunFolder(folder), [{"benign": labels, ATTACK: right} for right in wrong], [labels, labels])
    return str(folder)


def test_runs_on_the_same_images_are_compared_image_by_image(tmp_path: Path) -> None:
    """Where one is right wherever the other is, the paired interval is much narrower, and does not hold 0."""
    labels = np.arange(100) % 10
    better = run("sylva", 0.44, source=predictions(tmp_path / "a", [44, 44], labels))
    worse = run("per_lora", 0.40, source=predictions(tmp_path / "b", [40, 40], labels))
    _, a, b = compare([better, worse])
    paired, unpaired = paired_interval(a, b, ATTACK), unpaired_interval(a, b, ATTACK)
    assert paired is not None
    assert unpaired is not None
    assert 0 < paired[0] < 0.04 < paired[1] < unpaired[1]
    assert unpaired[0] < 0
    assert "chance" not in result_sentence([a, b])
    other_images = run("per_lora", 0.40, source=predictions(tmp_path / "c", [40, 40], labels + 1))
    assert paired_interval(a, compare([other_images])[1], ATTACK) is None
    assert paired_interval(a, compare([run("x", 0.4, source=str(tmp_path / "gone"))])[1], ATTACK) is None


def test_the_legend_has_runs_and_the_settings_that_differ() -> None:
    runs = [
        run("sylva", 0.4, seed, f"runs/{name}-s{seed}", config=config(lora={"rank": rank}))
        for name, rank in (("low", 2), ("high", 8))
        for seed in (0, 1)
    ]
    found = legend(compare(runs))
    assert found.keys == ("rank",)
    assert found.has_columns
    assert [(row.letter, row.runs, row.values) for row in found.rows] == [
        ("A", "low-s0, low-s1", ("2",)),
        ("B", "high-s0, high-s1", ("8",)),
    ]
    assert found.lines()[0] == "A  sylva; low-s0, low-s1; rank=2"


def test_columns_without_values_and_dashes_of_references_are_left_out() -> None:
    made = run("a", 0.4, communication={"upload_bytes_per_client_round": 0, "total_bytes": 0, "full_model_ratio": None})
    shown = columns(compare([made]))
    assert "ratio" not in [column.heading for column in shown]
    assert not [cell for column in shown for cell in column.cells if "–" in cell]


def test_with_equal_shares_of_test_images_there_are_balanced_accuracies_only() -> None:
    def headings(*shares: str) -> set[str]:
        partitions = [config()["partition"] | {"test_shares": one} for one in shares]
        rows = compare([run("a", 0.4) | {"config": config() | {"partition": partition}} for partition in partitions])
        accuracies = [column for column in columns(rows) if column.kind == "accuracy"]
        assert any("equal class shares" in note for note in notes(rows)) == (set(shares) == {"equal"})
        assert all(all(column.cells) for column in accuracies) == (set(shares) == {"equal"})  # of the majority, too
        if len(shares) == 1:
            assert ("as many of each class" in result_sentence(rows)) == (shares == ("equal",))
        return {column.heading for column in accuracies}

    assert headings("own") == {"plain", "balanced"}
    assert headings("equal") == {"balanced"}
    assert headings("equal", "own") == {"plain", "balanced"}


@pytest.mark.parametrize("std", [None, 0.02])
def test_the_spread_over_seeds_widens_the_unpaired_interval(std: float | None) -> None:
    offsets = (-0.02, 0.02) if std else (0, 0)
    a, b = (
        compare([run(name, mean + offset, seed) for seed, offset in enumerate(offsets)])[1]
        for name, mean in (("a", 0.5), ("b", 0.3))
    )
    found = unpaired_interval(a, b, ATTACK)
    assert found is not None
    low, high = found
    assert (low + high) / 2 == pytest.approx(0.2)
    assert (high - low > 0.16) == bool(std)
