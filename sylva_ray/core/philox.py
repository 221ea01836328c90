"""The counter-based random number generator Philox4x32-10 (Salmon et al. 2011), in integer operations of PyTorch.

Four words of 32 bits are a function of a key and a counter, so that any number can be drawn alone, in any order, on
any device. Words are held in int64, since PyTorch has no unsigned arithmetic.
"""

from __future__ import annotations

from sylva_ray.core.lazy import torch

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = (1 << 32) - 1


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the four words for every counter and key.

    Args:
        counter: four tensors of words; they and the key are broadcast against each other.
        key: two tensors of words.

    Returns:
        Four tensors of words in 0..2^32-1, int64.
    """
    c0, c1, c2, c3 = (word[None] for word in torch.broadcast_tensors(*counter, key[0])[:4])
    # The two halves of a round are rows. They change places in every round, as factors and keys do.
    even, odd = torch.cat([c0, c2]), torch.cat([c1, c3])
    product = torch.empty_like(even)
    rows = torch.arange(2, device=even.device).view(2, *[1] * (even.ndim - 1))  # constants that need no copy from here
    factors = [first + rows * (second - first) for first, second in (MULTIPLIERS, MULTIPLIERS[::-1])]
    steps = [first + rows * (second - first) for first, second in (KEY_STEPS[::-1], KEY_STEPS)]
    keys = [torch.stack([key[1], key[0]]), torch.stack([key[0], key[1]]) + steps[1]]
    (even0, even1), low, high = even.unbind(), odd.unbind(), product.unbind()
    for number in range(ROUNDS):
        half = number % 2
        torch.mul(even, factors[half], out=product)
        torch.bitwise_right_shift(product, 32, out=even)
        even0.bitwise_xor_(low[1])
        even1.bitwise_xor_(low[0])
        even.bitwise_xor_(keys[half]).bitwise_and_(MASK)
        keys[half].add_(steps[half], alpha=2)
        odd, product, low, high = product, odd, high, low  # the mask cuts off the high halves of `odd`
    odd.bitwise_and_(MASK)
    return even0, low[0], even1, low[1]
