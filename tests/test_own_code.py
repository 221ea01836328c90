"""A configuration names a class; only the user decides whether its code runs: installed, imported or ``--import``."""

from __future__ import annotations

import shutil
import site
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import sylva_ray
from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.api import sweep
from sylva_ray.cli import app
from sylva_ray.config.experiment import AlgorithmSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.own_code import allowed_directories, import_options, importing_from, load_attribute
from tests.conftest import TINY

EXAMPLE = Path(__file__).parents[1] / "examples" / "margin_at.py"
PAYLOAD = "from pathlib import Path\nPath(__file__).with_name('it_ran').touch()\n"
NAME = "a_payload:MarginAT"
SHORT = {"training": TINY["training"] | {"rounds": 1}, "algorithm": {"name": NAME, "phase2": {"enabled": False}}}


@pytest.fixture(autouse=True)
def _forget_modules() -> Iterator[None]:
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("a_"):
            del sys.modules[name]
    assert allowed_directories() == ()


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stderr


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, an unfinished one and a sweep of a method whose file is beside them, as one would pack them."""
    root = tmp_path_factory.mktemp("shared")
    (root / "a_payload.py").write_text(EXAMPLE.read_text())
    sylva_ray.run(TINY | SHORT, out=root / "run", imports=[root], show="nothing")
    shutil.copytree(root / "run", root / "stopped")
    for name in ("summary.json", "report.html"):
        (root / "stopped" / name).unlink()
    for checkpoint in sorted((root / "stopped" / "checkpoint").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    raw = {"name": "sweep", "experiment": TINY | SHORT, "parameters": {"lora.rank": {"grid": [1, 2]}}}
    (root / "space.yaml").write_text(yaml.safe_dump(raw))
    (root / "sweep").mkdir()
    with importing_from([root]):
        from sylva_ray.sweeps.space import load_space

        (root / "sweep" / "space.yaml").write_text(load_space(root / "space.yaml").to_yaml())
    (root / "config.yaml").write_text(yaml.safe_dump(TINY | SHORT))
    (root / "a_payload.py").write_text(EXAMPLE.read_text() + PAYLOAD)
    del sys.modules["a_payload"]
    return root


REFUSED = {
    "evaluate": ("evaluate", "run"),
    "resume": ("run", "stopped", "--resume"),
    "resume a finished run": ("run", "run", "--resume"),
    "run": ("run", "config.yaml", "--out", "new"),
    "run a run's config": ("run", "run", "--out", "new"),
    "tune": ("tune", "space.yaml", "--out", "new"),
    "tune --resume": ("tune", "sweep", "--resume"),
    "bytes": ("bytes", "--method", NAME),
}
WITHOUT_CODE = {
    "report": ("report", "run"),
    "export": ("export", "run", "--to", "adapters"),
    "export --merged": ("export", "run", "--to", "models", "--merged"),
    "compare": ("compare", "run"),
    "repair": ("repair", "run"),
}


@pytest.fixture
def here(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what was packed, as current directory, where Python looks first (``python -m``, ``PYTHONPATH``)."""
    folder = tmp_path / "here"
    shutil.copytree(shared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.syspath_prepend("")
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_code_beside_a_run_is_refused_with_the_option_to_add(case: str, here: Path) -> None:
    before = sorted(here.rglob("*"))
    code, err = call(*REFUSED[case])
    assert code == 2
    assert f"{'--method' if case == 'bytes' else 'algorithm.name'} = '{NAME}'" in err
    assert f"a_payload in {here}" in err
    assert "add: --import . (in Python: imports=['.'])" in err
    assert len(err.strip().splitlines()) == 1
    assert [path for path in sorted(here.rglob("*")) if path.name != ".lock"] == before, "something ran or was written"


@pytest.mark.parametrize("case", WITHOUT_CODE)
def test_commands_that_need_no_code_run_none(case: str, here: Path) -> None:
    code, err = call(*WITHOUT_CODE[case])
    assert (code, err) == (0, "")
    assert not (here / "it_ran").exists()
    assert "a_payload" not in sys.modules


def test_with_the_option_the_code_runs(here: Path) -> None:
    code, err = call("run", "stopped", "--resume", "--quiet", "--import", ".")
    assert (code, err) == (0, "")
    assert (here / "it_ran").exists()
    assert (here / "stopped" / "report.html").exists()


@pytest.mark.parametrize("name", ["a_package.inner:MarginAT", "a_folder.method:MarginAT", "a_folder.inner.x:MarginAT"])
def test_packages_and_plain_folders_are_code_too(name: str, here: Path) -> None:
    """As in ``runs.shared.payload:X``, where no folder is a package."""
    path = here.joinpath(*name.split(":")[0].split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    if name.startswith("a_package"):
        (path.parent / "__init__.py").write_text(PAYLOAD)
    path.write_text(EXAMPLE.read_text() + PAYLOAD)
    with pytest.raises(UserError, match=r"add: --import \."):
        create_algorithm(AlgorithmSection(name=name))
    assert not list(here.rglob("it_ran"))
    with importing_from([here]):
        assert create_algorithm(AlgorithmSection(name=name)).name == "margin_at"


def test_a_package_of_the_same_name_in_the_current_directory_is_not_executed(here: Path, tmp_path: Path) -> None:
    (here / "a_shared").mkdir()
    (here / "a_shared" / "__init__.py").write_text(PAYLOAD)
    own = tmp_path / "own" / "a_shared"
    own.mkdir(parents=True)
    (own / "method.py").write_text(EXAMPLE.read_text())
    with importing_from([tmp_path / "own"]):
        assert create_algorithm(AlgorithmSection(name="a_shared.method:MarginAT")).name == "margin_at"
    assert not list(here.rglob("it_ran"))


def test_what_is_installed_is_found_first_and_needs_no_option(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"
    (installed / "a_package").mkdir(parents=True)
    (installed / "a_package" / "__init__.py").touch()
    (installed / "a_package" / "method.py").write_text(EXAMPLE.read_text())
    (here / "a_package").mkdir()
    (here / "a_package" / "method.py").write_text(PAYLOAD)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(installed)])
    monkeypatch.syspath_prepend(str(installed))
    with importing_from(["."]):
        assert create_algorithm(AlgorithmSection(name="a_package.method:MarginAT")).name == "margin_at"
    assert not list(here.rglob("it_ran"))


def test_a_method_imports_its_neighbours_and_what_was_imported_stays_usable(tmp_path: Path) -> None:
    (tmp_path / "a_helper.py").write_text(EXAMPLE.read_text())
    (tmp_path / "a_method.py").write_text("from a_helper import MarginAT\n")
    name, path = AlgorithmSection(name="a_method:MarginAT"), list(sys.path)
    with importing_from([tmp_path]):
        assert create_algorithm(name).name == "margin_at"
        assert import_options() == f" --import {tmp_path}"
    assert sys.path == path
    assert create_algorithm(name).name == "margin_at"


WRONG: dict[str, Any] = {
    "this:s": "no module this is installed",  # the standard library has no methods, and some of it acts on import
    "antigravity:X": "no module antigravity is installed",
    "a_nowhere.x:X": "no module a_nowhere.x is installed; name the directory that holds it: --import DIR",
    "../a_payload:X": "must be package.module:Class",
    "a_payload:": "must be package.module:Class",
    ":X": "must be package.module:Class",
    "a:b:C": "must be package.module:Class",
    "os:Nothing": r"cannot be imported \(AttributeError",
    "os:system": "is no method. Expected: sylva,",
    "subprocess:Popen": "is no method. Expected: sylva,",
}


@pytest.mark.parametrize("name", WRONG)
def test_names_that_are_no_method(name: str) -> None:
    with pytest.raises(UserError, match=WRONG[name]) as caught:
        create_algorithm(AlgorithmSection(name=name))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("code", ["raise KeyError('x')", "raise SystemExit(0)", "import a_nowhere", "1 +"])
def test_a_module_that_fails_is_one_line(code: str, tmp_path: Path) -> None:
    (tmp_path / "a_broken.py").write_text(code)
    with importing_from([tmp_path]), pytest.raises(UserError, match=r"x = 'a_broken:X': cannot be imported \("):
        load_attribute("x", "a_broken:X")
    assert "a_broken" not in sys.modules


def test_a_directory_that_is_none_is_refused(here: Path) -> None:
    code, err = call("run", "config.yaml", "--import", "nowhere")
    assert (code, err) == (2, "sylva-ray: --import = 'nowhere': is not a directory\n")
    with pytest.raises(UserError, match=r"--import = .*config.yaml': is not a directory"):
        sweep("space.yaml", imports=[here / "config.yaml"])
    with pytest.raises(UserError, match=r"imports = '\.': must be a list: \['\.'\]"):
        sweep("space.yaml", imports=".")
