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

from sylva_ray.attacks.byzantine import BYZANTINE_ATTACKS, Collusion
from sylva_ray.config.experiment import ByzantineSection, ExperimentConfig
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.types import ClientState
from sylva_ray.transport.postprocessor import Message, Packing, Postprocessor, add, subtract


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
        attack: a key of `sylva_ray.attacks.byzantine.BYZANTINE_ATTACKS`.
        own: the update that the client would have uploaded had it been honest.
        benign: the honest updates; if there are none, ``own`` takes their place.
        rng: for the noise.
        num_clients: the clients that upload, honest or not.
        num_byzantine: how many of them are malicious.
        strength: of the attack; None: its default.
    """
    assert attack in BYZANTINE_ATTACKS, f"there is no attack {attack}"
    collusion = Collusion(num_clients, num_byzantine, rng, strength)
    result = {}
    for name, own_value in own.items():
        honest = np.stack([state[name] for state in benign or [own]]).astype(np.float64)
        result[name] = np.array(BYZANTINE_ATTACKS[attack].update(own_value, honest, collusion), own_value.dtype)
    return result


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
