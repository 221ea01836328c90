"""Paths and URLs: one reading everywhere, one line for what is none, and nothing written."""

from __future__ import annotations

import os
import pwd
import re
import socket
import tempfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import sylva_ray
from sylva_ray.cli import app
from sylva_ray.config.experiment import ExperimentConfig, with_stored_paths
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.locations import local_path, output_path, run_location, stored_path
from sylva_ray.storage.remote_copy import run_folder_at
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.sweeps.toys import space_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a config, a run, a space, and things that are in the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "cluster.yaml").write_text((ROOT / "cluster.yaml").read_text())
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    space_of(tmp_path / "spaces")
    return tmp_path


WORDS = {
    "": "is empty",
    "  ": "is empty",
    "~nobody-here/x": "there is no user nobody-here here",
    "$HOME/x": "variables are not expanded here",
    "${SCRATCH}/x": "variables are not expanded here",
    "C:\\runs\\a": "is a path of Windows",
    "c:/runs": "is a path of Windows",
    "\\\\server\\share": "is a path of Windows",
    "a\nb": "cannot be printed",
    "a\tb": "cannot be printed",
    "a\x00b": "cannot be printed",
    "\udcff": "cannot be printed",
    "x" * 256: "is too long (256 bytes in one name",
    "é" * 128: "is too long (256 bytes in one name",
    "y/" * 2048 + "z": "is too long (1 bytes in one name, 4,097 in all)",
    "s3:/bucket/run": "that needs s3:// with two slashes",
    "s3:bucket": "that needs s3:// with two slashes",
    "file://relative/x": "must be file:///PATH",
    "file://": "must be file:///PATH",
}
NO_RUN_FOLDERS = WORDS | {
    "s3://": "names no folder: write s3://BUCKET/FOLDER",
    "s3:///run": "names no folder",
    "memory://": "names no folder",
    "memory:///": "names no folder",
    "gs://": "names no folder",
    "s4://bucket/run": "no protocol 's4'; did you mean s3://...?",
    "S3://bucket/run": "no protocol 'S3'; did you mean s3://",
    "://bucket": "no protocol ''",
    "htp://host/run": "did you mean http://...?",
    "s3://[bucket/run": "is not a URL that can be used here (",
    "file:///": "must be file:///PATH",
}
NO_PATHS = WORDS | {"s3://bucket/x": "is a URL, and a path on this machine is needed here"}


@pytest.mark.parametrize("text", NO_PATHS)
@pytest.mark.usefixtures("here")
def test_what_is_no_path(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(NO_PATHS[text])) as caught:
        local_path("--csv", text)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match=re.escape(NO_PATHS[text])):
        stored_path(text)


@pytest.mark.parametrize("text", NO_RUN_FOLDERS)
@pytest.mark.usefixtures("here")
def test_what_is_no_run_folder(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(NO_RUN_FOLDERS[text])) as caught:
        run_location("RUN", text)
    assert len(str(caught.value).splitlines()) == 1


def test_paths_that_are_right(here: Path) -> None:
    me = pwd.getpwuid(os.getuid())
    assert local_path("k", "~") == here / "home"
    assert local_path("k", "~/a b/é/") == here / "home" / "a b" / "é"
    assert local_path("k", f"~{me.pw_name}/x") == Path(me.pw_dir) / "x"
    assert local_path("k", "a/~/b") == Path("a/~/b")
    assert local_path("k", "./~x") == Path("~x")
    assert local_path("k", f"file://{here}/a%20b") == here / "a b"
    assert local_path("k", f"file://localhost{here}/x") == here / "x"
    assert local_path("k", "a:b") == Path("a:b")
    (here / "cost$5").mkdir()
    assert local_path("k", "cost$5") == Path("cost$5"), "a variable that is the name of a folder"
    assert run_location("k", "s3://bucket") == "s3://bucket"
    assert run_location("k", "memory://bucket/run/") == "memory://bucket/run/"
    assert run_location("k", f"file://{here}/run") == f"file://{here}/run"
    assert stored_path("data/../x/") == f"{here}/data/../x"
    assert stored_path("~/x") == "~/x"
    assert stored_path(f"~{me.pw_name}/x") == f"{me.pw_dir}/x"
    assert stored_path(f"{here}/x") == f"{here}/x"


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_without_home_the_one_of_the_user_counts(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert local_path("k", "~/x") == Path(pwd.getpwuid(os.getuid()).pw_dir) / "x"

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match="no home folder is known for this user: set HOME"):
        local_path("k", "~/x")
    with (
        pytest.raises(UserError, match="set HOME"),
        run_folder_at("memory://b/r", "read"),
    ):
        pass
    config = build(ExperimentConfig, TINY)
    assert config.dataset.root.startswith("~"), "a data set that needs no folder needs no home"


WRONG_PLACES = {
    "good.yaml/x": ("folder", "good.yaml is not a folder"),
    "good.yaml/x/y/z": ("folder", "good.yaml is not a folder"),
    "good.yaml": ("folder", "is a file, and a folder is needed"),
    "pipe": ("folder", "is not a folder"),
    "dangling": ("folder", "is a symbolic link to nowhere, which does not exist"),
    "circle": ("folder", "is a symbolic link to circle, which does not exist"),
    "spaces": ("file", "is a folder"),
    "pipe/": ("file", "is not a file"),
    "/dev/null": ("file", "is not a file"),
    "none/x.csv": ("file", "its folder does not exist"),
    "good.yaml/x.csv": ("file", "good.yaml is not a folder"),
    "dangling/x.csv": ("file", "does not exist"),
}


@pytest.mark.parametrize("place", WRONG_PLACES)
@pytest.mark.usefixtures("here")
def test_places_where_nothing_can_be_written(place: str) -> None:
    kind, says = WRONG_PLACES[place]
    with pytest.raises(UserError, match=re.escape(says)):
        output_path("--out", place, kind)  # type: ignore[arg-type]


def test_sockets_and_folders_without_permission(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{short}/s")
        with pytest.raises(UserError, match="is not a folder"):
            output_path("--out", f"{short}/s", "folder")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match=f"cannot be written: no permission to write to {here}$"):
        output_path("--out", "new/run", "folder")
    with pytest.raises(UserError, match="no permission"):
        output_path("--csv", here / "x.csv", "file")


def test_places_that_can_be_written(here: Path) -> None:
    (here / "link").symlink_to(here / "spaces")
    assert output_path("--out", "link/run", "folder") == Path("link/run")
    assert output_path("--out", "~/new/run", "folder") == here / "home/new/run"
    assert output_path("--csv", "é x.csv", "file") == Path("é x.csv")
    assert output_path("--csv", "good.yaml", "file") == Path("good.yaml"), "a file is replaced"


PLACES = {
    "CONFIG": ("run", "{}"),
    "run --out": ("run", "good.yaml", "--out", "{}"),
    "RUN to resume": ("run", "{}", "--resume"),
    "RUN to evaluate": ("evaluate", "{}"),
    "RUN to export": ("export", "{}", "--to", "x"),
    "RUN to report": ("report", "{}"),
    "RUN to track": ("track", "{}"),
    "RUN to repair": ("repair", "{}"),
    "compare SOURCE": ("compare", "{}"),
    "compare --out": ("compare", "runs", "--out", "{}.csv"),
    "evaluate --out": ("evaluate", "runs", "--out", "{}"),
    "SPACE": ("tune", "{}"),
    "tune --out": ("tune", "spaces/space.yaml", "--out", "{}"),
    "pretrain CONFIG": ("pretrain", "{}"),
    "bytes --csv": ("bytes", "--csv", "{}"),
    "cluster file": ("cluster", "check", "{}"),
    "cluster --config": ("cluster", "check", "cluster.yaml", "--config", "{}"),
    "--import": ("run", "good.yaml", "--import", "{}"),
    "dataset.root": ("run", "good.yaml", "dataset.name=cifar10", "dataset.root={}"),
    "imagefolder": ("run", "good.yaml", "dataset.name=imagefolder:{}"),
    "parquet": ("run", "good.yaml", "dataset.name=parquet:{}"),
    "backbone.checkpoint": ("run", "good.yaml", "backbone.checkpoint={}"),
    "teacher": ("run", "good.yaml", "algorithm={name: pm_afl, teacher: {checkpoint: '{}'}}"),
    "cluster.launcher": ("run", "good.yaml", "cluster.launcher={}"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", ["~nobody-here/x", "s3:/bucket/x", "C:\\x"])
def test_every_place_reads_paths_in_this_way(place: str, text: str, here: Path) -> None:
    before = sorted(here.glob("*"))
    result = CliRunner().invoke(app, [word.replace("{}", text) for word in PLACES[place]])
    assert result.exit_code == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    says = {"~": "there is no user nobody-here", "s": "two slashes", "C": "is a path of Windows"}[text[0]]
    assert says in result.stderr, result.stderr
    assert sorted(here.glob("*")) == before


def test_a_run_is_found_from_another_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is relative when a run starts is stored absolute."""
    raw = TINY | {"dataset": {"name": "imagefolder:data"}, "backbone": {"checkpoint": "w.safetensors"}}
    config = build(ExperimentConfig, raw)
    assert config.dataset.name == f"imagefolder:{here}/data"
    assert config.backbone.checkpoint == f"{here}/w.safetensors"
    RunFolder(here / "run").claim(config, resume=False)
    monkeypatch.chdir("/")
    assert RunFolder(here / "run").load_config() == config


def test_the_paths_of_a_space_are_stored_absolute(here: Path) -> None:
    experiment = {
        "dataset": {"name": "parquet:d", "root": "~/x"},
        "algorithm": {"teacher": {"checkpoint": "t"}},
        "name": "a",
    }
    assert with_stored_paths(experiment) == {
        "dataset": {"name": f"parquet:{here}/d", "root": "~/x"},
        "algorithm": {"teacher": {"checkpoint": f"{here}/t"}},
        "name": "a",
    }
    swept = {"backbone.checkpoint": {"grid": ["a", "/b"]}}
    space = space_of(here / "spaces", parameters=swept)
    assert space.parameters["backbone.checkpoint"].values == (f"{here}/a", "/b")


def test_a_checkpoint_that_is_a_pipe_is_not_waited_for(here: Path) -> None:
    with pytest.raises(UserError, match="is not a regular file"):
        sylva_ray.run(TINY | {"backbone": {"checkpoint": "pipe"}}, out="run", show="nothing")
    assert not (here / "run").exists()


def test_home_folders_are_expanded_in_one_module_only() -> None:
    users = [
        path for path in (ROOT / "sylva_ray").rglob("*.py") if re.search(r"expanduser|Path\.home\(", path.read_text())
    ]
    assert users == [ROOT / "sylva_ray" / "core" / "locations.py"]
