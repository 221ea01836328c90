"""The records of a run: one per stage (``rounds.jsonl``), and what the layer game decided.

`Artefact` is the base of everything that a run writes as JSON; `sylva_ray.core.summary` and `sylva_ray.core.evaluation`
hold the others. docs/summary.md is generated from these types.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sylva_ray.core.errors import UserError
from sylva_ray.core.text import abbreviated


class Artefact(BaseModel):
    """A frozen JSON object in a file of a run.

    Keys without a field are kept: they come from another version of this package, or from a method's own stage. Fields
    that a file lacks have their default, and stay absent when the object is written again.
    """

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    description: ClassVar[str] = "an artefact of a run"
    """What the object is, for error messages."""

    @classmethod
    def from_json(cls, value: object, source: str) -> Self:
        """Check a parsed JSON value.

        Args:
            value: what ``json.loads`` returned.
            source: where it comes from, for the error message.

        Raises:
            UserError: a key is missing or has a value of the wrong type; names the first one.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            problem = error.errors()[0]
            where = abbreviated(".".join(map(str, problem["loc"])), length=100)
            message = problem["msg"].partition(" or instance of")[0].lower()
            reason = f"{where}: {message}" if where else "a JSON object is needed"
            raise UserError("file", source, f"is not {cls.description} ({reason})") from None

    def to_json(self) -> dict[str, Any]:
        """Return the keys that were set, as plain values that ``json.dumps`` takes."""
        return self.model_dump(exclude_unset=True)


def omitted_if_none() -> Any:
    """Return the `Field` of a key that is absent, and not null, where there is no value."""
    return Field(default=None, exclude_if=lambda value: value is None)


class ClientAccuracies(Artefact):
    """Accuracies of all clients under one condition, benign or attacked."""

    accuracy: list[float]
    """Fraction of right answers, ``[K]``."""
    balanced_accuracy: list[float]
    """Mean recall over the classes that occur in a client's labels, ``[K]``."""
    one_class: Annotated[list[float] | None, omitted_if_none()] = None
    """1 where a client answers a single class, else 0, ``[K]``; of the benign condition only."""


class Neighbours(Artefact):
    """The neighbourhood of every client, over which phase 2 pools values and outcomes of clients with few images."""

    members: list[list[int]]
    """Client numbers, ``[K][1 + neighbours]``, the client itself included."""
    weights: list[list[float]]
    """Their weights, same shape; rows sum to 1."""


class Compute(Artefact):
    """How a run computes: what every ``auto`` of the configuration was resolved to."""

    training_precision: str
    """``float32`` or ``bfloat16``, of training's forward and backward passes."""
    evaluation_precision: str
    """Of attacks at evaluation; ``bfloat16`` means that successes are confirmed in float32."""
    attention_float32: str
    """Attention kernel of float32 passes, ``fused`` or ``plain``."""
    attention_bfloat16: str
    """Attention kernel of bfloat16 passes."""


MIXED_IN = "_from_"
"""Between the group and the partner in the names of a mixture's metrics."""


class Extension(Artefact):
    """An entry of ``extensions.json``: rounds that were added to a run."""

    description: ClassVar[str] = "an extension of a run"

    before: int = Field(ge=1)
    """``training.rounds`` until then."""
    rounds: int = Field(ge=2)
    """``training.rounds`` from then on."""
    step: int = Field(ge=0)
    """The step with which the run goes on."""


class StageRecord(Artefact):
    """A line of ``rounds.jsonl``: a stage, its costs, and the accuracies after it.

    One of more than 256 clients has ``client_table`` in place of what it says of each.
    """

    description: ClassVar[str] = "a record of a stage"

    step: int
    """Position of the stage in the run, from 0."""
    stage: str
    """Its name: ``warmup``, ``phase1``, ``personalise``, ``mixture``, ``layer_game``, ``phase2``, or a method's own."""
    round: int
    """Same as ``step``, which it is in the files of every version."""
    epsilon: float | None = None
    """Attack budget of its training, in pixel units; null where nothing is attacked."""
    lr: float | None = None
    """Learning rate of its training; null where nothing is trained."""
    participants: list[int]
    """Client numbers."""
    missing: list[int] = Field([])
    """Participants that missed the round's deadline; they kept what they do not share with all."""
    metrics: dict[str, dict[str, float]] = Field({})
    """``{metric: {client: value}}``: ``loss`` of training; ``adapters_from_global`` and so on, shares of a mixture."""
    neighbours: Annotated[Neighbours | None, omitted_if_none()] = None
    """In the record of the last round before a stage that needs neighbourhoods."""
    evaluation: dict[str, ClientAccuracies] | None = None
    """``{condition: accuracies}`` after the stage; null where no evaluation was due."""
    panel: Annotated[list[int] | None, omitted_if_none()] = None
    """The clients whose accuracies these are, in ascending order; absent where all clients were evaluated."""
    in_part: Annotated[bool | None, omitted_if_none()] = None
    """True if the evaluation had less than one in full: the first attack, ``evaluation.max_samples`` images of a
    client, or a panel; else absent."""
    byzantine: Annotated[list[int] | None, omitted_if_none()] = None
    """The Byzantine clients, which count in no mean over the fleet; absent where there are none."""
    upload_bytes: int = 0
    """Array bytes that all clients uploaded, by arithmetic."""
    download_bytes: int = 0
    """Array bytes that all clients downloaded, by arithmetic."""
    upload_payload_bytes: int = 0
    """Measured size of the encoded uploads of exchanged models, headers included."""
    download_payload_bytes: int = 0
    """Measured size of the encoded downloads of exchanged models, headers included."""
    seconds: dict[str, float] = Field({})
    """``wall``; ``aggregate`` of the coordinator; all others summed over workers: ``train``, ``attack``, ``mixture``,
    ``game``, ``evaluate``, and what a method's own code names."""
    peak_memory_bytes: int = 0
    """High-water mark of the largest worker process."""
    gpus: Annotated[list[str] | None, omitted_if_none()] = None
    """GPUs of the workers, each with its driver and CUDA; absent on CPUs."""
    peak_gpu_memory_bytes: Annotated[int | None, omitted_if_none()] = None
    """The most that the tensors of a worker used of its GPU so far; absent on CPUs."""
    reduced_windows: Annotated[dict[str, int] | None, omitted_if_none()] = None
    """Windows (``training.windows``) that were smaller than planned, because the memory was in this stage or before it;
    absent where none was. They hold for all later stages, also after a resume."""
    dropped: list[int] = Field([])
    """Clients whose training diverged; they kept what they do not share with all, as it was before."""
    refused: Annotated[dict[str, str] | None, omitted_if_none()] = None
    """``{client: reason}`` of the uploads that were not merged; absent where all were."""
    compute: Annotated[Compute | None, omitted_if_none()] = None
    """Precisions and attention kernels."""
    changed_inputs: Annotated[list[str] | None, omitted_if_none()] = None
    """Data and weights that were not those that the run began with (``--allow-changed``)."""
    extended_from: Annotated[int | None, omitted_if_none()] = None
    """In the first record after rounds were added to the run: how many it had before."""

    @property
    def worker_seconds(self) -> dict[str, float]:
        """The seconds that workers computed, by activity, summed over workers."""
        return {activity: value for activity, value in self.seconds.items() if activity not in ("wall", "aggregate")}

    def places_of(self, clients: Iterable[int]) -> list[int]:
        """Return where the accuracies of ``clients`` stand in the lists, without clients that were not evaluated."""
        if self.panel is None:
            return list(clients)
        wanted = set(clients)
        return [place for place, client in enumerate(self.panel) if client in wanted]

    def counted(self, accuracies: Sequence[float]) -> list[float]:
        """Return the accuracies, in the order of a list of the evaluation, without those of Byzantine clients."""
        left_out = set(self.places_of(self.byzantine or ()))
        return [value for place, value in enumerate(accuracies) if place not in left_out]

    def counted_metric(self, metric: str) -> list[float]:
        """Return the values of a metric of the stage, such as ``loss``, without those of Byzantine clients."""
        left_out = set(map(str, self.byzantine or ()))
        return [value for client, value in self.metrics.get(metric, {}).items() if client not in left_out]

    def own_shares(self) -> dict[str, dict[int, float]]:
        """Return the shares of their own parameters that clients kept in a mixture, ``{group: {client: share}}``."""
        kept: dict[str, dict[int, float]] = {}
        for metric, given in self.metrics.items():
            group, is_of_mixture, _ = metric.partition(MIXED_IN)
            if is_of_mixture:
                own = kept.setdefault(group, dict.fromkeys(map(int, given), 1.0))
                for client, share in given.items():
                    own[int(client)] -= share
        return kept


class ClientTable(Artefact):
    """What a line of ``rounds.jsonl`` has in place of what it says of each client, where these are more than 256."""

    description: ClassVar[str] = "a reference to values of clients"

    file: str
    """A Parquet file, by its path in the run folder: one row per client of whom the record says something."""
    counts: dict[str, int] = Field({})
    """``{column: number of clients}``, of columns that are no numbers, e.g. ``participants``."""
    means: dict[str, float | None] = Field({})
    """``{column: mean}`` over honest clients that have a value, e.g. ``metrics/loss``; null where none is finite."""


class GameRecord(Artefact):
    """What the layer game of phase 2 decided. K clients, n players: the layers, the head last."""

    description: ClassVar[str] = "a record of a layer game"

    players: list[str]
    """Names of the players, ``[n]``."""
    selection: str = "shapley"
    """Name of the ranking, ``algorithm.phase2.selection``."""
    shapley: list[list[float | None]] | None = None
    """Benign minus robust Shapley value, ``[K][n]``; null where another ranking was used, and for every layer of a
    client whose values are no finite numbers."""
    shapley_benign: list[list[float | None]] | None = None
    """A layer's share of the gain in benign accuracy, ``[K][n]``."""
    shapley_robust: list[list[float | None]] | None = None
    """A layer's share of the loss in robust accuracy, ``[K][n]``."""
    half_width: list[list[float | None]] | None = None
    """Half width of the 95 % interval of a client's own value, before it is shrunk to its neighbours' mean and becomes
    ``shapley``, ``[K][n]``; null if exact."""
    scores: list[list[float | None]] | None = None
    """Gates, shifts or other scores that ranked the layers, ``[K][n]``; null for Shapley values."""
    selected: list[list[bool]]
    """Layers that a client may refine, ``[K][n]``."""
    candidates: list[int] = Field([])
    """Number of distinct candidate selections of every client, ``[K]``."""
    strength: list[float] = Field([])
    """How much of the refinement a client kept, ``[K]`` in [0, 1]; 0: the guard accepted nothing."""
    guard_images: list[int] = Field([])
    """Guard images that the decision rests on, other clients' included, ``[K]``; 0 where nothing was accepted. Where
    images have weights (``class_balance``), the effective number of them."""
    benign_bound: list[float] = Field([])
    """Upper bound of the loss of benign accuracy by what was kept, ``[K]``; negative for a gain."""
    guard_bound: list[float] = Field([])
    """Upper bound of the loss of robust accuracy by what was kept, ``[K]``."""
    coalitions_evaluated: int = 0
    """Coalitions evaluated by all clients."""
    block_evaluations: int = 0
    """Model blocks run for them, per set of images."""
    exact: bool = True
    """Whether every coalition was evaluated; else permutations were sampled."""
    value_difference: Annotated[float | None, omitted_if_none()] = None
    """Largest difference of a candidate's value from that in float32; absent where all values are in float32, or where
    it was no finite number."""
    relative_cost: Annotated[float | None, omitted_if_none()] = None
    """Cost of evaluating the coalitions, times that of phase 1 (blocks times images); absent for up to 8 players."""
    sampled_because: Annotated[str | None, omitted_if_none()] = None
    """Why permutations were sampled; absent where every coalition was evaluated."""

    def kept(self, client: int) -> bool:
        """Return whether a client kept a part of its refinement. Version 0.1 noted epochs instead of a strength."""
        return bool((self.strength or (self.model_extra or {})["refined_epochs"])[client])

    def refined(self, client: int) -> str:
        """Return a client's selected layers, and how much of their refinement it kept if not all: ``1-5 head 50%``.

        A block's name is its number.
        """
        players = zip(self.players, self.selected[client], strict=True)
        names = [player.removeprefix("blocks.") for player, chosen in players if chosen]
        blocks = [int(name) for name in names if name.isdecimal()]
        parts = []
        for _, run in groupby(enumerate(blocks), key=lambda block: block[1] - block[0]):  # equal where consecutive
            numbers = [str(number) for _, number in run]
            parts += [f"{numbers[0]}-{numbers[-1]}"] if len(numbers) > 2 else numbers
        parts += [name for name in names if not name.isdecimal()]
        if not parts:
            return "none"
        if not self.kept(client):
            return " ".join([*parts, "(not kept)"])
        is_part = self.strength and self.strength[client] < 1
        return " ".join([*parts, f"{self.strength[client]:.0%}"] if is_part else parts)
