"""The structure that the design promises: layers, one home per heavy library, shipped files that work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import load_config

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "sylva_ray").rglob("*.py"))

LAYERS = (
    "core",
    "attacks",
    "config",
    "storage",
    "data",
    "models",
    "metrics",
    "aggregation",
    "transport",
    "federation",
    "algorithms",
    "preparation",
    "evaluation",
    "reports",
    "observers",
    "provisioning",
    "execution",
    "sweeps",
    "pretraining",
    "api",
    "cli",
)
"""One layer per package, the lowest first. A file imports its own package and those before it, also in functions."""

RAY = ("sylva_ray/execution/ray/", "sylva_ray/sweeps/")
HOMES = {
    "ray": RAY,
    "optuna": ("sylva_ray/sweeps/optuna_search.py",),
    "mlflow": ("sylva_ray/observers/mlflow/",),
    "peft": ("sylva_ray/models/peft_format.py",),
    "timm": ("sylva_ray/models/",),
    "rich": ("sylva_ray/reports/", "sylva_ray/sweeps/terminal.py"),
    "typer": ("sylva_ray/cli",),
    "pickle": (),  # a file that holds one could execute code
    "cloudpickle": (),
}
"""Where a library may be imported."""


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> str:
    """A file's module name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package(module: str) -> str:
    """``federation`` of ``sylva_ray.federation.loop``."""
    return module.split(".")[1]


MODULES = {own(path): path for path in SOURCES if path.parent != ROOT / "sylva_ray"}


def test_every_package_has_a_layer() -> None:
    assert {package(module) for module in MODULES} == set(LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_lower_layers_never_import_upper_ones(module: str) -> None:
    level = LAYERS.index(package(module))
    used = {name for name in imports(MODULES[module]) if name in MODULES}
    assert not {name for name in used if LAYERS.index(package(name)) > level}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also not through an import inside a function."""
    modules = {own(path): path for path in SOURCES}  # with those of the root, which import the interface
    left = {module: {name for name in imports(path) if name in modules} - {module} for module, path in modules.items()}
    while free := [module for module, used in left.items() if not used & left.keys()]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_have_one_home(library: str) -> None:
    users = [str(p.relative_to(ROOT)) for p in SOURCES if any(m.split(".")[0] == library for m in imports(p))]
    assert all(user.startswith(HOMES[library]) for user in users), users


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
    "sylva_ray.federation.client.worker": LATE | {"ray", "rich", "typer"},
    "sylva_ray.execution.ray.client_actor": LATE | {"rich", "typer"},
    "sylva_ray.execution.ray.coordinator_actor": LATE | {"rich", "typer"},
    "sylva_ray.cli, sylva_ray.execution.ray.driver, sylva_ray.reports.terminal": LATE,
}
"""What a process imports to start, and what must not come with it. Each imports all that the one before it does."""


def test_no_process_imports_a_library_that_it_does_not_need_to_start() -> None:
    code = "import sys\n" + "".join(f"import {modules}\nprint(*sys.modules)\n" for modules in ROLES)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    for (modules, unwanted), loaded in zip(ROLES.items(), result.stdout.splitlines(), strict=True):
        assert not unwanted & set(loaded.split()), modules


SLOW = {"torch", "timm", "ray", "mlflow", "scipy", "sklearn", "matplotlib", "pandas", "optuna"}
"""What no answer may wait for that needs no computing."""

QUICK = {
    "help": (["--help"], 0),
    "help of a command": (["evaluate", "--help"], 0),
    "version": (["--version"], 0),
    "mistyped key": (["run", "configs/digits.yaml", "atack.epsilon=1"], 2),
    "mistyped command": (["rnu"], 2),
}


@pytest.mark.parametrize("case", QUICK)
def test_an_answer_that_needs_no_computing_loads_nothing_slow(case: str) -> None:
    arguments, expected_code = QUICK[case]
    code = (
        "import sys, sylva_ray.cli\n"
        "try:\n    sylva_ray.cli.app(sys.argv[1:])\n"
        "except SystemExit as stop:\n    print(stop.code)\n"
        "print(*sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    *_, exit_code, loaded = result.stdout.splitlines()
    assert int(exit_code) == expected_code, result.stderr
    assert not SLOW & set(loaded.split())


def test_the_command_line_calls_the_python_interface_and_nothing_else() -> None:
    allowed = {"sylva_ray", "sylva_ray.__version__", "sylva_ray.api", "sylva_ray.core.errors"}
    for path in (ROOT / "sylva_ray" / "cli").glob("*.py"):
        used = {name for name in imports(path) if name.startswith("sylva_ray") and name.split(".")[1:2] != ["cli"]}
        assert all(name in allowed or name.startswith("sylva_ray.core.errors.") for name in used), path.name


def test_importing_the_package_loads_its_interface_when_it_is_used() -> None:
    code = "import sys, sylva_ray\nprint('sylva_ray.api' in sys.modules)\nsylva_ray.run\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    before, loaded = result.stdout.splitlines()
    assert before == "False"
    assert "sylva_ray.api" in loaded.split()
    assert not SLOW & set(loaded.split())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    if path.name.startswith("pretrain"):
        from sylva_ray.pretraining.config import load_pretrain_config

        load_pretrain_config(path, [])
    else:
        create_algorithm(load_config(path).algorithm)
