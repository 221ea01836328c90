"""Wrong input: one line with key, value and what to do, exit code 2, nothing written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sylva_ray.cli import app
from sylva_ray.core.errors import RunError
from sylva_ray.preparation.experiment import Prepared
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Prepared) -> Path:
    """An empty working folder with a good config in it, and a few broken things beside it."""
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "broken.yaml").write_text("training: [1, 2\n")
    (tmp_path / "space.yaml").write_text("base: good.yaml\nparameters: {lora.rank: {grid: [1, 2]}}\n")
    (tmp_path / "tab.yaml").write_text("training:\n\trounds: 3\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "corrupt.safetensors").write_bytes(b"not a checkpoint")
    (tmp_path / "empty_data").mkdir()
    corrupt = tmp_path / "corrupt_data"
    corrupt.mkdir()
    (corrupt / "train-0.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("precious")
    other = tmp_path / "other_run"
    other.mkdir()
    (other / "config.yaml").write_text(tiny.config.model_copy(update={"seed": 7}).to_yaml())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stderr


RUN = ("run", "good.yaml")
ROOT = Path(__file__).parents[1]

CASES = {
    "no such config": (("run", "nowhere.yaml"), ["nowhere.yaml", "no such file", "recipes"]),
    "broken YAML": (("run", "broken.yaml"), ["broken.yaml", "not valid YAML"]),
    "YAML that is no mapping": (("run", "list.yaml"), ["mapping"]),
    "a section that is a value": ((*RUN, "training=3"), ["training = 3", "must be a section"]),
    "a value that is a section": ((*RUN, "training.rounds.x=3"), ["training.rounds.x", "'rounds' is a value"]),
    "override without value": ((*RUN, "training.lr"), ["training.lr", "KEY=VALUE"]),
    "unknown section": ((*RUN, "trainin.lr=1"), ["trainin", "did you mean 'training'"]),
    "unknown key": ((*RUN, "training.learning_rate=1"), ["training.learning_rate", "unknown key", "lr"]),
    "wrong type": ((*RUN, "training.rounds=many"), ["training.rounds", "'many'", "integer"]),
    "epsilon out of range": ((*RUN, "attack.epsilon=8"), ["attack.epsilon", "8", "must be at most 1"]),
    "epsilon that is no number": ((*RUN, "attack.epsilon=8/0"), ["attack.epsilon", "8/0", "fraction"]),
    "rank 0": ((*RUN, "lora.rank=0"), ["lora.rank", "greater than or equal to 1"]),
    "rank above the layer": ((*RUN, "lora.rank=500"), ["lora.rank", "500", "at most 192"]),
    "target that matches nothing": (
        (*RUN, "lora.target_modules=[attn.qvk]"),
        ["attn.qvk", "matches no layer", "attn.qkv"],
    ),
    "target that is a norm": ((*RUN, "lora.target_modules=[norm1]"), ["blocks.0.norm1", "a LayerNorm", "linear layer"]),
    "more clients than samples": ((*RUN, "partition.num_clients=100"), ["partition.num_clients", "100", "150"]),
    "more clients a round than clients": (
        (*RUN, "training.clients_per_round=9"),
        ["training.clients_per_round = 9", "at most partition.num_clients, 3"],
    ),
    "no such protocol": ((*RUN, "--out", "s4://bucket/run"), ["--out", "s4://bucket/run", "not a URL", "s3"]),
    "no such cluster file": (
        ("cluster", "check", "nowhere.yaml"),
        ["FILE = 'nowhere.yaml'", "no such file; a cluster file is a cluster.yaml for `ray up`"],
    ),
    "no such config for a cluster": (
        ("cluster", "check", str(ROOT / "cluster.yaml"), "--config", "nowhere.yaml"),
        ["--config = 'nowhere.yaml'", "no such file"],
    ),
    "no cluster file": (
        ("cluster", "check", "good.yaml"),
        ["FILE = 'good.yaml'", "is a configuration of an experiment, not of a cluster"],
    ),
    "an override of nothing": (("cluster", "check", "good.yaml", "seed=1"), ["override", "seed=1", "--config"]),
    "unknown data set": ((*RUN, "dataset.name=imagnet"), ["dataset.name", "imagnet", "digits"]),
    "missing data set": ((*RUN, "dataset.name=parquet:nowhere"), ["dataset.name", "nowhere", "no such folder"]),
    "empty data set": ((*RUN, "dataset.name=parquet:empty_data"), ["dataset.name", "empty_data", "train"]),
    "corrupt data set": ((*RUN, "dataset.name=parquet:corrupt_data"), ["dataset.name", "corrupt_data", "parquet"]),
    "empty image folder": ((*RUN, "dataset.name=imagefolder:empty_data"), ["dataset.name", "empty_data"]),
    "unknown backbone": ((*RUN, "backbone.name=vit_bse"), ["backbone.name", "vit_bse", "timm"]),
    "missing checkpoint": ((*RUN, "backbone.checkpoint=nowhere.safetensors"), ["backbone.checkpoint", "no such file"]),
    "corrupt checkpoint": (
        (*RUN, "backbone.checkpoint=corrupt.safetensors"),
        ["backbone.checkpoint", "not a readable"],
    ),
    "checkpoint of another model": (
        (
            *RUN,
            "backbone.name=vit_tiny_patch16_224",
            "backbone.checkpoint=" + str(files("sylva_ray") / "assets/vit_micro.safetensors"),
        ),
        ["backbone.checkpoint", "does not fit"],
    ),
    "unknown method": ((*RUN, "algorithm.name=silva"), ["algorithm.name", "silva", "did you mean 'sylva'"]),
    "method that cannot be imported": (
        (*RUN, "algorithm.name=no.such:Thing"),
        ["algorithm.name", "no module no.such is installed", "--import DIR"],
    ),
    "unknown parameter of the method": (
        (*RUN, "algorithm.adaptrs=global"),
        ["algorithm.adaptrs", "did you mean 'adapters'"],
    ),
    "phase 2 without adapters": (
        (*RUN, "algorithm.model=full", "algorithm.adapters=global"),
        ["algorithm.phase2.enabled", "algorithm.model=lora"],
    ),
    "phase 2 of a whole model": (
        (*RUN, "algorithm={name: fedavg_at, phase2: {enabled: true}}"),
        ["algorithm.phase2.enabled", "true", "algorithm.model=lora"],
    ),
    "neighbours without adapters": (
        (*RUN, "algorithm={name: fedavg_at, heads: neighbours}"),
        ["algorithm.model", "'full'", "global or local"],
    ),
    "more attackers than Krum bears": (
        (*RUN, "partition.num_clients=5", "byzantine.fraction=0.4", "algorithm={name: fedit_at, robust: {rule: krum}}"),
        ["byzantine.fraction", "0.4", "n >= 2f + 3", "5 uploads and assumes that 2 are Byzantine"],
    ),
    "a centre of one's own for all": (
        (*RUN, "algorithm={name: fedavg_at, robust: {rule: self_centred_clipping}}"),
        ["algorithm.robust.rule", "'self_centred_clipping'", "centred_clipping"],
    ),
    "neighbours by adapters that stay at home": (
        (*RUN, "algorithm={name: per_lora, heads: neighbours}"),
        ["algorithm.heads", "'neighbours'", "adapters=local"],
    ),
    "a robust rule over too few partners of a mixture": (
        (
            *RUN,
            "partition.num_clients=8",
            "partition.min_samples=5",
            "byzantine.fraction=0.13",
            "algorithm={name: sylva, num_neighbours: 3, mixture: {partners: [neighbours]}, robust: {rule: krum}}",
        ),
        ["byzantine.fraction", "3 neighbours (algorithm.num_neighbours)", "krum needs"],
    ),
    "batch statistics that would be coded": (
        (*RUN, "algorithm={name: fedavg_at}", "backbone.name=resnet10t", "compression.kind=int4"),
        ["compression.kind = 'int4'", "batch normalisation", "running_var"],
    ),
    "a robust rule over padded ranks": (
        (*RUN, "algorithm={name: hetlora_at, ranks: [1, 2], robust: {rule: krum}}"),
        ["algorithm.robust.rule", "'krum'", "only mean"],
    ),
    "a fraction that is nobody": (
        (*RUN, "byzantine.fraction=0.2"),
        ["byzantine.fraction", "0.2", "less than 1 of 3 clients", "0.334 is one"],
    ),
    "a strength without effect": (
        (*RUN, "byzantine={fraction: 0.4, attack: mimic, strength: 2}"),
        ["byzantine.strength", "2", "no effect on mimic"],
    ),
    "a loss without effect": (
        (*RUN, "algorithm={name: calfat, loss: trades}"),
        ["algorithm.loss", "'trades'", "a loss of its own"],
    ),
    "more liars than a neighbourhood bears": (
        (
            *RUN,
            "partition.num_clients=5",
            "algorithm.adapters=neighbours",
            "algorithm.robust={rule: geometric_median, assumed_fraction: 0.4}",
        ),
        ["algorithm.robust.assumed_fraction", "0.4", "n >= 2f + 1", "3 neighbours", "assumes that 2 are Byzantine"],
    ),
    "coordinates of LoRA pairs": (
        (*RUN, "algorithm.robust.rule=coordinate_median"),
        ["algorithm.robust.rule", "'coordinate_median'", "LoRA pairs", "factors=b"],
    ),
    "a client's rank above the common one": (
        (*RUN, "algorithm={name: hetlora_at, ranks: [1, 4]}"),
        ["algorithm.ranks", "4", "lora.rank, which is 2"],
    ),
    "teacher of other classes": (
        (*RUN, "algorithm={name: pm_afl, teacher_probe: false}"),
        ["algorithm.teacher", "knows 200 classes", "has 10", "teacher_probe=true"],
    ),
    "head before body in one epoch": (
        (*RUN, "algorithm={name: fedrep_at}"),
        ["training.local_epochs", "1", "at least 2 epochs"],
    ),
    "unknown compression": ((*RUN, "compression.kind=int2"), ["compression.kind", "int2", "'int4'", "'topk'"]),
    "unknown way to lie": ((*RUN, "byzantine.attack=lie"), ["byzantine.attack", "lie", "'sign_flip'"]),
    "shift where blocks are no chain": (
        (
            *RUN,
            "backbone.name=swin_tiny_patch4_window7_224",
            "backbone.image_size=56",
            "algorithm.phase2.selection=shift",
        ),
        ["algorithm.phase2.selection", "'shift'", "chain of transformer blocks"],
    ),
    "image size that patches do not divide": (
        (*RUN, "backbone.image_size=33"),
        ["backbone.image_size", "33", "multiple of 8"],
    ),
    "tracking address without a protocol": (
        (*RUN, "tracking.uri=ada:s3cret@host:5000"),
        ["tracking.uri", "neither a URL nor a path"],
    ),
    "tracking address with another protocol": (
        (*RUN, "tracking.enabled=true", "tracking.uri=ftp://host/store"),
        ["tracking.uri", "ftp://host/store", "no stores with the protocol 'ftp'", "sqlite"],
    ),
    "a word in place of the list of layers": (
        (*RUN, "lora.target_modules=all_linears"),
        ["lora.target_modules", "must be a list", "or all_linear"],
    ),
    "a size without a unit that is one": (
        (*RUN, "cluster.memory_per_actor=8 XB"),
        ["cluster.memory_per_actor", "8 XB", "a size such as 8 GB"],
    ),
    "a memory budget below one image": (
        (*RUN, "training.windows=auto", "cluster.memory_per_actor=30 MB"),
        ["cluster.memory_per_actor", "30 MB", "is too small: at least"],
    ),
    "more memory than there is": (
        (*RUN, "training.windows=auto", "cluster.memory_per_actor=900 TB"),
        ["cluster.memory_per_actor", "this machine has"],
    ),
    "windows that are no section": (
        (*RUN, "training.windows=0"),
        ["training.windows = 0: must be 'auto', or a section with keys of its own"],
    ),
    "a cohort size that is no number": (
        (*RUN, "training.cohort_size=many"),
        ["training.cohort_size = 'many': must be a valid integer, or 'auto'"],
    ),
    "no attention kernel": (
        (*RUN, "training.attention=flash"),
        ["training.attention", "flash", "'fused' or 'plain', or a section with keys"],
    ),
    "no attention kernel of a precision": (
        (*RUN, "training.attention={bfloat16: foo}"),
        ["training.attention.bfloat16 = 'foo'", "'fused' or 'plain'"],
    ),
    "no such precision to choose a kernel for": (
        (*RUN, "training.attention={bf16: fused}"),
        ["training.attention.bf16", "did you mean 'bfloat16'"],
    ),
    "GPU where there is none": ((*RUN, "training.device=cuda"), ["training.device", "cuda", "no GPU"]),
    "attack twice": (
        (*RUN, "evaluation.attacks=[{epsilon: 0.1}, {epsilon: 0.1}]"),
        ["evaluation.attacks = 'pgd20-eps25.5'", "listed twice"],
    ),
    "actors per client in cohorts": (
        (*RUN, "cluster.num_actors=per_client", "training.cohort_size=2"),
        ["cluster.num_actors", "cohort_size=1"],
    ),
    "folder with something else in it": ((*RUN, "--out", "occupied"), ["--out", "occupied", "not empty"]),
    "folder that holds a run": ((*RUN, "seed=7", "--out", "other_run"), ["--out", "other_run", "--resume"]),
    "folder that holds another config": (
        (*RUN, "--out", "other_run", "--resume"),
        ["other_run", "another config", "seed"],
    ),
    "nothing to resume": ((*RUN, "--out", "fresh", "--resume"), ["--out = 'fresh'", "no run to resume"]),
    "nothing to resume in RUN": (("run", "empty_data", "--resume"), ["RUN = 'empty_data'", "no run to resume"]),
    "no sweep to resume in SPACE": (("tune", "empty_data", "--resume"), ["SPACE = 'empty_data'", "no space.yaml"]),
    "no such space": (("tune", "nowhere.yaml"), ["SPACE = 'nowhere.yaml'", "no such file"]),
    "no such pre-training": (("pretrain", "nowhere.yaml"), ["CONFIG = 'nowhere.yaml'", "no such file"]),
    "comparison of nothing": (("compare", "empty_data"), ["SOURCE = 'empty_data'", "is not a run folder"]),
    "a run that is not there": (("report", "nowhere"), ["RUN = 'nowhere'", "is not a run folder (it does not exist)"]),
    "bad address of a store": (("compare", "x", "--uri", "a:b@c"), ["--uri", "neither a URL nor a path"]),
    "address of a store with another protocol": (
        ("compare", "x", "--uri", "foo+bar://h"),
        ["--uri", "no stores with the protocol 'foo'"],
    ),
    "other settings in a resume": (
        ("run", "other_run", "--resume", "training.rounds=4", "attack.epsilon=2/255", "cluster.num_actors=2"),
        [
            "attack.epsilon = '2/255'",
            "attack.epsilon: 4/255 there, 2/255 now",
            "sylva-ray run other_run attack.epsilon=2/255 cluster.num_actors=2 training.rounds=4 --out NEW",
        ],
    ),
    "a backbone without layers for adapters": (
        (*RUN, "backbone.name=resnet18", "backbone.image_size=32"),
        ["backbone.name = 'resnet18'", "no linear layer but its head", "lora.target_modules=[layer"],
    ),
    "a class that is no method": (
        (*RUN, "algorithm.name=json:JSONDecoder"),
        ["algorithm.name", "is no method. Expected: sylva,", "or package.module:Class"],
    ),
    "a function that is no partition": (
        (*RUN, "partition.kind=json:JSONDecoder"),
        ["partition.kind", "failed (TypeError", "must be a function (labels, section, rng)"],
    ),
    "a tab in YAML": (("run", "tab.yaml"), ["CONFIG = 'tab.yaml'", "line 2: it is indented with a tab", "blanks"]),
    "a budget that is no number": (("evaluate", "x", "--epsilon", "x"), ["--epsilon = 'x'", "fraction such as 4/255"]),
    "a format that is unknown": (
        ("export", "other_run", "--to", "x", "--format", "tflite"),
        ["'--format': 'tflite' is not one of 'peft', 'onnx'"],
    ),
    "resume without folder": ((*RUN, "--resume"), ["--resume", "--out"]),
    "folder below a file": ((*RUN, "--out", "good.yaml/run"), ["good.yaml/run"]),
    "report of no run": (("report", "empty_data"), ["empty_data", "not a run folder"]),
    "export of a client that is no number": (
        ("export", "other_run", "--to", "x", "--client", "²"),
        ["--client = '²'", "all or the number of a client"],
    ),
    "export of no run": (("export", "nowhere", "--to", "x"), ["nowhere", "not a run folder"]),
    "bytes of an unknown backbone": (("bytes", "--backbone", "vitt"), ["--backbone", "vitt"]),
    "bytes at rank 0": (("bytes", "--rank", "0"), ["--rank = 0", "greater than or equal to 1"]),
    "bytes of an unknown method": (("bytes", "--method", "nope"), ["--method", "unknown method"]),
    "a file of another kind, run": (("run", "space.yaml"), ["is the space of a sweep", "sylva-ray tune space.yaml"]),
    "a file of another kind, swept": (("tune", "good.yaml"), ["is an experiment", "sylva-ray run good.yaml"]),
    "a file of another kind, pre-trained": (("pretrain", "good.yaml"), ["is an experiment", "run good.yaml"]),
    "a value in place of a parameter": (
        ("tune", "space.yaml", "parameters.lora.rank=3"),
        ["parameters.lora.rank = 3", "e.g. {grid: [3]}"],
    ),
    "a word in place of a list": ((*RUN, "tracking.observers=wandb"), ["tracking.observers", "write [wandb] (more:"]),
    "a word in place of a list of sections": ((*RUN, "evaluation.attacks=pgd"), ["write [{name: pgd}]"]),
    "a number in place of a word or a section": ((*RUN, "training.windows=3"), ["'auto', or a section with keys"]),
    "a word in place of a number or another word": (
        (*RUN, "cluster.num_actors=per_clients"),
        ["integer, or 'auto' or 'per_client'; did you mean 'per_client'?"],
    ),
    "a partition that is misspelt": (
        (*RUN, "partition.kind=dirchlet"),
        ["or package.module:name; did you mean 'dirichlet'?"],
    ),
    "a section that is no section": ((*RUN, "attack=null"), ["attack = null", "(more: sylva-ray show attack)"]),
    "a word in place of a section": ((*RUN, "compression=int8"), ["compression = 'int8'", "e.g. {kind: int8}"]),
    "a value that the shell has divided": (
        (*RUN, "evaluation.attacks=[{name:", "pgd}]"),
        ["in a shell all of KEY=VALUE"],
    ),
    "a kind of names": (("show", "checks"), ["sylva-ray list checks"]),
    "a key inside a list": ((*RUN, "evaluation.attacks.0.step=3"), ["(more: sylva-ray show evaluation.attacks)"]),
    "a data set that needs arguments": (
        (*RUN, "dataset.name=os.path:join"),
        ["failed (TypeError", "must be a function without arguments"],
    ),
    "fewer images than one client needs": (
        (*RUN, "partition.min_samples=1000"),
        ["partition.num_clients", "lower partition.min_samples"],
    ),
    "a setting as an option": ((*RUN, "--seed", "3"), ["No such option: --seed", "KEY=VALUE: seed=..."]),
    "a setting's last name as an option": ((*RUN, "--rounds", "3"), ["KEY=VALUE: training.rounds=..."]),
    "a setting without its section": ((*RUN, "rounds=3"), ["did you mean 'training.rounds'?"]),
    "a setting of another section": ((*RUN, "attack.lr=3"), ["did you mean 'training.lr'?"]),
    "a near key before the same one elsewhere": (
        (*RUN, "evaluation.attack=3"),
        ["did you mean 'evaluation.attacks' or 'attack'"],
    ),
    "a setting of experiments as an option of pretrain": (
        ("pretrain", "pretrain_tiny_imagenet", "--zzz", "3"),
        ["settings are written KEY=VALUE\n"],
    ),
    "a method's setting without its section": ((*RUN, "class_balance=0.9"), ["show algorithm.class_balance"]),
    "an option without its value": ((*RUN, "--out"), ["Option '--out' requires an argument.\n"]),
    "an attack's unknown key": (("evaluate", "x", "--attack", "pgd:step=3"), ["pgd.step", "sylva-ray show pgd"]),
    "an unknown attack": (("evaluate", "x", "--attack", "pgdd"), ["did you mean 'pgd'", "sylva-ray list attacks"]),
    "a run's setting in tracking": (("track", "other_run", "seed=3"), ["only tracking.* can be changed here"]),
    "a pre-training's setting": (
        ("pretrain", "pretrain_tiny_imagenet", "training.epochs=0"),
        ["training.epochs = 0: must be greater than or equal to 1\n"],
    ),
    "unknown option": ((*RUN, "--outt", "x"), ["--outt"]),
    "unknown command": (("rnu",), ["rnu", "Did you mean 'run'? Commands: list, show"]),
    "unknown command of a group": (("cluster", "shapes"), ["'shapes'. Commands: check, gpu"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line_and_exit_code_2(case: str, here: Path) -> None:
    arguments, says = CASES[case]
    before = sorted(here.rglob("*"))
    code, err = call(*arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    for part in says:
        assert part in err, err
    assert "Traceback" not in err
    assert sorted(here.rglob("*")) == before, "something was written"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped"),
        (RunError("train, step 3, clients 1: boom"), 1, "step 3"),
        (OSError(28, "No space left on device"), 1, "No space left"),
    ],
)
def test_a_run_that_fails_says_how_to_resume(
    error: BaseException | signal.Signals, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(prepared: Prepared, folder: RunFolder, resume: bool, *others: object) -> None:
        del others
        folder.claim(prepared.config, resume)
        if isinstance(error, signal.Signals):
            os.kill(os.getpid(), error)
        else:
            raise error

    monkeypatch.setattr("sylva_ray.execution.run.run_prepared", fail)
    got, err = call(*RUN, "--out", "begun")
    assert got == code
    assert says in err
    assert err.strip().endswith("sylva-ray run begun --resume")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.usefixtures("here")
def test_an_interruption_before_anything_was_begun_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        del arguments
        raise KeyboardInterrupt

    monkeypatch.setattr("sylva_ray.config.experiment.load_config", interrupt)
    code, err = call(*RUN)
    assert code == 130
    assert err.strip().startswith("sylva-ray: interrupted: nothing was begun")


@pytest.mark.usefixtures("here")
def test_an_interrupted_pre_training_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(config: object, out: Path, *others: object) -> None:
        del config, others
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("sylva_ray.pretraining.trainer.pretrain", interrupt)
    Path("pre.yaml").write_text("dataset: {name: digits}\n")
    code, err = call("pretrain", "pre.yaml", "training.epochs=2", "--out", "base")
    assert code == 130
    assert err == (
        "sylva-ray: interrupted. The finished epochs are kept. "
        "Resume with: sylva-ray pretrain pre.yaml training.epochs=2 --out base --resume\n"
    )


RAY_CASES = {
    "GPU actors where there is no GPU": (("cluster.gpus_per_actor=0.5",), ["cluster.gpus_per_actor", "0.5"]),
    "address unreachable": (
        ("cluster.address=127.0.0.1:9", "cluster.connect_timeout_s=2"),
        ["cluster.address", "127.0.0.1:9"],
    ),
    "more CPUs than there are": (("cluster.cpus_per_actor=4096",), ["cluster.cpus_per_actor", "4096"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RAY_CASES)
def test_a_cluster_that_cannot_hold_the_run(case: str, here: Path) -> None:
    """In a process of its own: this one may be connected to Ray already."""
    overrides, says = RAY_CASES[case]
    before = sorted(here.rglob("*"))
    command = [sys.executable, "-m", "sylva_ray.cli", *RUN, "cluster.pool=ray", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 2, result.stderr
    assert all(part in result.stderr.strip().splitlines()[-1] for part in says), result.stderr
    assert sorted(here.rglob("*")) == before


def test_ctrl_c_while_the_commands_are_imported_ends_in_one_line() -> None:
    script = """
import sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "sylva_ray.cli.app":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
import sylva_ray.cli
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "sylva-ray: interrupted: nothing was begun\n")
