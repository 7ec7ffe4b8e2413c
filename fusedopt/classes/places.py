"""Integers of a trace in which a few parameters stand for others: they find elements of lists, and say no more."""

from __future__ import annotations

from typing import Any

from ..trace.signals import Untraceable

_SAYING = """
abs add and bool ceil divmod eq float floor floordiv format ge gt hash int invert le lshift lt mod mul ne neg or pos
pow radd rand rdivmod repr rfloordiv rlshift rmod rmul ror round rpow rrshift rshift rsub rtruediv rxor str sub truediv
trunc xor
""".split()  # noqa: SIM905
"""Methods that say which number it is; ``__index__`` is not among them."""
_WITH_NONE = {"eq", "ne", "lt", "le", "gt", "ge"}


class Place(int):
    """Where a parameter is in a list."""

    def _refuse(self, *_: Any) -> Any:
        raise Untraceable("the step looks at the place of a parameter in a list")

    for _name in _SAYING:
        locals()[f"__{_name}__"] = _refuse


class Several(int):
    """How many parameters there are. That there are some may be asked."""

    def _refuse(self, *_: Any) -> Any:
        raise Untraceable("the step asks how many parameters there are")

    for _name in _SAYING:
        locals()[f"__{_name}__"] = _refuse

    def __bool__(self) -> bool:
        return True


def _compared(name: str) -> Any:
    def compared(self: Several, other: Any) -> Any:
        return getattr(int, name)(self, other) if type(other) is int and other == 0 else self._refuse()

    return compared


for _name in _WITH_NONE:
    setattr(Several, f"__{_name}__", _compared(f"__{_name}__"))
