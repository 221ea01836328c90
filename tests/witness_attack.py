"""The independent witness: plain PEFT, timm and other people's attacks. It imports nothing of this project.

    python witness_attack.py FOLDER

FOLDER holds ``client_000/`` and so on (PEFT adapters), ``images.npz`` (``x_0 [n, 3, H, W] uint8``, ``y_0 [n]``, ...),
``backbone.safetensors`` (a timm state_dict) and ``witness.json`` (timm name and arguments, mean, std, epsilon, steps).
Prints one JSON line of accuracies.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyautoattack
import timm
import torch
import torchattacks
from peft import PeftModel
from safetensors.torch import load_file


class Normalised(torch.nn.Module):
    """Pixels in [0, 1] in, logits out."""

    def __init__(self, model: torch.nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((x - self.mean) / self.std)


def main() -> None:
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "witness.json").read_text())
    images = np.load(folder / "images.npz")
    torch.manual_seed(0)
    torch.set_num_threads(settings["threads"])
    right: dict[str, list[torch.Tensor]] = {"benign": [], "pgd": [], "autoattack": []}
    for client in range(settings["num_clients"]):
        base = timm.create_model(settings["timm_name"], **settings["timm_arguments"])
        body = {n: v for n, v in load_file(folder / "backbone.safetensors").items() if not n.startswith("head.")}
        assert not base.load_state_dict(body, strict=False).unexpected_keys
        peft = PeftModel.from_pretrained(base, str(folder / f"client_{client:03d}"))
        model = Normalised(peft, settings["mean"], settings["std"]).eval()
        x = torch.tensor(images[f"x_{client}"]).float() / 255
        y = torch.tensor(images[f"y_{client}"])
        with torch.no_grad():
            benign = model(x).argmax(1) == y
        attack = torchattacks.PGD(model, eps=settings["epsilon"], alpha=settings["step_size"], steps=settings["steps"])
        with_pgd = benign & (model(attack(x, y)).argmax(1) == y)
        right["benign"] += benign.tolist()
        right["pgd"] += with_pgd.tolist()
        if settings["autoattack_steps"]:
            names = ["apgd-ce", "apgd-t", "fab-t", "square"]
            adversary = pyautoattack.AutoAttack(
                model, norm="Linf", eps=settings["epsilon"], version="custom", attacks=names, seed=0
            )
            for part in (adversary.apgd, adversary.apgd_targeted, adversary.fab):
                part.n_iter, part.n_restarts = settings["autoattack_steps"], 1
            adversary.square.n_queries = 50 * settings["autoattack_steps"]
            x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=250)
            with torch.no_grad():
                right["autoattack"] += (benign & (model(x_adv).argmax(1) == y)).tolist()
    print(json.dumps({name: float(np.mean(own)) for name, own in right.items() if own} | {"images": len(right["pgd"])}))


if __name__ == "__main__":
    main()
