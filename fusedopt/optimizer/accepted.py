"""What an optimizer accepts (callbacks, hyperparameters, groups, gradients, state), and what it says of the rest."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .. import callback, env
from ..callback import arguments_of, defaults_of
from ..step.reference import FLOATS
from . import names
from .checkpoint import FASTAI
from .loadable import LOOKAHEAD
from .state import COUNTERS, FLAGS


def as_callbacks(cbs: Any) -> list[Callable[..., Any]]:
    listed = isinstance(cbs, Iterable) and not isinstance(cbs, str) and not callable(cbs)
    found = list(cbs) if listed else [cbs]
    for cb in found:
        if not callable(cb):
            raise TypeError(f"callbacks must be callable; {cb!r} is not")
    return found


def list_of(group: Mapping[str, Any], own: list[Callable[..., Any]]) -> list[Callable[..., Any]]:
    """The callbacks of a param group: its own, else the optimizer's."""
    found = group.get(callback.GROUPS_OWN)
    return own if found is None else as_callbacks(found)


COMMON = (
    "lr", "mom", "sqr_mom", "wd", "eps", "dampening", "maximize", "foreach", "fused", "capturable", "differentiable",
)  # fmt: skip
"""Hyperparameters that are accepted whether or not a callback takes them."""


def check_known(
    hypers: Iterable[str],
    cbs: Sequence[Callable[..., Any]],
    what: str = "hyperparameter",
    common: Sequence[str] = (*COMMON, "backend", "state_dtype", "title"),
) -> None:
    """Raise TypeError for a hyperparameter that no callback takes: most likely a typing error."""
    taken = set(common)
    for cb in cbs:
        found = callback.looked_up(cb)
        if found is None:
            return  # a callable object may take anything
        taken |= found | arguments_of(cb).keys() | defaults_of(cb).keys()
    for name in hypers:
        if name not in taken:
            near = difflib.get_close_matches(name, {*taken, *(names.TORCH if common else ())}, 1)
            hint = f"did you mean {near[0]!r}?" if near else "name it among a callback's arguments"
            if common and name in names.TORCH:
                hint = f"its name for callbacks is {' and '.join(map(repr, names.TORCH[name]))}"
            raise TypeError(f"no callback takes the {what} {name!r}; {hint}")


class Roles(NamedTuple):
    """What names mean to a list of callbacks.

    state: what they keep: arguments that one of them names among the keys it returns
    taken: what else they take, and so may find in a param group; None if one of them may take anything
    never: the parameter itself, and what a partial has bound
    """

    state: frozenset[str]
    taken: frozenset[str] | None
    never: frozenset[str]

    def ignores(self, name: Any) -> bool:
        """Whether what is kept in the state under this name is handed to no callback."""
        return name in self.never or callback.is_temporary(name)

    def hands(self, name: str, own: Iterable[str]) -> bool:
        """Whether a key of a param group goes to callbacks; ``own``: the hyperparameters the optimizer was given."""
        if name in own:
            return True
        return name not in self.state | self.never and (self.taken is None or name in self.taken)


def roles_of(cbs: Iterable[Callable[..., Any]], stored: Iterable[str], closed: bool) -> Roles:
    """The roles of names in callbacks that keep state under the names ``stored`` too.

    ``closed``: what our own callbacks can be told beyond the hyperparameters that the optimizer was given is not taken.
    """
    arguments, bound, first = set[str](), set[str](), set[str]()
    mentioned, returned, anything = set[str](), {*COUNTERS, *FASTAI, *FLAGS, *LOOKAHEAD, *stored}, False
    for cb in cbs:
        own = list(arguments_of(cb))
        given = set(cb.keywords) if isinstance(cb, functools.partial) else set()
        found = callback.looked_up(cb)
        if not (closed and callback.is_ours(cb)):
            arguments |= {*own} - given
            mentioned |= found or set()
        bound |= given
        first |= set(own[:1])
        anything |= found is None
        returned |= (found or set()) & {*own}
        returned |= callback.keys_made(cb)
    taken = None if anything else frozenset((arguments | mentioned) - returned)
    return Roles(frozenset(returned), taken, frozenset(first | bound))


def warn_of_misspelt(strange: Iterable[str], known: Iterable[str]) -> None:
    """Warn of a group's keys that no callback takes, where they look like one that is taken.

    What other libraries keep in groups ("lr_mult", "initial_lr", "max_momentum") passes in silence, as in torch.
    """
    known = {*known, *COMMON, *names.TORCH}
    for key in strange:
        pieces = key.lower().split("_")
        near = difflib.get_close_matches(key.lower(), known, 1, 0.8)
        if (
            near
            and key not in known
            and not any(set(name.split("_")) <= {*pieces} for name in near if name != key.lower())
        ):
            warnings.warn(
                f"the param group's key {key!r} is no hyperparameter of this optimizer and has no effect; did you "
                f"mean {near[0]!r}? A key that is another library's may stay under a name less alike",
                UserWarning,
                stacklevel=env.caller_level(),
            )


def last(value: Any) -> Any:
    return value.stop if isinstance(value, slice) else value[-1]


def is_listed(name: str, value: Any) -> bool:
    """Whether a hyperparameter has one value per group: a slice, or a list or array of more than one."""
    if isinstance(value, slice):
        return True
    if not _is_row(name, value):
        return False
    if not len(value):
        raise ValueError(f"{name} is empty; give one number, or one per param group")
    return len(value) > 1


def _is_row(name: str, value: Any) -> bool:
    kinds = (list, tuple) if name == "lr" else list
    return isinstance(value, kinds) or getattr(value, "ndim", 0) == 1


def default_of(name: str, value: Any) -> Any:
    """The default that a hyperparameter given to the constructor is for groups: its last value, or the only one."""
    if is_listed(name, value) or (_is_row(name, value) and not isinstance(value, torch.Tensor)):
        value = last(value)
    return names.plain(value)


def as_param_groups(params: Any) -> Any:
    """Params as torch takes them: a list of lists (fastai's splitters) becomes one group per list.

    A lone tensor is a list of one, as in fastai.
    """
    if isinstance(params, torch.nn.Module) and not _lists_parameters(params):
        raise TypeError(
            f"params are parameters, not a model (a {type(params).__name__}); give model.parameters()"
        )
    if isinstance(params, torch.Tensor):
        return [params]
    if isinstance(params, Mapping):
        return params  # torch says what is wrong
    found = list(params)
    is_group = [not isinstance(p, (torch.Tensor, dict)) and _is_list(p) for p in found]
    if not any(is_group):
        return found
    for i, (group, p) in enumerate(zip(is_group, found, strict=True)):
        if not group:
            raise ValueError(
                f"group {i} is a {type(p).__name__}, not a list of parameters, while others are lists"
            )
    return [{"params": list(p)} for p in found]


def _lists_parameters(module: Any) -> bool:
    """Whether a module is an iterable of parameters, as a ParameterList is, and not of layers."""
    return hasattr(module, "__iter__") and not any(isinstance(p, torch.nn.Module) for p in module)


def _is_list(p: Any) -> bool:
    """A list of parameters, not torch's ``(name, parameter)`` pair."""
    return (
        isinstance(p, Iterable)
        and not isinstance(p, str)
        and not (isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str))
    )


def hyper_of(group: dict[str, Any], name: str, value: Any) -> Any:
    """A hyperparameter as callbacks get it: a number, or a tensor of a capturable group, which kernels read."""
    there = {p.device for p in group["params"][:1]}
    if isinstance(value, torch.Tensor) and group.get("capturable") and {value.device} == there:
        return value.detach().reshape(())
    value = names.number(value)
    names.check(name, value)
    return value


def check_state(p: torch.Tensor, state: Mapping[str, Any], group: int, i: int) -> None:
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.device != p.device:
            raise RuntimeError(
                f"the state {key!r} of parameter {i} of group {group} is on {value.device}, the parameter on "
                f"{p.device}; move the model before the state dict is loaded, or the state with it"
            )


def one_each(name: str, given: Any, params: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Extra tensors as a list, one for every parameter, or None where there is none."""
    if isinstance(given, Mapping):
        known = set(params)
        if strange := [p for p in given if not isinstance(p, torch.Tensor) or p not in known]:
            shown = tuple(strange[0].shape) if isinstance(strange[0], torch.Tensor) else repr(strange[0])
            raise ValueError(
                f"the extra tensors {name!r} are by parameter, and {shown} is no parameter of this optimizer"
            )
        return [given.get(p) for p in params]
    if isinstance(given, torch.Tensor) or not isinstance(given, Iterable):
        raise TypeError(
            f"the extra tensors {name!r} are a list with one per parameter, or a dict by parameter, not a "
            f"{type(given).__name__}"
        )
    found = list(given)
    if len(found) != len(params):
        raise ValueError(
            f"the extra tensors {name!r} are {len(found)}, the parameters {len(params)}. Remedy: a list with one per "
            "parameter, None where there is none, or a dict by parameter"
        )
    return found


def check_extra(p: torch.Tensor, name: str, value: Any, group: int, i: int, taken: bool) -> None:
    what = f"the extra tensor {name!r} of parameter {i} of group {group}"
    if taken:
        raise ValueError(f"{what} has the name of its state, or of a hyperparameter; choose another")
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.dtype not in FLOATS:
        kind = (
            f"{value.layout} {value.dtype} tensor"
            if isinstance(value, torch.Tensor)
            else type(value).__name__
        )
        raise TypeError(f"{what} must be a dense floating point tensor; it is a {kind}")
    if value.device != p.device:
        raise ValueError(f"{what} is on {value.device}, the parameter on {p.device}")
    if value.shape not in (p.shape, ()):
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}. Remedy: that shape, or one number "
            "for the parameter, of shape ()"
        )


def check_gradient(p: torch.Tensor, grad: torch.Tensor, group: int, i: int) -> None:
    what = f"the gradient of parameter {i} of group {group}"
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{what} is sparse; use dense gradients (sparse=False) or torch.optim.SparseAdam for it"
        )
    if grad.device != p.device:
        raise RuntimeError(
            f"{what} is on {grad.device}, the parameter on {p.device}; move the model as a whole"
        )
    if grad.shape != p.shape:
        raise RuntimeError(f"{what} has shape {tuple(grad.shape)}, the parameter {tuple(p.shape)}")
    if p.dtype not in FLOATS or grad.dtype not in FLOATS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise RuntimeError(
            f"parameter {i} of group {group} is {p.dtype} with a {grad.dtype} gradient; {known} only"
        )
    if not p.is_contiguous() and torch._debug_has_internal_overlap(p) == 1:
        raise RuntimeError(f"parameter {i} of group {group} is expanded, several elements are one; clone it")
