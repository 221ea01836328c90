"""Read Sylva from top to bottom: the method in one file, in plain PyTorch and PEFT.

    python examples/sylva_in_one_file.py

Every client is a model of its own, every step is a loop over clients, and every coalition is a forward pass of its own.
The package computes the same, but trains clients as one stack, computes the layers that coalitions have in common once,
and runs on Ray; tests/test_sylva_in_one_file.py holds it equal to this file, stage by stage. Random numbers come from
the package's streams (`sylva_ray.core.seeding`): two programs agree to the last digits only if they draw the same
batches. Data, pre-trained weights and the guard's confidence bound are also the package's; they are not what this file
explains.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from timm.data.config import resolve_model_data_config
from torch import nn
from torchvision.transforms import Normalize

from sylva_ray.config.experiment import BackboneSection, DatasetSection, PartitionSection
from sylva_ray.core.seeding import ImageDraws, generator, image_keys
from sylva_ray.core.types import ClientData, Split
from sylva_ray.data.datasets import load_dataset
from sylva_ray.data.fleet import build_fleet
from sylva_ray.federation.stages.layer_game.selection import images_needed, paired_upper_bound
from sylva_ray.models.backbone import create_backbone

State = dict[str, torch.Tensor]
"""The adapters and the head of a client, by PEFT's names."""

Points = Iterator[torch.Tensor]
"""Points of an attack, ``[n, 3, H, W]`` each."""


@dataclass(frozen=True)
class Settings:
    """The settings of the method, named as in the package's configuration."""

    seed: int = 0
    rank: int = 8
    alpha: int = 16
    rounds: int = 3
    batch_size: int = 16
    lr: float = 0.01
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    epsilon: float = 8 / 255
    steps: int = 3  # of PGD in training
    epsilon_warmup: float = 0.3
    head_warmup_lr: float = 0.01
    benign_epochs: int = 3
    benign_lr: float = 1e-3
    refine_epochs: int = 2
    refine_lr: float = 1e-3
    attack_steps: int = 5  # of PGD for game values and the guard
    max_images: int = 8
    shrink_strength: float = 64.0
    guard_tolerance: float = 0.1
    guard_confidence: float = 0.9
    dtype: torch.dtype = torch.float32


# -- A client: its data, and an ordinary PEFT model ------------------------------------------------------------------


class Client:
    """A client with LoRA adapters on a copy of ``vit``, and its own head; pixels are in [0, 1]."""

    def __init__(self, number: int, data: ClientData, vit: nn.Module, s: Settings) -> None:
        self.number, self.data, self.s = number, data, s
        targets = ["attn.qkv", "attn.proj"]
        lora = LoraConfig(r=s.rank, lora_alpha=s.alpha, target_modules=targets, modules_to_save=["head"])
        config = resolve_model_data_config(vit)  # type: ignore[no-untyped-call]
        mean, std = (torch.tensor(config[key]) for key in ("mean", "std"))
        self.model = nn.Sequential(Normalize(mean, std), get_peft_model(copy.deepcopy(vit), lora)).to(s.dtype).eval()
        self.parameters = {n: p for n, p in self.model.named_parameters() if "lora_" in n or "modules_to_save" in n}
        stream = generator(s.seed, "initial state")  # the same for all clients
        for name, p in self.parameters.items():
            p.data.zero_()  # B and the head's bias
            if "lora_A" in name:
                p.data.copy_((torch.rand(p.shape, generator=stream) * 2 - 1) / p.shape[1] ** 0.5)
            elif name.endswith("head.modules_to_save.default.weight"):
                p.data.copy_(torch.randn(p.shape, generator=stream) * 0.01)

    def state(self) -> State:
        """Return a copy of adapters and head."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def load(self, state: State) -> None:
        """Load the entries of ``state``, which may be adapters only."""
        for name, value in state.items():
            self.parameters[name].data.copy_(value)

    def players(self) -> list[list[str]]:
        """Return the players of the layer game: the parameter names of every block, then those of the head."""
        groups: dict[str, list[str]] = {}
        for name in self.parameters:
            block = re.search(r"blocks\.\d+\.", name)
            groups.setdefault(block.group() if block else "head", []).append(name)
        return list(groups.values())

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """Convert ``[n, 3, H, W] uint8`` to numbers in [0, 1]."""
        return torch.tensor(images).to(self.s.dtype) / 255


# -- Adversarial training (Madry et al. 2018) ------------------------------------------------------------------------


def pgd(client: Client, x: torch.Tensor, y: torch.Tensor, noise: torch.Tensor, steps: int, epsilon: float) -> Points:
    """Yield the start and ``steps`` further points of projected gradient ascent; ``noise`` is uniform in [-1, 1]."""
    step_size = min(epsilon, 2.5 * epsilon / steps)
    x_adv = (x + epsilon * noise).clamp(x - epsilon, x + epsilon).clamp(0, 1)
    yield x_adv
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(client.model(x_adv), y, reduction="sum"), x_adv)
        x_adv = (x_adv.detach() + step_size * gradient.sign()).clamp(x - epsilon, x + epsilon).clamp(0, 1)
        yield x_adv


def train(
    client: Client, names: Sequence[str], purpose: str, round: int, lr: float, epochs: int = 1, epsilon: float = 0.0
) -> list[State]:
    """Train the parameters in ``names``, on adversarial images if ``epsilon`` > 0; return the states after epochs."""
    s, split = client.s, client.data.train
    trained = [client.parameters[name] for name in names]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=s.weight_decay)
    stream = generator(s.seed, purpose, client.number, round)
    states = []
    for _ in range(epochs):
        for rows in torch.randperm(len(split), generator=stream).split(s.batch_size):  # type: ignore[no-untyped-call]
            x, y = client.pixels(split.images[rows.numpy()]), torch.from_numpy(split.labels[rows.numpy()])
            noise = torch.rand(x.shape, generator=stream) * 2 - 1
            torch.rand((len(rows), 2), generator=stream)  # for methods that draw more per image than Sylva
            if epsilon > 0:
                *_, x = pgd(client, x, y, noise.to(s.dtype), s.steps, epsilon)
            optimizer.zero_grad()
            F.cross_entropy(client.model(x), y).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, s.clip_norm)
            optimizer.step()
        states.append(client.state())
    return states


# -- Phase 1: adapters are trained against attacks and merged among neighbours; heads stay with the client -----------


def warm_up(clients: Sequence[Client]) -> None:
    """Fit every client's head to benign images (round 0); attacks on a random head would mean nothing."""
    for client in clients:
        train(client, client.players()[-1], "train", 0, client.s.head_warmup_lr)


def federated_round(clients: Sequence[Client], round: int) -> np.ndarray:
    """Run one local epoch, upload, merge and download; return the weights of neighbours, ``[K, K]``."""
    s = clients[0].s
    epsilon = s.epsilon * min(1.0, round / (math.ceil(s.epsilon_warmup * s.rounds) + 1))
    for client in clients:
        train(client, list(client.parameters), "train", round, learning_rate(s, round), epsilon=epsilon)
    uploads = [{name: value for name, value in client.state().items() if "lora_" in name} for client in clients]
    sizes = np.array([len(client.data.train) for client in clients])
    near = neighbourhoods(uploads, sizes)
    everyone = np.tile(sizes / sizes.sum(), (len(clients), 1))
    for client, upload, weights in zip(clients, uploads, everyone if round == 1 else near, strict=True):
        client.load(merge(uploads, weights, upload))  # updates of round 1 are too small to find neighbours by
    return near


def learning_rate(s: Settings, round: int) -> float:
    """Return the learning rate of a round: a cosine over the rounds, down to a tenth."""
    progress = (round - 1) / max(1, s.rounds - 1)
    return s.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def local_epoch(clients: Sequence[Client]) -> None:
    """Train one last epoch on the merged adapters; the result is theta_r, the robust state that a client deploys."""
    for client in clients:
        s = client.s
        train(client, list(client.parameters), "train", s.rounds + 1, learning_rate(s, s.rounds), epsilon=s.epsilon)


def products(upload: State) -> dict[str, torch.Tensor]:
    """Return the dense update ``B A`` of every adapted layer, by the name of its A."""
    return {a: upload[a.replace("lora_A", "lora_B")].double() @ upload[a].double() for a in upload if "lora_A" in a}


def merge(uploads: Sequence[State], weights: Sequence[float], own: State) -> State:
    """Return the factors of rank r that are nearest to the weighted mean of all ``B A`` (Eckart and Young 1936).

    The mean of the factors would be wrong: the product of means is not the mean of products. Where the mean has fewer
    than r directions, B is 0 and A keeps the rows of ``own``, so that they can still learn.
    """
    merged = {}
    for name in [name for name in own if "lora_A" in name]:
        mean = sum(w * products(upload)[name] for w, upload in zip(weights, uploads, strict=True))
        u, sigma, vt = torch.linalg.svd(torch.as_tensor(mean), full_matrices=False)
        rank, scale = len(own[name]), math.sqrt(3)  # rows of A start with norm 1 / sqrt 3, and keep it
        u, sigma, vt = u[:, :rank], sigma[:rank], vt[:rank]
        sign = u.gather(0, u.abs().argmax(0, keepdim=True))[0].sign()  # an SVD leaves the sign open
        nonzero = sigma > 1e-7 * sigma[0]
        merged[name.replace("lora_A", "lora_B")] = u * (sign * sigma * scale * nonzero)
        merged[name] = torch.where(nonzero[:, None], sign[:, None] * vt / scale, own[name])
    return merged


def neighbourhoods(uploads: Sequence[State], sizes: np.ndarray) -> np.ndarray:
    """Return the weights of each client's ceil(sqrt K) nearest clients, itself included; ``[K, K]``, rows of sum 1.

    Clients are near if the angle between their updates is small. A neighbour has the weight ``n_j exp(-d^2 / (2
    sigma^2))``, where sigma is the largest of the distances; the client itself has at least 1 / k.
    """
    flat = [np.concatenate([update.flatten().numpy() for update in products(u).values()]) for u in uploads]
    units = [u / max(float(np.linalg.norm(u)), 1e-300) for u in flat]
    k = min(len(units), max(2, math.ceil(math.sqrt(len(units)))))
    weights = np.zeros((len(units), len(units)))
    for i, row in enumerate(weights):
        distance = np.array([np.linalg.norm(u - units[i]) for u in units])
        near = sorted(range(len(units)), key=lambda j: (j != i, distance.round(6)[j], j))[:k]
        sigma = distance[near].max() if distance[near].max() > 1e-6 else 1.0
        row[near] = sizes[near] * np.exp(-(distance[near] ** 2) / (2 * sigma**2))
        row /= row.sum()
        if row[i] < 1 / k:
            row *= (1 - 1 / k) / (row.sum() - row[i])
            row[i] = 1 / k
    return weights


# -- Phase 2: which layers may be refined on benign data without losing robustness? ----------------------------------


@dataclass
class Game:
    """The results of the layer game by client. There are n players: the blocks, and at the end the head."""

    robust: list[State]  # theta_r
    benign: list[State]  # theta_b: theta_r after some benign epochs of all layers
    values: list[np.ndarray]  # [2^n, 2], benign and robust; coalition number c has player l if bit l of c is set
    shapley: np.ndarray  # [K, n, 2], contributions to the benign gain and to the robust loss
    candidates: list[np.ndarray]  # [m, n] bool, the first one empty, each a subset of the next
    selected: list[np.ndarray]  # [n] bool


def layer_game(clients: Sequence[Client], near: np.ndarray) -> Game:
    """Compute the benign end points, values of coalitions, Shapley values, candidates and the guard's choice."""
    s, round = clients[0].s, clients[0].s.rounds + 2
    robust = [client.state() for client in clients]
    benign = [train(c, list(c.parameters), "theta_b", round, s.benign_lr, s.benign_epochs)[-1] for c in clients]
    values = [coalition_values(c, r, b, round) for c, r, b in zip(clients, robust, benign, strict=True)]
    own = np.stack([shapley_values(v * [1, -1]) for v in values])
    images = np.array([min(s.max_images, len(client.data.selection)) for client in clients])
    trust = (images / (images + s.shrink_strength))[:, None, None]
    shapley = trust * own + (1 - trust) * np.tensordot(near, own, axes=1)
    candidates = [nested_candidates(phi) for phi in shapley]
    robust_images = {}
    for i, client in enumerate(clients):
        states = [mixed(client, robust[i], benign[i], row) for row in candidates[i]]
        robust_images[i] = guard_outcomes(client, states, round)
        client.load(robust[i])
    selected = [candidates[i][last_accepted(i, robust_images, near, s)] for i in range(len(clients))]
    return Game(robust, benign, values, shapley, candidates, selected)


def mixed(client: Client, robust: State, benign: State, coalition: Sequence[bool]) -> State:
    """Return theta_S: the players of the coalition from theta_b, the others from theta_r."""
    chosen = {name for names, inside in zip(client.players(), coalition, strict=True) if inside for name in names}
    return {name: (benign if name in chosen else robust)[name] for name in robust}


def coalition_values(client: Client, robust: State, benign: State, round: int) -> np.ndarray:
    """Return the mean probability of the true class on the selection images, benign and under attack; ``[2^n, 2]``.

    Under attack, the worse of two adversarial versions of an image counts; they are made once, against theta_r and
    theta_b.
    """
    s, split = client.s, client.data.selection
    x, y = client.pixels(split.images[: s.max_images]), torch.from_numpy(split.labels[: s.max_images])
    against = []
    for state in (robust, benign):
        client.load(state)
        noise = torch.rand(x.shape, generator=generator(s.seed, "game/noise", client.number, round)) * 2 - 1
        against.append(list(pgd(client, x, y, noise.to(s.dtype), s.attack_steps, s.epsilon))[-1])
    values, n = [], len(client.players())
    for number in range(2**n):
        client.load(mixed(client, robust, benign, [number >> player & 1 == 1 for player in range(n)]))
        with torch.no_grad():
            probability = client.model(torch.cat([x, *against])).softmax(1).gather(1, y.repeat(3)[:, None])
        clean, on_robust, on_benign = probability.double().view(3, -1)
        values.append([float(clean.mean()), float(torch.minimum(on_robust, on_benign).mean())])
    return np.array(values)


def shapley_values(values: np.ndarray) -> np.ndarray:
    """Return the mean gain when a player joins, over all orders (Shapley 1953); ``[2^n, 2]`` -> ``[n, 2]``."""
    n = len(values).bit_length() - 1
    phi = np.zeros((n, 2))
    for player, coalition in product(range(n), range(2**n)):
        if not coalition >> player & 1:
            size = coalition.bit_count()
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            phi[player] += weight * (values[coalition | 1 << player] - values[coalition])
    return phi


def nested_candidates(phi: np.ndarray) -> np.ndarray:
    """Add players with a benign gain one after the other: by gain per robust loss, those without a loss first."""
    gain, loss = phi[:, 0], phi[:, 1].clip(min=0)
    price = [g / c if c > 0 else math.inf for g, c in zip(gain, loss, strict=True)]
    order = sorted(np.flatnonzero(gain > 0), key=lambda player: (-price[player], -gain[player], player))
    return np.array([np.isin(range(len(phi)), order[:size]) for size in range(len(order) + 1)])


def guard_outcomes(client: Client, states: Sequence[State], round: int) -> np.ndarray:
    """Return which guard images withstand an attack made against each state; ``[len(states), n] bool``."""
    outcomes = []
    for state in states:
        client.load(state)
        outcomes.append(answers(client, client.data.guard, client.s.attack_steps, f"guard/{round}")[1])
    return np.stack(outcomes)


def answers(client: Client, split: Split, steps: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Return which images are classified correctly, and which are so at every point of PGD."""
    x, y = client.pixels(split.images), torch.from_numpy(split.labels)
    keys = image_keys(client.s.seed, purpose, client.number, np.arange(len(split)))
    noise = 2 * ImageDraws(keys).uniform(0, x.shape[1:]) - 1
    points = [x, *(u.detach() for u in pgd(client, x, y, noise, steps, client.s.epsilon))]
    with torch.no_grad():
        correct = torch.stack([client.model(u).argmax(1) == y for u in points])
    return correct[0].numpy(), correct.all(0).numpy()


def last_accepted(i: int, robust_images: Mapping[int, np.ndarray], near: np.ndarray, s: Settings) -> int:
    """Return the last row of ``robust_images[i]`` before one whose robust loss against row 0 may exceed the tolerance.

    If client i has too few guard images, those of its nearest neighbours with such a row are added.
    """
    enough, accepted = images_needed(s.guard_tolerance, s.guard_confidence), 0
    for row in range(1, len(robust_images[i])):
        lost = gained = images = 0
        for j in [i, *(int(j) for j in np.argsort(-near[i], kind="stable") if near[i, j] > 0 and j != i)]:
            if j in robust_images and row < len(robust_images[j]) and (images < enough or j == i):
                lost += int((robust_images[j][0] & ~robust_images[j][row]).sum())
                gained += int((~robust_images[j][0] & robust_images[j][row]).sum())
                images += robust_images[j].shape[1]
        if paired_upper_bound(lost, gained, images, s.guard_confidence) > s.guard_tolerance:
            break
        accepted = row
    return accepted


def refine(clients: Sequence[Client], game: Game, near: np.ndarray) -> list[int]:
    """Train the selected layers on benign images, up to the last epoch that passes the guard; return these epochs."""
    s, round = clients[0].s, clients[0].s.rounds + 3
    epochs, robust_images = {}, {}
    for i, client in enumerate(clients):
        if game.selected[i].any():
            chosen = zip(client.players(), game.selected[i], strict=True)
            names = [name for player, inside in chosen if inside for name in player]
            states = train(client, names, "refine", round, s.refine_lr, s.refine_epochs)
            epochs[i] = [game.robust[i], *states]
            robust_images[i] = guard_outcomes(client, epochs[i], round)
    kept = [last_accepted(i, robust_images, near, s) if i in robust_images else 0 for i in range(len(clients))]
    for i in robust_images:
        clients[i].load(epochs[i][kept[i]])
    return kept


# -- The whole run ---------------------------------------------------------------------------------------------------


def report(stage: str, clients: Sequence[Client], steps: int = 5) -> None:
    """Print the mean test accuracies over clients, benign and under PGD."""
    label = f"pgd{steps}-eps{clients[0].s.epsilon * 255:.4g}"
    accuracy = np.mean([[correct.mean() for correct in answers(c, c.data.test, steps, label)] for c in clients], axis=0)
    print(f"{stage:24}{accuracy[0]:10.1%}{accuracy[1]:10.1%}", flush=True)


def main() -> None:
    """Run Sylva on the embedded digits."""
    argparse.ArgumentParser(
        description="Sylva on the embedded digits, in about a minute; it takes no options."
    ).parse_args()
    torch.set_num_threads(1)  # batches are too small for more
    s = Settings()
    partition = PartitionSection(alpha=0.3, num_clients=3, valid_fraction=0.4, test_samples=20)
    fleet = build_fleet(load_dataset(DatasetSection(max_train=240), 32, s.seed), partition, s.seed)
    vit = create_backbone(BackboneSection(), fleet.num_classes).model  # timm's, with the weights of this package
    clients = [Client(i, fleet.client(i), vit, s) for i in range(fleet.num_clients)]
    print(f"{'after':24}{'benign':>10}{'robust':>10}")
    warm_up(clients)
    report("head warm-up", clients)
    for round in range(1, s.rounds + 1):
        near = federated_round(clients, round)
        report(f"round {round}", clients)
    local_epoch(clients)
    report("last local epoch", clients)
    game = layer_game(clients, near)
    kept = refine(clients, game, near)
    report("refinement", clients)
    for client, selected, epochs in zip(clients, game.selected, kept, strict=True):
        layers = ", ".join(str(player) for player in np.flatnonzero(selected)) or "none"
        print(f"client {client.number}: layers {layers} selected (the last is the head), {epochs} epochs kept")


if __name__ == "__main__":
    main()
