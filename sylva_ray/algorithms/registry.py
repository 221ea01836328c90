"""Methods by name, ours or anybody's: ``algorithm.name=my_pkg.my_module:MyMethod`` needs no change here."""

from __future__ import annotations

import difflib
import importlib

from sylva_ray.algorithms.base import Algorithm
from sylva_ray.algorithms.local_lora import LocalLora
from sylva_ray.algorithms.sylva import Sylva, SylvaPaperLike
from sylva_ray.algorithms.undefended import Undefended
from sylva_ray.config import AlgorithmSection, build
from sylva_ray.errors import UserError

ALGORITHMS: dict[str, type[Algorithm]] = {
    method.name: method for method in (Sylva, SylvaPaperLike, LocalLora, Undefended)
}


def create_algorithm(section: AlgorithmSection) -> Algorithm:
    """The method with its own parameters validated.

    Raises:
        UserError: unknown name (with the nearest one), a class that cannot be imported, a parameter that does not fit.
    """
    method = _find(section.name)
    return method(build(method.Parameters, section.parameters, prefix="algorithm"))


def _find(name: str) -> type[Algorithm]:
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            method = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError("algorithm.name", name, f"cannot be imported ({error})") from None
        if not (isinstance(method, type) and issubclass(method, Algorithm)):
            raise UserError("algorithm.name", name, "must be a subclass of sylva_ray.algorithms.base.Algorithm")
        return method
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        fix = f"{hint}Known methods: {', '.join(ALGORITHMS)}; or package.module:Class"
        raise UserError("algorithm.name", name, fix)
    return ALGORITHMS[name]
