"""PM-AFL: a pre-trained teacher guides adversarial federated learning by mixture distillation.

From the abstract: a frozen pre-trained teacher; vanilla mixture distillation on pairs of images and their mixtures;
adversarial mixture distillation with attacked images on the side of the student only; consistency of the local model
under attack with the clean prediction of the global model; a small global model. The weights and the temperature are
our choice. ``backbone`` is the student, which is uploaded; the teacher is not.

The teacher has the classes of the data, or (``teacher_probe``) every client fits its own head on the frozen teacher in
the warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from sylva_ray.algorithms.adversarial import detached
from sylva_ray.attacks.losses import cross_entropy, kl_divergence
from sylva_ray.attacks.pgd import pgd
from sylva_ray.config.experiment import BackboneSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.lazy import torch
from sylva_ray.core.sections import conflict
from sylva_ray.core.types import AttackSpec, ClientState, ParameterStack
from sylva_ray.core.windows import in_windows, joined, limits_of
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.federation.contract import Algorithm
from sylva_ray.federation.parameters import Sharing
from sylva_ray.models.cohort import CohortModel

PROBE = ("teacher_head.weight", "teacher_head.bias")
"""The client's head on the teacher. It is part of the client's state and is not uploaded."""

if TYPE_CHECKING:
    from sylva_ray.models.backbone import Backbone


class PmAfl(Algorithm):
    """A small model for all clients learns from a frozen pre-trained teacher, on images, mixtures and attacked ones.

    The loss is L_vanilla + adversarial_weight L_adversarial + consistency_weight L_consistency; it needs no labels.
    """

    name = "pm_afl"
    papers = (
        "Qiao et al. 2025, Pre-trained Model Guided Mixture Knowledge Distillation for Adversarial Federated Learning, "
        "arXiv 2501.15257",
    )

    class Parameters(Algorithm.Parameters):
        """The teacher, the temperature of both sides of the distillation, and the weights of the losses."""

        teacher: BackboneSection = BackboneSection()
        teacher_probe: bool = Field(
            True, description="false: the head of the teacher, which must have the classes of the data"
        )
        temperature: float = Field(2.0, gt=0)
        adversarial_weight: float = Field(1.0, ge=0)
        consistency_weight: float = Field(0.5, ge=0)
        craft_against: Literal["student", "teacher"] = "student"
        model: Literal["lora", "full"] = "full"
        heads: Sharing = "global"
        final_local_epochs: int = Field(0, ge=0)
        head_warmup_epochs: int = Field(10, ge=0, description="of the student's head and the probe")

        @model_validator(mode="after")
        def _probe_is_fitted(self) -> Self:
            if self.teacher_probe and self.head_warmup_epochs == 0:
                raise conflict(
                    "head_warmup_epochs", 0, "must be at least 1, because the warm-up fits the teacher_probe"
                )
            return self

    parameters: Parameters

    # -- the teacher ------------------------------------------------------------------------------------------------

    def auxiliary_weights(self, num_classes: int) -> dict[str, np.ndarray]:
        """Return the weights of the teacher.

        Raises:
            UserError: it cannot be built, or it has other classes and no probe is fitted.
        """
        from sylva_ray.models.backbone import backbone_arrays, checkpoint_classes, create_backbone  # it imports timm

        p = self.parameters
        teacher_classes = checkpoint_classes(p.teacher)
        if not p.teacher_probe and teacher_classes != num_classes:
            fix = (
                f"knows {teacher_classes or 'no'} classes, the data has {num_classes}; set algorithm.teacher_probe=true"
            )
            raise UserError("algorithm.teacher", p.teacher.checkpoint or p.teacher.name, fix)
        teacher = create_backbone(p.teacher, num_classes)
        arrays = backbone_arrays(teacher)
        if teacher_classes != num_classes:  # a random head, whose place the probe takes
            prefix = f"{teacher.head_name}."
            arrays |= {name: np.zeros_like(value) for name, value in arrays.items() if name.startswith(prefix)}
        return arrays

    def bind_model(
        self, model: CohortModel, num_classes: int, auxiliary: Mapping[str, np.ndarray], device: torch.device
    ) -> None:
        """Build the frozen teacher."""
        from sylva_ray.models.backbone import create_backbone

        super().bind_model(model, num_classes, auxiliary, device)
        self.teacher: Backbone = create_backbone(self.parameters.teacher, num_classes, auxiliary)
        self.teacher.requires_grad_(False).to(device)
        self.num_classes = num_classes

    def initial_state(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        """Return the initial state, with a probe of zeros if one is fitted."""
        result = super().initial_state(client, state)
        if self.parameters.teacher_probe:
            width = self.teacher.classifier.in_features
            result[PROBE[0]] = np.zeros((self.num_classes, width), np.float32)  # type: ignore[arg-type]
            result[PROBE[1]] = np.zeros(self.num_classes, np.float32)
        return result

    def sharing(self, name: str) -> Sharing:
        """Return with whom a parameter is shared; the probe is local."""
        return "local" if name in PROBE else super().sharing(name)

    def warm_up_names(self) -> tuple[str, ...]:
        """Return the names of the student's head and of the probe."""
        return self.head_names + (PROBE if self.parameters.teacher_probe else ())

    def warm_up_losses(self, context: ClientContext, params: ParameterStack, batch: Batch) -> torch.Tensor:
        """Return the sum of two cross-entropies, of the head and of the probe, which have no parameter in common."""
        losses = super().warm_up_losses(context, params, batch)
        if self.parameters.teacher_probe:
            losses = losses + cross_entropy(self.teach(context, params, batch.x, batch), batch.y)
        return losses

    def teach(self, context: ClientContext, params: ParameterStack, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the logits of the teacher for ``x``, ``[N, num_classes]``."""
        limits = limits_of(context.model)
        outputs = joined(in_windows([len(x)], limits, "forward", lambda window: self._predict(x[window.rows])))
        if not self.parameters.teacher_probe:
            return outputs
        weight, bias = (params[name][batch.device_owner] for name in PROBE)
        logits: torch.Tensor = torch.einsum("nd,ncd->nc", outputs, weight) + bias
        return logits

    def _predict(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the frozen teacher says of images: its logits, or the features on which a probe is fitted."""
        if not self.parameters.teacher_probe:
            logits: torch.Tensor = self.teacher(x).float()
            return logits
        model = self.teacher.model
        tokens = model.forward_features(self.teacher.preprocess(x))  # type: ignore[operator]
        features: torch.Tensor = model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
        return features

    # -- the student ------------------------------------------------------------------------------------------------

    def craft(self, context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        """Craft images and mixtures that maximise the divergence from the teacher's clean prediction.

        PGD always starts at random: where teacher and student agree the divergence has no gradient.
        """
        attack = replace(attack, random_start=True)
        frozen = detached(params)
        mixture = mixtures(batch)
        with torch.no_grad():  # all models that are not trained predict here, in evaluation mode
            targets = [self.teach(context, frozen, x, batch) for x in (batch.x, mixture)]
            broadcast = context.model.forward(context.received, batch.x, batch.owner)
        with context.stopwatch("attack"):
            attacked = []
            for x, target in zip((batch.x, mixture), targets, strict=True):

                def craft(
                    own: ParameterStack, part: Batch, rows: slice, x: torch.Tensor = x, target: torch.Tensor = target
                ) -> torch.Tensor:
                    def objective(u: torch.Tensor) -> torch.Tensor:
                        if self.parameters.craft_against == "teacher":
                            return kl_divergence(target[rows], self.teach(context, own, u, part))
                        return kl_divergence(target[rows], context.model.forward(own, u, part.owner))

                    return pgd(objective, x[rows], attack, part.noise)

                attacked.append(context.in_windows(frozen, batch, craft))
        context.scratch["mixtures"] = mixture, attacked[1]
        context.scratch["predictions"] = *targets, broadcast
        return attacked[0]

    def sample_losses(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of every image, ``[N]``.

        Every image is in two pairs, but is distilled once: the mean over all halves of pairs is the mean over the
        batch.
        """
        p = self.parameters
        mixture, mixture_adv = context.scratch["mixtures"]
        teacher, teacher_mixture, broadcast = context.scratch["predictions"]
        student, student_mixture, attacked, attacked_mixture = (
            context.model.forward(params, x, batch.owner) for x in (batch.x, mixture, x_adv, mixture_adv)
        )
        vanilla = self.distill(teacher, student) + self.distill(teacher_mixture, student_mixture)
        adversarial = self.distill(teacher, attacked) + self.distill(teacher_mixture, attacked_mixture)
        consistency = kl_divergence(broadcast, attacked)
        return vanilla + p.adversarial_weight * adversarial + p.consistency_weight * consistency

    def distill(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """Return tau^2 KL(p_T || p_S) of the softened predictions (Hinton et al. 2015)."""
        tau = self.parameters.temperature
        return tau**2 * kl_divergence(teacher / tau, student / tau)


def mixtures(batch: Batch) -> torch.Tensor:
    """Mix every image with a random one of the same client: lambda x_a + (1 - lambda) x_b, lambda ~ Beta(1, 1)."""
    # Owners are sorted, so every image stays in the block of its client.
    partner = torch.argsort(batch.device_owner + batch.uniforms[:, 0].double(), stable=True)
    mix = batch.uniforms[:, 1].to(batch.x).view(-1, 1, 1, 1)
    return mix * batch.x + (1 - mix) * batch.x[partner]
