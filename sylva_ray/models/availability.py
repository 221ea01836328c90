"""Check a backbone as far as that needs neither PyTorch nor timm, whose imports take about four seconds."""

from __future__ import annotations

import difflib
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from sylva_ray.config.experiment import BackboneSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.locations import local_path
from sylva_ray.models.shipped import RETIRED, SHIPPED

MAX_HEADER = 100_000_000
"""Largest header of a safetensors file in bytes, as its format defines."""


def check_available(section: BackboneSection, key: str = "backbone") -> None:
    """Check the model's name, and that the file of its weights can be opened.

    `sylva_ray.models.backbone.create_backbone` checks the rest.

    Args:
        section: which model; where its weights come from.
        key: of the section in the configuration, for messages.

    Raises:
        UserError: the model is unknown, or its checkpoint is missing or no safetensors file.
    """
    if section.name in RETIRED and section.checkpoint is None:
        fix = (
            "is of an earlier version, whose weights are not part of this one: set backbone.checkpoint to its file in "
            "sylva_ray/assets/ of that version, or use vit_micro"
        )
        raise UserError(f"{key}.name", section.name, fix)
    if section.name in SHIPPED.keys() | RETIRED.keys():
        if section.pretrained:
            fix = f"{section.name} ships with this package: leave it false"
            raise UserError(f"{key}.pretrained", True, fix)
    elif ":" not in section.name and not _may_be_in_timm(section.name.split(".")[0]):
        raise unknown_model(f"{key}.name", section.name, _registered())
    if section.checkpoint is not None:
        check_safetensors(local_path(f"{key}.checkpoint", section.checkpoint), f"{key}.checkpoint")


def unknown_model(key: str, name: str, known: list[str]) -> UserError:
    """Return the error for a model that timm does not have, with names that are like it."""
    stem, everything = name.split(".")[0], [*SHIPPED, *known]
    longer = sorted((other for other in everything if stem and other.startswith(stem)), key=len)
    near = [*longer, *difflib.get_close_matches(stem, [other for other in everything if other not in longer], n=3)][:3]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(
        key, name, f"is neither a model of this package nor of timm; {hint}`timm.list_models()` lists them"
    )


def check_safetensors(path: Path, key: str) -> None:
    """Check that a file exists and begins like a safetensors file; the arrays are not read.

    Args:
        path: the file.
        key: of the setting that names it.

    Raises:
        UserError: it is missing, cannot be read, or is something else.
    """
    if path.exists() and not path.is_file():  # to read a pipe might never end
        raise UserError(key, str(path), "is a folder" if path.is_dir() else "is not a regular file")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(key, str(path), "no such file; `sylva-ray pretrain` makes one") from None
    except OSError as error:
        raise UserError(key, str(path), f"cannot be read ({error.strerror})") from None
    header = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{" or header > min(MAX_HEADER, size - 8):
        raise UserError(key, str(path), "is not a readable safetensors file, or a part of one")


def _may_be_in_timm(name: str) -> bool:
    """Return False for a name that occurs nowhere in timm's sources, in which every model is a function of this name.

    If timm has been imported, its own registry decides, to which a user's code may have added models.
    """
    words = set() if "timm" in sys.modules else _words()
    return not words or name in words


def _words() -> set[str]:
    """Return the words in timm's sources."""
    return set(re.findall(r"\w+", _sources()))


def _registered() -> list[str]:
    """Return the names of timm's models."""
    return re.findall(r"@register_model\s+def (\w+)\(", _sources())


def _sources() -> str:
    """Return the text of timm's modules with models; empty where they are not there as text."""
    spec = find_spec("timm")
    folders = spec.submodule_search_locations or () if spec is not None else ()
    paths = sorted(path for folder in folders for path in (Path(folder) / "models").glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
