"""What an export holds is enough: a process without this package gets the same logits from it."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import sylva_ray
from sylva_ray.algorithms.registry import ALGORITHMS
from sylva_ray.config.experiment import BackboneSection, ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.data.datasets import _square
from sylva_ray.data.images import decode_image
from sylva_ray.models.backbone import backbone_arrays, create_backbone
from sylva_ray.models.cohort import repeat_owner, to_parameters
from sylva_ray.models.export import export_clients
from sylva_ray.models.load_script import load_script
from sylva_ray.models.origin import origin_of
from sylva_ray.preparation.experiment import create_worker, prepare
from sylva_ray.preparation.inputs import digest_backbone, digest_inputs
from tests.conftest import TINY
from tests.data.test_images import CONVERTED

pytestmark = pytest.mark.long

PLAIN = """
import sys
sys.modules["sylva_ray"] = None  # an import fails
sys.path.insert(0, "")
import numpy as np, torch

images = torch.from_numpy(np.load(sys.argv[1]))
with torch.no_grad():
    exec(sys.argv[3])
    np.save(sys.argv[2], logits.numpy())
"""
"""Runs a card's first Python block, where its images are from, and where its results go."""


def blocks(card: Path) -> list[str]:
    """The Python of a model card."""
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


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


def test_a_plain_process_gets_the_same_logits(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = sylva_ray.export(finished, tmp_path / "out", [0, 1], onnx=True)[1:]
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

    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    variables: dict[str, Any] = {"images": images.numpy()}
    monkeypatch.chdir(tmp_path / "out")
    exec(blocks(folders[0] / "README.md")[1], variables)
    np.testing.assert_allclose(variables["logits"], expected, atol=1e-4)
    metadata = variables["session"].get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    (opset,) = (entry.version for entry in onnx.load(folders[0] / "model.onnx").opset_import if not entry.domain)
    assert f"`model.onnx` (opset {opset})" in (folders[0] / "README.md").read_text()
    assert metadata["opset"] == str(opset)

    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "ordinary").touch()
    assert set(modes.values()) == {(tmp_path / "ordinary").stat().st_mode & 0o777}, modes


def plain_logits(export: Path, folder: Path) -> np.ndarray:
    """Return what a process without this package computes with client 1 for the images in ``folder``."""
    block = blocks(export / "client_001" / "README.md")[0]
    arguments = [str(folder / "images.npy"), str(folder / "logits.npy"), block]
    subprocess.run([sys.executable, "-c", PLAIN, *arguments], check=True, capture_output=True, cwd=export)
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
        assert text in " ".join(card.text.split())
    assert all(check.name in card.text for check in summary.checks)
    papers = ALGORITHMS[summary.algorithm].papers
    assert papers
    for paper in papers:
        assert f"* {paper}" in " ".join(card.text.split())
    assert "trained on Tiny-ImageNet without adversarial examples" in " ".join(card.text.split())
    assert card.data.license == "apache-2.0"
    assert max(map(len, card.text.splitlines())) <= 120
    assert "\n\n\n" not in card.text


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


@pytest.mark.parametrize("finished", ["adapters"], indirect=True)
def test_an_export_says_how_far_it_is_and_leaves_other_files_alone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sylva_ray.export(finished, tmp_path / "out")
    first, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"1/2  {tmp_path}/out/client_000  [0-9.]+ s  eta [0-9]+ s", first)
    assert re.fullmatch(rf"2/2  {tmp_path}/out/client_001  [0-9.]+ s", last)
    sylva_ray.export(finished, tmp_path / "out", [1], log_format="json")
    assert json.loads(capsys.readouterr().out)["folder"] == str(tmp_path / "out" / "client_001")
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no export"):
        sylva_ray.export(finished, tmp_path)


def test_weights_that_the_hub_knows_by_name_are_not_copied() -> None:
    """The script asks timm for them; nothing is fetched here."""
    backbone = create_backbone(BackboneSection(name="vit_tiny_patch16_224"), 2)
    text = load_script(backbone, ["a", "b"], adapters=True, has_base=False)
    assert "timm.create_model(**arguments, num_classes=len(CLASSES), pretrained=True)" in text
    assert "base.safetensors" not in text
    compile(text, "load.py", "exec")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script of an export of two clients; their folders are empty."""
    backbone = create_backbone(BackboneSection(), 2)
    for client in range(2):
        (tmp_path / f"client_{client:03d}").mkdir()
    (tmp_path / "load.py").write_text(load_script(backbone, ["a", "b"], adapters=False, has_base=False))
    return tmp_path / "load.py"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            [],
            "load.py: name a client and images, e.g. python load.py client_000 photo.png; available: client_000",
        ),
        (["client_7", "x.png"], "load.py: there is no client 'client_7'; available: client_000, client_001"),
        (["client_000"], "load.py: name one or more images, e.g. python load.py client_000 photo.png"),
    ],
)
def test_a_wrong_argument_of_the_script_is_answered_in_a_line(
    arguments: list[str], says: str, script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(says)


@pytest.mark.parametrize("case", CONVERTED)
def test_a_script_reads_every_kind_of_image_as_training_does(case: str, script: Path, tmp_path: Path) -> None:
    """Gray of 12 or 16 bits, 0 for white, transparency: the model sees the colours that it was trained on."""
    make, _ = CONVERTED[case]
    (tmp_path / "image").write_bytes(make())
    decode_image(tmp_path / "image").save(tmp_path / "decoded.png")
    read = runpy.run_path(str(script))["read"]
    assert torch.equal(read(tmp_path / "image"), read(tmp_path / "decoded.png"))


def test_a_script_has_help_with_an_example_and_names_its_clients(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    text = " ".join(capsys.readouterr().out.split())
    assert "example: python load.py client_000 photo.png; available: client_000, client_001" in text
    with pytest.raises(ValueError, match=r"there is no client 'client_2'; available: client_000, client_001"):
        runpy.run_path(str(script))["load"]("client_2")


@pytest.mark.parametrize(
    ("section", "licence", "hub_name", "says"),
    [
        ({}, "apache-2.0", None, "trained on"),
        ({"name": "vit_micro_robust"}, "apache-2.0", None, "trained further on adversarial examples"),
        ({"checkpoint": "/mine/weights.safetensors"}, "unknown", None, "`weights.safetensors`, which the person"),
        ({"name": "resnet18"}, "unknown", None, "random weights"),
        ({"name": "resnet18", "pretrained": True}, "apache-2.0", "timm/resnet18.a1_in1k", "timm states the licence"),
        ({"name": "mine.models:net", "pretrained": True}, "unknown", None, "not known"),
    ],
)
def test_only_what_is_known_is_said_about_the_weights_of_a_backbone(
    section: dict[str, Any], licence: str, hub_name: str | None, says: str
) -> None:
    origin = origin_of(BackboneSection(**section))
    assert (origin.licence, origin.hub_name) == (licence, hub_name)
    assert says in origin.description


def test_a_folder_holds_one_export(tmp_path: Path) -> None:
    """What an earlier export left in a client's folder would be loaded in its place."""
    config = ExperimentConfig(algorithm={"name": "fedavg_at"})
    backbone = create_backbone(config.backbone, 2)
    states = [backbone_arrays(backbone)] * 2
    (tmp_path / "client_000").mkdir()
    (tmp_path / "client_000" / "adapter_model.safetensors").touch()
    export_clients(config, states, [0, 1], tmp_path, ["a", "b"])
    assert [path.name for path in (tmp_path / "client_000").iterdir()] == ["model.safetensors"]
    export_clients(config, states, [1], tmp_path, ["a", "b"])
    with pytest.raises(UserError, match=r"has clients of another export \(client_000\)"):
        export_clients(config, states, [1], tmp_path, ["a", "c"])


def _photo(kind: str) -> Image.Image:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (48, 80, 3), dtype=np.uint8)
    if kind.startswith("16 bits"):
        return Image.fromarray(rng.integers(0, 65536, (48, 80), dtype=np.uint16))
    if kind == "transparent":
        return Image.fromarray(np.dstack([pixels, rng.integers(0, 256, (48, 80), dtype=np.uint8)]))
    return Image.fromarray(pixels[:, :48] if kind == "large square" else pixels)


@pytest.mark.parametrize("kind", ["landscape", "large square", "rotated", "transparent", "16 bits", "16 bits, PGM"])
def test_the_script_reads_photos_as_training_did(kind: str, tmp_path: Path, script: Path) -> None:
    image, exif = _photo(kind), Image.Exif()
    exif[0x0112] = 6 if kind == "rotated" else 1
    path = tmp_path / ("photo.pgm" if kind.endswith("PGM") else "photo.png")
    image.save(path, exif=exif)
    pixels = runpy.run_path(str(script))["read"](path)
    expected = np.asarray(_square(decode_image(path), 32, "")).transpose(2, 0, 1)
    np.testing.assert_array_equal((255 * pixels[0]).round().numpy(), expected)


def test_a_run_from_random_weights_knows_its_backbone_again() -> None:
    """The weights that timm draws for the body depend on the size of the head."""
    raw = TINY | {"algorithm": {"name": "fedit_at"}, "backbone": {"name": "test_vit", "image_size": 32}}
    made = prepare(build(ExperimentConfig, raw))
    state = {"head.bias": np.zeros(made.fleet.num_classes, np.float32)}
    assert digest_backbone(made.config, state).weights == digest_inputs(made).weights
