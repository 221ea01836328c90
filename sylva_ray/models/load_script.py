"""The script that loads exported clients without this package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from safetensors.numpy import save

from sylva_ray.models.backbone import Backbone, backbone_arrays
from sylva_ray.storage.run_folder import EXPORT_FILES

SCRIPT, BASE = EXPORT_FILES
"""Names of the script, and of the weights of the backbone where they cannot be had by its name."""

TEMPLATE = '''"""Load clients of this export with timm{{ " and PEFT" if adapters else "" }}; sylva_ray is not needed.

    {{ install }}
    python load.py client_000 photo.png          # prints the class of every image

In Python: ``model = load("client_000")``, then ``model(preprocess(images))`` are the logits of `CLASSES`.
"""

import argparse
import sys
from pathlib import Path

try:
    import numpy as np
    import timm
    import torch
{% if adapters %}
    from peft import PeftModel
{% endif %}
    from PIL import Image, ImageOps
    from safetensors.torch import load_file
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"load.py: {error.name} is missing: {{ install }}")
{% if own_module %}

import {{ own_module }}  # registers the model with timm
{% endif %}

HERE = Path(__file__).resolve().parent
CLASSES = {{ classes }}
IMAGE_SIZE = {{ image_size }}
MEAN = torch.tensor({{ mean }}).view(1, 3, 1, 1)
STD = torch.tensor({{ std }}).view(1, 3, 1, 1)


def preprocess(images):
    """Return what the model takes: images [N, 3, H, W] in [0, 1], resized and normalised."""
    if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
        images = torch.nn.functional.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    return (images - MEAN) / STD


def read(path):
    """Return the pixels [1, 3, S, S] in [0, 1] of a file: upright, on white, and the square in its middle.

    Larger images are scaled down to the size of the model as the images of its training were, with a filter.
    """
    opened = Image.open(path)
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PPM"):
        tags = opened.tag_v2 if opened.format == "TIFF" else {}
        top = 2 ** tags.get(258, (16,))[0] - 1  # BitsPerSample
        levels = np.asarray(image).clip(0, top).astype(np.uint32)
        levels = top - levels if tags.get(262) == 0 else levels  # PhotometricInterpretation: 0 is white
        image = Image.fromarray(((levels * 255 + top // 2) // top).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise OSError(f"the range of the values of its mode {image.mode} is not known")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.width != image.height or image.width > IMAGE_SIZE:
        scale = IMAGE_SIZE / min(image.size)
        image = image.resize([max(IMAGE_SIZE, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        left, top = (image.width - IMAGE_SIZE) // 2, (image.height - IMAGE_SIZE) // 2
        image = image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
    pixels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def load(client):
    """Return the model of a client, e.g. client_000, in evaluation mode: its whole weights if they are there."""
    if client not in clients():
        raise ValueError(f"there is no client {client!r}; {available()}")
    arguments = {{ arguments }}
    if (HERE / client / "model.safetensors").exists():
        model = timm.create_model(**arguments, num_classes=len(CLASSES))
        model.load_state_dict(load_file(HERE / client / "model.safetensors"))
        return model.eval()
{% if not adapters %}
    raise FileNotFoundError(HERE / client / "model.safetensors")
{% elif has_base %}
    model = timm.create_model(**arguments, num_classes=len(CLASSES))
    base = {name: value.float() for name, value in load_file(HERE / "{{ base }}").items()}
    missing, unexpected = model.load_state_dict(base, strict=False)
    assert not unexpected and all(name.startswith("{{ head }}.") for name in missing), missing
    return PeftModel.from_pretrained(model, str(HERE / client)).eval()
{% else %}
    model = timm.create_model(**arguments, num_classes=len(CLASSES), pretrained=True)
    return PeftModel.from_pretrained(model, str(HERE / client)).eval()
{% endif %}


def clients():
    """Return the names of the clients beside this script."""
    return sorted(path.name for path in HERE.glob("client_*") if path.is_dir())


def available():
    """Return the names of the first clients, in words."""
    names = clients()
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"available: {', '.join(names[:5]) or 'none'}{more}"


def main():
    """Print the class of every image; what is wrong is said in one line."""
    example = "python load.py client_000 photo.png"
    about = "Print the classes that the model of a client gives to images."
    parser = argparse.ArgumentParser("load.py", description=about, epilog=f"example: {example}; {available()}")
    parser.add_argument("client", nargs="?", help="e.g. client_000")
    parser.add_argument("images", nargs="*", metavar="image", help="file of an image")
    given = parser.parse_args()
    if given.client is None:
        parser.exit(2, f"load.py: name a client and images, e.g. {example}; {available()}\\n")
    if given.client not in clients():
        parser.exit(2, f"load.py: there is no client {given.client!r}; {available()}\\n")
    if not given.images:
        parser.exit(2, f"load.py: name one or more images, e.g. {example}\\n")
    model = load(given.client)
    for path in given.images:
        try:
            pixels = read(path)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            parser.exit(2, f"load.py: cannot read {path!r} as an image: {error}\\n")
        with torch.no_grad():
            logits = model(preprocess(pixels))
        print(path, CLASSES[int(logits.argmax())])


if __name__ == "__main__":
    main()
'''


def packages(adapters: bool) -> str:
    """Return the command that installs what the script needs; ``adapters`` as of `load_script`."""
    return f"pip install timm{' peft' * adapters} safetensors pillow"


def load_script(
    backbone: Backbone, classes: Sequence[str], adapters: bool, has_base: bool, own_module: str | None = None
) -> str:
    """Return the text of `SCRIPT`.

    Args:
        backbone: of the clients.
        classes: names of the classes, in the order of the logits.
        adapters: whether clients are adapters; otherwise they are whole models.
        has_base: whether `BASE` lies beside the script; otherwise timm gets the weights by name.
        own_module: the module that registers the model with timm, for a model of the user's own.
    """
    from jinja2 import Environment, StrictUndefined  # the start of a run need not wait for it

    arguments = {name: value for name, value in backbone.arguments.items() if name != "pretrained_cfg_overlay"}
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(
        adapters=adapters,
        has_base=has_base,
        own_module=own_module,
        install=packages(adapters),
        base=BASE,
        head=backbone.head_name,
        classes=repr(list(classes)),
        image_size=backbone.image_size,
        mean=_numbers(backbone.mean),
        std=_numbers(backbone.std),
        arguments=repr(arguments),
    )


def _numbers(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.flatten().tolist()]


def base_file(backbone: Backbone) -> bytes:
    """Return the backbone's weights without its head as a safetensors file, in half precision if that loses nothing."""
    arrays = {
        name: value
        for name, value in sorted(backbone_arrays(backbone).items())
        if not name.startswith(f"{backbone.head_name}.")
    }
    floats = {name: value for name, value in arrays.items() if value.dtype == np.float32}
    with np.errstate(over="ignore"):
        halves = {name: value.astype(np.float16) for name, value in floats.items()}
    if all(np.array_equal(halves[name].astype(np.float32), value) for name, value in floats.items()):
        arrays |= halves
    data: bytes = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    return data
