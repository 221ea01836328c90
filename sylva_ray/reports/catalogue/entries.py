"""Methods, attacks, data sets and everything else that a configuration may name, each with a sentence."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sylva_ray.algorithms.registry import ALGORITHMS
from sylva_ray.attacks.registry import ATTACKS
from sylva_ray.config.recipes import recipes
from sylva_ray.data.partition import PARTITIONS
from sylva_ray.data.published import PUBLISHED
from sylva_ray.metrics.check_titles import CHECK_TITLES
from sylva_ray.models.shipped import SHIPPED


@dataclass(frozen=True)
class Entry:
    """Something that has a name.

    Attributes:
        name: as it is written in a configuration.
        summary: a sentence without its full stop.
    """

    name: str
    summary: str


def _methods() -> list[Entry]:
    return [Entry(name, first_sentence(method.__doc__)) for name, method in ALGORITHMS.items()]


def _attacks() -> list[Entry]:
    modules = {name: sys.modules[attack.__module__] for name, attack in sorted(ATTACKS.items())}
    return [Entry(name, first_sentence(module.__doc__)) for name, module in modules.items()]


def _datasets() -> list[Entry]:
    published = [
        Entry(name, f"{train:,} training and {test:,} test images of {classes} classes; torchvision downloads them")
        for name, (train, test, classes) in PUBLISHED.items()
    ]
    return [
        Entry("digits", "1,797 handwritten digits of scikit-learn, 10 classes; no download"),
        *published,
        Entry("imagefolder:PATH", "a folder with one folder of images per class"),
        Entry("parquet:PATH", "a folder of parquet files in the image schema of Hugging Face"),
    ]


def _backbones() -> list[Entry]:
    shipped = [Entry(name, first_sentence(_body_of(backbone.card.read_text()))) for name, backbone in SHIPPED.items()]
    return [*shipped, Entry("any timm model", "e.g. vit_small_patch16_224, with backbone.pretrained or a checkpoint")]


def _partitions() -> list[Entry]:
    return [Entry(name, first_sentence(draw.__doc__)) for name, draw in PARTITIONS.items()]


def _checks() -> list[Entry]:
    return [Entry(name, f"{check.title}: {check.passes_if}") for name, check in CHECK_TITLES.items()]


def _recipes() -> list[Entry]:
    return [Entry(name, f"{recipe.kind}: {recipe.summary}") for name, recipe in recipes().items()]


ENTRIES: Mapping[str, Callable[[], list[Entry]]] = MappingProxyType(
    {
        "methods": _methods,
        "attacks": _attacks,
        "datasets": _datasets,
        "backbones": _backbones,
        "partitions": _partitions,
        "checks": _checks,
        "recipes": _recipes,
    }
)
"""Returns the entries of each kind."""


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a docstring or a page, without its full stop and its markup.

    >>> first_sentence("PGD, e.g. of ``linf``. With restarts.")
    'PGD, e.g. of linf'
    """
    paragraph = " ".join(inspect.cleandoc(text or "").split("\n\n")[0].replace("`", "").split())
    return re.split(r"(?<!e\.g)(?<!i\.e)(?<!et al)\.(?: |$)", paragraph)[0]


def _body_of(page: str) -> str:
    """Return a Markdown page without its first heading."""
    return page.partition("\n\n")[2]
