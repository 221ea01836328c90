"""The parameters of methods: the section ``algorithm`` of the configuration, validated."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sylva_ray.aggregation.robust import COORDINATE_RULES
from sylva_ray.core.sections import Count, OwnName, Section, conflict

Sharing = Literal["neighbours", "global", "local"]


class RobustParameters(Section):
    """Robust aggregation, which tolerates Byzantine clients: a rule replaces the mean within each neighbourhood."""

    rule: (
        Literal[
            "mean",
            "coordinate_median",
            "trimmed_mean",
            "krum",
            "multi_krum",
            "geometric_median",
            "centred_clipping",
            "self_centred_clipping",
            "norm_clipping",
        ]
        | OwnName
    ) = Field("mean", description="one of your own: package.module:function")
    assumed_fraction: float | None = Field(
        None, ge=0, lt=1, description="malicious clients that the rule assumes; None: byzantine.fraction"
    )
    bucket_size: Count = Field(
        1, description="uploads averaged at random before the rule; 1: none. self_centred_clipping has no buckets"
    )

    def num_inputs(self, num_uploads: int) -> int:
        """Return how many points the rule gets for so many uploads."""
        return num_uploads if self.rule == "self_centred_clipping" else math.ceil(num_uploads / self.bucket_size)


class MixtureParameters(Section):
    """How much of others' models every client mixes into its own after its last local epochs, by held-out images."""

    enabled: bool = Field(True, description="it needs last local epochs, and something that is shared")
    partners: tuple[Literal["global", "neighbours"], ...] | None = Field(
        None,
        min_length=1,
        description="whose models are tried; None: what the client had received; others need one more upload",
    )
    own_shares: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.75, 0.5, 0.25, 0.0), min_length=1, description="shares of the client's own model that are tried, besides 1"
    )
    attack_steps: Count = Field(10, description="of the PGD against every candidate, at the epsilon that is reported")
    max_images: int = Field(128, ge=2, description="of a client's selection split")
    balance: float = Field(
        0.25, ge=0, le=1, description="an image counts 1 / n_class^balance; 0: images count the same, 1: classes do"
    )
    shrink_strength: float = Field(
        4.0, ge=0, description="images at which the gains of client and fleet have equal weights"
    )


class Phase2Parameters(Section):
    """Phase 2: which layers may be refined on benign data, the guard over the choice, and the refinement."""

    enabled: bool = Field(True, description="it needs adapters")
    selection: Literal["shapley", "greedy", "gates", "shift", "all", "head", "random"] = Field(
        "shapley", description="ranking of the layers; the guard decides how many are refined"
    )
    benign_epochs: Count = Field(
        3, description="of all layers, which result in theta^b, the benign end point of the game"
    )
    benign_lr: float = Field(1e-3, gt=0, description="learning rate of the benign epochs")
    refine_epochs: Count = Field(3, description="of the selected layers only")
    refine_lr: float = Field(1e-3, gt=0, description="learning rate of the refinement")
    strengths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.25, 0.5),
        min_length=1,
        description="how far from the robust to the refined layers a client may go; the guard tests robust losses in "
        "this order, and takes the largest benign gain among those that pass",
    )
    attack_steps: Count = Field(10, description="of the PGD of game and guard, at the epsilon that is reported")
    max_images: int = Field(128, ge=2, description="of a client's selection split in the game")
    sampled_pairs: int = Field(
        64, ge=2, description="antithetic permutation pairs, at most, where not all coalitions are evaluated"
    )
    max_cost: float = Field(
        1.0, gt=0, description="of the game, times that of phase 1; if all coalitions cost more, they are sampled"
    )
    max_stack: Count = Field(2048, description="images times coalitions in one forward; more need more memory")
    gate_steps: Count = Field(200, description="of Adam on the gates (selection=gates)")
    shrink_strength: float = Field(
        64.0, ge=0, description="images at which values of client and neighbourhood have equal weights"
    )
    guard_tolerance: float = Field(
        0.05, ge=0, le=1, description="largest loss of robust accuracy by the bound of the guard"
    )
    guard_confidence: float = Field(0.9, gt=0.5, lt=1, description="of the bound of the robust loss, one-sided, paired")
    benign_tolerance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="likewise of benign accuracy; 0: it must have risen by the bound; 1: it does not count",
    )
    benign_confidence: float = Field(0.87, gt=0.5, lt=1, description="of the bound of the benign loss")
    guard_pool: Count | None = Field(
        None,
        description="images below which outcomes of other clients are added; None: what the robust bound needs",
    )

    @model_validator(mode="after")
    def _strengths_rise(self) -> Self:
        if any(low >= high for low, high in pairwise(self.strengths)):
            raise conflict("strengths", list(self.strengths), "must be in ascending order, each once")
        return self


class MethodParameters(Section):
    """The parameters that every method has; a subclass adds its own and changes defaults."""

    model: Literal["lora", "full"] = Field("lora", description="what is trained: adapters and head, or the whole model")
    adapters: Sharing = Field("global", description="with whom the adapters (with model=full: the body) are shared")
    heads: Sharing = Field("local", description="with whom the heads are shared")
    factors: Literal["both", "b", "a"] = Field(
        "both", description="b: A is frozen (FFA-LoRA, LoRA-FA); a: A is shared, B personal (FedSA-LoRA)"
    )
    a_init: Literal["kaiming", "orthonormal"] = Field("kaiming", description="orthonormal: rows of norm 1/sqrt 3")
    factor_rule: Literal["product_svd", "naive"] = Field("product_svd", description="how LoRA factors are averaged")
    weighting: Literal["samples", "uniform"] = Field("samples", description="of clients in the mean")
    robust: RobustParameters = RobustParameters()
    num_neighbours: Count | None = Field(
        None, description="including the client itself; None: ceil(sqrt K), at least 2"
    )
    head_warmup_epochs: int = Field(1, ge=0, description="benign epochs of the head before round 1")
    head_warmup_lr: float = Field(1e-2, gt=0, description="learning rate of these epochs")
    epsilon_warmup: float = Field(
        0.3,
        ge=0,
        le=1,
        description="fraction of the rounds over which epsilon is ramped from 0; at 1 none of several reaches it, the "
        "last local epochs do",
    )
    final_local_epochs: int = Field(1, ge=0, description="from the merged state, at the end of phase 1")
    mixture: MixtureParameters = MixtureParameters(enabled=False)
    phase2: Phase2Parameters = Phase2Parameters(enabled=False)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        partners = (self.mixture.partners or ()) if self.mixture.enabled else ()
        sharings = (self.adapters, self.heads, *partners)
        by_neighbours = "neighbours" in sharings
        if self.model == "full" and by_neighbours:
            raise conflict("model", self.model, "has no adapters that define neighbours: use global or local sharing")
        if self.model == "full":
            for key, value in (("factors", "both"), ("factor_rule", "product_svd"), ("a_init", "kaiming")):
                if getattr(self, key) != value:
                    fix = f"has no factors, which the method's {key}={getattr(self, key)} is about: keep model=lora"
                    raise conflict("model", self.model, fix)
        if self.model == "full" and self.phase2.enabled:
            fix = "needs adapters: use algorithm.model=lora, or algorithm.phase2.enabled=false"
            raise conflict("algorithm.phase2.enabled", True, fix)
        if self.adapters == "local" and self.heads == "neighbours":
            fix = "needs uploaded adapters, and with adapters=local there are none: use global"
            raise conflict("heads", self.heads, fix)
        if self.robust.rule == "self_centred_clipping" and "global" in sharings:
            fix = (
                "has another result for every client, so nothing can be shared globally: "
                "use neighbours or local sharing, or centred_clipping"
            )
            raise conflict("algorithm.robust.rule", self.robust.rule, fix)
        if self.factors == "a" and by_neighbours:
            fix = "does not upload B, and neighbours are defined by B A: use global sharing"
            raise conflict("factors", self.factors, fix)
        pairs_travel = self.model == "lora" and self.factors == "both" and self.factor_rule == "product_svd"
        if self.robust.rule in COORDINATE_RULES and pairs_travel and self.adapters != "local":
            fix = (
                "needs coordinates that mean the same for all clients, which LoRA pairs do not have: "
                "set algorithm.factors=b, factor_rule=naive or model=full"
            )
            raise conflict("algorithm.robust.rule", self.robust.rule, fix)
        return self


def unused_settings(method: str, parameters: MethodParameters) -> list[str]:
    """Return a line per setting that has no effect: of a part that is off, e.g. a recipe's, or beside others."""
    found = []
    for name in ("mixture", "phase2"):
        section: MixtureParameters | Phase2Parameters = getattr(parameters, name)
        unused = sorted(section.model_dump(exclude_defaults=True).keys() - {"enabled"})
        if unused and not section.enabled:
            keys = f"{', '.join(unused)} of algorithm.{name}"
            found.append(f"{method} does not use {keys}, unless algorithm.{name}.enabled=true")
    if parameters.mixture.enabled:
        if not parameters.final_local_epochs:
            found.append(f"{method} mixes nothing: a mixture follows the last local epochs, and there are none")
        elif parameters.adapters == parameters.heads == "local":
            found.append(f"{method} mixes nothing: it shares neither adapters nor heads")
    if parameters.weighting == "uniform" and parameters.robust.rule not in ("mean", "self_centred_clipping"):
        found.append(f"algorithm.robust.rule={parameters.robust.rule} weighs all clients alike, whatever the weighting")
    return found
