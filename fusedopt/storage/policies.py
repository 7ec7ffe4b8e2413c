"""The policies that there are."""

from __future__ import annotations

from typing import Any

import torch

from .functions import joined, rounded, split
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
    """A bfloat16 number, and in a second one what that is too small by: 16 bits of precision, where bfloat16 has 8.

    For parameters this is Kahan's summation: what an update has lost is kept, and added to the next one.
    """

    code, rest, params = torch.bfloat16, (torch.bfloat16,), True

    def encode(self, x: Any, noise: Any) -> Any:
        high = rounded(x, torch.bfloat16)
        low = x - high
        return high, torch.where(
            low.abs() < float("inf"), low, 0.0
        )  # of what is beyond the largest number nothing

    def decode(self, code: Any, *rest: Any) -> Any:
        return code + rest[0]


class Corrected(Policy):
    """A bfloat16 number, and 8 or 16 bits of what a float32 number has more; with 16 bits exactly that.

    With 8 bits float32 numbers of 16 bits of precision, rounded to the nearest.
    """

    code, params = torch.bfloat16, True

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
