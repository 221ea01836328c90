"""HETLoRA-AT: clients with unequal LoRA ranks (Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning").

A client of rank r_k has its factors in the first r_k slots of the common rank. The other slots are 0 and remain 0,
because with both factors 0 no gradient reaches a slot. So all clients fit into one stack, and only r_k slots are
uploaded. The scaling is alpha / (common rank) for all clients. The paper's self-pruning of ranks is not implemented.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from sylva_ray.aggregation.factors import paired_modules
from sylva_ray.aggregation.neighbours import product_gram
from sylva_ray.algorithms.adversarial import AdversarialTraining
from sylva_ray.core.errors import UserError
from sylva_ray.core.sections import conflict
from sylva_ray.core.types import ClientState
from sylva_ray.federation.context import RoundUploads
from sylva_ray.federation.parameters import Sharing


class HetLoraAT(AdversarialTraining):
    """Adversarially trained LoRA with a rank of its own for each client.

    The server averages zero-padded factors with weights ||B_k A_k||_F and truncates the result to each client's rank.
    """

    name = "hetlora_at"
    papers = ("Cho et al. 2024, Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP",)

    class Parameters(AdversarialTraining.Parameters):
        """The ranks: client i has rank ``ranks[i mod len(ranks)]``, at most ``lora.rank``."""

        ranks: tuple[int, ...] = Field((2, 4, 8), min_length=1)
        slots: Literal["all", "owners"] = Field(
            "all",
            description="owners: a slot is averaged over the clients that have it, so high ranks are not diluted",
        )
        factor_rule: Literal["product_svd", "naive"] = "naive"

        @model_validator(mode="after")
        def _has_slots(self) -> Self:
            needs_products = "has no products B A, which hetlora_at averages by: keep model=lora and factors=both"
            if self.model == "full":
                raise conflict("model", self.model, needs_products)
            if self.factors != "both":
                raise conflict("factors", self.factors, needs_products)
            if self.robust.rule != "mean":
                fix = "takes padded low ranks for outliers: use only mean"
                raise conflict("algorithm.robust.rule", self.robust.rule, fix)
            if self.slots == "owners" and self.factor_rule != "naive":
                raise conflict("slots", self.slots, "averages factors slot by slot: set factor_rule=naive")
            return self

    parameters: Parameters

    def rank(self, client: int) -> int:
        """Return r_k, the rank of a client."""
        return self.parameters.ranks[client % len(self.parameters.ranks)]

    def initial_state(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        """Return the common state with the slots after r_k set to 0.

        Raises:
            UserError: a rank is below 1 or above the common one.
        """
        self.common_rank = next(len(value) for name, value in state.items() if name.endswith(".lora_A"))
        if not 1 <= self.rank(client) <= self.common_rank:
            fix = f"must be between 1 and lora.rank, which is {self.common_rank}"
            raise UserError("algorithm.ranks", self.rank(client), fix)
        return self._cut(client, super().initial_state(client, state))

    def pack(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        """Return the first r_k slots of what is uploaded."""
        return {name: value[_slots(name, self.rank(client))] for name, value in super().pack(client, state).items()}

    def unpack(self, client: int, upload: ClientState) -> dict[str, np.ndarray]:
        """Pad an upload with zeros to the common rank."""
        missing = self.common_rank - self.rank(client)
        padding = {".lora_A": ((0, missing), (0, 0)), ".lora_B": ((0, 0), (0, missing))}
        return {n: np.pad(value, padding[n[-7:]]) if n[-7:] in padding else value for n, value in upload.items()}

    def client_weights(self, uploads: RoundUploads, clients: Sequence[int]) -> np.ndarray:
        """Return ||B_k A_k||_F over all modules; equal weights while all products are 0."""
        norms = np.sqrt(np.diag(product_gram([uploads.by_client[client] for client in clients])).clip(0))
        return norms if norms.any() else np.ones(len(clients))

    def merge(
        self, uploads: RoundUploads, names: Sequence[str], members: Sequence[int], weights: np.ndarray, receiver: int
    ) -> dict[str, np.ndarray]:
        """Return the mean of padded factors; with ``slots=owners`` a slot is averaged over the clients that have it."""
        merged = super().merge(uploads, names, members, weights, receiver)
        if self.parameters.slots == "owners":
            ranks = [len(value) for name, value in merged.items() if name.endswith(".lora_A")]
            slots = np.arange(max(ranks, default=0))  # of heads alone there are none
            weight_of_slot = sum(w * (slots < self.rank(k)) for k, w in zip(members, weights, strict=True))
            scale = np.divide(1.0, weight_of_slot, out=np.zeros(len(slots)), where=weight_of_slot > 0)
            for name, value in merged.items():
                if name.endswith(".lora_A"):
                    merged[name] = (value * scale[:, None]).astype(value.dtype)
                elif name.endswith(".lora_B"):
                    merged[name] = (value * scale).astype(value.dtype)
        return merged

    def merge_for_all(
        self, uploads: RoundUploads, names: Sequence[str], sharing: Sharing, weights: np.ndarray
    ) -> dict[int, dict[str, np.ndarray]]:
        """See `Method.merge_for_all`; every client receives the slots that it has."""
        merged = super().merge_for_all(uploads, names, sharing, weights)
        return {client: self._cut(client, state) for client, state in merged.items()}

    def aggregate(self, uploads: RoundUploads) -> list[dict[str, np.ndarray]]:
        """Return the merged factors, truncated to the rank of each client.

        A slot that is 0 in both merged factors (no client that has it uploaded) keeps its value, because no gradient
        would reach it.
        """
        merged = super().aggregate(uploads)
        for trained, state in zip(uploads.states, merged, strict=True):
            for module in paired_modules(state):
                a, b = f"{module}.lora_A", f"{module}.lora_B"
                is_merged = np.logical_or(state[a].any(axis=1), state[b].any(axis=0))
                state[a] = np.where(is_merged[:, None], state[a], trained[a])
                state[b] = np.where(is_merged, state[b], trained[b])
        return merged

    def _cut(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        cut = {}
        for name, value in state.items():
            keep = np.zeros_like(value)
            keep[_slots(name, self.rank(client))] = 1
            cut[name] = value * keep
        return cut


def _slots(name: str, rank: int) -> tuple[slice, ...]:
    """Return the index of the first ``rank`` slots of a factor, or of everything in another parameter."""
    if name.endswith(".lora_A"):
        return (slice(rank),)
    return (slice(None), slice(rank)) if name.endswith(".lora_B") else (...,)  # type: ignore[return-value]
