"""The policies that there are."""

from __future__ import annotations

from typing import Any

import torch

from .functions import block_amax, cut, joined, near_root, near_square, rounded, shortened, split, spread
from .policy import Policy, register


class Rounded(Policy):
    """To the nearest number of a dtype, or at random to one of the two nearest (`functions.rounded`)."""

    def __init__(self, dtype: torch.dtype, noisy: bool = False) -> None:
        self.code, self.noisy, self.params = dtype, noisy, noisy  # type: ignore[misc]

    def encode(self, x: Any, noise: Any) -> Any:
        return x if noise is None else rounded(x, self.code, noise)

    def decode(self, code: Any, *rest: Any) -> Any:
        return code


class Kahan(Policy):
    """A bfloat16 number, and in a second one what that is too small by: 15 bits of precision, where bfloat16 has 8.

    For parameters this is Kahan's summation: what an update has lost is kept, and added to the next one.
    """

    code, rest, params, fixed = torch.bfloat16, (torch.bfloat16,), True, True

    def encode(self, x: Any, noise: Any) -> Any:
        high = rounded(x, torch.bfloat16)
        # Towards zero: with half of the last bit of `high` that would be another number, the next time.
        low = cut(x - high)
        return high, torch.where(low.abs() < float("inf"), low, 0.0)  # infinity has none

    def decode(self, code: Any, *rest: Any) -> Any:
        return code + rest[0]


class Corrected(Policy):
    """A bfloat16 number, and 8 or 16 bits of what a float32 number has more; with 16 bits exactly that.

    With 8 bits that is float32 numbers of 15 to 16 bits of precision.
    """

    code, params, fixed = torch.bfloat16, True, True

    def __init__(self, bits: int) -> None:
        self.rest = (torch.int16 if bits == 16 else torch.int8,)  # type: ignore[misc]
        self.unit = 2.0 ** (16 - bits)

    def encode(self, x: Any, noise: Any) -> Any:
        high, low = split(x)
        return (high, low) if self.unit == 1 else (high, (low / self.unit).round().clamp(max=127.0))

    def decode(self, code: Any, *rest: Any) -> Any:
        return joined(code, rest[0] if self.unit == 1 else rest[0] * self.unit)


class Master(Policy):
    """A parameter of lower precision with a float32 copy, which is what is stepped.

    A parameter that was changed by somebody else, so that it is no longer its copy rounded, counts as it is.
    """

    rest, state, params = (torch.float32,), False, True

    def __init__(self, dtype: torch.dtype) -> None:
        self.code = dtype  # type: ignore[misc]

    def encode(self, x: Any, noise: Any) -> Any:
        return x, x

    def decode(self, code: Any, *rest: Any) -> Any:
        return torch.where(rounded(rest[0], self.code) == code, rest[0], code)


class Blocks(Policy):
    """Eight bits, and a scale that neighbouring elements share: from the largest size among them.

    A code is the root of a number's size (`functions.near_root`) in units of the scale, so that small numbers have
    finer steps: 127 with a sign, or 255 without. Unsigned ones are for second moments: what is above zero stays there,
    as rules divide by it. A number that is not finite leaves zeros of the others in its block, and becomes infinite or
    NaN; so does one below zero that is to be unsigned. Sizes below 10⁻³⁴ become zero.
    """

    least, fixed = 4096, True

    def __init__(self, signed: bool, block: int) -> None:
        self.code, self.block = (torch.int8 if signed else torch.uint8), block  # type: ignore[misc]
        self.signed, self.top = signed, 127.0 if signed else 255.0

    def encode(self, x: Any, noise: Any) -> Any:
        largest = block_amax(x, self.block, self.signed)
        fits = (largest >= 0) & (largest < float("inf"))
        # The root of infinity is 2⁶⁴, those of NaN are above it: with this scale their codes are, too.
        largest = torch.where(fits, near_root(largest).clamp(min=2.0**-50), 1.45 * 2.0**64)
        # With its few bits a code times the scale is exact: so what is decoded is encoded to the same again.
        scale = shortened(largest / self.top)
        code = (near_root(x.abs() if self.signed else x) * spread(1 / scale, x, self.block)).round()
        if self.signed:
            return torch.copysign(torch.where(code < self.top, code, self.top), x), scale
        code = torch.where(x >= 0, code, self.top)
        return torch.where((x > 0) & (code < 1), 1.0, code), scale

    def decode(self, code: Any, *rest: Any) -> Any:
        return near_square(code * spread(rest[0], code, self.block))


register("float32", Rounded(torch.float32))
register("bfloat16", Rounded(torch.bfloat16))
register("float16", Rounded(torch.float16))
register("bfloat16_sr", Rounded(torch.bfloat16, noisy=True))
register("float16_sr", Rounded(torch.float16, noisy=True))
register("kahan", Kahan())
register("bf16+8", Corrected(8))
register("bf16+16", Corrected(16))
register("master", Master(torch.bfloat16))
register("float16_master", Master(torch.float16))
register("int8", Blocks(True, 64))
register("uint8", Blocks(False, 64))
register("int8_256", Blocks(True, 256))
register("uint8_256", Blocks(False, 256))
