"""Random numbers that are functions of where they are wanted: of a seed, a step, a stream, a parameter, an element.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011). A
block of four words is for four elements, one after another::

    key      seed (64 bits)
    counter  number of the block        its lower 32 bits
             the rest of it             8 bits, then the stream in 8, the group in 15, and 1 for normal numbers
             step                       its lower 32 bits
             number of the parameter    in its group

Rounding at random needs neither that many bits nor that good ones, and must not take longer than what it saves: `noise`
is a word of each element, mixed by multiplications (the finalizer of a hash), of which even streams have the lower half
and odd ones the upper.

Here is what kernels compute, in integers of 64 bits that hold words, and in float32 with none but the operations that
IEEE 754 defines to the bit. So the numbers are the same in every language, on every device, and in every compute type.
"""

from __future__ import annotations

import numpy as np
import torch

STREAMS = 1 << 8
"""How many streams there are."""
LARGEST = 2.0**62
"""Of seeds and steps, so that they fit an integer."""
WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def place(group: int, index: int) -> int:
    """What a parameter is known by: its group, and its number in there. The same whichever others have gradients."""
    return (group & 0x7FFF) << 32 | (index & WORD)


def philox(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """The block of four words with this counter: int64 tensors of words, which broadcast."""
    a, b, c, d = counter
    for r in range(ROUNDS):
        k, m = ((key[i] + r * WEYL[i]) & WORD for i in (0, 1))
        # As 64 bits without a sign these products do not overflow; with one, their bits are the same.
        x, y = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (y >> 32 & WORD) ^ b ^ k, y & WORD, (x >> 32 & WORD) ^ d ^ m, x & WORD
    return a, b, c, d


def whole(x: torch.Tensor) -> torch.Tensor:
    """A seed or step as an integer: towards zero; what is no number is the least."""
    x = x.to(torch.float64)
    x = torch.where(x > -LARGEST, x, -LARGEST)
    return torch.where(x < LARGEST, x, LARGEST).to(torch.int64)


def uniform(count: int, seed: torch.Tensor, step: torch.Tensor, stream: int, place: int) -> torch.Tensor:
    """float32 numbers of 24 bits for so many elements: at least 0, and less than 1."""
    words = _blocks(count, seed, step, stream, place, 0)
    return _of_elements([(word >> 8).to(torch.float32) * 2.0**-24 for word in words], count)


def normal(count: int, seed: torch.Tensor, step: torch.Tensor, stream: int, place: int) -> torch.Tensor:
    """float32 numbers of the standard normal distribution, by Box and Muller's method: up to ±6.7."""
    a, b, c, d = _blocks(count, seed, step, stream, place, 1)
    pairs = [radius(r) * cosine(angle, odd) for r, angle in ((a, b), (c, d)) for odd in (0, 1)]
    return _of_elements(pairs, count)


def noise(count: int, seed: torch.Tensor, step: torch.Tensor, stream: int, place: int) -> torch.Tensor:
    """float32 numbers of 16 bits for so many elements: at least 1, and less than 2. They repeat after 2³² elements."""
    element, seed = torch.arange(count, device=seed.device), whole(seed)
    key = torch.zeros_like(seed)
    for word in (seed, seed >> 32, torch.full_like(seed, place >> 32 | stream >> 1 << 16), whole(step)):
        key = mixed(key ^ word & WORD)
    key = mixed(key ^ (place & WORD))
    word = mixed(element * WEYL[0] + key & WORD)
    return (word >> 16 * (stream & 1) & 0xFFFF).to(torch.float32) * 2.0**-16 + 1


def mixed(word: torch.Tensor) -> torch.Tensor:
    """Another word for each, each bit of which depends on all of its bits."""
    word = ((word >> 16) ^ word) * 0x21F0AAAD & WORD
    word = ((word >> 15) ^ word) * 0x735A2D97 & WORD
    return (word >> 15) ^ word


def _blocks(
    count: int, seed: torch.Tensor, step: torch.Tensor, stream: int, place: int, normal: int
) -> Words:
    """Those of all elements."""
    block, seed = torch.arange((count + 3) // 4, device=seed.device), whole(seed)
    tag = (block >> 32 & 0xFF) | stream << 8 | (place >> 32) << 16 | normal << 31
    counter = block & WORD, tag, whole(step) & WORD, torch.full_like(block, place & WORD)
    return philox(counter, (seed & WORD, seed >> 32 & WORD))


def _of_elements(numbers: list[torch.Tensor], count: int) -> torch.Tensor:
    return torch.stack(numbers, 1).flatten()[:count]


def radius(word: torch.Tensor) -> torch.Tensor:
    """√(-2 ln u), where u is from 2⁻³² up to 1."""
    u = ((word >> 1).to(torch.float32) + 0.5) * 2.0**-31
    bits = u.view(torch.int32).to(torch.int64) - 0x3F3504F3  # √½ and above have the exponent 0
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(torch.int32).view(torch.float32) - 1.0
    z = f * f
    p = f * -0.0785954595 + 0.128816217
    p = (p * f + -0.131287679) * f + 0.141811967
    p = (p * f + -0.166245535) * f + 0.200022861
    p = (p * f + -0.250008106) * f + 0.333333164
    logarithm = (bits >> 23).to(torch.float32) * 0.693147182 + (f + (f * z * p - z * 0.5))
    return root(logarithm * -2.0)


def cosine(word: torch.Tensor, odd: int) -> torch.Tensor:
    """Of the angle that a word stands for, or where it is odd its sine: by quarters of the circle."""
    quarter = (word >> 30) + odd * 3 & 3
    x = ((word >> 5 & 0x1FFFFFE) - 0xFFFFFF).to(torch.float32) * 2.0**-25
    z = x * x
    sine = x * (((z * -0.00460217707 + 0.0796802267) * z + -0.64596349) * z + 1.57079637)
    cosine = (((z * 0.00090402161 + -0.0208602883) * z + 0.253669232) * z + -1.23370051) * z + 1.0
    size = torch.where(quarter & 1 == 0, cosine, sine)
    return torch.where(quarter + 1 & 2 == 0, size, -size)


def root(x: torch.Tensor) -> torch.Tensor:
    """Correctly rounded, as hardware does it. On CPU ``torch.sqrt`` may be MKL's: 1 in 120 results is off by an ulp."""
    if x.device.type != "cpu":
        return torch.sqrt(x)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.detach().numpy())))
