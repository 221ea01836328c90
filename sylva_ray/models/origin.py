"""Where the weights of a backbone come from, and under which licence, as far as that is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sylva_ray.config.experiment import BackboneSection
from sylva_ray.models.light_timm import timm
from sylva_ray.models.shipped import SHIPPED

UNKNOWN = "unknown"
"""The licence where none is stated, as the Hugging Face hub writes it."""


@dataclass(frozen=True)
class Origin:
    """What is known about the weights of a backbone.

    Attributes:
        licence: of the weights, as the Hugging Face hub writes licences; `UNKNOWN` where none is stated.
        hub_name: ``owner/name`` on the hub; None: they are not from there.
        description: in Markdown.
    """

    licence: str
    hub_name: str | None
    description: str


def origin_of(section: BackboneSection) -> Origin:
    """Return what is known about the weights of a backbone.

    Args:
        section: which model; where its weights come from.
    """
    name = section.name
    if section.checkpoint is not None:
        file = Path(section.checkpoint).name
        about = (
            f"`{name}` with weights from a file, `{file}`, which the person who made this run chose. What these weights"
        )
        return Origin(UNKNOWN, None, f"{about} were trained on, and their licence, is not known here.")
    if name in SHIPPED:
        return Origin("apache-2.0", None, SHIPPED[name].card.read_text(encoding="utf-8").partition("\n\n")[2].strip())
    if not section.pretrained:
        return Origin(UNKNOWN, None, f"`{name}` with random weights: nothing was trained before this run.")
    known = timm.get_pretrained_cfg(name) if ":" not in name else None
    if known is None or not str(known.hf_hub_id).startswith("timm/"):
        return Origin(
            UNKNOWN, None, f"`{name}` with the weights that timm fetches for it. Their licence is not known here."
        )
    licence = known.license or UNKNOWN
    link = f"[{known.hf_hub_id}](https://huggingface.co/{known.hf_hub_id})"
    about = (
        f"`{name}` with the weights of {link}, where their training is described; timm states the licence {licence}."
    )
    return Origin(licence, known.hf_hub_id, about)
