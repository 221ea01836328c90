"""The sections of training: its attack, rounds and local epochs, and how a step is computed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sylva_ray.attacks.pgd import default_step_size
from sylva_ray.core.sections import Count, PixelUnits, Section
from sylva_ray.core.types import AttackSpec


class AttackSection(Section):
    """The attack of adversarial training: L-infinity PGD in the pixel space [0, 1] (Madry et al. 2018).

    ``fgsm_rs`` is fast adversarial training (Wong et al. 2020): one step of 1.25 epsilon from a random start. An epoch
    after which the accuracy under PGD-5 drops suddenly (catastrophic overfitting) is undone.
    """

    name: Literal["pgd", "fgsm_rs"] = Field("pgd", description="of training: pgd, or fgsm_rs (one step, fast)")
    norm: Literal["linf"] = Field("linf", description="of the perturbation")
    epsilon: PixelUnits = Field(
        8 / 255, ge=0, le=1, description="largest change of a pixel in training, in [0, 1], e.g. 8/255"
    )
    steps: Count = Field(10, description="steps of pgd")
    step_size: PixelUnits | None = Field(None, gt=0, le=1, description="None: 2.5 epsilon / steps, at most epsilon")
    random_start: bool = Field(True, description="whether pgd starts at a random point within epsilon")

    @property
    def is_fast(self) -> bool:
        """Whether it is fast adversarial training, which can collapse."""
        return self.name == "fgsm_rs"

    @property
    def title(self) -> str:
        """Name in texts, e.g. ``PGD-10``."""
        return "FGSM-RS" if self.is_fast else f"PGD-{self.steps}"

    def spec(self, epsilon: float | None = None, loss: str = "ce") -> AttackSpec:
        """Return the attack; if ``epsilon`` is another one than in this section, the step size is scaled with it."""
        epsilon = self.epsilon if epsilon is None else epsilon
        if self.is_fast:
            return AttackSpec("pgd", epsilon, 1, 1.25 * epsilon, random_start=True, loss=loss)
        if self.step_size is not None:
            ratio = epsilon / self.epsilon if self.epsilon else 1.0
            step_size = self.step_size * ratio
        else:
            step_size = default_step_size(epsilon, self.steps)
        return AttackSpec("pgd", epsilon, self.steps, step_size, self.random_start, loss=loss)


class AttentionKernels(Section):
    """The attention kernel of each precision; ``training.attention=auto`` is resolved to it."""

    float32: Literal["fused", "plain"] = "fused"
    bfloat16: Literal["fused", "plain"] = "fused"


class Windows(Section):
    """Images that the memory holds, by what is computed; ``training.windows=auto`` is resolved to it.

    More images are computed one window after the other, which changes last bits at most. The defaults are the largest
    windows, which a memory budget (``cluster.memory_per_actor``) makes smaller. No forward pass has more than
    ``at_once`` images, which does not depend on the budget. Where a step of training has more, but not more than
    ``train``, the activations of all its windows are kept.
    """

    train: Count = Field(2048, description="with the gradient of parameters, in training")
    attack: Count = Field(2048, description="with the gradient of images, in training")
    evaluate: Count = Field(2048, description="with the gradient of images, in evaluation, mixture, game and guard")
    forward: Count = Field(2048, description="without gradients")
    walk: Count = Field(2048, description="times coalitions, in the layer game")
    at_once: Count = Field(2048, description="in one forward pass, whatever the memory holds")

    def of(self, kind: Literal["train", "attack", "evaluate", "forward", "walk"]) -> int:
        """Return the images of one forward pass of a kind."""
        return min(int(getattr(self, kind)), self.at_once)


class TrainingSection(Section):
    """Rounds and local training."""

    rounds: Count = Field(10, description="rounds of phase 1: local training, then an exchange")
    clients_per_round: Count | None = Field(None, description="None: all clients in every round")
    cohort_size: Count | Literal["auto"] = Field(
        "auto", description="number of clients that are trained in one batched forward"
    )
    local_epochs: Count = Field(1, description="epochs of a client in a round")
    batch_size: Count = Field(32, description="images per client and step")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="of local training")
    lr: float = Field(1e-3, ge=0, description="learning rate of local training, in the first round")
    lr_schedule: Literal["constant", "cosine"] = Field("cosine", description="over rounds")
    weight_decay: float = Field(
        1e-4, ge=0, description="per step and unit of learning rate, decoupled from the gradient"
    )
    clip_norm: float | None = Field(1.0, gt=0, description="maximal gradient norm per client; None: no clipping")
    augment: Literal["none", "flip", "crop", "flip_crop"] = Field(
        "none", description="random flips and crops, before the attack"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of forwards in training; auto: bfloat16 if a measurement finds it faster"
    )
    tf32: bool = Field(
        False, description="let a GPU round the factors of float32 products to 10 bits: faster, less exact"
    )
    attention: Literal["auto", "fused", "plain"] | AttentionKernels = Field(
        "auto", description="fused: torch's scaled_dot_product_attention; plain: two matrix products; auto: measured"
    )
    windows: Literal["auto"] | Windows = Field(
        "auto",
        description="images in one forward pass; auto: what fits cluster.memory_per_actor, by a measurement, and on a "
        "CPU no more than keep it busy; numbers are taken as they are, and halved where the memory is used up",
    )
    device: Literal["cpu", "cuda", "auto"] = Field(
        "auto", description="auto: cuda where actors have a share of a GPU, or in one process that finds one; else cpu"
    )
