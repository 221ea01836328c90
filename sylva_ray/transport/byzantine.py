"""Byzantine clients: which clients they are, and what they upload.

The malicious clients are omniscient: they know every honest update of the round, cooperate, and wait until all honest
clients have uploaded. An update is the uploaded state minus the received one. An attack is a linear function of the
updates, array by array. For LoRA factors that is an attack on the model to first order only: B A is bilinear, so with
the updates of both factors negated their product stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sylva_ray.config.experiment import ByzantineSection, ExperimentConfig
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.types import ClientState
from sylva_ray.transport.postprocessor import Message, Packing, Postprocessor, add, subtract

ATTACKS = ("sign_flip", "gaussian", "label_flip", "alie", "ipm", "mimic", "nan")


class ByzantineUploads(Postprocessor):
    """Replaces the uploads of the malicious clients after everything has been decoded.

    Args:
        section: ``byzantine`` of the configuration: the attack and its strength.
        seed: of the experiment.
        malicious: numbers of the malicious clients.
        packing: the method. A malicious client sends no more than the method lets it send.
    """

    def __init__(self, section: ByzantineSection, seed: int, malicious: Sequence[int], packing: Packing) -> None:
        self.section, self.seed, self.malicious, self.packing = section, seed, tuple(malicious), packing

    def decode_round(
        self, uploads: Mapping[int, ClientState], messages: Mapping[int, Message]
    ) -> Mapping[int, ClientState]:
        """Return the uploads with those of malicious clients replaced.

        Updates are taken in the shapes of a state, where those of clients with unequal LoRA ranks can be compared.
        """
        attackers = [client for client in self.malicious if client in uploads]
        if not attackers:
            return uploads
        unpack = self.packing.unpack
        received = {client: unpack(client, messages[client].reference) for client in uploads}
        updates = {client: subtract(unpack(client, upload), received[client]) for client, upload in uploads.items()}
        benign = [updates[client] for client in sorted(updates) if client not in self.malicious]
        attack_uploads = {}
        for client in attackers:
            rng = numpy_generator(self.seed, "forged", client, messages[client].step)
            update = malicious_update(
                self.section.attack,
                updates[client],
                benign,
                rng,
                num_clients=len(uploads),
                num_byzantine=len(attackers),
                strength=self.section.strength,
            )
            attack_uploads[client] = self.packing.pack(client, add(received[client], update))
        return {**uploads, **attack_uploads}


def malicious_update(
    attack: str,
    own: ClientState,
    benign: Sequence[ClientState],
    rng: np.random.Generator,
    num_clients: int,
    num_byzantine: int,
    strength: float | None = None,
) -> dict[str, np.ndarray]:
    """Return the update that a malicious client uploads, with the names, shapes and dtypes of ``own``.

    Args:
        attack: one of `ATTACKS`:

            * ``sign_flip``: -c own, c = 1 by default.
            * ``gaussian``: N(0, (c s)^2), c = 10 by default, s the standard deviation of all honest entries of the
              array (Blanchard et al. 2017 send noise of a fixed, large size).
            * ``alie``: mean - z standard deviations per coordinate, which hides among the honest updates ("A Little Is
              Enough", Baruch et al. 2019); z from `alie_z` by default.
            * ``ipm``: -eps mean, eps = 2 by default (inner product manipulation, Xie et al. 2020, whose subtle value is
              0.1). It reverses the mean of all updates if ``eps f > n - f``.
            * ``mimic``: every malicious client copies honest client 0, which then outweighs the honest clients that
              differ from it (Karimireddy et al. 2022, who choose the copied client by the data).
            * ``nan``: NaN in every entry, as from a broken client.
            * ``label_flip``: ``own`` unchanged: the attack is in the training data, see `flip_labels`.
        own: the update that the client would have uploaded had it been honest.
        benign: the honest updates; if there are none, ``own`` takes their place.
        rng: for the noise.
        num_clients: n, the clients that upload, honest or not.
        num_byzantine: f, how many of them are malicious.
        strength: replaces c, z or eps.
    """
    assert attack in ATTACKS, f"there is no attack {attack}"

    def factor(default: float) -> float:
        return default if strength is None else strength

    result = {}
    for name, own_value in own.items():
        honest = np.stack([state[name] for state in benign or [own]]).astype(np.float64)
        value: np.ndarray
        if attack == "sign_flip":
            value = -factor(1.0) * own_value
        elif attack == "gaussian":
            value = rng.normal(0, factor(10.0) * honest.std(), own_value.shape)
        elif attack == "alie":
            value = honest.mean(0) - factor(alie_z(num_clients, num_byzantine)) * honest.std(0)
        elif attack == "ipm":
            value = -factor(2.0) * honest.mean(0)
        elif attack == "mimic":
            value = honest[0]
        elif attack == "nan":
            value = np.full(own_value.shape, np.nan)
        else:
            value = own_value
        result[name] = np.array(value, own_value.dtype)
    return result


def alie_z(num_clients: int, num_byzantine: int) -> float:
    """Return by how many standard deviations a malicious update may differ from the mean and still look honest.

    To be in the majority the f attackers need ``s = floor(n/2 + 1) - f`` honest clients that are farther from the mean
    than they are: ``z = Phi^-1((n - f - s) / (n - f))`` (Baruch et al. 2019). This is 1.43 for 24 of 50 clients, but 0
    for 2 of 10. The result is at least 1, because otherwise a small federation would not be attacked at all.
    """
    from scipy.special import ndtri  # only this attack needs scipy

    honest = num_clients - num_byzantine
    supporters = max(1, num_clients // 2 + 1 - num_byzantine)
    return max(1.0, float(ndtri(max(0, honest - supporters) / honest))) if honest else 1.0


def flip_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return ``num_classes - 1 - labels``; the middle class of an odd number is unchanged."""
    return num_classes - 1 - labels


def draw_byzantine_clients(fraction: float, num_clients: int, rng: np.random.Generator) -> list[int]:
    """Draw floor(fraction K) of K clients, sorted.

    A decimal fraction counts as it is written: 0.29 of 100 clients are 29, although the float is below 0.29.
    """
    count = math.floor(fraction * num_clients + 1e-9)
    return sorted(rng.choice(num_clients, count, replace=False).tolist())


def byzantine_clients(config: ExperimentConfig) -> list[int]:
    """Return the malicious clients of an experiment, sorted; they depend on its seed alone."""
    rng = numpy_generator(config.seed, "attackers")
    return draw_byzantine_clients(config.byzantine.fraction, config.partition.num_clients, rng)
