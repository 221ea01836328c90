"""Data and weights other than a run's are refused by every command that loads them, or named in what it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import sylva_ray
from sylva_ray.cli import app
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.models.backbone import backbone_arrays, create_backbone
from sylva_ray.models.shipped import SHIPPED
from sylva_ray.preparation.experiment import prepare
from sylva_ray.preparation.inputs import claim_run, digest_inputs
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.storage.conftest import contents

pytestmark = pytest.mark.long


def draw_images(folder: Path, per_class: int, seed: int = 0) -> None:
    """Write bright and dark images, as one folder per class."""
    rng = np.random.default_rng(seed)
    for name, level in (("bright", 200), ("dark", 40)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            pixels = rng.integers(level, level + 40, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{seed}-{number:03d}.png")


def experiment(home: Path, rounds: int = 1) -> dict[str, Any]:
    return TINY | {
        "dataset": {"name": f"imagefolder:{home}/images"},
        "partition": {"num_clients": 2, "kind": "iid", "min_samples": 8, "test_samples": 4},
        "backbone": {"checkpoint": f"{home}/backbone.safetensors"},
        "algorithm": {"name": "sylva", "phase2": {"enabled": False}},
        "training": TINY["training"] | {"rounds": rounds},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a backbone, and a run on them."""
    home = tmp_path_factory.mktemp("inputs")
    draw_images(home / "images", 30)
    shutil.copy(SHIPPED["vit_micro"].checkpoint, home / "backbone.safetensors")
    sylva_ray.run(experiment(home), out=home / "run", show="nothing")
    return home


@pytest.fixture
def home(made: Path) -> Iterator[Path]:
    """The same folder; what a test changes in it is undone."""
    for part in ("run", "images"):
        shutil.copytree(made / part, made / "kept" / part)
    yield made
    for part in ("run", "images"):
        shutil.rmtree(made / part)
        shutil.move(made / "kept" / part, made / part)
    shutil.copy(SHIPPED["vit_micro"].checkpoint, made / "backbone.safetensors")


def interrupt(run: RunFolder) -> None:
    """Make it a run whose last stage is missing."""
    run.checkpoints.remove(run.checkpoints.steps()[-1])
    run.summary_file.unlink()


def change_weights(home: Path) -> None:
    weights = load_file(home / "backbone.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("mlp.fc1.weight"))
    weights[name] = weights[name] + np.float32(0.01).astype(weights[name].dtype)
    save_file(weights, home / "backbone.safetensors")


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*arguments])
    return result.exit_code, result.stdout, result.stderr


def refused(*arguments: str) -> str:
    """Call a command that must be refused in one line; return the line."""
    code, _, errors = call(*arguments)
    assert code == 2, errors
    assert len(errors.splitlines()) == 1
    return errors


def test_inputs_are_on_the_disk_before_the_first_stage(home: Path) -> None:
    stored = RunFolder(home / "run").load_inputs()
    assert stored is not None
    assert stored.version == sylva_ray.__version__
    assert stored.data.keys() == {"train", "test", "class_names", "partition"}
    assert stored == digest_inputs(prepare(build(ExperimentConfig, experiment(home))))
    copy = json.loads((home / "run" / "checkpoint" / "round_0000" / "inputs.json").read_text())
    assert copy == stored.to_json()


def test_added_images_are_refused_by_evaluate_and_named_by_what_goes_on(home: Path) -> None:
    """Otherwise images that were trained on would be tested on."""
    run = str(home / "run")
    code, _, errors = call("evaluate", run, "--attack", "fgsm")
    assert code == 0, errors
    assert errors == ""
    draw_images(home / "images", 9, seed=1)
    before = contents(home / "run")
    for more in ((), ("--images", "3")):
        line = refused("evaluate", run, "--attack", "fgsm", *more)
        assert "the training images, the test images and the division among the clients of imagefolder:" in line
        assert "are not those of the run; restore them, or add --allow-changed" in line
    assert contents(home / "run") == before
    found = sylva_ray.evaluate(run, ["fgsm"], allow_changed=True, show="nothing")
    assert found.warnings is not None
    assert "the test images" in found.warnings[-1]
    assert "are not those of the run (--allow-changed)" in found.warnings[-1]
    fgsm = next(iter(found.attacks.values()))
    assert fgsm.seconds > 0, "measurements of the run's own images are not those of others"


def test_a_changed_test_image_alone_is_named(home: Path) -> None:
    config = build(ExperimentConfig, experiment(home))
    before = digest_inputs(prepare(config))
    for path in sorted((home / "images").rglob("*.png")):
        content = path.read_bytes()
        image = np.array(Image.open(path))
        image[0, 0, 0] ^= 1
        Image.fromarray(image).save(path)
        changed = before.changed_data(digest_inputs(prepare(config)))
        path.write_bytes(content)
        if changed == ["the test images"]:
            return
        assert changed == ["the training images"]
    pytest.fail("no test image")


def test_a_resume_on_changed_images_is_refused_or_said_in_the_summary(home: Path) -> None:
    run = RunFolder(home / "run")
    interrupt(run)
    draw_images(home / "images", 9, seed=1)
    before = contents(run.path)
    assert "--allow-changed" in refused("run", str(run), "--resume")
    assert contents(run.path) == before
    code, out, errors = call("run", str(run), "--resume", "--allow-changed")
    assert code == 0, errors
    assert "are not those of the run (--allow-changed)" in " ".join(out.split())
    records = run.load_records()
    assert [record.changed_inputs is None for record in records] == [True, True, False]
    summary = run.load_summary()
    assert summary is not None
    assert any(text.startswith("since step 2, the training images") for text in summary.warnings)
    assert RunFolder(home / "kept" / "run").load_inputs() == run.load_inputs(), "those that the run began with"


def test_a_replaced_backbone_is_refused_by_export_evaluate_and_resume(home: Path, tmp_path: Path) -> None:
    run, to = str(home / "run"), str(tmp_path / "out")
    right = sylva_ray.export(run, tmp_path / "right", [0], merged=True)[0]
    change_weights(home)
    said = f"the weights of the backbone ({home}/backbone.safetensors) are not those of the run"
    assert said in refused("export", run, "--to", to, "--merged")
    assert not Path(to).exists()
    assert said in refused("evaluate", run)
    assert said in refused("export", run, "--to", to), "an export holds the backbone"
    code, _, errors = call("export", run, "--to", to, "--merged", "--allow-changed", "--client", "0")
    assert code == 0
    assert said in errors
    changed, same = (" ".join((at / "README.md").read_text().split()) for at in (Path(to, "client_000"), right))
    assert "other weights here than in the run: the weights of the backbone" in changed
    assert "other weights here" not in same
    interrupt(RunFolder(run))
    assert said in refused("run", run, "--resume")


def test_a_surrogate_on_another_backbone_is_refused(home: Path) -> None:
    other = shutil.copytree(home / "run", home / "kept" / "other")
    change_weights(home)
    shutil.rmtree(home / "kept" / "second", ignore_errors=True)
    sylva_ray.run(experiment(home), out=home / "kept" / "second", show="nothing")
    with pytest.raises(UserError, match="was trained on a backbone with other weights"):
        sylva_ray.evaluate(home / "kept" / "second", ["fgsm"], surrogates=[other], show="nothing")
    for name in ("other", "second"):
        shutil.rmtree(home / "kept" / name)


def test_another_version_is_said_and_not_refused(home: Path) -> None:
    run = RunFolder(home / "run")
    for path in (run.inputs_file, *run.checkpoints.root.glob("*/inputs.json")):
        path.write_text(path.read_text().replace(sylva_ray.__version__, "0.0.9"))
    for step in run.checkpoints.steps():
        folder = run.checkpoints.root / f"round_{step:04d}"
        (folder / "manifest.json").write_text(_manifest(folder, step))
    code, _, errors = call("evaluate", str(run), "--attack", "fgsm")
    assert code == 0, errors
    assert errors == f"warning: the run began with version 0.0.9 of sylva_ray, and this is {sylva_ray.__version__}\n"


def _manifest(folder: Path, step: int) -> str:
    from sylva_ray.storage.manifest import write_manifest

    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    return write_manifest(step, files)


def test_inputs_that_were_edited_or_lost_are_refused_and_restored(home: Path) -> None:
    run = RunFolder(home / "run")
    stored = run.inputs_file.read_text()
    for text in (None, "{}", "", stored.replace('"train": "', '"train": "0')):
        run.inputs_file.unlink() if text is None else run.inputs_file.write_text(text)
        assert "sylva-ray repair" in refused("evaluate", str(run)) or text == "{}"
        assert sylva_ray.repair(run.path) == ["inputs.json: restored from round_0002"]
        assert json.loads(run.inputs_file.read_text()) == json.loads(stored)


@pytest.mark.parametrize("text", ["", '{"version": "0', None], ids=["empty", "torn", "missing"])
def test_a_run_that_has_computed_nothing_begins_with_the_inputs_of_now(text: str | None, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    prepared = prepare(build(ExperimentConfig, TINY))
    claim_run(prepared, run, False, False, print)
    stored = run.inputs_file.read_text()
    run.inputs_file.unlink() if text is None else run.inputs_file.write_text(text)
    assert claim_run(prepared, run, True, False, print).changed_inputs == ()
    assert run.inputs_file.read_text() == stored


def test_a_backbone_is_built_once_for_everything_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    create = Mock(wraps=timm.create_model)
    monkeypatch.setattr(timm, "create_model", create)
    digest_inputs(prepare(build(ExperimentConfig, TINY)))
    assert create.call_count == 1


def test_preparing_leaves_the_weights_as_they_are() -> None:
    """The trial of a model shares nothing with what is sent to workers; batch normalisation counts batches in place."""
    raw = TINY | {"algorithm": {"name": "fedavg_at"}, "backbone": {"name": "resnet18", "image_size": 32}}
    prepared = prepare(build(ExperimentConfig, raw))
    weights = backbone_arrays(create_backbone(prepared.config.backbone, 10))
    assert weights.keys() == prepared.backbone.keys()
    assert all(np.array_equal(weights[name], prepared.backbone[name]) for name in weights)


@pytest.mark.parametrize("method", ["sylva", "pm_afl", "fedavg_at"])
def test_digests_do_not_depend_on_what_is_drawn(method: str) -> None:
    """The heads that a backbone and a teacher get are random, and no result depends on them."""
    config = build(ExperimentConfig, TINY | {"algorithm": {"name": method}})
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(digest_inputs(prepare(config)))
    assert found[0] == found[1]
    assert ("auxiliary" in found[0].weights) == (method == "pm_afl")


def test_the_flag_is_refused_where_it_has_no_effect() -> None:
    assert "--allow-changed = " in refused("run", "configs/digits.yaml", "--allow-changed")
