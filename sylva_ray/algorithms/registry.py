"""Methods by name; a method outside this package is named ``my_package.my_module:MyMethod``."""

from __future__ import annotations

from sylva_ray.algorithms.calfat import CalFAT
from sylva_ray.algorithms.dbfat import DBFAT
from sylva_ray.algorithms.fedavg_at import FedAvgAT, FedAvgATFineTuned, FedItAT, FedMart, FedTrades
from sylva_ray.algorithms.fedawp import FedAWP
from sylva_ray.algorithms.fedper_at import FedPerAT, FedRepAT
from sylva_ray.algorithms.fedprox_at import FedProxAT
from sylva_ray.algorithms.hetlora import HetLoraAT
from sylva_ray.algorithms.local import PerAdv, PerLora
from sylva_ray.algorithms.lorica import Lorica
from sylva_ray.algorithms.partial_lora import FedSaLoraAT, FfaLoraAT
from sylva_ray.algorithms.pm_afl import PmAfl
from sylva_ray.algorithms.sfat import SFAT
from sylva_ray.algorithms.sylva import Sylva, SylvaPaperLike
from sylva_ray.algorithms.undefended import Undefended
from sylva_ray.config.experiment import AlgorithmSection
from sylva_ray.config.schema import build
from sylva_ray.core.own_code import find_class
from sylva_ray.federation.contract import Algorithm

GROUP = "sylva_ray.methods"
"""The group of entry points."""

ALGORITHMS: dict[str, type[Algorithm]] = {
    method.name: method
    for method in (
        *(Sylva, SylvaPaperLike, Lorica, PmAfl),
        *(FedAvgAT, FedAvgATFineTuned, FedTrades, FedMart, FedProxAT, FedAWP, FedPerAT, FedRepAT, CalFAT, DBFAT, SFAT),
        *(FedItAT, FfaLoraAT, FedSaLoraAT, HetLoraAT),
        *(PerLora, PerAdv, Undefended),
    )
}


def create_algorithm(section: AlgorithmSection) -> Algorithm:
    """Return the method that a configuration names, with its parameters.

    Raises:
        UserError: the name is unknown, the class cannot be imported, or a parameter is invalid.
    """
    method = find_algorithm(section.name)
    return method(build(method.Parameters, section.parameters, prefix="algorithm"))


def find_algorithm(name: str) -> type[Algorithm]:
    """Return the class of a method.

    Raises:
        UserError: the name is unknown, or the class cannot be imported.
    """
    return find_class("algorithm.name", name, "method", ALGORITHMS, GROUP, Algorithm)  # type: ignore[type-abstract]
