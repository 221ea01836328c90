"""What an evaluation attack is: its settings, how it runs and what it is called; and `ATTACKS`, the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, model_validator

from sylva_ray.attacks.state import AttackState
from sylva_ray.core.sections import PixelUnits, Section
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

EPSILON = 8 / 255
"""The budget of an attack that states none, in pixel units."""
INFINITE = float("inf")
"""The budget of an attack that looks for the nearest adversarial image."""


class Attack(Section):
    """One evaluation attack; its fields are what a user can set, and the only place where defaults are written.

    A new attack is one file of this package: a subclass with a field ``name``, with `spec` and `run`, under `register`.
    It can then be named in ``evaluation.attacks`` and behind ``--attack``::

        @register
        class OneStepBack(LinfAttack):
            name: Literal["one_step_back"] = "one_step_back"
            shown: ClassVar[str] = "one step back"

            def spec(self) -> AttackSpec:
                return AttackSpec("one_step_back", self.epsilon, 1, self.epsilon, random_start=False)

            @classmethod
            def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
                rows = state.remaining()
                state.logits((state.x[rows] - spec.epsilon).clamp(0, 1), rows)

    Attributes:
        shown: the attack's name in titles.
        counts_steps: whether the number of steps follows it (PGD-20, but FGSM).
    """

    model_config = ConfigDict(allow_inf_nan=False)
    shown: ClassVar[str]
    counts_steps: ClassVar[bool] = True

    @classmethod
    def kinds(cls) -> Sequence[type[Section]]:
        """See `Section.kinds`: every registered attack."""
        return list(ATTACKS.values()) if cls is Attack else [cls]

    def spec(self) -> AttackSpec:
        """Build the frozen form, which travels to the workers and names the attack (`AttackSpec.label`)."""
        raise NotImplementedError

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Attack the images of ``state`` that are still robust.

        Args:
            state: answers logits and gradients, and records every success.
            spec: what `spec` built.
            draws: every random number, by image and stream index.
        """
        raise NotImplementedError

    @classmethod
    def title(cls, spec: AttackSpec) -> str:
        """Say in words what the spec's label says in short."""
        name = f"{cls.shown}-{spec.steps}" if cls.counts_steps else cls.shown
        norm = spec.norm.upper()
        details = [f"{spec.loss} loss"] if "loss" in cls.model_fields and spec.loss != cls.default("loss") else []
        details += [f"{spec.restarts} restarts"] if spec.restarts > 1 else []
        details += [f"{key} {value:g}" for key, value in spec.options]
        details += [f"nearest in {norm}"] if spec.epsilon == INFINITE else []
        name = f"{name} ({', '.join(details)})" if details else name
        if spec.epsilon == INFINITE:
            return name
        budget = epsilon_text(spec)
        return f"{name} at epsilon {budget}/255" if spec.norm == "linf" else f"{name} at {norm} epsilon {budget}"

    # -- the options of a spec: settings that only this attack has --------------------------------------------------

    @classmethod
    def default(cls, key: str) -> object:
        """Return a setting's default."""
        return cls.model_fields[key].default

    def changed(self, *keys: str) -> tuple[tuple[str, float], ...]:
        """List those of the settings that are not at their defaults: only they belong into the label."""
        return tuple((key, float(getattr(self, key))) for key in keys if getattr(self, key) != self.default(key))

    @classmethod
    def option(cls, spec: AttackSpec, key: str) -> float:
        """Read a setting off a spec; one that it leaves out has its default."""
        return spec.option(key, cls.model_fields[key].default)


class LinfAttack(Attack):
    """An attack inside a ball of pixel units."""

    epsilon: PixelUnits = Field(EPSILON, ge=0, le=1)


class LinfOrL2Attack(Attack):
    """``epsilon`` in pixel units for linf ("8/255"), the length of the whole image's perturbation for l2 (0.5)."""

    norm: Literal["linf", "l2"] = "linf"
    epsilon: PixelUnits = Field(EPSILON, ge=0)

    @model_validator(mode="after")
    def _epsilon_is_in_pixels(self) -> LinfOrL2Attack:
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError(f"epsilon={self.epsilon:g} must be in [0, 1] pixel units (8/255, not 8)")
        return self


ATTACKS: dict[str, type[Attack]] = {}
"""Every registered attack by name; `sylva_ray.attacks.registry` fills it with those of this package."""

AttackT = TypeVar("AttackT", bound=Attack)


def register(attack: type[AttackT]) -> type[AttackT]:
    """Enter an attack into `ATTACKS` under the default of its field ``name``.

    Raises:
        ValueError: another attack has that name.
    """
    name = str(attack.default("name"))
    if name in ATTACKS:
        raise ValueError(f"two attacks are named {name!r}: {ATTACKS[name].__qualname__} and {attack.__qualname__}")
    ATTACKS[name] = attack
    return attack


def epsilon_text(spec: AttackSpec) -> str:
    """Format the budget as labels do: in 1/255 for linf, as it is for l2 and l0."""
    return f"{spec.epsilon * (255 if spec.norm == 'linf' else 1):.4g}"
