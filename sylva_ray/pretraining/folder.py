"""The folder of a pre-training, as far as it needs no PyTorch.

::

    config.json    the resolved configuration        log.jsonl             one record per epoch
    inputs.json    digests of data and weights       backbone.safetensors  the result, in half precision
    checkpoint/    the newest two epochs             model_card.md         how it was made; written last
"""

from __future__ import annotations

from pathlib import Path

from sylva_ray.core.errors import UserError
from sylva_ray.core.inputs import Inputs
from sylva_ray.pretraining.config import (
    PRETRAIN_CONFIG,
    PretrainConfig,
    ResolvedPretrainConfig,
    ResolvedPretrainTraining,
    load_resolved,
)
from sylva_ray.storage.atomic import draft_of, json_text
from sylva_ray.storage.claim import check_claim, list_names, write_marker
from sylva_ray.storage.inputs import INPUTS, InputCheck, compare_inputs, load_inputs

RESULT, CARD, LOG, CHECKPOINTS = "backbone.safetensors", "model_card.md", "log.jsonl", "checkpoint"


class PretrainFolder:
    """The files of one pre-training. Creating the object does not access the disk.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / PRETRAIN_CONFIG
        self.result, self.card, self.log = path / RESULT, path / CARD, path / LOG

    def check_claim(self, config: PretrainConfig, resume: bool) -> None:
        """Check that the folder is free, or holds this pre-training if it is to be resumed; nothing is written.

        Args:
            config: of the user, or resolved.
            resume: whether the folder must hold this pre-training already.

        Raises:
            UserError: it does not.
        """
        leftovers = (INPUTS, draft_of(Path(INPUTS)).name)
        check_claim(str(self.path), list_names(self.path), PRETRAIN_CONFIG, "pre-training", resume, leftovers)
        if resume and self.as_started(config) != load_resolved(self.path):
            raise UserError("--out", str(self.path), "holds a pre-training with another config")

    def as_started(self, config: PretrainConfig) -> ResolvedPretrainConfig:
        """Resolve ``auto`` to what the pre-training in the folder was started with.

        Raises:
            UserError: the folder's configuration is damaged.
        """
        started, asked = load_resolved(self.path).training, config.training
        decided = {
            "precision": started.precision if asked.precision == "auto" else asked.precision,
            "attention": started.attention if asked.attention == "auto" else asked.attention,
        }
        training = ResolvedPretrainTraining(**dict(asked) | decided)
        return ResolvedPretrainConfig(**dict(config) | {"training": training})

    def claim(self, config: ResolvedPretrainConfig, inputs: Inputs, resume: bool, allow_changed: bool) -> InputCheck:
        """Write ``inputs.json`` and ``config.json`` of a new pre-training, or check those of one to resume.

        Args:
            config: of the pre-training.
            inputs: digests of what it computes with.
            resume: see `check_claim`.
            allow_changed: whether the inputs may differ from those that it began with.

        Raises:
            UserError: see `check_claim`; or the inputs differ.
        """
        self.check_claim(config, resume)
        if not resume:
            write_marker(self.path / INPUTS, json_text(inputs.to_json()), replace=True)
            write_marker(self.path / PRETRAIN_CONFIG, config.model_dump_json(indent=1))
        stored = load_inputs(self.path, "it is damaged; start again with another --out")
        weights = config.backbone.checkpoint or config.backbone.name
        return compare_inputs(
            stored, inputs, "--out", self.path, "pre-training", config.dataset.name, weights, allow_changed
        )

    def finished(self) -> Path | None:
        """Return the result of a pre-training that has finished; None where something is left to do."""
        return self.result if self.result.exists() and self.card.exists() else None
