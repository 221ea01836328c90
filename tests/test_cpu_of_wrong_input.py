"""Wrong input is answered before PyTorch, timm or Ray are imported, which takes most of the seconds of a wrong answer.

What only the model itself can tell is not listed: names in ``lora.target_modules``, a ``lora.rank`` above a layer's
smaller side, a checkpoint of another model. It takes the imports, about four seconds of CPU time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sylva_ray.preparation.resolve import may_have_gpu

ROOT = Path(__file__).parents[1]
RUN = ("run", str(ROOT / "configs/digits.yaml"))
TUNE = ("tune", str(ROOT / "tune_spaces/smoke.yaml"))
PRETRAIN = ("pretrain", str(ROOT / "configs/pretrain_tiny_imagenet.yaml"))

WRONG = {
    "an empty config": ("run", "empty.yaml"),
    "a key twice": ("run", "twice.yaml"),
    "no such config": ("run", "nowhere.yaml"),
    "a value out of range": (*RUN, "lora.rank=0"),
    "an override that is none": (*RUN, "a..b=1"),
    "an unknown attack in the config": (*RUN, "evaluation.attacks=[{name: pgdd}]"),
    "an unknown method": (*RUN, "algorithm.name=silva"),
    "a method that cannot be imported": (*RUN, "algorithm.name=no.such:Thing"),
    "an unknown parameter of the method": (*RUN, "algorithm.adaptrs=global"),
    "a parameter out of range": (*RUN, "algorithm.phase2.guard_confidence=2"),
    "too many Byzantine clients": (*RUN, "byzantine.fraction=0.4", "algorithm={name: fedit_at, robust: {rule: krum}}"),
    "an unknown backbone": (*RUN, "backbone.name=vit_tiny_patch16_222"),
    "a backbone that is never fetched": (*RUN, "backbone.pretrained=true"),
    "a checkpoint that is missing": (*RUN, "backbone.checkpoint=nowhere.safetensors"),
    "a checkpoint that is none": (*RUN, "backbone.checkpoint=empty.yaml"),
    "an unknown teacher": (*RUN, "algorithm={name: pm_afl, teacher: {name: vit_tny}}"),
    "too many clients for the data": (*RUN, "partition.num_clients=1000"),
    "too many classes for the data": (*RUN, "partition={kind: pathological, classes_per_client: 11}"),
    "too many images per client": (*RUN, "partition.min_samples=1000"),
    "a space with an unknown backbone": (*TUNE, "parameters.backbone.name={grid: [vit_tny]}"),
    "an unknown data set": (*RUN, "dataset.name=imagnet"),
    "a missing data set": (*RUN, "dataset.name=parquet:nowhere"),
    "a data set without files": (*RUN, "dataset.name=imagefolder:empty"),
    "a damaged data set": (*RUN, "dataset.name=parquet:damaged"),
    "a folder that is not free": (*RUN, "--out", "occupied"),
    "nothing to resume": (*RUN, "--out", "fresh", "--resume"),
    "a space with a wrong value": (*TUNE, "training.rounds=0"),
    "a space with a wrong point": (*TUNE, "parameters.lora.rank={grid: [2, 0]}"),
    "a space with an unknown method": (*TUNE, "algorithm.name=silva"),
    "a space with an unknown data set": (*TUNE, "dataset.name=imagnet"),
    "a sweep in a folder that is not free": (*TUNE, "--out", "occupied"),
    "an evaluation of nothing": ("evaluate", "nowhere"),
    "an evaluation by an unknown attack": ("evaluate", "nowhere", "--attack", "pgdd"),
    "an evaluation by an unknown suite": ("evaluate", "nowhere", "--suite", "quik"),
    "a budget out of range": ("evaluate", "nowhere", "--epsilon", "8"),
    "a comparison of nothing": ("compare", "nowhere"),
    "an export of nothing": ("export", "nowhere", "--to", "x"),
    "a report of nothing": ("report", "nowhere"),
    "tracking of nothing": ("track", "nowhere"),
    "pre-training of a run's config": ("pretrain", str(ROOT / "configs/digits.yaml")),
    "pre-training on nothing": (*PRETRAIN, "dataset.name=imagefolder:nowhere"),
    "no such cluster file": ("cluster", "check", "nowhere.yaml"),
    "no cluster file": ("cluster", "check", str(ROOT / "configs/digits.yaml")),
    "bytes of an unknown method": ("bytes", "--method", "silva"),
    "bytes of an unknown backbone": ("bytes", "--backbone", "vit_tny"),
    "pre-training of an unknown backbone": (*PRETRAIN, "dataset.name=digits", "backbone.name=vit_tny"),
    "bytes at rank 0": ("bytes", "--rank", "0"),
}

if not may_have_gpu():
    WRONG["a GPU where there is none"] = (*RUN, "training.device=cuda")

HEAVY = ("torch", "timm", "ray", "mlflow", "sklearn")

SCRIPT = """
import contextlib, io, json, os, sys, sylva_ray.cli
heavy = json.loads(sys.argv[1])
for name, arguments in json.loads(sys.argv[2]).items():
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            sylva_ray.cli.app(arguments)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([name, code, error.getvalue(), [library for library in heavy if library in sys.modules]]))
"""
"""Every case in one process: what one of them imports, the next ones show, too."""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "twice.yaml").write_text("lora: {rank: 2}\nlora: {rank: 3}\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    for name in ("train", "test"):
        (tmp_path / "damaged" / f"{name}.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("precious")
    return tmp_path


@pytest.mark.long
def test_wrong_input_is_answered_before_heavy_libraries_are_imported(here: Path) -> None:
    before = sorted(here.rglob("*"))
    command = [sys.executable, "-c", SCRIPT, json.dumps(HEAVY), json.dumps(WRONG)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    answers = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert [name for name, *_ in answers] == list(WRONG)
    for name, code, error, imported in answers:
        assert code == 2, (name, error)
        assert len(error.strip().splitlines()) == 1, (name, error)
        assert not imported, (name, error)
    assert sorted(here.rglob("*")) == before
