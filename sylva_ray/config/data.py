"""The sections of data: the data set, and how its images are distributed to clients."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator

from sylva_ray.core.locations import StoredPath, stored_path
from sylva_ray.core.sections import Count, OwnName, Section


def stored_dataset(name: str) -> str:
    """Return the name of a data set, with the path in it as `stored_path` returns it.

    Raises:
        ValueError: the path is not one.
    """
    kind, _, path = name.partition(":")
    return f"{kind}:{stored_path(path)}" if path and kind in ("imagefolder", "parquet") else name


class DatasetSection(Section):
    """The data set: digits, cifar10, cifar100, stl10, gtsrb, ``imagefolder:PATH``, ``parquet:PATH``, or your own.

    Your own is ``package.module:function``, which returns a training half and a test half.
    """

    name: str = Field(
        "digits",
        description="see `sylva-ray list datasets`; imagefolder:PATH, parquet:PATH, or package.module:function",
    )
    root: StoredPath = Field(
        "~/.cache/sylva_ray/datasets", description="folder of the data sets that torchvision downloads"
    )
    max_train: int | None = Field(None, ge=1, description="use a random, class-balanced subset of the training images")
    max_test: int | None = Field(None, ge=1, description="the same for the images from which test sets are drawn")
    test_pool: Literal["test", "train"] = Field(
        "test", description="train: test on training images that max_train leaves out, to choose hyperparameters"
    )
    label: str | None = Field(None, description="column of the labels in parquet files; None: found by rule")
    image: str | None = Field(None, description="column of the images in parquet files; None: found by rule")

    @field_validator("name")
    @classmethod
    def _store_path(cls, name: str) -> str:
        return stored_dataset(name)

    @field_validator("label", "image")
    @classmethod
    def _column_has_an_effect(cls, column: str | None, info: ValidationInfo) -> str | None:
        name = info.data.get("name")
        if column is not None and name is not None and not name.startswith("parquet:"):
            raise ValueError(f"has no effect on {name}: only parquet data sets have columns; leave it out")
        return column


Leftovers: TypeAlias = Literal["random", "first"]
"""See ``partition.leftovers``."""


class PartitionSection(Section):
    """How images are distributed to clients, and the images of a client to its four splits.

    A kind of your own is ``package.module:function`` with (labels, section, rng) -> the client of every image.
    """

    kind: Literal["iid", "dirichlet", "pathological", "quantity"] | OwnName = Field(
        "dirichlet",
        description="how images are dealt to clients: iid; dirichlet (label skew); pathological (few classes each); "
        "quantity (unequal numbers of images)",
    )
    num_clients: Count = Field(10, description="number of clients in the fleet")
    alpha: float = Field(
        0.5, gt=0, description="Dirichlet concentration of labels; for `quantity`, of the numbers of images"
    )
    classes_per_client: Count = Field(
        2, description="for `pathological`; more where the clients would otherwise not hold all classes"
    )
    min_samples: int = Field(10, ge=5, description="minimal number of training and validation images per client")
    valid_fraction: float = Field(
        0.2, gt=0, lt=1, description="of a client's images; half for selection, half for the guard"
    )
    test_samples: int = Field(100, ge=1, description="test images per client")
    test_shares: Literal["own", "equal"] = Field(
        "own",
        description="class shares of a client's test images: own, those of its training images; equal, as many of "
        "every class that is among 100 images with own shares",
    )
    leftovers: Leftovers = Field(
        "random",
        description="which classes get the images that are left over when a split, or a subset of the data set, is "
        "divided into whole numbers: drawn at random; or the first ones, in every client, as up to version 0.2",
    )
