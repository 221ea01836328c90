"""The model card of an exported client, in the form of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from scipy.stats import binomtest

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.summary import ClientSummary, Summary
from sylva_ray.core.version import __version__

SOURCES = {
    "sylva": "Qi et al., Sylva: Tailoring Personalized Adversarial Defense in Pre-trained Models via Collaborative "
    "Fine-tuning, ACM CCS 2025, arXiv 2506.05402",
}
"""Papers of methods, by the name of the method."""

BODY = """---
{{ card_data }}
---

# Client {{ client }} of {{ name }}

{{ method }} fine-tuned for one client of a simulated fleet of {{ fleet }}, on the classes and images that this client
holds. On other data it may be wrong.

```
python load.py client_{{ number }} IMAGE
```

`load.py` lies in the folder above and needs timm{{ peft }} and safetensors{{ base }}. Images are RGB in [0, 1]; its
function `preprocess` resizes them to the model's size (bilinear) and normalises them.

## Data

{{ dataset }}, {{ train }} training images of this client{{ most }}.

## Threat model

{{ threat }}

## Accuracy on this client's {{ test }} test images

| | accuracy | 95 % interval (Wilson) |
|---|---|---|
{{ rows }}

Always answering the most frequent class would be right on {{ majority }} %.

## Checks

{{ checks }}

## Citation

{{ citation }}
"""


def model_card(
    config: ExperimentConfig, summary: Summary, client: int, has_adapters: bool, changed: Sequence[str] = ()
) -> str:
    """Return the card of a client: base model, data, threat model, accuracies with intervals, checks, citation.

    Args:
        config: the experiment.
        summary: of the finished run.
        client: its number.
        has_adapters: whether the export is an adapter, and not a whole model.
        changed: weights that are not those of the run, in words; the card says so.
    """
    own = next(entry for entry in summary.clients if entry.client == client)
    limit = config.evaluation.max_samples
    images = own.test if limit is None else min(own.test, limit)
    conditions = {"benign": summary.final.benign_accuracy, **summary.final.robust_accuracy}
    accuracies = {name: spread.per_client[client] for name, spread in conditions.items()}
    licence = "apache-2.0" if not config.backbone.pretrained else "other"
    data = ModelCardData(
        base_model=f"timm/{config.backbone.name}" if config.backbone.pretrained else None,
        license=licence,
        license_name="the licence of the base model" if licence == "other" else None,
        library_name="peft" if has_adapters else "timm",
        tags=["adversarial-robustness", "federated-learning", summary.algorithm],
        model_name=f"{summary.name}-client-{client}",
        eval_results=_results(summary, accuracies),
    )
    warning = f"\nThe frozen backbone has other weights than the run had: {', '.join(changed)}.\n" if changed else ""
    base = (
        ""
        if config.backbone.pretrained or not has_adapters
        else "; the frozen backbone is `base.safetensors` beside it"
    )
    card = ModelCard.from_template(
        data,
        template_str=BODY,
        client=client,
        number=f"{client:03d}",
        name=summary.name or "a run",
        method=f"{config.backbone.name}, {summary.algorithm}",
        fleet=summary.num_clients,
        peft=", PEFT" if has_adapters else "",
        base=base,
        dataset=summary.dataset,
        train=own.train,
        most=_most_frequent(summary, client),
        threat="\n".join(f"* {key}: {text}" for key, text in summary.threat_model.items()) or "none",
        test=images,
        rows="\n".join(_row(name, accuracy, images) for name, accuracy in accuracies.items()),
        majority=f"{100 * own.majority_share:.1f}",
        checks=_checks(summary, own) + warning,
        citation=_citation(summary.algorithm),
    )
    return str(card).rstrip() + "\n"


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


def _row(name: str, accuracy: float, images: int) -> str:
    bounds = binomtest(round(accuracy * images), images).proportion_ci(0.95, method="wilson")
    return f"| {name} | {100 * accuracy:.1f} % | {100 * bounds.low:.1f} to {100 * bounds.high:.1f} % |"


def _most_frequent(summary: Summary, client: int, count: int = 3) -> str:
    """Return a client's most frequent classes in words; nothing where the summary does not hold them."""
    if summary.label_matrix is None:
        return ""
    images = summary.label_matrix[client]
    order = sorted(range(len(images)), key=lambda label: -images[label])[:count]
    names = summary.class_names or [str(label) for label in range(len(images))]
    return ", most of " + ", ".join(f"{names[label]} ({images[label]})" for label in order if images[label])


def _checks(summary: Summary, own: ClientSummary) -> str:
    """Return the checks of the run, and whether this client shows a defence."""
    lines = [f"* {check.name} {'passed' if check.passed else 'FAILED'}: {check.meaning}" for check in summary.checks]
    if own.collapsed:
        lines.append("* This client collapsed: under attack it is no better than its most frequent class.")
    return "\n".join(lines) or "None were computed."


def _citation(algorithm: str) -> str:
    source = SOURCES.get(algorithm)
    ours = f"sylva_ray {__version__} (CITATION.cff)"
    return f"{source}; {ours}, an independent implementation." if source else f"{ours}."
