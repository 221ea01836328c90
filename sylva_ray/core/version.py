"""The version of this package; `sylva_ray.__version__` is the same."""

__version__ = "0.2.0"
