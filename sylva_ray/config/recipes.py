"""Recipes: the configurations and spaces that come with this package, each named like its file.

They are in ``configs/`` and ``tune_spaces/`` of the repository, and a wheel contains both folders. Wherever a file of a
configuration or of a space is expected, the name of a recipe will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from sylva_ray.config.schema import read_yaml
from sylva_ray.core.errors import UserError
from sylva_ray.core.locations import is_url, local_path
from sylva_ray.core.text import did_you_mean

RecipeKind = Literal["experiment", "pretraining", "space"]

FOLDERS = ("configs", "tune_spaces")
"""The folders of recipes: experiments and pre-trainings, and spaces of sweeps."""

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Recipe:
    """A file that comes with this package.

    Attributes:
        name: of the file, without its suffix.
        path: of the file.
        kind: what the file holds.
    """

    name: str
    path: Path
    kind: RecipeKind

    @property
    def summary(self) -> str:
        """The first sentence of the comment at the top of the file."""
        comment = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#") or not line.strip("# "):
                break
            comment.append(line.strip("# "))
        return " ".join(comment).split(". ")[0].removesuffix(".")


@cache
def recipes() -> dict[str, Recipe]:
    """Return all recipes by name: experiments first, then spaces, then pre-trainings."""
    found = [Recipe(path.stem, path, _kind_of(path)) for folder in _folders() for path in sorted(folder.glob("*.yaml"))]
    order: tuple[RecipeKind, ...] = ("experiment", "space", "pretraining")
    return {recipe.name: recipe for recipe in sorted(found, key=lambda recipe: order.index(recipe.kind))}


def recipe_or_path(key: str, value: str | Path, kind: RecipeKind) -> Path:
    """Return the path that a user means, or that of the recipe whose name was given.

    A file of that name, or a folder with a ``config.yaml``, comes before a recipe.

    Args:
        key: of the argument, for the message.
        value: a path or the name of a recipe.
        kind: of recipes that are allowed.

    Raises:
        UserError: it is not a path of this system; or it is neither a file nor a recipe of this kind, and looks like
            the name of one.
    """
    text = str(value)
    path = local_path(key, value)
    if is_url(text) or path.suffix or len(path.parts) != 1 or path.is_file() or (path / "config.yaml").is_file():
        return path
    names = [name for name, recipe in recipes().items() if recipe.kind == kind]
    if text in names:
        return recipes()[text].path
    if path.exists():
        return path
    if text in recipes():
        raise UserError(key, text, f"is a recipe of another kind: {_COMMANDS[recipes()[text].kind]} {text}")
    fix = f"is neither a file nor a recipe; {did_you_mean(text, names)}Recipes: {', '.join(names)}"
    raise UserError(key, text, fix)


@contextmanager
def asked_for(key: str, path: str | Path, kind: RecipeKind) -> Iterator[None]:
    """Name the command for a file, where the file is wrong because it is of another kind.

    Args:
        key: of the argument, for the message.
        path: of the file.
        kind: that the block expects.

    Raises:
        UserError: the block raised one; it is about the file if that is of another kind.
    """
    try:
        yield
    except UserError:
        found = _kind_inside(Path(path))
        if found is None or found == kind:
            raise
        fix = f"is {_ARTICLES[found]}, not {_ARTICLES[kind]}: {_COMMANDS[found]} {path}"
        raise UserError(key, str(path), fix) from None


def _kind_inside(path: Path) -> RecipeKind | None:
    """Return of which kind a file is by the keys in it; None if it cannot be read or its keys do not say."""
    try:
        raw = read_yaml(path)
    except UserError:
        return None
    training = raw.get("training")
    if "parameters" in raw:
        return "space"
    if isinstance(training, dict) and training.keys() & {"warmup_epochs", "label_smoothing", "mixup", "crop_scale"}:
        return "pretraining"
    return "experiment" if raw.keys() & {"algorithm", "partition", "lora", "evaluation"} else None


_ARTICLES: dict[RecipeKind, str] = {
    "experiment": "an experiment",
    "space": "the space of a sweep",
    "pretraining": "a pre-training",
}

_COMMANDS: dict[RecipeKind, str] = {
    "experiment": "sylva-ray run",
    "space": "sylva-ray tune",
    "pretraining": "sylva-ray pretrain",
}


def _folders() -> list[Path]:
    """Return the folders of recipes: those in the package if it was installed from a wheel, else the repository's."""
    root = next(root for root in (_PACKAGE / "recipes", _PACKAGE.parent) if (root / FOLDERS[0]).is_dir())
    return [root / name for name in FOLDERS]


def _kind_of(path: Path) -> RecipeKind:
    if path.parent.name == FOLDERS[1]:
        return "space"
    return "pretraining" if path.name.startswith("pretrain") else "experiment"
