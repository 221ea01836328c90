"""What an export holds is enough: a process without this package gets the same logits from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

import sylva_ray
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import repeat_owner, to_parameters
from sylva_ray.preparation.experiment import create_worker, prepare
from tests.conftest import TINY

PLAIN = """
import sys
sys.modules["sylva_ray"] = None  # an import fails
import runpy
import numpy as np, torch

export = runpy.run_path(sys.argv[1] + "/load.py")
model = export["load"](sys.argv[2])
with torch.no_grad():
    np.save(sys.argv[4], model(export["preprocess"](torch.from_numpy(np.load(sys.argv[3])))).numpy())
"""
"""The code of the README, and where its results go."""

METHODS: dict[str, dict[str, Any]] = {
    "adapters": {"algorithm": {"name": "fedit_at"}, "lora": {"rank": 2, "train_norms": True}},
    "whole models": {"algorithm": {"name": "fedavg_at"}, "training": TINY["training"] | {"lr": 3e-4, "cohort_size": 1}},
}


@pytest.fixture(scope="module", params=METHODS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two clients."""
    folder = tmp_path_factory.mktemp("export") / "run"
    config = TINY | METHODS[request.param]
    sylva_ray.run(config, ["training.rounds=1", "partition.num_clients=2"], out=folder, show="nothing")
    return folder


def test_a_plain_process_gets_the_same_logits(finished: Path, tmp_path: Path) -> None:
    folders = sylva_ray.export(finished, tmp_path / "out", [1], onnx=True)
    assert folders == [tmp_path / "out" / "client_001"]
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # another size than the model's
    np.save(tmp_path / "images.npy", images.numpy())
    loaded = sylva_ray.load_run(finished)
    prepared = prepare(loaded.config)
    worker = create_worker(prepared.config, prepared.fleet, prepared.backbone)
    params = to_parameters({name: value[None] for name, value in loaded.states[1].items()}, "cpu", torch.float32)
    with torch.no_grad():
        expected = worker.model.forward(params, images, repeat_owner([3])).numpy()
    np.testing.assert_allclose(plain_logits(tmp_path / "out", tmp_path), expected, atol=1e-4)

    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(folders[0] / "model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, atol=1e-4)


def plain_logits(export: Path, folder: Path) -> np.ndarray:
    """Return what a process without this package computes with client 1 for the images in ``folder``."""
    arguments = [str(export), "client_001", str(folder / "images.npy"), str(folder / "logits.npy")]
    subprocess.run([sys.executable, "-c", PLAIN, *arguments], check=True, capture_output=True, cwd=folder)
    logits: np.ndarray = np.load(folder / "logits.npy")
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["adapters"], indirect=True)
def test_the_adapter_and_the_merged_model_are_the_same(finished: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).random((2, 3, 32, 32), np.float32))
    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    sylva_ray.export(finished, adapter, [1])
    sylva_ray.export(finished, whole, [1], merged=True)
    assert (whole / "client_001" / "model.safetensors").exists()
    np.testing.assert_allclose(plain_logits(whole, tmp_path), plain_logits(adapter, tmp_path), atol=1e-4)


def test_a_card_says_what_the_model_is_and_how_good(finished: Path, tmp_path: Path) -> None:
    (folder,) = sylva_ray.export(finished, tmp_path / "out", [0])
    card, summary = ModelCard.load(folder / "README.md"), sylva_ray.load_run(finished).summary
    assert summary is not None
    results = {result.metric_name: result.metric_value for result in card.data.eval_results or ()}
    assert results["accuracy, benign"] == round(summary.final.benign_accuracy.per_client[0], 4)
    for text in ("Threat model", "95 % interval", "Citation", *summary.threat_model.values()):
        assert text in card.text
    assert all(check.name in card.text for check in summary.checks)
    assert max(map(len, card.text.splitlines())) < 200


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["adapters"], indirect=True)
def test_a_script_prints_the_class_of_an_image(finished: Path, tmp_path: Path) -> None:
    from PIL import Image

    sylva_ray.export(finished, tmp_path / "out", [0])
    Image.new("RGB", (32, 32), (200, 10, 10)).save(tmp_path / "red.png")
    command = [sys.executable, str(tmp_path / "out" / "load.py"), "client_000", str(tmp_path / "red.png")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    path, name = done.stdout.split()
    summary = sylva_ray.load_run(finished).summary
    assert summary is not None
    assert path == str(tmp_path / "red.png")
    assert name in summary.class_names


def test_weights_that_the_hub_knows_by_name_are_not_copied() -> None:
    """The script asks timm for them; nothing is fetched here."""
    from sylva_ray.config.experiment import BackboneSection
    from sylva_ray.models.load_script import load_script

    backbone = create_backbone(BackboneSection(name="vit_tiny_patch16_224"), 2)
    text = load_script(backbone, ["a", "b"], adapters=True, has_base=False)
    assert "timm.create_model(**arguments, num_classes=len(CLASSES), pretrained=True)" in text
    assert "base.safetensors" not in text
    compile(text, "load.py", "exec")
