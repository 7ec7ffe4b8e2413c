"""Functions that look at what the layers of a model take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from .batches import mapped


class Hook:
    """Calls ``hook_func(module, input, output)`` whenever ``m`` has run, and keeps in ``stored`` what that returns.

    In a ``with`` block it removes itself at the end, however that is reached; elsewhere call `remove`.
    With ``is_forward`` False it sees the gradients, after the backward pass. ``detach``: tensors come without their
    graph; ``cpu``: and on the CPU.
    """

    def __init__(
        self,
        m: nn.Module,
        hook_func: Callable[[nn.Module, Any, Any], Any],
        is_forward: bool = True,
        detach: bool = True,
        cpu: bool = False,
    ) -> None:
        self.hook_func, self.detach, self.cpu = hook_func, detach, cpu
        self.stored: Any = None
        register = m.register_forward_hook if is_forward else m.register_full_backward_hook
        self.hook = register(self.hook_fn)

    def hook_fn(self, module: nn.Module, input: Any, output: Any) -> None:
        """What torch calls, with the ``module``, its ``input`` and its ``output``."""
        if self.detach:
            input, output = _detached(input, self.cpu), _detached(output, self.cpu)
        self.stored = self.hook_func(module, input, output)

    def remove(self) -> None:
        """Leave the module; a second time does nothing."""
        self.hook.remove()

    def __enter__(self) -> Hook:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class Hooks:
    """A `Hook` with ``hook_func`` and ``kwargs`` on each of the modules ``ms``; a ``with`` block removes them."""

    def __init__(
        self, ms: Iterable[nn.Module], hook_func: Callable[[nn.Module, Any, Any], Any], **kwargs: Any
    ) -> None:
        self.hooks: list[Hook] = []
        try:
            for m in ms:
                self.hooks.append(Hook(m, hook_func, **kwargs))
        except BaseException:
            self.remove()
            raise

    @property
    def stored(self) -> list[Any]:
        """What each has kept."""
        return [hook.stored for hook in self.hooks]

    def remove(self) -> None:
        """Leave all modules."""
        for hook in self.hooks:
            hook.remove()

    def __getitem__(self, i: int) -> Hook:
        return self.hooks[i]

    def __len__(self) -> int:
        return len(self.hooks)

    def __iter__(self) -> Iterator[Hook]:
        return iter(self.hooks)

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def hook_output(module: nn.Module, detach: bool = True, cpu: bool = False, grad: bool = False) -> Hook:
    """A `Hook` that keeps what a module gives, or with ``grad`` the gradients of that; ``detach``, ``cpu`` as there."""
    return Hook(module, _output, is_forward=not grad, detach=detach, cpu=cpu)


def hook_outputs(
    modules: Iterable[nn.Module], detach: bool = True, cpu: bool = False, grad: bool = False
) -> Hooks:
    """`Hooks` that keep what modules give, or with ``grad`` the gradients of that; ``detach``, ``cpu`` as of `Hook`."""
    return Hooks(modules, _output, is_forward=not grad, detach=detach, cpu=cpu)


def _output(module: nn.Module, input: Any, output: Any) -> Any:
    return output


def _detached(x: Any, cpu: bool) -> Any:
    """Its tensors without their graph, in the tuples, lists and dicts that they came in; what else there is stays."""
    return mapped(x, lambda t: t.detach().cpu() if cpu else t.detach())
