"""The structure that the design promises: layers, one home per heavy library, shipped files that work, nothing downloaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config import load_config

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "sylva_ray").rglob("*.py"))

LAYERS = [
    {"errors", "types", "schema", "attack_settings", "config", "seeding", "timing"},
    {"data", "models", "attacks", "game", "aggregation", "tracking"},
    {"algorithms", "evaluation"},
    {"client"},
    {"coordinator"},
    {"experiment"},
    {"assess", "tuning"},
    {"cluster", "display"},
    {"cli"},
]
"""Lowest first. A file may import its own layer and the ones below."""


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def layer(part: str) -> int:
    return next(level for level, names in enumerate(LAYERS) if part in names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_layers_never_import_upper_ones(path):
    own = path.relative_to(ROOT / "sylva_ray").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for module in imports(path):
        if module.startswith("sylva_ray."):
            assert layer(module.split(".")[1]) <= layer(own), f"{path.name} imports {module}"


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("ray", "sylva_ray/cluster/"),
        ("mlflow", "sylva_ray/tracking/"),
        ("peft", "sylva_ray/models/peft_format.py"),
        ("optuna", "sylva_ray/cluster/"),
    ],
)
def test_heavy_libraries_have_one_home(library, home):
    users = [str(p.relative_to(ROOT)) for p in SOURCES if any(m.split(".")[0] == library for m in imports(p))]
    assert all(user.startswith(home) for user in users), users
    if library == "mlflow":
        assert len(users) == 1


LATE = {
    "sklearn",
    "scipy",
    "pandas",
    "pyarrow",
    "mlflow",
    "matplotlib",
    "jinja2",
    "peft",
    "optuna",
    "fsspec",
    "ray.tune",
}
"""Heavy libraries that no process needs before it works: each is imported where it is used."""

ROLES = {
    "sylva_ray.client.worker": LATE | {"ray", "rich", "typer"},
    "sylva_ray.cluster.client_actor": LATE | {"rich", "typer"},
    "sylva_ray.cluster.coordinator_actor": LATE | {"rich", "typer"},
    "sylva_ray.cli, sylva_ray.cluster.run, sylva_ray.display, sylva_ray.experiment": LATE,
}
"""What a process imports to start, and what must not come with it. Each imports all that the one before it does."""


def test_no_process_imports_a_library_that_it_does_not_need_to_start():
    code = "import sys\n" + "".join(f"import {modules}\nprint(*sys.modules)\n" for modules in ROLES)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    for (modules, unwanted), loaded in zip(ROLES.items(), result.stdout.splitlines(), strict=True):
        assert not unwanted & set(loaded.split()), modules


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path):
    if path.name.startswith("pretrain"):
        from sylva_ray.models.pretrain import load_pretrain_config

        load_pretrain_config(path, [])
    else:
        create_algorithm(load_config(path).algorithm)


def test_the_readme_names_only_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    targets = {
        line.split(":")[0]
        for line in (ROOT / "Makefile").read_text().splitlines()
        if ": " in line and line[0].isalpha()
    }
    for line in text.splitlines():
        if line.startswith("make "):
            assert line.split()[1] in targets, line
    helped = subprocess.run(
        [sys.executable, "-m", "sylva_ray.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for line in text.splitlines():
        if line.startswith("sylva-ray "):
            assert line.split()[1] in helped, line
