"""The version of this package; `sylva_ray.__version__` is the same."""

__version__ = "0.3.0.dev0"
