"""The section ``tracking``: where MLflow and other trackers get a run."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Literal

from pydantic import Field, field_validator

from sylva_ray.core.sections import Lines, Seconds, Section

STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks")
"""Protocols of MLflow's own stores; those of databases may name a driver: ``mysql+pymysql``."""


class TrackingSection(Section):
    """Trackers. Without ``uri`` and ``MLFLOW_TRACKING_URI``, MLflow has a file beside the run folder."""

    enabled: bool = Field(True, description="whether MLflow gets the run")
    observers: tuple[str, ...] = Field(
        (), description="further trackers: tensorboard, wandb, or a class of your own, package.module:Class"
    )
    uri: str | None = Field(
        None, description="MLflow store, e.g. http://HOST:5000 or sqlite:///FILE; None: mlflow.db beside the run folder"
    )
    experiment: str = Field("sylva_ray", description="MLflow experiment")
    run_name: str | None = Field(None, description="name of the MLflow run; None: that of the run folder")
    detail: Literal["clients", "fleet"] = Field(
        "fleet",
        description="clients: also metrics of single clients, figures and models, not only a table of clients",
    )
    parent_run_id: str | None = Field(None, description="MLflow run of which this run is a child")
    tags: dict[str, Lines] = Field({}, description="additional tags of the MLflow run")
    flush_timeout_s: Seconds = Field(30.0, description="how long to wait for the server at the end of a run")

    @field_validator("uri")
    @classmethod
    def _is_a_url_or_a_path(cls, uri: str | None) -> str | None:
        if uri is not None and "://" not in uri and ("@" in uri or uri.startswith("//")):
            raise ValueError("is neither a URL nor a path; begin with the protocol, as in https://")
        return uri


def check_store(uri: str) -> None:
    """Check that MLflow, or a plug-in of it that is installed, can have a store with this address.

    No configuration is checked so when it is read: the machine that reads a run may lack the plug-in of the one that
    tracked it.

    Raises:
        ValueError: its protocol is unknown.
    """
    protocol = uri.partition("://")[0].partition("+")[0].lower() if "://" in uri else ""
    if protocol and protocol not in STORES and not entry_points(group="mlflow.tracking_store", name=protocol):
        raise ValueError(f"MLflow has no stores with the protocol {protocol!r}, but with {', '.join(STORES)}")
