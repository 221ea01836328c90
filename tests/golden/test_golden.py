"""Results stay as they were, bit for bit: a refactor that moves a digest has changed what it computes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from tests.golden.runs import RUNS, digests

pytestmark = pytest.mark.long

GOLDEN = json.loads((Path(__file__).parent / "digests.json").read_text())
"""``{"machines": {fingerprint: description}, "runs": {run: {part: digest}}}``. ``runs`` is what `tests.golden.runs`
writes. A machine is added by hand, with the fingerprint that the skipped test prints, once its digests are these."""


@threadpool_limits.wrap(limits=1, user_api="blas")
def fingerprint() -> str:
    """What this processor and these libraries make of the operations that a run is made of."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    digest = hashlib.sha256(f"{torch.__version__} {np.__version__}".encode())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(34, 192, generator=generator).to(dtype).requires_grad_()
        w = torch.randn(576, 192, generator=generator).to(dtype)
        y = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (192,)) @ w.T).softmax(-1)
        q = y.float().reshape(2, 17, 9, 64).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        (gradient,) = torch.autograd.grad(attended.square().sum() + y.float().log().sum(), x)
        digest.update(gradient.float().numpy().tobytes() + attended.detach().numpy().tobytes())
    gram = np.random.default_rng(0).normal(size=(40, 192))
    digest.update(np.linalg.eigh(gram @ gram.T)[1].tobytes() + np.linalg.svd(gram)[1].tobytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="module")
def _known_machine() -> None:
    here = fingerprint()
    if here not in GOLDEN["machines"]:
        pytest.skip(f"no digests were recorded on a processor with torch {torch.__version__} like this one ({here})")


@pytest.mark.usefixtures("_known_machine")
@pytest.mark.parametrize("name", ["sylva", *(pytest.param(n, marks=pytest.mark.slow) for n in RUNS if n != "sylva")])
def test_results_are_those_that_were_recorded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RAY_USAGE_STATS_ENABLED", "0")
    assert digests(name, tmp_path / "run") == GOLDEN["runs"][name]
