"""``evaluation.json``: what `sylva-ray evaluate` measured on the trained clients of a run."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated, ClassVar

from pydantic import Field

from sylva_ray.core.records import Artefact, omitted_if_none
from sylva_ray.core.summary import CheckResult, Spread
from sylva_ray.core.types import AttackSpec

_Finite = Annotated[float, Field(exclude_if=math.isinf)]


class ConditionRow(Artefact):
    """Accuracy under one condition: benign, an attack, or the worst case over several attacks."""

    accuracy: Spread
    """Over clients."""
    balanced_accuracy: Spread
    """Class-balanced, over clients."""
    interval: tuple[float, float]
    """95 % interval of the mean of ``accuracy`` over clients: what other test images of theirs could give (Wilson)."""
    images: int
    """Images measured, Byzantine clients' left out."""


class AttackSettings(Artefact):
    """An attack as it was run. The budget is absent where the nearest adversarial image was sought."""

    name: str
    """Key of the attack, e.g. ``pgd``."""
    epsilon: _Finite = math.inf
    """Budget in pixel units (linf), length (l2) or pixels (l0)."""
    steps: int
    """Steps or queries."""
    step_size: _Finite
    """Step size in the units of ``epsilon``."""
    random_start: bool = True
    """Whether it starts at a random point of the ball."""
    restarts: int = 1
    """Independent starts."""
    loss: str = "ce"
    """The loss that it maximises."""
    norm: str = "linf"
    """``linf``, ``l2`` or ``l0``."""
    options: tuple[tuple[str, float], ...] = ()
    """Settings that only this attack has."""

    @classmethod
    def from_spec(cls, spec: AttackSpec) -> AttackSettings:
        """Describe a specification."""
        return cls(**asdict(spec))

    def to_spec(self) -> AttackSpec:
        """Return the specification."""
        return AttackSpec(**{name: getattr(self, name) for name in type(self).model_fields})


class AttackRow(ConditionRow):
    """Accuracy under one attack, and the cost of the attack."""

    settings: AttackSettings
    """Settings of the attack."""
    median_distance: float | None
    """Median size of the perturbations, in the attack's norm, of the images that are classified correctly without one;
    null where most of them are robust. It is the smallest that an attack without a budget found; one with a budget
    stops at the first."""
    forwards: int
    """Images that went forward through the model."""
    backwards: int
    """Images that went backward."""
    seconds: float
    """Worker seconds of what was measured now; 0 where all was in the cache."""
    images_per_second: float | None
    """Test images attacked per worker second; null where all was in the cache."""


class WorstCaseRow(ConditionRow):
    """The worst case: a prediction counts as correct where it is correct under every attack of the same budget."""

    attacks: list[str]
    """Labels of the attacks."""


class PerClass(Artefact):
    """Recall by true class, all clients together; null where a class does not occur."""

    images: list[int]
    """Test images of each class."""
    benign: list[float | None]
    """On unchanged images."""
    worst_case: list[float | None]
    """In the worst case over the main attacks."""


class Curve(Artefact):
    """Accuracy against a setting of the attack."""

    x: list[float]
    """Values of the setting."""
    mean: list[float]
    """Mean accuracy over clients at each."""
    per_client: list[list[float]]
    """Accuracy of each client at each."""
    images: int
    """Images measured."""


class Curves(Artefact):
    """Accuracy against the attack's budget and against its steps."""

    epsilon: Curve
    """PGD-20 at growing epsilon (pixel units)."""
    steps: Curve
    """PGD of growing length."""


class Transfer(Artefact):
    """Accuracy on images that were made against another model."""

    attack: str
    """Label of the attack on the source."""
    images_per_client: int
    """Images of each client."""
    matrix: list[list[float | None]]
    """``matrix[source][target]``; null where it was not measured."""
    own: float
    """Mean of the diagonal."""
    others_mean: float | None
    """Mean off the diagonal."""
    surrogates: dict[str, float]
    """Mean accuracy on images made through other runs, by run folder."""
    strongest: float | None
    """Mean over clients of the accuracy under the strongest source."""


class CertifiedLevel(Artefact):
    """Certified accuracy of the smoothed clients at one noise level (Cohen et al. 2019)."""

    sigma: float
    """Standard deviation of the noise, pixel units."""
    draws: int
    """Noise draws per image."""
    alpha: float
    """Probability that a certificate is wrong."""
    images: int
    """Images of the whole fleet."""
    abstained: float
    """Fraction of images without a certificate."""
    radii: list[float]
    """L2 radii, pixel units, whole image."""
    mean: list[float]
    """Certified accuracy at each, mean over clients."""
    per_client: list[list[float]]
    """Certified accuracy of each client at each."""


class GalleryImage(Artefact):
    """An adversarial image that is close to the original."""

    client: int
    """Number of the client that the test image belongs to."""
    image: int
    """Its position in the client's test split."""
    label: str
    """Name of the true class."""
    answer: str
    """Name of the class that the client predicts for the adversarial image."""
    distance: float
    """L-infinity distance, pixel units."""
    clean: list[list[list[float]]]
    """Pixels 0..255, ``[3][H][W]``."""
    adversarial: list[list[list[float]]]
    """Pixels of the adversarial image, likewise."""


class Evaluation(Artefact):
    """``evaluation.json``, written by `sylva-ray evaluate`."""

    description: ClassVar[str] = "an evaluation"

    run: str
    """Name of the experiment."""
    algorithm: str
    """Name of the method."""
    images: int
    """Test images of the main attacks, Byzantine clients' left out."""
    threat_model: dict[str, str]
    """``norm``, ``training``, ``evaluation``, ``knowledge``, ``precision``, perhaps ``byzantine``, in words."""
    benign: ConditionRow
    """Unchanged images."""
    attacks: dict[str, AttackRow]
    """By attack label."""
    worst_case: dict[str, WorstCaseRow]
    """By budget, e.g. ``linf-eps8``."""
    majority: Spread
    """Accuracy of always answering a client's most frequent training class."""
    per_class: PerClass
    """By true class."""
    collapsed: list[int]
    """Clients that are no better in the worst case than always predicting one class."""
    transfer: Annotated[Transfer | None, omitted_if_none()] = None
    """Where ``--transfer`` was requested."""
    curves: Annotated[Curves | None, omitted_if_none()] = None
    """Where ``--curves`` or ``--checks`` was requested."""
    checks: Annotated[list[CheckResult] | None, omitted_if_none()] = None
    """Where ``--checks`` was requested."""
    certified: Annotated[list[CertifiedLevel] | None, omitted_if_none()] = None
    """Where ``--certify`` was requested."""
    gallery: list[GalleryImage] = Field([])
    """Adversarial images that are closest to the originals."""
    warnings: Annotated[list[str] | None, omitted_if_none()] = None
    """What limits the meaning of the numbers, one sentence each."""
