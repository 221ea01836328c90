"""Whether a run still computes with the data and the weights that it began with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.inputs import Inputs
from sylva_ray.core.types import ClientState, stack_digest
from sylva_ray.core.version import __version__
from sylva_ray.data.digest import data_digest
from sylva_ray.federation.client.worker import split_weights
from sylva_ray.preparation.experiment import Prepared
from sylva_ray.preparation.extension import PlannedExtension
from sylva_ray.storage.run_folder import RunFolder

Notify = Callable[[str], None]
"""Takes a sentence that the user should read."""


def digest_inputs(prepared: Prepared) -> Inputs:
    """Digest the data and the weights of an experiment; about a second per gigabyte."""
    from sylva_ray.models.backbone import digest_weights  # timm

    assert prepared.facts is not None
    weights, auxiliary = split_weights(prepared.backbone)
    digests = {"backbone": digest_weights(weights, prepared.facts.head_name)}
    if auxiliary:
        digests["auxiliary"] = stack_digest(auxiliary).hex()
    return Inputs(version=__version__, data=asdict(data_digest(prepared.fleet)), weights=digests)


def digest_backbone(config: ExperimentConfig, state: ClientState) -> Inputs:
    """Digest the weights of an experiment's backbone alone, without the head.

    Args:
        config: the experiment.
        state: of any client; random weights depend on the number of classes of its head.

    Raises:
        UserError: see `create_backbone`.
    """
    from sylva_ray.models.backbone import backbone_arrays, create_backbone, digest_weights
    from sylva_ray.models.shipped import SHIPPED

    section = config.backbone
    backbone = create_backbone(section, num_classes=2)
    if not (section.pretrained or section.checkpoint or section.name in SHIPPED):
        backbone = create_backbone(section, len(state[f"{backbone.head_name}.bias"]))
    digest = digest_weights(backbone_arrays(backbone), backbone.head_name)
    return Inputs(version=__version__, weights={"backbone": digest})


def claim_run(
    prepared: Prepared,
    folder: RunFolder,
    resume: bool,
    allow_changed: bool,
    notify: Notify,
    extension: PlannedExtension | None = None,
) -> Prepared:
    """Claim a run folder, which is locked, for an experiment with these data and weights.

    Args:
        prepared: the experiment.
        folder: of the run.
        resume: whether the folder must hold this run already; else it must be free.
        allow_changed: whether data and weights may differ from those that the run began with.
        notify: is called with what the user should know.
        extension: rounds that the run gets now; results are deleted only once data and weights have been compared.

    Returns:
        The experiment, with what has changed.

    Raises:
        UserError: see `RunFolder.claim` and `RunFolder.check_inputs`.
    """
    inputs = digest_inputs(prepared)
    if extension is not None:
        folder.check_inputs(prepared.config, inputs, allow_changed)
        notify(extension.apply(folder))
    folder.claim(prepared.config, resume, inputs)
    check = folder.check_inputs(prepared.config, inputs, allow_changed)
    for text in check.notices:
        notify(text)
    changed = dict.fromkeys([*prepared.changed_inputs, *check.changed])
    return dataclasses.replace(prepared, changed_inputs=tuple(changed))
