"""The postprocessors of a run, in their order: the one place where they are made from the configuration."""

from __future__ import annotations

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.transport.byzantine import ByzantineUploads, byzantine_clients
from sylva_ray.transport.codecs import codec_from_config
from sylva_ray.transport.compression import Compression
from sylva_ray.transport.postprocessor import Packing, Postprocessor


def create_postprocessors(config: ExperimentConfig, packing: Packing) -> list[Postprocessor]:
    """Return the postprocessors that a configuration asks for, the one nearest to the model first.

    Byzantine clients come before compression. Uploads are received in the reverse order: the coordinator decodes them
    and then replaces those of the malicious clients, so that no codec weakens or reveals a malicious update.
    """
    postprocessors: list[Postprocessor] = []
    malicious = byzantine_clients(config)
    if malicious:
        postprocessors.append(ByzantineUploads(config.byzantine, config.seed, malicious, packing))
    codec = codec_from_config(config.compression)
    if codec is not None:
        postprocessors.append(Compression(codec, config.compression, packing))
    return postprocessors
