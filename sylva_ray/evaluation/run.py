"""Evaluate a finished run: attack its deployed, personal models with any attacks.

::

    run folder ──► clients' states ──► tasks ──► pool ──► measurement cache ──► evaluation.json

`prepare_evaluation` checks everything and writes nothing. `run_evaluation` reads finished measurements from
``evaluation/``, so an evaluation that was interrupted, or that asks for more, measures only what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.core.errors import UserError, asked_as
from sylva_ray.core.evaluation import Curves, Evaluation, Transfer
from sylva_ray.core.inputs import Inputs
from sylva_ray.core.summary import CheckResult, Spread
from sylva_ray.core.text import as_argument
from sylva_ray.core.types import AttackSpec
from sylva_ray.evaluation import tables
from sylva_ray.evaluation.measurements import EvaluationInput, Measurements, Progress, State
from sylva_ray.evaluation.plan import (
    EPSILONS,
    STEPS,
    EvaluationRequest,
    check_attacks,
    epsilon_curve,
    steps_curve,
)
from sylva_ray.evaluation.run_checks import RunFacts, run_checks
from sylva_ray.federation.pool import ClientPool
from sylva_ray.federation.threat_model import budget_warnings, threat_model
from sylva_ray.preparation.experiment import load_fleet, prepare
from sylva_ray.preparation.inputs import digest_inputs
from sylva_ray.storage.run_folder import RunFolder

OVERRIDABLE = ("cluster.", "training.device", "training.attention", "training.windows", "evaluation.precision")
"""Prefixes of the settings that an evaluation may override."""


def prepare_evaluation(
    folder: RunFolder,
    images: int | None,
    surrogates: Sequence[RunFolder],
    overrides: Sequence[str],
    allow_changed: bool = False,
) -> EvaluationInput:
    """Load a finished run.

    Args:
        folder: of the run.
        images: test images per client; None: as many as the run had.
        surrogates: folders of other runs with the same clients and the same kind of model.
        overrides: ``KEY=VALUE`` of `OVERRIDABLE` settings.
        allow_changed: whether data and weights may differ from those that the run began with.

    Raises:
        UserError: there is no finished run, an override would change what is measured, a surrogate does not match, or
            data or weights have changed.
    """
    for override in overrides:
        if not override.startswith(OVERRIDABLE):
            allowed = "cluster.*, training.device, training.attention, training.windows and evaluation.precision"
            raise UserError("override", override, f"would change the run; only {allowed} can be overridden here")
    folder.check_has_run()
    if not folder.summary_file.exists():
        raise UserError("RUN", str(folder), f"is not finished; first: sylva-ray run {as_argument(folder)} --resume")
    folder.load_summary()  # a damaged one is refused before anything is computed
    states = folder.load_states()
    config = whole = folder.load_config(overrides)
    if images is not None:
        partition = config.partition.model_copy(update={"test_samples": images})
        keep = config.dataset.test_pool == "train"
        dataset = config.dataset.model_copy(update={"max_test": config.dataset.max_test if keep else None})
        config = config.model_copy(update={"partition": partition, "dataset": dataset})
    prepared = prepare(config)
    assert prepared.facts is not None
    known = prepared if images is None else replace(prepared, fleet=load_fleet(whole, prepared.facts.image_size))
    inputs = digest_inputs(known)
    check = folder.check_inputs(whole, inputs, allow_changed)
    prepared = replace(prepared, changed_inputs=check.changed)
    missing = [client for client in range(len(states)) if not folder.adapter(client).exists()]
    if missing and create_algorithm(config.algorithm).parameters.model == "lora":
        command = f"sylva-ray run {as_argument(folder)} --resume"
        fix = f"has no adapters of client {missing[0]} in adapters/; write them with: {command}"
        raise UserError("RUN", str(folder), fix)
    return EvaluationInput(
        folder=folder,
        prepared=prepared,
        states=states,
        surrogates={str(other): _surrogate(other, states, inputs) for other in surrogates},
        inputs=inputs,
        notices=check.notices,
    )


def _surrogate(folder: RunFolder, states: Sequence[State], inputs: Inputs) -> list[State]:
    """Return the states of another run, after a check that they fit to ``states`` and to the same backbone."""
    with asked_as("--surrogate", "RUN"):
        other_states = folder.load_states()
    shapes, other_shapes = ({n: value.shape for n, value in first.items()} for first in (states[0], other_states[0]))
    if len(other_states) != len(states) or other_shapes != shapes:
        fix = "has another number of clients or another kind of model; transfer needs the same of both"
        raise UserError("--surrogate", str(folder), fix)
    stored = folder.load_inputs()
    if stored is not None and "backbone" in stored.weights and stored.weights["backbone"] != inputs.weights["backbone"]:
        fix = "was trained on a backbone with other weights; transfer needs the same"
        raise UserError("--surrogate", str(folder), fix)
    return other_states


def run_evaluation(
    run: EvaluationInput, request: EvaluationRequest, pool: ClientPool, progress: Progress
) -> Evaluation:
    """Measure what is requested.

    Args:
        run: the run.
        request: what to measure.
        pool: where it is measured.
        progress: is notified of measurements and tasks.
    """
    measurements = Measurements(run, request, pool, progress)
    config, fleet = run.prepared.config, run.prepared.fleet
    left_out = measurements.left_out
    measured = measurements.attacks(request.attacks)
    counted, main = measured.without(left_out), [spec.label for spec in _main_attacks(request)]
    collapsed = measurements.collapsed(tables.worst_answers(measured, main))
    images = int(sum(map(len, counted.labels)))
    records = run.folder.load_records()
    model = threat_model(config, request.attacks, records)
    transfer = measurements.transfer() if request.transfer else None
    exported = measurements.exported() if request.checks else 0
    distinct = images if measured.distinct is None else measured.distinct
    facts = RunFacts(request.epsilon, fleet.num_classes, model, distinct, exported, collapsed, left_out)
    curves, checks = _curves_and_checks(measurements, facts, transfer)
    return Evaluation(
        run=config.name,
        algorithm=config.algorithm.name,
        images=images,
        threat_model=model,
        benign=tables.condition_row(measured.answers["benign"], measured.labels, left_out, measured.distinct),
        attacks={spec.label: tables.attack_row(spec, measured, left_out) for spec in request.attacks},
        worst_case=tables.worst_cases(request.attacks, measured, left_out),
        majority=Spread.from_values(measurements.majority, left_out),
        per_class=tables.per_class(counted, tables.worst_answers(counted, main), fleet.num_classes),
        collapsed=[client for client, is_collapsed in enumerate(collapsed) if is_collapsed],
        transfer=transfer,
        curves=curves,
        checks=checks,
        certified=[measurements.certified(sigma) for sigma in request.sigmas] or None,
        gallery=measurements.gallery(),
        warnings=[
            *budget_warnings(config, request.attacks, records, curves.epsilon.x if curves else ()),
            *(f"{what} are not those of the run (--allow-changed)" for what in run.prepared.changed_inputs),
        ]
        or None,
    )


def _main_attacks(request: EvaluationRequest) -> list[AttackSpec]:
    """Return the attacks of the worst case: L-infinity with the request's budget, else all that have a budget."""
    bounded = [spec for spec in request.attacks if math.isfinite(spec.epsilon)]
    return [spec for spec in bounded if spec.norm == "linf" and spec.epsilon == request.epsilon] or bounded


def _curves_and_checks(
    measurements: Measurements, facts: RunFacts, transfer: Transfer | None
) -> tuple[Curves | None, list[CheckResult] | None]:
    """Measure the curves, and run the checks, which need them; None for what is not requested."""
    request = measurements.request
    if not (request.curves or request.checks):
        return None, None
    epsilons = dict(zip(EPSILONS, epsilon_curve(), strict=True))
    steps = dict(zip(map(float, STEPS), steps_curve(request.epsilon), strict=True))
    more = check_attacks(request.epsilon, facts.num_classes) if request.checks else {}
    specs = [*epsilons.values(), *steps.values(), *more.values()]
    subset = measurements.attacks(specs, request.subset_images).without(measurements.left_out)
    curves = Curves(epsilon=tables.curve(epsilons, subset), steps=tables.curve(steps, subset))
    if not request.checks:
        return curves, None
    return curves, run_checks(subset, measurements.probes(), facts, transfer.strongest if transfer else None)
