"""Read Sylva from top to bottom: the method in one file, in plain PyTorch and PEFT.

    python examples/sylva_in_one_file.py

Every client is a model of its own, every step is a loop over clients, and every coalition is a forward pass. The
package computes the same, but trains clients as one stack and runs on Ray; tests/test_sylva_in_one_file.py holds the
two equal, stage by stage. Data, weights, random numbers and the guard's confidence bound are the package's.
"""

import argparse
import copy
import math
import re
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from timm.data.config import resolve_model_data_config
from torch import nn
from torchvision.transforms import Normalize

from sylva_ray.config.data import DatasetSection, PartitionSection
from sylva_ray.config.experiment import BackboneSection
from sylva_ray.core.seeding import ImageDraws, generator, image_keys
from sylva_ray.core.types import ClientData, Split
from sylva_ray.data.datasets import load_dataset
from sylva_ray.data.fleet import build_fleet
from sylva_ray.federation.stages.layer_game.selection import images_needed, paired_upper_bound
from sylva_ray.models.backbone import create_backbone

SEED, DTYPE, RANK, ALPHA = 0, torch.float32, 8, 16
ROUNDS, BATCH_SIZE, LR, HEAD_WARMUP_LR, WEIGHT_DECAY, CLIP_NORM = 3, 16, 0.01, 0.01, 1e-4, 1.0
EPSILON, STEPS, EPSILON_WARMUP = 8 / 255, 3, 0.3  # of PGD in training
BENIGN_EPOCHS, BENIGN_LR, REFINE_EPOCHS, REFINE_LR = 3, 1e-3, 2, 1e-3
OWN_SHARES, MIXTURE_STEPS, MIXTURE_IMAGES, BALANCE, MIXTURE_SHRINK = (0.75, 0.5, 0.25, 0.0), 5, 128, 0.25, 4.0
STRENGTHS, ATTACK_STEPS, MAX_IMAGES, SHRINK_STRENGTH = (0.25, 0.5), 5, 8, 64.0  # of phase 2
TOLERANCE, CONFIDENCE, BENIGN_TOLERANCE, BENIGN_CONFIDENCE = 0.05, 0.9, 0.0, 0.87  # of the guard

TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]  # the adapted layers

State = dict[str, torch.Tensor]  # adapters and head of a client, by PEFT's names


class Client:
    """Data, LoRA adapters on a copy of ``vit``, and a head; pixels are in [0, 1]."""

    def __init__(self, number: int, data: ClientData, vit: nn.Module) -> None:
        self.number, self.data = number, data
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, modules_to_save=["head"])
        mean, std = (torch.tensor(resolve_model_data_config(vit)[key]) for key in ("mean", "std"))
        self.model = nn.Sequential(Normalize(mean, std), get_peft_model(copy.deepcopy(vit), lora)).to(DTYPE).eval()
        self.parameters = {n: p for n, p in self.model.named_parameters() if "lora_" in n or "modules_to_save" in n}
        stream = generator(SEED, "initial state")  # the same for all clients
        for name, p in self.parameters.items():
            p.data.zero_()  # B and the head's bias
            if "lora_A" in name:
                p.data.copy_((torch.rand(p.shape, generator=stream) * 2 - 1) / p.shape[1] ** 0.5)
            elif name.endswith("head.modules_to_save.default.weight"):
                p.data.copy_(torch.randn(p.shape, generator=stream) * 0.01)
        self.players: dict[str, list[str]] = {}  # of the layer game: the blocks, and at the end the head
        for name in self.parameters:
            block = re.search(r"blocks\.\d+\.", name)
            self.players.setdefault(block.group() if block else "head", []).append(name)

    def state(self) -> State:
        """Return a copy of adapters and head."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def load(self, state: State) -> "Client":
        """Load the entries of ``state``, which may be adapters only."""
        for name, value in state.items():
            self.parameters[name].data.copy_(value)
        return self


# -- Adversarial training (Madry et al. 2018) ------------------------------------------------------------------------


def tensors(split: Split, rows: slice | np.ndarray = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images in [0, 1], ``[n, 3, H, W]``, and their labels."""
    return torch.from_numpy(split.images[rows]).to(DTYPE) / 255, torch.from_numpy(split.labels[rows])


def pgd(
    client: Client, x: torch.Tensor, y: torch.Tensor, noise: torch.Tensor, steps: int, epsilon: float
) -> Iterator[torch.Tensor]:
    """Yield the start and ``steps`` further points of projected gradient ascent; ``noise`` is uniform in [-1, 1]."""
    x_adv = (x + epsilon * noise.to(DTYPE)).clamp(x - epsilon, x + epsilon).clamp(0, 1)
    yield x_adv
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(client.model(x_adv), y, reduction="sum"), x_adv)
        step = min(epsilon, 2.5 * epsilon / steps) * gradient.sign()
        x_adv = (x_adv.detach() + step).clamp(x - epsilon, x + epsilon).clamp(0, 1)
        yield x_adv


def train(
    client: Client, names: Sequence[str], purpose: str, round: int, lr: float, epochs: int = 1, epsilon: float = 0.0
) -> list[State]:
    """Train the parameters in ``names``, on adversarial images if ``epsilon`` > 0; return the states after epochs."""
    trained = [client.parameters[name] for name in names]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=WEIGHT_DECAY)
    stream = generator(SEED, purpose, client.number, round)
    states = []
    for epoch in range(epochs):
        for rows in torch.randperm(len(client.data.train), generator=stream).split(BATCH_SIZE):
            x, y = tensors(client.data.train, rows.numpy())
            keys = image_keys(SEED, purpose, client.number, rows.numpy(), round, epoch)
            noise = ImageDraws(keys).signed(0, x.shape[1:])
            if epsilon > 0:
                *_, x = pgd(client, x, y, noise, STEPS, epsilon)
            optimizer.zero_grad()
            F.cross_entropy(client.model(x), y).backward()
            nn.utils.clip_grad_norm_(trained, CLIP_NORM)
            optimizer.step()
        states.append(client.state())
    return states


def answers(client: Client, split: Split, steps: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Return which images are classified correctly, and which are so at every point of PGD; ``[n] bool`` each."""
    x, y = tensors(split)
    keys = image_keys(SEED, purpose, client.number, np.arange(len(split)))
    noise = ImageDraws(keys).signed(0, x.shape[1:])
    points = [x, *pgd(client, x, y, noise, steps, EPSILON)]
    correct = torch.stack([client.model(point.detach()).argmax(1) == y for point in points])
    return correct[0].numpy(), correct.all(0).numpy()


def outcomes_of(client: Client, states: Sequence[State], purpose: str, split: Split, steps: int) -> np.ndarray:
    """Return which images are right, benign and under an attack made against each state; ``[states, 2, n] bool``."""
    return np.stack([answers(client.load(state), split, steps, purpose) for state in states])


# -- Phase 1: adapters and heads are trained against attacks and merged over all clients; the last epoch is local -----


def warm_up(clients: Sequence[Client]) -> None:
    """Fit the heads to benign images and average them (round 0); attacks on a random head would mean nothing."""
    for client in clients:
        train(client, client.players["head"], "train", 0, HEAD_WARMUP_LR)
    exchange(clients, [client.players["head"] for client in clients])


def adversarial_epoch(clients: Sequence[Client], round: int) -> None:
    """Train adapters and head for one epoch; the learning rate follows a cosine, and epsilon grows at first.

    The epoch after the last round is local: its results are not exchanged.
    """
    progress = min(1.0, (round - 1) / max(1, ROUNDS - 1))
    lr = LR * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    epsilon = EPSILON * min(1.0, round / (math.ceil(EPSILON_WARMUP * ROUNDS) + 1))
    for client in clients:
        train(client, list(client.parameters), "train", round, lr, epsilon=epsilon)


def federated_round(clients: Sequence[Client], round: int) -> np.ndarray:
    """Run one local epoch, then exchange adapters and heads; return the weights of neighbours, ``[K, K]``."""
    adversarial_epoch(clients, round)
    near = neighbourhoods([client.state() for client in clients], images(clients))
    exchange(clients, [list(client.parameters) for client in clients])
    return near


def mix_in_others(clients: Sequence[Client], received: State) -> None:
    """Mix what all had received into the tuned adapters, then into the heads; the result is theta_r, the robust state.

    A share of the own model is good where many held-out images are right, benign and attacked, and rare classes count
    more. What a client measures is shrunk to the mean of all, more so with few images.
    """
    is_head = {name: "head" in name for name in received}
    for names in ([n for n in received if not is_head[n]], [n for n in received if is_head[n]]):
        states, gains, sizes = [], [], []
        for client in clients:
            own, split = client.state(), client.data.selection
            split = Split(split.images[:MIXTURE_IMAGES], split.labels[:MIXTURE_IMAGES])
            ends = [{name: end[name] for name in names} for end in (own, received)]
            states.append([own, *(own | (merge(ends, [a, 1 - a]) if a else ends[1]) for a in OWN_SHARES)])
            right = outcomes_of(client, states[-1], f"mixture/{ROUNDS + 1}", split, MIXTURE_STEPS).mean(1)
            weights = np.bincount(split.labels)[split.labels].astype(float) ** -BALANCE
            gains.append((right - right[0]) @ weights / weights.sum())
            sizes.append(len(split))
        for client, tried, gain, size in zip(clients, states, gains, sizes, strict=True):
            own_weight = size / (size + MIXTURE_SHRINK)
            client.load(tried[np.argmax(own_weight * gain + (1 - own_weight) * np.mean(gains, axis=0))])


def images(clients: Sequence[Client]) -> np.ndarray:
    """Return the numbers of training images, ``[K]``."""
    return np.array([len(client.data.train) for client in clients])


def exchange(clients: Sequence[Client], names: Sequence[Sequence[str]]) -> None:
    """Upload the named parameters, merge them with weights by training images, and download the result."""
    uploads = [{name: client.state()[name] for name in own} for client, own in zip(clients, names, strict=True)]
    merged = merge(uploads, images(clients) / images(clients).sum())
    for client in clients:
        client.load(merged)


def products(upload: State) -> State:
    """Return the dense update ``B A`` of every adapted layer, by the name of its A."""
    return {a: upload[a.replace("lora_A", "lora_B")].double() @ upload[a].double() for a in upload if "lora_A" in a}


def merge(uploads: Sequence[State], weights: Sequence[float] | np.ndarray) -> State:
    """Return the factors of rank r that are nearest to the weighted mean of all ``B A`` (Eckart and Young 1936).

    The mean of the factors would be wrong: the product of means is not the mean of products. Where the mean has fewer
    than r directions, B is 0 and A keeps the first upload's rows, so that they can still learn. Heads are averaged.
    """
    merged: State = {}
    for name in (name for name in uploads[0] if "lora_" not in name):
        merged[name] = torch.stack([float(w) * own[name] for w, own in zip(weights, uploads, strict=True)]).sum(0)
    dense = [products(upload) for upload in uploads]
    for name in dense[0]:
        mean = sum(float(weight) * update[name] for weight, update in zip(weights, dense, strict=True))
        u, sigma, vt = torch.linalg.svd(torch.as_tensor(mean), full_matrices=False)
        u, sigma, vt, scale = u[:, :RANK], sigma[:RANK], vt[:RANK], math.sqrt(3)  # rows of A have norm 1 / sqrt 3
        sign = u.gather(0, u.abs().argmax(0, keepdim=True))[0].sign()  # an SVD leaves the sign open
        nonzero = sigma > 1e-7 * sigma[0]
        merged[name.replace("lora_A", "lora_B")] = u * (sign * sigma * scale * nonzero)
        merged[name] = torch.where(nonzero[:, None], sign[:, None] * vt / scale, uploads[0][name])
    return merged


def neighbourhoods(uploads: Sequence[State], sizes: np.ndarray) -> np.ndarray:
    """Return the weights of each client's ceil(sqrt K) nearest clients, itself included; ``[K, K]``, rows of sum 1.

    Clients are near if the angle between their updates is small. A neighbour has the weight ``n_j exp(-d^2 / (2
    sigma^2))``, where sigma is the largest of the distances; the client itself has at least 1 / k.
    """
    flat = np.stack([np.concatenate([u.flatten().numpy() for u in products(upload).values()]) for upload in uploads])
    units = flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-300)
    k = min(len(units), max(2, math.ceil(math.sqrt(len(units)))))
    weights = np.zeros((len(units), len(units)))
    for i, row in enumerate(weights):
        distance = np.linalg.norm(units - units[i], axis=1)
        near = sorted(range(len(units)), key=lambda j: (j != i, distance.round(6)[j], j))[:k]
        sigma = distance[near].max() if distance[near].max() > 1e-6 else 1.0
        row[near] = sizes[near] * np.exp(-(distance[near] ** 2) / (2 * sigma**2))
        row /= row.sum()
        if row[i] < 1 / k:
            row *= (1 - 1 / k) / (row.sum() - row[i])
            row[i] = 1 / k
    return weights


# -- Phase 2: which layers may be refined on benign data without losing robustness? ----------------------------------


def layer_game(clients: Sequence[Client], near: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Let players be the blocks and the head, and play; leave the clients at theta_r.

    Returns:
        By client: ``values [2^n, 2]`` of coalitions, benign and robust, where coalition c has player l if bit l of c
        is set; ``shapley [n, 2]``, shares of benign gain and robust loss; ``candidates [m, n] bool``, each a subset of
        the next, the first one empty; ``selected [n] bool``, the largest one whose robust loss is bounded.
    """
    games, outcomes, ends = [], {}, []
    for client in clients:
        robust = client.state()  # theta_r
        benign = train(client, list(robust), "theta_b", ROUNDS + 2, BENIGN_LR, BENIGN_EPOCHS)[-1]  # theta_b
        values = coalition_values(client, robust, benign)
        ends.append((robust, benign))
        games.append({"values": values, "own": shapley_values(values * [1, -1])})
    for i, client in enumerate(clients):
        images = min(MAX_IMAGES, len(client.data.selection))
        trust = images / (images + SHRINK_STRENGTH)  # the fewer images, the more do neighbours count
        among = sum(near[i, j] * game["own"] for j, game in enumerate(games))
        games[i]["shapley"] = trust * games[i]["own"] + (1 - trust) * among
        games[i]["candidates"] = nested_candidates(games[i]["shapley"])
        states = [mixed(client, *ends[i], row) for row in games[i]["candidates"]]
        outcomes[i] = outcomes_of(client, states, f"candidates/{ROUNDS + 2}", client.data.selection, ATTACK_STEPS)
        client.load(ends[i][0])
    for i, game in enumerate(games):
        bounded = [row for row, (_, loss) in enumerate(bounds_of_losses(i, outcomes, near)) if loss <= TOLERANCE]
        game["selected"] = game["candidates"][max(bounded)]
    return games


def mixed(client: Client, robust: State, benign: State, coalition: Sequence[bool]) -> State:
    """Return theta_S: the players of the coalition from theta_b, the others from theta_r."""
    chosen = zip(client.players.values(), coalition, strict=True)
    return robust | {name: benign[name] for names, inside in chosen if inside for name in names}


def coalition_values(client: Client, robust: State, benign: State) -> np.ndarray:
    """Return the mean probability of the true class on the selection images, benign and under attack; ``[2^n, 2]``.

    Attacks are made once, against theta_r and theta_b; of the two adversarial versions of an image the worse counts.
    """
    x, y = tensors(client.data.selection, slice(MAX_IMAGES))
    keys = image_keys(SEED, f"game/noise/{ROUNDS + 2}", client.number, np.arange(len(x)))
    noise = ImageDraws(keys).signed(0, x.shape[1:])
    against = []
    for state in (robust, benign):
        against.append(list(pgd(client.load(state), x, y, noise, ATTACK_STEPS, EPSILON))[-1])
    values, n = [], len(client.players)
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


def bounds_of_losses(i: int, outcomes: dict[int, np.ndarray], near: np.ndarray) -> list[tuple[float, float]]:
    """Return upper bounds of the benign and robust loss of every row of ``outcomes[i]`` against row 0, whose own are 0.

    If client i has too few images, those of other clients with such a row are added, the nearest clients first:
    neighbours, then their neighbours, and at the end the others.
    """
    enough = images_needed(TOLERANCE, CONFIDENCE)
    order = [i]
    for j in order:
        order += [m for m in np.argsort(-near[j], kind="stable").tolist() if near[j, m] > 0 and m not in order]
    order += [j for j in range(len(near)) if j not in order]
    bounds = [(0.0, 0.0)]
    for row in range(1, len(outcomes[i])):
        pool = outcomes[i][[0, row]]
        for j in order[1:]:
            if pool.shape[2] < enough and j in outcomes and row < len(outcomes[j]):
                pool = np.concatenate([pool, outcomes[j][[0, row]]], axis=2)
        lost, gained = (pool[0] & ~pool[1]).sum(1), (~pool[0] & pool[1]).sum(1)
        benign = paired_upper_bound(lost[0], gained[0], pool.shape[2], BENIGN_CONFIDENCE)
        bounds.append((benign, paired_upper_bound(lost[1], gained[1], pool.shape[2], CONFIDENCE)))
    return bounds


def refine(clients: Sequence[Client], games: Sequence[dict[str, np.ndarray]], near: np.ndarray) -> list[float]:
    """Train the selected layers on benign images; keep the strength that the guard accepts, and return it.

    Strength a means ``theta_r + a (refined - theta_r)``, of adapters the nearest product. On held-out images, the guard
    wants a bounded robust loss at this and all weaker strengths, and of those the clearest benign gain.
    """
    states, outcomes = {}, {}
    for i, client in enumerate(clients):
        if games[i]["selected"].any():
            robust = client.state()
            players = zip(client.players.values(), games[i]["selected"], strict=True)
            names = [name for names, inside in players if inside for name in names]
            refined = train(client, names, "refine", ROUNDS + 3, REFINE_LR, REFINE_EPOCHS)[-1]
            ends = [{name: state[name] for name in names} for state in (robust, refined)]
            states[i] = [robust, *(robust | merge(ends, [1 - a, a]) if a < 1 else refined for a in STRENGTHS)]
            outcomes[i] = outcomes_of(client, states[i], f"guard/{ROUNDS + 3}", client.data.guard, ATTACK_STEPS)
    strengths = np.zeros(len(clients))
    for i in states:
        bounds = bounds_of_losses(i, outcomes, near)
        first_harm = next((row for row, (_, loss) in enumerate(bounds) if loss > TOLERANCE), len(bounds))
        gains = {row: bounds[row][0] for row in range(1, first_harm) if bounds[row][0] <= BENIGN_TOLERANCE}
        row = min(gains, key=lambda row: (gains[row], -row), default=0)
        strengths[i] = (0.0, *STRENGTHS)[row]
        clients[i].load(states[i][row])
    return strengths.tolist()


# -- The whole run ---------------------------------------------------------------------------------------------------


def report(stage: str, clients: Sequence[Client]) -> None:
    """Print the mean test accuracies over clients, benign and under PGD."""
    found = [answers(client, client.data.test, 5, f"pgd5-eps{EPSILON * 255:.4g}") for client in clients]
    benign, robust = np.mean([[correct.mean() for correct in pair] for pair in found], axis=0)
    print(f"after {stage:12} {benign:6.1%} benign {robust:6.1%} robust", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description="Sylva on the embedded digits, in a minute; it takes no options.").parse_args()
    torch.set_num_threads(1)  # batches are too small for more
    partition = PartitionSection(alpha=0.3, num_clients=3, valid_fraction=0.4, test_samples=20)
    fleet = build_fleet(load_dataset(DatasetSection(max_train=240), 32, SEED), partition, SEED)
    vit = create_backbone(BackboneSection(), fleet.num_classes).model  # timm's, with the weights of this package
    clients = [Client(i, fleet.client(i), vit) for i in range(fleet.num_clients)]
    warm_up(clients)
    report("warm-up", clients)
    for round in range(1, ROUNDS + 1):
        near = federated_round(clients, round)
        report(f"round {round}", clients)
    received = clients[0].state()  # all clients have received the same
    adversarial_epoch(clients, ROUNDS + 1)
    mix_in_others(clients, received)
    report("phase 1", clients)
    games = layer_game(clients, near)
    kept = refine(clients, games, near)
    report("phase 2", clients)
    for i, game in enumerate(games):
        print(f"client {i}: players {np.flatnonzero(game['selected'])} selected, {kept[i]:.0%} of the refinement kept")
