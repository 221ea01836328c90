"""The check of a backbone without timm refuses nothing that timm has."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from timm.models import _registry

from sylva_ray.config.experiment import BackboneSection
from sylva_ray.core.errors import UserError
from sylva_ray.models.availability import _registered, _words, check_available, unknown_model


def test_every_model_of_timm_passes_and_is_suggested() -> None:
    """Also those whose names are deprecated."""
    of_timm = {name for name, build in _registry._model_entrypoints.items() if build.__module__.startswith("timm.")}
    assert len(of_timm) > 1000
    assert not of_timm - _words()
    assert not set(timm.list_models()) & of_timm - set(_registered())


def test_a_model_that_was_registered_by_other_code_passes() -> None:
    check_available(BackboneSection(name="of_another_package"))


def test_the_message_names_models_that_are_like_it() -> None:
    error = unknown_model("backbone.name", "resnt18.a1_in1k", ["resnet18", "vit_tiny_patch16_224"])
    assert "did you mean resnet18?" in str(error)
    error = unknown_model("backbone.name", "vit_smal", ["gcvit_small", "vit_small_patch16_224", "vit_small_patch8_224"])
    assert "did you mean vit_small_patch8_224 or vit_small_patch16_224 or gcvit_small?" in str(error)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" * 20, b"\x10" + bytes(7) + b"{", b"\xff" * 8 + b"{"],
    ids=["empty", "zip", "cut", "huge"],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a readable safetensors file, or a part of one"):
        check_available(BackboneSection(checkpoint=str(path)))
