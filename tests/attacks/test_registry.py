"""An attack is one file: registered there, it can be named everywhere, and its defaults are written nowhere else."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import yaml
from pydantic import Field

from sylva_ray.attacks.base import Attack, LinfAttack, register
from sylva_ray.attacks.registry import ATTACKS, attack_stack, attack_title
from sylva_ray.attacks.state import AttackState
from sylva_ray.config.attacks import check_classes, parse_attack
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import ATTACKS_WITHOUT_STEPS, AttackSpec, ClientImages
from sylva_ray.federation.threat_model import threat_model
from sylva_ray.preparation.resolve import resolve_config
from tests.attacks.models import LinearCohort, linear_batch

DOCS = Path(__file__).parents[2] / "docs" / "evaluate.md"


@pytest.fixture
def toy() -> Iterator[type[LinfAttack]]:
    """One new attack: every pixel gets darker."""

    @register
    class Darker(LinfAttack):
        name: Literal["darker"] = "darker"
        tries: int = Field(2, ge=1)
        power: float = Field(1.0, gt=0)
        display_name: ClassVar[str] = "darkening"

        def spec(self) -> AttackSpec:
            return AttackSpec("darker", self.epsilon, self.tries, 0.0, options=self.changed("power"))

        @classmethod
        def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
            del draws
            for number in range(spec.steps):
                rows = state.remaining()
                amount = spec.epsilon * ((number + 1) / spec.steps) ** cls.option(spec, "power")
                state.logits((state.x[rows] - amount).clamp(0, 1), rows)

    yield Darker
    del ATTACKS["darker"]


def config_with(*attacks: dict[str, Any]) -> ExperimentConfig:
    return build(ExperimentConfig, {"evaluation": {"attacks": list(attacks)}})


@pytest.mark.usefixtures("toy")
def test_a_registered_attack_can_be_named_in_a_config_and_on_the_command_line() -> None:
    config = config_with({"name": "darker", "epsilon": "4/255", "power": 2}, {"name": "darker"}, {"steps": 3})
    assert [spec.label for spec in config.evaluation.specs] == ["darker2-power2-eps4", "darker2-eps8", "pgd3-eps8"]
    assert config.evaluation.specs[0] == parse_attack("darker:epsilon=4/255,power=2")
    assert attack_title(config.evaluation.specs[0]) == "darkening-2 (power 2) at epsilon 4/255"


@pytest.mark.usefixtures("toy")
def test_a_config_with_it_is_written_and_read_again() -> None:
    config = config_with({"name": "darker", "tries": 5})
    assert build(ExperimentConfig, yaml.safe_load(config.to_yaml())) == config
    section = yaml.safe_load(config.to_yaml())["evaluation"]["attacks"][0]
    assert section == {"epsilon": 8 / 255, "name": "darker", "tries": 5, "power": 1.0}


def test_label_title_threat_model_and_classes_follow_from_its_file(tiny_config: ExperimentConfig) -> None:
    """The example of `Attack`, which also needs three classes."""

    @register
    class OneStepBack(LinfAttack):
        name: Literal["one_step_back"] = "one_step_back"
        display_name: ClassVar[str] = "one step back"
        counts_steps: ClassVar[bool] = False
        black_box: ClassVar[bool] = True

        def spec(self) -> AttackSpec:
            return AttackSpec("one_step_back", self.epsilon, 1, self.epsilon, random_start=False)

        @classmethod
        def min_classes(cls, spec: AttackSpec) -> int:
            del spec
            return 3

    try:
        spec = parse_attack("one_step_back:epsilon=4/255")
        assert (spec.label, attack_title(spec)) == ("one_step_back-eps4", "one step back at epsilon 4/255")
        described = threat_model(resolve_config(tiny_config), [spec], [])["evaluation"]
        assert described.startswith("one_step_back-eps4; white box, except one_step_back (the model's answers only)")
        check_classes([spec], 3)
        with pytest.raises(UserError, match=r"one step back needs at least 3 classes and the data set has 2$"):
            check_classes([spec], 2)
    finally:
        del ATTACKS["one_step_back"]
        ATTACKS_WITHOUT_STEPS.remove("one_step_back")


def test_it_attacks(toy: type[LinfAttack]) -> None:
    params, x, y, owner = linear_batch()
    found = attack_stack(
        LinearCohort(),
        params,
        ClientImages(x, y, owner, 2),
        toy.model_validate({"epsilon": 0.1}).spec(),
        ImageDraws(torch.arange(len(x))),
    )
    expected = torch.zeros(len(y), dtype=torch.bool)
    for amount in (0.05, 0.1):
        expected |= LinearCohort().forward(params, x - amount, owner).argmax(1) != y
    assert torch.equal(found.predictions != y, expected)
    assert 0 < expected.sum() < len(y)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (
            {"name": "darker", "trys": 3},
            r"evaluation.attacks.0.trys.*did you mean 'tries'\? Available: name, epsilon, tries",
        ),
        ({"name": "darkr"}, r"evaluation.attacks.0.name = 'darkr'.*did you mean 'darker'\?"),
        ({"name": "darker", "power": 0}, "evaluation.attacks.0.power = 0: must be greater than 0"),
    ],
)
def test_wrong_settings_of_it_are_one_clear_line(attack: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_with(attack)


def test_it_is_unknown_where_it_is_not_registered() -> None:
    with pytest.raises(UserError, match=r"is not known; .*Available: apgd, autoattack, cw"):
        config_with({"name": "darker"})
    assert attack_title(AttackSpec("darker", 0.1, 2, 0.0)) == "darker2-eps25.5"


def test_a_name_is_registered_once(toy: type[LinfAttack]) -> None:
    with pytest.raises(ValueError, match="two attacks are named 'darker'"):
        register(toy)


FILE = """
from typing import Any, ClassVar, Literal
from sylva_ray.attacks.base import LinfAttack
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ClientImages

"""
READER = """
import sys
from sylva_ray.attacks.registry import attack_title
from sylva_ray.config.attacks import parse_attack
from sylva_ray.core.own_code import importing_from
with importing_from([sys.argv[1]]):
    spec = parse_attack("one_step_back:OneStepBack:epsilon=4/255")
print(spec.label, attack_title(spec), sep=", ")
"""


def test_a_file_is_all_that_a_new_attack_needs(tmp_path: Path) -> None:
    """The file is the example that the contract's docstring shows."""
    _, _, example = (Attack.__doc__ or "").partition("::\n")
    (tmp_path / "one_step_back.py").write_text(FILE + textwrap.dedent(example.partition("    One of this package")[0]))
    command = [sys.executable, "-c", READER, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "OneStepBack-eps4, one step back at epsilon 4/255\n"


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_of_ones_own_may_inherit_from_another(name: str) -> None:
    """It has a name of its own; otherwise the other one would be run in its place."""
    parent = ATTACKS[name]
    own = type("Mine", (parent,), {"__annotations__": {"name": str}, "__module__": __name__, "name": "my.module:Mine"})
    needed = {key: 1 for key, field in parent.model_fields.items() if field.is_required() and key != "name"}
    assert own(**needed).spec().name == "my.module:Mine"
    assert parent(**needed).spec().name == name


CODE_READER = """
import sys
from sylva_ray.config.attacks import parse_attack
from sylva_ray.core.own_code import importing_from
from sylva_ray.evaluation.cache import _own_code
with importing_from([sys.argv[1]]):
    print(_own_code(parse_attack("mine:OneStepBack")), _own_code(parse_attack("pgd")), end="")
"""


def test_a_corrected_attack_is_measured_again(tmp_path: Path) -> None:
    """The code of an own attack is hashed into the names of its measurements."""
    _, _, example = (Attack.__doc__ or "").partition("::\n")
    code = FILE + textwrap.dedent(example.partition("    One of this package")[0])
    for text in (code, code.replace("state.x[rows] - spec", "state.x[rows] + spec")):
        (tmp_path / "mine.py").write_text(text)
        command = [sys.executable, "-B", "-c", CODE_READER, str(tmp_path)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{text} "


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_the_docs_state_every_setting_with_its_default(name: str) -> None:
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    stated = dict(re.findall(r"`(\w+)`(?: \(?([\d.]+|none)\)?(?=,|$))?", row.split("|")[2].strip()))
    fields = {key: field.default for key, field in ATTACKS[name].model_fields.items() if key != "name"}
    assert stated.keys() | {"epsilon"} == fields.keys() | {"epsilon"}
    for key, text in stated.items():
        if text:
            assert fields[key] == (None if text == "none" else float(text)), key


@pytest.mark.parametrize(
    ("text", "label", "title"),
    [
        ("pgd", "pgd20-eps8", "PGD-20 at epsilon 8/255"),
        ("fgsm:epsilon=4/255,loss=margin", "fgsm-margin-eps4", "FGSM (margin loss) at epsilon 4/255"),
        (
            "pgd:steps=50,restarts=5,loss=margin,epsilon=4/255",
            "pgd50x5-margin-eps4",
            "PGD-50 (margin loss, 5 restarts) at epsilon 4/255",
        ),
        (
            "pgd:step_size=2/255,random_start=false",
            "pgd20-step2-fixed1-eps8",
            "PGD-20 (step 2, fixed 1) at epsilon 8/255",
        ),
        ("cw", "cw50-margin-eps8", "CW-50 at epsilon 8/255"),
        ("mim:norm=l2,epsilon=0.5", "mim10-l2-decay1-eps0.5", "MIM-10 (decay 1) at L2 epsilon 0.5"),
        (
            "apgd:loss=targeted,norm=l2,epsilon=0.5",
            "apgd100-targeted-l2-targets9-eps0.5",
            "APGD-100 (targeted loss, targets 9) at L2 epsilon 0.5",
        ),
        ("fab:targets=3", "fab100-targets3-eps8", "FAB-100 (targets 3) at epsilon 8/255"),
        ("noise:tries=4", "noise4-eps8", "random noise-4 at epsilon 8/255"),
        ("square:p_init=0.5", "square5000-p_init0.5-eps8", "Square-5000 (p_init 0.5) at epsilon 8/255"),
        ("autoattack", "autoattack-eps8", "AutoAttack at epsilon 8/255"),
        ("autoattack:steps=20", "autoattack-steps20-eps8", "AutoAttack (steps 20) at epsilon 8/255"),
        ("deepfool", "deepfool50-l2", "DeepFool-50 (nearest in L2)"),
        ("sparsefool:reach=5,epsilon=3", "sparsefool20-l0-reach5-eps3", "SparseFool-20 (reach 5) at L0 epsilon 3"),
    ],
)
def test_label_and_title_are_built_from_one_spec(text: str, label: str, title: str) -> None:
    spec = parse_attack(text)
    assert spec.label == label
    assert attack_title(spec) == title
