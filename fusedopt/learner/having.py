"""Callbacks that come and go."""

from __future__ import annotations

from typing import Any

from .callback import Callback
from .checks import as_callback, free_name
from .events import refuse_half
from .order import in_order


class Having:
    """Part of the `Loop`: it has callbacks, under their names."""

    cbs: list[Callback]
    _listening: dict[str, list[Callback]]

    def add_cb(self, cb: Callback | type[Callback]) -> Any:
        """Add the callback ``cb``, or one of this class; it is found under its name from now on."""
        new = as_callback(cb)
        refuse_half(new)
        in_order([*self.cbs, new])  # a cycle is refused before anything has changed
        setattr(self, free_name(new, self), new)
        new.learn = self
        self.cbs.append(new)
        self._listening.clear()
        return self

    def remove_cb(self, cb: Callback | type[Callback]) -> Any:
        """Remove the callback ``cb``, or all of this class."""
        for found in [c for c in self.cbs if c is cb or (isinstance(cb, type) and isinstance(c, cb))]:
            found.learn = None
            self.cbs.remove(found)
            if self.__dict__.get(found.name) is found:
                delattr(self, found.name)
        self._listening.clear()
        return self
