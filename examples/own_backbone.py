"""A backbone of one's own: a model that timm does not know, registered with timm.

sylva-ray run digits --import . backbone.name=examples.own_backbone:vit_pico
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn


@register_model
def vit_pico(pretrained: bool = False, **settings: Any) -> nn.Module:
    """Build a vision transformer of 0.1 million parameters.

    Any module will do that has ``get_classifier()``, which returns its last linear layer, and ``pretrained_cfg``, which
    says what it takes. Its weights are those of ``backbone.checkpoint``, or what the function loads where
    ``pretrained`` is true.
    """
    if pretrained:
        raise RuntimeError("vit_pico has no weights on a hub")
    names = ("img_size", "num_classes")
    given = {name: settings[name] for name in names if name in settings}
    model = VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, **given})
    side = model.patch_embed.img_size[0]
    vars(model)["pretrained_cfg"] = {"input_size": (3, side, side), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model
