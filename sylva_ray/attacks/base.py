"""The base class of evaluation attacks (settings, execution, title) and `ATTACKS`, the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from sylva_ray.attacks.state import AttackState
from sylva_ray.core.sections import PixelUnits, Section, conflict
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.text import of_255
from sylva_ray.core.types import ATTACKS_WITHOUT_STEPS, AttackSpec

EPSILON = 8 / 255
"""The default budget, in pixel units."""
L2_EPSILON = 0.5
"""The default budget of an attack within an L2 ball (as in RobustBench, Croce et al. 2021)."""
INFINITE = float("inf")
"""The budget of attacks that search for the nearest adversarial image."""


class Attack(Section):
    """An evaluation attack. Its fields are the settings of the user, with their default values.

    A new attack is a subclass with the methods `spec` and `run`. As ``package.module:OneStepBack`` it is available in
    ``evaluation.attacks`` and with ``--attack``::

        class OneStepBack(LinfAttack):
            display_name: ClassVar[str] = "one step back"
            counts_steps: ClassVar[bool] = False
            black_box: ClassVar[bool] = True

            def spec(self) -> AttackSpec:
                return AttackSpec(self.name, self.epsilon, 1, self.epsilon, random_start=False)

            @classmethod
            def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
                rows = state.remaining()
                state.logits((state.x[rows] - spec.epsilon).clamp(0, 1), rows)

    One of this package has a field ``name`` with its short name, and is decorated with `register`.

    Attributes:
        name: by which a configuration finds the attack.
        display_name: the name of the attack in titles.
        counts_steps: whether the number of steps follows the name in titles and labels, as in PGD-20.
        black_box: whether the attack uses the answers of the model alone, no gradients.
    """

    name: str
    display_name: ClassVar[str]
    counts_steps: ClassVar[bool] = True
    black_box: ClassVar[bool] = False

    @classmethod
    def kinds(cls) -> Sequence[type[Section]]:
        """Return all registered attacks for `Attack` itself, see `Section.kinds`."""
        return list(ATTACKS.values()) if cls is Attack else [cls]

    def spec(self) -> AttackSpec:
        """Return the attack as an `AttackSpec`, which is sent to the workers and provides the label."""
        raise NotImplementedError

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Attack those images of ``state`` that are still robust.

        Args:
            state: the images and the model; it computes logits and gradients and records every success.
            spec: the attack, as returned by `spec`.
            draws: the source of all random numbers.
        """
        raise NotImplementedError

    @classmethod
    def min_classes(cls, spec: AttackSpec) -> int:
        """Return the smallest number of classes that the attack can be run with."""
        del spec
        return 2

    @classmethod
    def title(cls, spec: AttackSpec) -> str:
        """Return a title for tables and figures, e.g. ``PGD-20 (5 restarts) at epsilon 8/255``."""
        name = f"{cls.display_name}-{spec.steps}" if cls.counts_steps else cls.display_name
        norm = spec.norm.upper()
        details = [f"{spec.loss} loss"] if "loss" in cls.model_fields and spec.loss != cls.default("loss") else []
        details += [f"{spec.restarts} restarts"] if spec.restarts > 1 else []
        details += [f"{key} {value:g}" for key, value in spec.options]
        details += [f"nearest in {norm}"] if spec.epsilon == INFINITE else []
        name = f"{name} ({', '.join(details)})" if details else name
        if spec.epsilon == INFINITE:
            return name
        return f"{name} at {'' if spec.norm == 'linf' else f'{norm} '}epsilon {budget_words(spec)}"

    # -- options of a spec: the settings that are specific to this attack -------------------------------------------

    @classmethod
    def default(cls, key: str) -> object:
        """Return the default value of a setting."""
        return cls.model_fields[key].default

    def changed(self, *keys: str) -> tuple[tuple[str, float], ...]:
        """Return those of the settings that differ from their defaults; only these appear in the label."""
        return tuple((key, float(getattr(self, key))) for key in keys if getattr(self, key) != self.default(key))

    @classmethod
    def option(cls, spec: AttackSpec, key: str) -> float:
        """Return a setting from the options of a spec, or its default if the spec does not contain it."""
        return spec.option(key, cls.model_fields[key].default)


class LinfAttack(Attack):
    """An attack within an L-infinity ball; ``epsilon`` is in pixel units."""

    epsilon: PixelUnits = Field(EPSILON, ge=0, le=1)


class LinfOrL2Attack(Attack):
    """An attack within an L-infinity or an L2 ball.

    Attributes:
        epsilon: in pixel units for ``linf`` (default 8/255); the Euclidean norm of the perturbation for ``l2`` (default
            0.5).
    """

    norm: Literal["linf", "l2"] = "linf"
    epsilon: PixelUnits = Field(EPSILON, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _l2_has_its_own_default(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("norm") == "l2" and "epsilon" not in raw:
            return {**raw, "epsilon": L2_EPSILON}
        return raw

    @model_validator(mode="after")
    def _epsilon_is_in_pixels(self) -> LinfOrL2Attack:
        if self.norm == "linf" and self.epsilon > 1:
            raise conflict("epsilon", self.epsilon, "must be in [0, 1] pixel units (8/255, not 8)")
        return self


ATTACKS: dict[str, type[Attack]] = {}
"""The registered attacks by name; importing `sylva_ray.attacks.registry` registers those of this package."""

AttackT = TypeVar("AttackT", bound=Attack)


def register(attack: type[AttackT]) -> type[AttackT]:
    """Add an attack to `ATTACKS` under the default value of its field ``name``.

    Raises:
        ValueError: another attack has that name.
    """
    name = str(attack.default("name"))
    if name in ATTACKS:
        raise ValueError(f"two attacks are named {name!r}: {ATTACKS[name].__qualname__} and {attack.__qualname__}")
    ATTACKS[name] = attack
    if not attack.counts_steps:
        ATTACKS_WITHOUT_STEPS.add(name)
    return attack


def epsilon_text(spec: AttackSpec) -> str:
    """Return the budget as it appears in labels: in units of 1/255 for linf, unchanged for l2 and l0."""
    return budget_words(spec).removesuffix("/255")


def budget_words(spec: AttackSpec) -> str:
    """Return the budget as people read it: a fraction of 255 for linf, unchanged for l2 and l0."""
    return of_255(spec.epsilon) if spec.norm == "linf" else f"{spec.epsilon:.4g}"
