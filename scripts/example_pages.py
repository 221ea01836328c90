"""Build an example of every page, and look at each in Chromium: wide and on a phone, light and dark.

    PYTHONPATH=. python scripts/example_pages.py OUT            # the pages alone
    PYTHONPATH=. python scripts/example_pages.py OUT --check    # also a picture of each, and what is wrong with it
    PYTHONPATH=. python scripts/example_pages.py OUT --check --axe node_modules/axe-core/axe.min.js

The numbers in the pages are random. Chromium (``--browser``) is run without a window. A page is wrong if two texts
overlap, a text is cut off or has too little contrast, the page is wider than the screen, or axe-core finds a
violation. The exit code is 1 if a page is wrong.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sylva_ray.core.evaluation import Evaluation
from sylva_ray.core.yaml import parse_yaml
from sylva_ray.reports.compare import compare, page
from sylva_ray.reports.pages.compare import render as render_comparison
from sylva_ray.reports.pages.run import write_report
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.sweeps.report import render as render_sweep
from tests.reports.synthetic_run import make_config, make_run, spread
from tests.sweeps.test_results import make_space, result, sweep_of

WIDTHS = (1280, 420)
"""Of the screen, in pixels."""

SCHEMES = {"light": 1, "dark": 0}
"""``prefers-color-scheme``, and Chromium's number for it."""

PROBE = Path(__file__).with_name("page_probe.js")
TIMEOUT_S = 120


def build(out: Path) -> list[Path]:
    """Write one example of every page.

    Args:
        out: a folder, whose examples of earlier calls are replaced.

    Returns:
        The pages.
    """
    shutil.rmtree(out / "runs", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    pages = []
    for name, clients, finished in (("run", 6, True), ("many_clients", 40, True), ("unfinished", 6, False)):
        folder = RunFolder(out / "runs" / name)
        make_run(folder.path, make_config(clients), finished=finished)
        if name == "run":
            folder.write_evaluation(Evaluation.from_json(evaluation(), "an example"))
        pages.append(Path(shutil.copy(write_report(folder), out / f"{name}.html")))
    comparison = out / "compare.html"
    comparison.write_text(render_comparison(page(compare(comparison_runs(out)))))
    sweep = out / "sweep.html"
    trials = [result(r, seed, 0.9 - r / 40, r / 12 + seed / 50) for r in (2, 4, 8) for seed in (0, 1)]
    sweep.write_text(render_sweep(sweep_of(make_space("benign_accuracy", "robust_accuracy"), trials)))
    return [*pages, comparison, sweep]


def comparison_runs(out: Path) -> list[dict[str, Any]]:
    """Return summaries of three methods with two seeds each, with their configurations."""
    draw = np.random.default_rng(0)
    runs: list[dict[str, Any]] = []
    for method, lead in (("sylva", 0.08), ("per_lora", 0.03), ("fedavg_at", 0.0)):
        for seed in (0, 1):
            folder = out / "runs" / f"{method}-s{seed}"
            config = make_config().model_copy(update={"seed": seed})
            make_run(folder, config, phase2=method == "sylva")
            summary = json.loads((folder / "summary.json").read_text())
            for stage in ("phase1", "final"):
                for kind in ("robust_accuracy", "robust_balanced_accuracy"):
                    for attack, values in summary[stage][kind].items():
                        moved = np.clip(np.array(values["per_client"]) + lead - 0.1 + draw.normal(0, 0.02), 0, 1)
                        summary[stage][kind][attack] = spread(moved)
            if method != "sylva":  # it ends with phase 1, and has the clients of the other runs
                summary["final"] = summary["phase1"]
                summary["label_matrix"] = runs[seed]["label_matrix"]
            settings: Any = parse_yaml((folder / "config.yaml").read_text())
            settings["algorithm"] |= {"name": method}
            runs.append(summary | {"algorithm": method, "source": str(folder), "config": settings})
    return runs


def evaluation() -> dict[str, Any]:
    """Return an evaluation with everything that a page can show."""
    draw = np.random.default_rng(0)

    def row(mean: float, **more: Any) -> dict[str, Any]:
        values = np.clip(draw.normal(mean, 0.05, 6), 0, 1)
        return {
            "accuracy": spread(values) | {"worst_decile": float(values.min())},
            "balanced_accuracy": spread(0.9 * values) | {"worst_decile": float(0.9 * values.min())},
            "interval": [mean - 0.04, mean + 0.04],
            "images": 600,
        } | more

    def attack(mean: float, name: str, **settings: Any) -> dict[str, Any]:
        given = {"name": name, "epsilon": 8 / 255, "steps": 20, "step_size": 2 / 255} | settings
        costs = {"forwards": 12_000, "backwards": 12_000, "seconds": 9.0, "images_per_second": 66.0}
        return row(mean, settings=given, median_distance=5 / 255, **costs)

    epsilons = [e / 255 for e in (0, 1, 2, 4, 8, 16, 32, 64)]
    steps = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0]
    curves: dict[str, dict[str, Any]] = {
        "epsilon": {"x": epsilons, "mean": [0.7 * np.exp(-40 * e) for e in epsilons]},
        "steps": {"x": steps, "mean": [0.3 + 0.3 / step for step in steps]},
    }
    for curve in curves.values():
        spreads = np.clip(np.array(curve["mean"])[None] + draw.normal(0, 0.03, (6, 1)), 0, 1)
        curve |= {"per_client": spreads.tolist(), "images": 192}
    shade = np.arange(32)[None, :, None] * np.ones((3, 1, 32)) * 8.0
    return {
        "run": "synthetic",
        "algorithm": "sylva",
        "images": 600,
        "threat_model": {"norm": "L-infinity, in [0, 1] pixel space", "knowledge": "all weights are known"},
        "benign": row(0.82),
        "attacks": {
            "pgd20-eps8": attack(0.41, "pgd"),
            "pgd50x2-margin-eps8": attack(0.39, "pgd", steps=50, loss="margin", restarts=2),
            "square1000-eps8": attack(0.52, "square", steps=1000),
        },
        "worst_case": {"linf-eps8": row(0.38, attacks=["pgd20-eps8", "square1000-eps8"])},
        "majority": spread(np.full(6, 0.35)),
        "per_class": {"images": [60] * 10, "benign": [0.8] * 10, "worst_case": [i / 12 for i in range(10)]},
        "collapsed": [5],
        "transfer": {
            "attack": "pgd20-eps8",
            "images_per_client": 32,
            "matrix": draw.uniform(0.4, 0.7, (6, 6)).tolist(),
            "own": 0.41,
            "others_mean": 0.6,
            "surrogates": {"runs/other": 0.66},
            "strongest": 0.5,
        },
        "curves": curves,
        "checks": [
            {"name": f"S{n}", "passed": n != 12, "value": 0.1, "meaning": "what was found, in one sentence"}
            for n in range(1, 15)
        ],
        "certified": [
            {
                "sigma": 0.12,
                "draws": 1000,
                "alpha": 0.001,
                "images": 60,
                "abstained": 0.05,
                "radii": [0.0, 0.1, 0.25, 0.5],
                "mean": [0.7, 0.6, 0.4, 0.1],
                "per_client": [[0.7, 0.6, 0.4, 0.1]] * 6,
            }
        ],
        "gallery": [
            {
                "client": client,
                "image": 3,
                "label": "digit 4",
                "answer": "digit 9",
                "distance": 2 / 255,
                "clean": shade.tolist(),
                "adversarial": np.clip(shade + draw.choice([-2.0, 2.0], shade.shape), 0, 255).tolist(),
            }
            for client in range(4)
        ],
    }


def check(path: Path, width: int, scheme: str, browser: str, axe: Path | None) -> list[str]:
    """Look at a page: write ``PAGE-WIDTH-SCHEME.png`` beside it and return what is wrong.

    The page is shown in a frame, since a window of Chromium is never as narrow as a phone.

    Args:
        path: of the page.
        width: of the frame.
        scheme: a key of `SCHEMES`.
        browser: Chromium's command.
        axe: ``axe.min.js`` of axe-core; None: without it.
    """
    scripts = "".join(f"<script>{source.read_text()}</script>" for source in ([axe] if axe else []) + [PROBE])
    with tempfile.TemporaryDirectory() as scratch:
        framed = Path(scratch) / "framed.html"
        framed.write_text(path.read_text().replace("</body>", f"{scripts}</body>"))
        shell = Path(scratch) / "shell.html"
        _write_shell(shell, framed.name, width, 900)
        common = [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            *(f"--user-data-dir={scratch}/profile", "--virtual-time-budget=20000"),
        ]
        found = _result(_run([*common, "--dump-dom", shell.as_uri()]))
        height = min(int(found["height"]) + 20, 16_000)
        _write_shell(shell, framed.name, width, height)
        picture = path.with_name(f"{path.stem}-{width}-{scheme}.png")
        window = f"--window-size={max(width, 600)},{height}"
        _run([*common, window, f"--screenshot={picture}", shell.as_uri()])
        Image.open(picture).crop((0, 0, width, height)).save(picture)
    problems: list[str] = found["problems"]
    return problems


def _write_shell(shell: Path, framed: str, width: int, height: int) -> None:
    frame = f'<iframe src="{framed}" style="border:0;width:{width}px;height:{height}px"></iframe><pre id="found"></pre>'
    listen = "addEventListener('message', e => { document.getElementById('found').textContent = e.data; });"
    shell.write_text(f'<body style="margin:0"><script>{listen}</script>{frame}</body>')


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-500:]}")
    return done.stdout


def _result(dom: str) -> dict[str, Any]:
    match = re.search(r'<pre id="found">(.+?)</pre>', dom, re.DOTALL)
    if match is None:
        raise RuntimeError("the page sent no result")
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found


def main() -> None:
    """Build the pages and, if asked for, look at them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--check", action="store_true", help="look at the pages in Chromium")
    parser.add_argument("--browser", default="chromium", metavar="COMMAND")
    parser.add_argument("--axe", type=Path, metavar="FILE", help="axe.min.js of axe-core")
    given = parser.parse_args()
    wrong = 0
    for path in build(given.out):
        print(path)
        for width in WIDTHS if given.check else ():
            for scheme in SCHEMES:
                problems = check(path, width, scheme, given.browser, given.axe)
                wrong += len(problems)
                for problem in problems:
                    print(f"  {width} px, {scheme}: {problem}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
