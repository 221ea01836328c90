"""How an evaluation attack is described: in a config (``evaluation.attacks``), and as ``--attack NAME:k=v,...``.

Every attack has keys of its own, so that one which it does not have is refused, with the nearest that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from sylva_ray.config.schema import PixelUnits, Section, build
from sylva_ray.core.errors import UserError
from sylva_ray.core.text import did_you_mean, split_assignment
from sylva_ray.core.types import AttackSpec

INFINITE = float("inf")


def default_step_size(epsilon: float, steps: int) -> float:
    """2.5 epsilon / steps (Madry et al. 2018), never more than epsilon."""
    return min(epsilon, 2.5 * epsilon / steps)


class _Attack(Section):
    """What every attack's section can do."""

    model_config = ConfigDict(allow_inf_nan=False)

    def spec(self) -> AttackSpec:
        """What the attack's code reads."""
        raise NotImplementedError


class _Linf(_Attack):
    """An attack inside a ball of pixel units."""

    epsilon: PixelUnits = Field(8 / 255, ge=0, le=1)


class _LinfOrL2(_Attack):
    """``epsilon`` in pixel units for linf ("8/255"), the length of the whole image's perturbation for l2 (0.5)."""

    norm: Literal["linf", "l2"] = "linf"
    epsilon: PixelUnits = Field(8 / 255, ge=0)

    @model_validator(mode="after")
    def _epsilon_is_in_pixels(self) -> _LinfOrL2:
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError(f"epsilon={self.epsilon:g} must be in [0, 1] pixel units (8/255, not 8)")
        return self


class NoiseAttack(_LinfOrL2):
    """``tries`` uniform points of the ball."""

    name: Literal["noise"] = "noise"
    tries: int = Field(10, ge=1)

    def spec(self) -> AttackSpec:
        """The frozen form that travels to the workers."""
        return AttackSpec("noise", self.epsilon, self.tries, 0.0, norm=self.norm)


class FgsmAttack(_Linf):
    """One full step."""

    name: Literal["fgsm"] = "fgsm"
    loss: Literal["ce", "margin"] = "ce"

    def spec(self) -> AttackSpec:
        """The frozen form."""
        return AttackSpec("fgsm", self.epsilon, 1, self.epsilon, False, 1, self.loss)


class PgdAttack(_LinfOrL2):
    """``step_size`` None: 2.5 epsilon / steps."""

    name: Literal["pgd"] = "pgd"
    steps: int = Field(20, ge=1)
    step_size: PixelUnits | None = Field(None, gt=0)
    random_start: bool = True
    restarts: int = Field(1, ge=1)
    loss: Literal["ce", "margin"] = "ce"

    def spec(self) -> AttackSpec:
        """The frozen form."""
        options: tuple[tuple[str, float], ...] = ()  # only what is not the default, for the label
        step = default_step_size(self.epsilon, self.steps)
        if self.step_size is not None and self.step_size != step:
            step = self.step_size
            options = (("step", step * 255 if self.norm == "linf" else step),)
        if not self.random_start:
            options += (("fixed", 1.0),)
        return AttackSpec(
            "pgd", self.epsilon, self.steps, step, self.random_start, self.restarts, self.loss, self.norm, options
        )


class MimAttack(_LinfOrL2):
    """PGD along a running sum of gradients; ``decay`` of the sum per step."""

    name: Literal["mim"] = "mim"
    steps: int = Field(10, ge=1)
    decay: float = Field(1.0, ge=0)

    def spec(self) -> AttackSpec:
        """The frozen form; steps of epsilon / steps without a random start, as in the paper."""
        step = self.epsilon / self.steps
        options = (("decay", self.decay),)
        return AttackSpec("mim", self.epsilon, self.steps, step, False, norm=self.norm, options=options)


class CwAttack(_Linf):
    """PGD on the margin (Carlini and Wagner 2017, kappa 0) in the L-infinity ball."""

    name: Literal["cw"] = "cw"
    steps: int = Field(50, ge=1)
    restarts: int = Field(1, ge=1)

    def spec(self) -> AttackSpec:
        """The frozen form."""
        step = default_step_size(self.epsilon, self.steps)
        return AttackSpec("cw", self.epsilon, self.steps, step, True, self.restarts, "margin")


class ApgdAttack(_LinfOrL2):
    """``loss`` ce, dlr, or targeted (the DLR towards each of the ``targets`` likeliest wrong classes)."""

    name: Literal["apgd"] = "apgd"
    steps: int = Field(100, ge=1)
    restarts: int = Field(1, ge=1)
    loss: Literal["ce", "dlr", "targeted"] = "ce"
    targets: int = Field(9, ge=1)

    def spec(self) -> AttackSpec:
        """The frozen form."""
        options = (("targets", float(self.targets)),) if self.loss == "targeted" else ()
        return AttackSpec(
            "apgd", self.epsilon, self.steps, 0.0, True, self.restarts, self.loss, self.norm, options=options
        )


class FabAttack(_Linf):
    """Towards the boundary with each of the ``targets`` likeliest wrong classes."""

    name: Literal["fab"] = "fab"
    steps: int = Field(100, ge=1)
    restarts: int = Field(1, ge=1)
    targets: int = Field(9, ge=1)

    def spec(self) -> AttackSpec:
        """The frozen form."""
        options = (("targets", float(self.targets)),)
        return AttackSpec("fab", self.epsilon, self.steps, 0.0, False, self.restarts, options=options)


class SquareAttack(_Linf):
    """``queries`` of random squares; ``p_init`` is the share of pixels that the first one covers."""

    name: Literal["square"] = "square"
    queries: int = Field(5000, ge=1)
    p_init: float = Field(0.8, gt=0, le=1)

    def spec(self) -> AttackSpec:
        """The frozen form."""
        options = (("p_init", self.p_init),) if self.p_init != 0.8 else ()
        return AttackSpec("square", self.epsilon, self.queries, 0.0, options=options)


class AutoAttack(_Linf):
    """The standard ensemble; ``steps`` of its gradient attacks (Square has fifty times as many queries)."""

    name: Literal["autoattack"] = "autoattack"
    steps: int = Field(100, ge=1)

    def spec(self) -> AttackSpec:
        """The frozen form."""
        options = (("steps", float(self.steps)),) if self.steps != 100 else ()
        return AttackSpec("autoattack", self.epsilon, self.steps, 0.0, options=options)


class DeepFoolAttack(_Attack):
    """The nearest adversarial image in L2; with ``epsilon``, also what stands within it."""

    name: Literal["deepfool"] = "deepfool"
    steps: int = Field(50, ge=1)
    overshoot: float = Field(0.02, ge=0)
    epsilon: float | None = Field(None, ge=0, description="length of the perturbation")

    def spec(self) -> AttackSpec:
        """The frozen form."""
        return _nearest("deepfool", self.epsilon, self.steps, "l2", (("overshoot", self.overshoot, 0.02),))


class SparseFoolAttack(_Attack):
    """Few pixels; ``reach`` times DeepFool's step to the boundary; with ``epsilon``, what stands within so many pixels."""

    name: Literal["sparsefool"] = "sparsefool"
    steps: int = Field(20, ge=1)
    reach: float = Field(3.0, ge=1)
    overshoot: float = Field(0.02, ge=0)
    epsilon: float | None = Field(None, ge=0, description="pixels")

    def spec(self) -> AttackSpec:
        """The frozen form."""
        options = (("reach", self.reach, 3.0), ("overshoot", self.overshoot, 0.02))
        return _nearest("sparsefool", self.epsilon, self.steps, "l0", options)


def _nearest(
    name: str, epsilon: float | None, steps: int, norm: str, options: tuple[tuple[str, float, float], ...]
) -> AttackSpec:
    changed = tuple((key, value) for key, value, default in options if value != default)
    return AttackSpec(name, INFINITE if epsilon is None else epsilon, steps, 0.0, False, norm=norm, options=changed)


ATTACK_SECTIONS: tuple[type[_Attack], ...] = (
    NoiseAttack,
    FgsmAttack,
    PgdAttack,
    MimAttack,
    CwAttack,
    ApgdAttack,
    FabAttack,
    SquareAttack,
    AutoAttack,
    DeepFoolAttack,
    SparseFoolAttack,
)


def _named(value: Any) -> Any:
    """Without a name it is PGD."""
    return {"name": "pgd", **value} if isinstance(value, dict) else value


EvaluationAttack = Annotated[
    NoiseAttack
    | FgsmAttack
    | PgdAttack
    | MimAttack
    | CwAttack
    | ApgdAttack
    | FabAttack
    | SquareAttack
    | AutoAttack
    | DeepFoolAttack
    | SparseFoolAttack,
    Field(discriminator="name"),
    BeforeValidator(_named),
]


def parse_attack(text: str) -> AttackSpec:
    """``NAME`` or ``NAME:key=value,key=value``, as on the command line.

    Raises:
        UserError: unknown attack or key (with the nearest one), a value out of range."""
    name, _, rest = text.partition(":")
    known = {section.model_fields["name"].default: section for section in ATTACK_SECTIONS}
    if name not in known:
        hint = did_you_mean(name, known)
        raise UserError("--attack", text, f"unknown attack; {hint}Known are {', '.join(known)}")
    values: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        assignment = split_assignment(part)
        if assignment is None:
            raise UserError("--attack", text, f"{part!r} must be KEY=VALUE")
        key, value = assignment
        values[key] = value
    return build(known[name], values, prefix=f"--attack {name}").spec()


def check_classes(specs: Sequence[AttackSpec], num_classes: int) -> None:
    """Whether the data set has enough classes for every attack's loss.

    Raises:
        UserError: fewer than three for the DLR, four for its targeted form."""
    for spec in specs:
        needed = {"dlr": 3, "targeted": 4}.get(spec.loss, 2)
        if num_classes < needed:
            fix = f"the {spec.loss} loss needs {needed} classes and the data set has {num_classes}; use loss=ce"
            raise UserError("attack", spec.label, fix)
