"""The model card of an exported client, in the form of the Hugging Face hub."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from scipy.stats import binomtest

from sylva_ray.algorithms.registry import ALGORITHMS
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.summary import ClientSummary, Summary
from sylva_ray.core.version import __version__
from sylva_ray.metrics.check_titles import CHECK_TITLES
from sylva_ray.models.load_script import BASE, packages
from sylva_ray.models.onnx_format import ONNX, OPSET
from sylva_ray.models.origin import UNKNOWN, Origin, origin_of
from sylva_ray.models.peft_format import MERGED, WEIGHTS
from sylva_ray.reports.attack_titles import attack_titles

WIDTH = 120
"""Columns at which prose is broken."""

BODY = """---
{{ card_data }}
---

# Client {{ client }} of {{ name }}

{{ about }}

## Use

{{ use }}

```
{{ install }}
python load.py {{ folder }} photo.png
```

The same in Python:

```python
from load import CLASSES, load, preprocess

model = load("{{ folder }}")
logits = model(preprocess(images))  # images: float tensor [N, 3, H, W], RGB in [0, 1]
```

`preprocess` resizes images to the size of the model (bilinear) and normalises them. `CLASSES` are the names of the
logits.
{% if merged %}

`model.safetensors` is the whole model, with the adapter merged into it; `load.py` takes it where it is there.
{% endif %}
{% if onnx %}

`model.onnx` (opset {{ opset }}) is the whole model for ONNX Runtime (`pip install onnxruntime`), with resizing and
normalisation inside. Its metadata has the names of the classes.

```python
import onnxruntime

session = onnxruntime.InferenceSession("{{ folder }}/model.onnx")
(logits,) = session.run(["logits"], {"images": images})  # images: float32 array [N, 3, H, W], RGB in [0, 1]
```
{% endif %}

## Base model: {{ backbone }}

{{ base }}

## Data

{{ data }}

## Threat model

{{ threat }}

## Accuracy on this client's {{ test }} test images

| | accuracy | 95 % interval (Wilson) |
|---|---|---|
{{ rows }}

Always answering the most frequent class would be right on {{ majority }} %.

## Checks

{{ checks }}

## Licence

{{ licence }}

## Citation

{{ citation }}
"""


def model_card(
    config: ExperimentConfig, summary: Summary, client: int, files: Collection[str], changed: Sequence[str] = ()
) -> str:
    """Return the card of a client: how to load it, base model, data, threat model, accuracies, checks, licence, papers.

    Args:
        config: the experiment.
        summary: of the finished run.
        client: its number.
        files: names of the files in the client's folder.
        changed: weights that are not those of the run, in words; the card says so.
    """
    own = next(entry for entry in summary.clients if entry.client == client)
    conditions = {"benign": summary.final.benign_accuracy, **summary.final.robust_accuracy}
    accuracies = {name: spread.per_client[client] for name, spread in conditions.items()}
    titles = {"benign": "without an attack"} | attack_titles(config.evaluation.specs)
    origin, has_adapters = origin_of(config.backbone), WEIGHTS in files
    data = ModelCardData(
        base_model=origin.hub_name,
        license=origin.licence,
        license_name="the licence of the base model" if origin.licence == "other" else None,
        library_name="peft" if has_adapters else "timm",
        tags=["adversarial-robustness", "federated-learning", summary.algorithm],
        model_name=f"{summary.name}-client-{client}",
        eval_results=_results(summary, accuracies),
    )
    card = ModelCard.from_template(
        data,
        template_str=BODY,
        client=client,
        folder=f"client_{client:03d}",
        name=summary.name or "a run",
        about=_about(summary, has_adapters),
        use=_use(config, has_adapters),
        install=packages(has_adapters),
        merged=has_adapters and MERGED in files,
        onnx=ONNX in files,
        opset=OPSET,
        backbone=config.backbone.name,
        base="\n\n".join((origin.description, *_changed(changed))),
        data=_filled(
            f"{summary.dataset}: {own.train} training images of this client{_most_frequent(summary, client)}."
        ),
        threat=_listed(f"{key}: {text}" for key, text in summary.threat_model.items()) or "Not stated.",
        test=own.test,
        rows="\n".join(_row(titles.get(name, name), accuracy, own.test) for name, accuracy in accuracies.items()),
        majority=f"{100 * own.majority_share:.1f}",
        checks=_checks(summary, own),
        licence=_licence(config, origin, summary),
        citation=_citation(summary.algorithm),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def _about(summary: Summary, has_adapters: bool) -> str:
    """Return what the model is, in a sentence or two."""
    what = "A LoRA adapter and head" if has_adapters else "A whole model"
    trained = f"trained by the method {summary.algorithm} in a simulated fleet of {summary.num_clients} clients"
    return _filled(f"{what} for one client, {trained}. It knows the images of this client and may be wrong on others.")


def _use(config: ExperimentConfig, has_adapters: bool) -> str:
    """Return what the script needs, and where it is."""
    is_fetched = config.backbone.pretrained and config.backbone.checkpoint is None
    base = f", which holds `load.py` and the frozen backbone, `{BASE}`" if not is_fetched else ", which holds `load.py`"
    text = f"In the folder above this one{base if has_adapters else ', which holds `load.py`'}:"
    if has_adapters and is_fetched:
        text = f"{text[:-1]}; timm fetches the frozen backbone from the Hugging Face hub:"
    module = config.backbone.name.partition(":")[0] if ":" in config.backbone.name else None
    return _filled(f"The Python module `{module}` defines the model and must be importable. {text}" if module else text)


def _changed(changed: Sequence[str]) -> list[str]:
    """Return a warning where the backbone's weights are not those of the run."""
    return [_filled(f"The backbone has other weights here than in the run: {', '.join(changed)}.")] if changed else []


def _results(summary: Summary, accuracies: Mapping[str, float]) -> list[EvalResult]:
    """Return the accuracies as the hub lists them."""
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=summary.dataset.split(":")[0],
            dataset_name=summary.dataset.split(":")[0],
            metric_type="accuracy",
            metric_name=f"accuracy, {name}",
            metric_value=round(accuracy, 4),
        )
        for name, accuracy in accuracies.items()
    ]


def _row(title: str, accuracy: float, images: int) -> str:
    bounds = binomtest(round(accuracy * images), images).proportion_ci(0.95, method="wilson")
    return f"| {title} | {100 * accuracy:.1f} % | {100 * bounds.low:.1f} to {100 * bounds.high:.1f} % |"


def _most_frequent(summary: Summary, client: int, count: int = 3) -> str:
    """Return a client's most frequent classes in words; nothing where the summary does not hold them."""
    if summary.label_matrix is None:
        return ""
    images = summary.label_matrix[client]
    order = sorted(range(len(images)), key=lambda label: -images[label])[:count]
    names = summary.class_names or [str(label) for label in range(len(images))]
    frequent = ", ".join(f"{names[label]} ({images[label]} images)" for label in order if images[label])
    return f"; the most frequent classes are {frequent}"


def _checks(summary: Summary, own: ClientSummary) -> str:
    """Return the checks of the run, and whether this client shows a defence."""
    lines = [
        f"{check.name}, {CHECK_TITLES[check.name].title}, {'passed' if check.passed else 'FAILED'}: {check.meaning}"
        if check.name in CHECK_TITLES
        else f"{check.name} {'passed' if check.passed else 'FAILED'}: {check.meaning}"
        for check in summary.checks
    ]
    if own.collapsed:
        lines.append("This client shows no defence: under attack it is no better than its most frequent class.")
    return _listed(lines) or "None were computed."


def _licence(config: ExperimentConfig, origin: Origin, summary: Summary) -> str:
    """Return what is known about licences, and what is not."""
    known = f"is {origin.licence}" if origin.licence != UNKNOWN else "is not known here"
    dataset = summary.dataset.split(":")[0]
    return _filled(
        f"The licence of the base model, {config.backbone.name}, {known}. Nothing is known here about the licence of "
        f"this client's images ({dataset}), nor about the licence under which this model is given to others."
    )


def _citation(algorithm: str) -> str:
    """Return the papers of a method of this package, and this package."""
    papers = ALGORITHMS[algorithm].papers if algorithm in ALGORITHMS else ()
    implementation = f"sylva_ray {__version__} (CITATION.cff){', an independent implementation' if papers else ''}"
    return _listed((*papers, implementation))


def _listed(texts: Iterable[str]) -> str:
    """Return a list in Markdown."""
    return "\n".join(_filled(f"* {text}", "  ") for text in texts)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
