"""Every evaluation attack: within its budget, against closed forms if there are any, and a function of the image."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from sylva_ray.attacks.apgd import checkpoints
from sylva_ray.attacks.deepfool import OVERSHOOT
from sylva_ray.attacks.fab import nearest_on_plane
from sylva_ray.attacks.losses import dlr, target_margin, targeted_dlr
from sylva_ray.attacks.norms import LENGTHS, NORMS
from sylva_ray.attacks.registry import ATTACKS, AttackResult, attack_stack
from sylva_ray.attacks.sparsefool import _boundary, sparse_step
from sylva_ray.attacks.square import fraction_of_pixels
from sylva_ray.attacks.state import AttackedModel, AttackState
from sylva_ray.config.attacks import parse_attack
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import ImageDraws, image_keys
from sylva_ray.core.types import AttackSpec, ClientImages, ParameterStack
from tests.attacks.models import LinearCohort, WavyCohort, gap, linear_batch

LINF = ("fgsm", "pgd", "mim", "cw", "apgd:steps=40", "fab:steps=20", "autoattack:steps=20")
EVERY = (
    *("noise", "fgsm", "pgd:steps=5", "mim:steps=5", "cw:steps=5", "square:queries=40", "autoattack:steps=5"),
    *("apgd:steps=10", "apgd:steps=10,loss=dlr", "apgd:steps=5,loss=targeted", "fab:steps=5,restarts=2"),
    *(
        "noise:norm=l2,epsilon=0.3",
        "pgd:norm=l2,epsilon=0.3",
        "mim:norm=l2,epsilon=0.3",
        "apgd:norm=l2,epsilon=0.3,steps=10",
    ),
    *("deepfool", "deepfool:epsilon=0.2", "sparsefool", "sparsefool:epsilon=2"),
)


def spec_of(text: str, epsilon: float = 0.02) -> AttackSpec:
    fixed = "epsilon" in text or "fool" in text
    return parse_attack(text if fixed else f"{text}{',' if ':' in text else ':'}epsilon={epsilon}")


def attacked(
    model: AttackedModel,
    params: ParameterStack,
    x: torch.Tensor,
    y: torch.Tensor,
    owner: torch.Tensor,
    text: str,
    epsilon: float = 0.02,
) -> AttackResult:
    draws = ImageDraws(image_keys(0, text, 0, np.arange(len(x))))
    return attack_stack(model, params, ClientImages(x, y, owner, 2), spec_of(text, epsilon), draws)


def test_every_attack_is_tested_here() -> None:
    assert {spec_of(text).name for text in EVERY} == set(ATTACKS)


# -- promises that all of them keep ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", EVERY)
def test_what_falls_is_in_the_ball_in_the_pixel_range_and_misclassified(text: str) -> None:
    params, x, _, owner = linear_batch(num_classes=5, n=24, spread=0.5)
    model = WavyCohort()
    y = model.forward(params, x, owner).argmax(1)
    y[::6] = (y[::6] + 1) % 5  # some are wrong from the start
    before = {name: value.clone() for name, value in params.items()}
    spec, found = spec_of(text), attacked(model, params, x, y, owner, text)
    fallen = found.predictions != y
    assert fallen[::6].all()
    assert (found.distance[::6] == 0).all()
    assert torch.equal(fallen, found.distance.isfinite())
    assert torch.equal(model.forward(params, found.x_adv, owner).argmax(1)[fallen], found.predictions[fallen])
    assert torch.equal(found.x_adv[~fallen], x[~fallen])
    assert found.x_adv.min() >= 0
    assert found.x_adv.max() <= 1
    length = LENGTHS[spec.norm].length(found.x_adv - x)
    torch.testing.assert_close(length[fallen], found.distance[fallen])
    assert (length <= spec.epsilon + 1e-6).all()
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert found.forwards >= len(x)


@pytest.mark.parametrize("text", EVERY)
def test_an_image_falls_or_stands_whoever_is_attacked_with_it(text: str) -> None:
    params, x, _, owner = linear_batch(num_classes=5, n=12)
    params, x = {name: value.double() for name, value in params.items()}, x.double()
    model = WavyCohort()
    y = model.forward(params, x, owner).argmax(1)
    together = attacked(model, params, x, y, owner, text)
    rows = torch.tensor([1, 4, 7, 11])
    draws = ImageDraws(image_keys(0, text, 0, rows.numpy()))
    alone = attack_stack(model, params, ClientImages(x[rows], y[rows], owner[rows], 2), spec_of(text), draws)
    assert torch.equal(alone.predictions, together.predictions[rows])
    torch.testing.assert_close(alone.x_adv, together.x_adv[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", [text for text in EVERY if "fool" not in text])
def test_epsilon_zero_changes_nothing(text: str) -> None:
    params, x, y, owner = linear_batch(num_classes=5)
    y[::7] = (y[::7] + 1) % 5
    bare = ",".join(part for part in text.split(",") if "epsilon" not in part)
    bare = bare if "l2" not in text else text.replace("epsilon=0.3", "epsilon=0")
    found = attacked(LinearCohort(), params, x, y, owner, bare, epsilon=0)
    assert torch.equal(found.predictions, LinearCohort().forward(params, x, owner).argmax(1))


@pytest.mark.parametrize("text", [t for t in EVERY if not t.startswith("noise")])
def test_a_constant_model_yields_no_nan_and_falls_nowhere(text: str) -> None:
    params, x, _, owner = linear_batch(num_classes=5)
    params = {"w": torch.zeros_like(params["w"]), "b": torch.tensor([[0.0, 3, 1, 2, 0]] * 2)}
    y = torch.ones(len(x), dtype=torch.long)
    found = attacked(LinearCohort(), params, x, y, owner, text)
    assert torch.equal(found.predictions, y)
    assert found.x_adv.isfinite().all()


# -- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", LINF)
def test_linf_attacks_break_exactly_what_can_be_broken_of_a_linear_model(text: str) -> None:
    """An image of a two-class linear model falls if and only if its lead is less than epsilon * |weights|_1."""
    params, x, y, owner = linear_batch(n=200)
    lead, w = gap(params, x, y, owner)
    needed = lead / w.abs().sum(1)
    epsilon = float(needed.median())
    clear = (needed - epsilon).abs() > 0.02 * epsilon  # FAB's last step and rounding
    found = attacked(LinearCohort(), params, x, y, owner, text, epsilon)
    assert torch.equal((found.predictions != y)[clear], (needed < epsilon)[clear])
    assert 0.3 < (found.predictions == y).float().mean() < 0.7


@pytest.mark.parametrize("text", ["pgd:norm=l2", "mim:norm=l2", "apgd:norm=l2,steps=40", "deepfool"])
def test_l2_attacks_break_exactly_what_can_be_broken_of_a_linear_model(text: str) -> None:
    params, x, y, owner = linear_batch(n=200)
    lead, w = gap(params, x, y, owner)
    needed = lead / w.norm(dim=1)
    epsilon = float(needed.median())
    clear = (needed - epsilon).abs() > 0.03 * epsilon
    found = attacked(LinearCohort(), params, x, y, owner, f"{text}{',' if ':' in text else ':'}epsilon={epsilon}")
    assert torch.equal((found.predictions != y)[clear], (needed < epsilon)[clear])


def test_deepfool_is_one_step_of_the_exact_length_on_a_linear_model() -> None:
    params, x, y, owner = linear_batch(n=100)
    lead, w = gap(params, x, y, owner)
    found = attacked(LinearCohort(), params, x, y, owner, "deepfool:steps=1")
    assert (found.predictions != y).all()
    torch.testing.assert_close(found.distance, 1.02 * lead / w.norm(dim=1), rtol=2e-2, atol=1e-4)
    delta = (found.x_adv - x).flatten(1)
    torch.testing.assert_close(torch.cosine_similarity(delta, -w), torch.ones(100), rtol=0, atol=1e-4)


def test_fab_finds_the_nearest_image_of_a_linear_model() -> None:
    params, x, y, owner = linear_batch(n=60)
    lead, w = gap(params, x, y, owner)
    needed = lead / w.abs().sum(1)
    found = attacked(LinearCohort(), params, x, y, owner, "fab:steps=20", epsilon=0.5)
    assert (found.distance >= needed - 1e-6).all()
    assert (found.distance <= 1.1 * needed + 1e-6).all()


def test_sparsefool_moves_the_pixels_of_the_largest_weights_first() -> None:
    params, x, y, owner = linear_batch(n=40, spread=0.05)
    _, w = gap(params, x, y, owner)
    found = attacked(LinearCohort(), params, x, y, owner, "sparsefool")
    assert (found.predictions != y).all()
    delta = (found.x_adv - x).flatten(1)
    moved = delta.abs() > 1e-6
    for own, weights in zip(moved, w.abs(), strict=True):
        assert weights[own].min() >= weights[~own].max() - 1e-6
    assert torch.equal(delta.sign()[moved], -w.sign()[moved])
    pixels = (found.x_adv - x).abs().amax(1).flatten(1) > 0
    torch.testing.assert_close(found.distance, pixels.sum(1).float())


def test_sparsefool_overshoots_what_it_tries_and_not_where_it_is() -> None:
    """Half of the rest in every turn: 1.02 (1 - 1/2^k) > 1 from k = 6 on; 5 would do if the overshoot added up."""
    params, x, y, owner = linear_batch(n=40, spread=0.05)
    lead, _ = gap(params, x, y, owner)
    far = lead > lead.median()  # beyond the least move that the solver makes
    fallen = {}
    for turns in (5, 6):
        spec = replace(spec_of(f"sparsefool:steps={turns}"), options=(("reach", 0.5),))
        draws = ImageDraws(image_keys(0, "sparse", 0, np.arange(len(x))))
        found = attack_stack(LinearCohort(), params, ClientImages(x, y, owner, 2), spec, draws)
        fallen[turns] = (found.predictions != y)[far]
    assert not fallen[5].any()
    assert fallen[6].all()


def test_sparsefool_takes_the_normal_where_the_boundary_is() -> None:
    """Gradients of a curved model turn on the way there (x_B in algorithm 2 of the paper)."""
    model = WavyCohort()
    params, x, _, owner = linear_batch(num_classes=3, n=20)
    y = model.forward(params, x, owner).argmax(1)
    state = AttackState(model, params, ClientImages(x, y, owner, 2))
    displacement, normal = _boundary(state, x, torch.arange(len(x)))
    end = x + (1 + OVERSHOOT) * displacement
    reached = model.forward(params, end, owner).scatter(1, y[:, None], float("-inf")).argmax(1)

    def gradient(point: torch.Tensor) -> torch.Tensor:
        point = point.clone().requires_grad_()
        margin = target_margin(model.forward(params, point, owner), y, reached)
        return torch.autograd.grad(margin.sum(), point)[0].flatten(1)

    torch.testing.assert_close(normal.flatten(1), gradient(end))
    assert torch.cosine_similarity(gradient(x), normal.flatten(1)).min() < 0.99, "it has turned"


@pytest.mark.long
def test_square_breaks_nothing_that_cannot_be_and_most_of_what_can() -> None:
    params, x, y, owner = linear_batch(n=100)
    lead, w = gap(params, x, y, owner)
    needed = lead / w.abs().sum(1)
    epsilon = float(needed.median())
    found = attacked(LinearCohort(), params, x, y, owner, "square:queries=1500", epsilon)
    fallen = found.predictions != y
    assert not fallen[needed > epsilon + 1e-6].any()
    assert fallen[needed < 0.8 * epsilon].float().mean() > 0.9


def test_autoattack_is_at_least_as_strong_as_its_parts_and_costs_nothing_on_the_fallen() -> None:
    params, x, _, owner = linear_batch(num_classes=5, n=60)
    model = WavyCohort()
    y = model.forward(params, x, owner).argmax(1)
    whole = attacked(model, params, x, y, owner, "autoattack:steps=15")
    first = attacked(model, params, x, y, owner, "apgd:steps=15")
    assert (whole.predictions == y).sum() <= (first.predictions == y).sum()
    fallen_at_once = attacked(model, params, x, (y + 1) % 5, owner, "autoattack:steps=15")
    assert (fallen_at_once.forwards, fallen_at_once.backwards) == (60, 0)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_dlr_ignores_scale_and_shift() -> None:
    logits, y = torch.randn(50, 6, dtype=torch.float64), torch.randint(0, 6, (50,))
    torch.testing.assert_close(dlr(logits, y), dlr(7 * logits - 3, y))
    targets = (y + 2) % 6
    torch.testing.assert_close(targeted_dlr(logits, y, targets), targeted_dlr(0.1 * logits + 5, y, targets))
    by_hand = torch.tensor([[4.0, 1.0, 3.0, 0.0]])
    assert float(dlr(by_hand, torch.tensor([0]))) == pytest.approx(-(4 - 3) / (4 - 1))
    assert float(targeted_dlr(by_hand, torch.tensor([0]), torch.tensor([1]))) == pytest.approx(-(4 - 1) / (4 - 0.5))


def test_apgd_looks_where_the_authors_look() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_square_schedule_is_the_authors() -> None:
    assert [fraction_of_pixels(q, 10_000, 0.8) for q in (0, 11, 51, 201, 8001)] == [0.8, 0.4, 0.2, 0.1, 0.8 / 512]


def test_the_shortest_way_to_a_plane_inside_the_box_is_the_linear_programs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        z, w = rng.random(6), rng.normal(size=6)
        w[rng.integers(6)] = 0
        target = rng.random(6)  # a point of the box, so that the plane meets it
        rise = float(w @ (target - z))
        point, normal = (torch.tensor(v).view(1, 1, 2, 3) for v in (z, w))
        d = nearest_on_plane(point, normal, torch.tensor([rise])).flatten().numpy()
        # minimise t subject to |d_i| <= t, w . d = rise, 0 <= z + d <= 1
        bounds = [(-a, 1 - a) for a in z] + [(0, None)]
        less = np.block([[np.eye(6), -np.ones((6, 1))], [-np.eye(6), -np.ones((6, 1))]])
        best = linprog([0] * 6 + [1], less, np.zeros(12), [[*w, 0]], [rise], bounds)
        assert np.abs(d).max() == pytest.approx(best.fun, abs=1e-6)
        assert w @ d == pytest.approx(rise, abs=1e-6)
        assert ((z + d >= -1e-9) & (z + d <= 1 + 1e-9)).all()


def test_where_the_plane_is_out_of_reach_the_corner_is_taken() -> None:
    z, w = torch.full((1, 1, 1, 3), 0.5), torch.tensor([1.0, -2.0, 0.0]).view(1, 1, 1, 3)
    d = nearest_on_plane(z, w, torch.tensor([99.0]))
    assert (z + d).flatten().tolist() == [1.0, 0.0, 0.5]


def test_the_sparse_step_moves_as_few_coordinates_as_possible() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        z, w = rng.random(5), rng.normal(size=5)
        room = np.where(w > 0, 1 - z, z)
        rise = 0.6 * float(np.abs(w) @ room)
        point, normal = (torch.tensor(v).view(1, 1, 1, 5) for v in (z, w))
        delta = sparse_step(point, normal, torch.tensor([rise])).flatten().numpy() - z
        assert w @ delta >= rise - 1e-9
        count = int((np.abs(delta) > 0).sum())
        order = np.argsort(-np.abs(w))
        fewest = next(k for k in range(6) if np.abs(w)[order[:k]] @ room[order[:k]] >= rise - 1e-9)
        assert count == fewest, "largest weights first"


@pytest.mark.parametrize("name", ["linf", "l2"])
def test_norms_project_climb_and_start_in_their_ball(name: str) -> None:
    norm, x = NORMS[name], torch.rand(50, 3, 4, 4)
    draws = ImageDraws(torch.arange(50))
    u = norm.project(x + torch.randn_like(x), x, 0.1)
    assert (norm.length(u - x) <= 0.1 + 1e-6).all()
    assert torch.equal(norm.project(x, x, 0.1), x)
    assert (norm.length(norm.inside(x, draws, 0)) <= 1 + 1e-6).all()
    torch.testing.assert_close(norm.length(norm.surface(x, draws, 0)), torch.ones(50))
    g = torch.randn_like(x)
    best = (g * norm.ascent(g)).sum()
    for turn in range(5):
        assert (g * norm.surface(x, draws, turn)).sum() < best


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 10.0])
def test_rounding_of_large_images_does_not_reject_points_on_the_sphere(epsilon: float) -> None:
    """A length is a sum over 150,528 numbers in float32, whose error grows with the length."""
    norm, x = NORMS["l2"], 0.25 + 0.5 * torch.rand(40, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    far = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    length = norm.length(norm.project(x + far, x, epsilon) - x)
    assert (length <= epsilon + norm.slack(epsilon)).all()
    assert norm.slack(epsilon) <= 1e-6 + 1e-5 * epsilon
    assert NORMS["linf"].slack(epsilon) == LENGTHS["l0"].slack(20) == 1e-6


# -- randomness --------------------------------------------------------------------------------------------------------


def test_image_draws_depend_on_the_image_and_the_turn_alone() -> None:
    draws = ImageDraws(image_keys(3, "x", 1, np.arange(100)))
    whole = draws.uniform(5, (3, 8, 8))
    rows = torch.tensor([7, 50, 99])
    assert torch.equal(draws.select(rows).uniform(5, (3, 8, 8)), whole[rows])
    assert torch.equal(ImageDraws(image_keys(3, "x", 1, np.array([50]))).uniform(5, (3, 8, 8))[0], whole[50])
    different = [
        draws.uniform(6, (3, 8, 8)),
        ImageDraws(image_keys(4, "x", 1, np.arange(100))).uniform(5, (3, 8, 8)),
        ImageDraws(image_keys(3, "y", 1, np.arange(100))).uniform(5, (3, 8, 8)),
        ImageDraws(image_keys(3, "x", 2, np.arange(100))).uniform(5, (3, 8, 8)),
    ]
    for one, other in itertools.combinations([whole, *different], 2):
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.03


def test_image_draws_are_uniform_and_normal() -> None:
    draws = ImageDraws(image_keys(0, "stats", 0, np.arange(400)))
    u = draws.uniform(0, (500,))
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 45  # chi-square, 19 degrees of freedom, p = 0.001
    z = draws.normal(1, (500,))
    assert float(z.mean()) == pytest.approx(0, abs=0.01)
    assert float(z.std()) == pytest.approx(1, abs=0.01)
    assert float((z > 1.6449).float().mean()) == pytest.approx(0.05, abs=0.002)
    neighbours = torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.01


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pdg", "unknown attack; did you mean 'pgd'?"),
        ("pgd:stepz=3", "did you mean 'steps'?"),
        ("pgd:epsilon=8", r"must be in \[0, 1\] pixel units"),
        ("fgsm:epsilon=8", "must be at most 1"),
        ("pgd:epsilon=-1/255", "greater than or equal to 0"),
        ("pgd:steps", "must be KEY=VALUE"),
        ("apgd:loss=kl", "'ce', 'dlr' or 'targeted'"),
        ("square:steps=4", "Available: .*queries"),
    ],
)
def test_wrong_attacks_are_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_attack(text)


def test_a_fraction_is_an_epsilon_on_the_command_line_too() -> None:
    assert parse_attack("pgd:epsilon=4/255,steps=7").label == "pgd7-eps4"


class TwoPrecisions:
    """Two-class linear models of the first pixel, just below ``border`` in float32, below ``coarse`` in bfloat16."""

    head_names = ("w", "b")
    precision = torch.float32

    def __init__(self, border: float, coarse: float) -> None:
        self.borders = {torch.float32: border, torch.bfloat16: coarse}
        self.passes = {torch.float32: 0, torch.bfloat16: 0}

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        del params, owner
        self.passes[self.precision] += len(x)
        ahead = 10 * (x[:, 0, 0, 0] - self.borders[self.precision])
        return torch.stack([torch.zeros_like(ahead), ahead], 1)


@pytest.mark.parametrize(
    ("border", "coarse", "falls"),
    [(0.55, 0.55, True), (0.59, 0.45, True), (0.65, 0.45, False), (0.65, 0.65, False)],
    ids=["both see it", "the coarse one sees too much, the exact one later", "only the coarse one sees it", "neither"],
)
def test_an_image_falls_where_float32_confirms_it(border: float, coarse: float, falls: bool) -> None:
    """The budget is 0.1 around 0.5 in steps of 0.02; what float32 does not confirm is attacked further."""
    model = TwoPrecisions(border, coarse)
    x, y, owner = torch.full((3, 3, 2, 2), 0.5), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    spec = AttackSpec("pgd", 0.1, 10, 0.02, random_start=False)
    found = attack_stack(model, {}, ClientImages(x, y, owner, 1), spec, ImageDraws(torch.arange(3)), torch.bfloat16)
    assert (found.predictions == int(falls)).all()
    if falls:
        assert (found.x_adv[:, 0, 0, 0] > border).all()
    assert found.forwards == sum(model.passes.values())
    assert model.passes[torch.bfloat16] > 0


def test_benign_answers_are_those_of_float32() -> None:
    model = TwoPrecisions(border=0.4, coarse=0.9)
    x, y, owner = torch.full((2, 3, 2, 2), 0.5), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    spec = AttackSpec("pgd", 0.1, 3, 0.02, random_start=False)
    found = attack_stack(model, {}, ClientImages(x, y, owner, 1), spec, ImageDraws(torch.arange(2)), torch.bfloat16)
    assert (found.predictions == 1).all()
    assert (found.distance == 0).all()
    assert model.passes[torch.bfloat16] == 0, "nothing is left to attack"


@pytest.mark.parametrize("name", ["fab", "deepfool", "sparsefool", "square", "noise"])
def test_attacks_that_compare_answers_compute_exactly(name: str) -> None:
    model = TwoPrecisions(border=0.55, coarse=0.3)
    x, y, owner = torch.full((2, 3, 2, 2), 0.5), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    norm, epsilon = ("l0", 2) if name == "sparsefool" else ("linf", 0.1)
    spec = AttackSpec(name, epsilon, 20, 0.0, random_start=False, norm=norm)
    found = attack_stack(model, {}, ClientImages(x, y, owner, 1), spec, ImageDraws(torch.arange(2)), torch.bfloat16)
    assert (found.predictions == 1).all()
    assert model.passes[torch.bfloat16] == 0
