"""FedPer-AT (Arivazhagan et al. 2019) and FedRep-AT (Collins et al. 2021): personal heads on a shared body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from sylva_ray.algorithms.fedavg_at import FedAvgAT
from sylva_ray.core.errors import UserError
from sylva_ray.core.sections import Count, conflict
from sylva_ray.federation.parameters import Sharing


class FedPerAT(FedAvgAT):
    """FedAvg-AT with personal heads: a client trains body and head together, and shares only the body."""

    name = "fedper_at"
    papers = ("Arivazhagan et al. 2019, Federated Learning with Personalization Layers, arXiv 1912.00818",)

    class Parameters(FedAvgAT.Parameters):
        """Personal heads, and a last local epoch of body and head from the merged body."""

        heads: Sharing = "local"
        final_local_epochs: int = Field(1, ge=0)


class FedRepAT(FedPerAT):
    """FedPer-AT in which a client trains first its head, then the body."""

    name = "fedrep_at"
    papers = ("Collins et al. 2021, Exploiting Shared Representations for Personalized Federated Learning, ICML",)

    class Parameters(FedPerAT.Parameters):
        """Of ``training.local_epochs`` the last ``body_epochs`` train the body, those before the head."""

        body_epochs: Count = 1
        final_local_epochs: int = Field(2, ge=0)

        @model_validator(mode="after")
        def _final_epochs_have_both(self) -> Self:
            if 0 < self.final_local_epochs <= self.body_epochs:
                fix = f"must be 0, or more than body_epochs, which is {self.body_epochs}"
                raise conflict("final_local_epochs", self.final_local_epochs, fix)
            return self

    parameters: Parameters

    def schedule(self, epochs: int, names: Sequence[str]) -> list[tuple[int, list[str]]]:
        """Return E - body_epochs epochs of the head, then body_epochs epochs of the body.

        Raises:
            UserError: there are too few epochs for both.
        """
        body_epochs = self.parameters.body_epochs
        if epochs <= body_epochs:
            fix = f"fedrep_at trains the head before the body: at least {body_epochs + 1} epochs are needed"
            raise UserError("training.local_epochs", epochs, fix)
        head = [name for name in names if name in self.head_names]
        body = [name for name in names if name not in self.head_names]
        return [(epochs - body_epochs, head), (body_epochs, body)]
