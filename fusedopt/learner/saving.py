"""Models and Learners on disk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .callback import Callback
from .callbacks.recorder import print_line

SUFFIX = ".pth"
READ_ERRORS = (pickle.UnpicklingError, EOFError, RuntimeError, ValueError)


class Saving:
    """The Learner's methods for it."""

    path: Path
    model: nn.Module
    opt: Any
    dls: Any
    logger: Any
    cbs: list[Callback]
    create_opt: Any
    _forget_batch: Any
    _running: bool

    def save(self, file: str | Path, with_opt: bool = True) -> Path:
        """Write the model's state, and the optimizer's; returns the file. fastai and ``torch.load`` can read it.

        Args:
            file: relative to ``learn.path``; ``.pth`` is added. (fastai has a folder ``models`` in between.)
            with_opt: as ``{"model": ..., "opt": ...}``; else the model's state alone. Without optimizer there is none.
        """
        state: Any = self.model.state_dict()
        if with_opt and self.opt is not None:
            state = {"model": state, "opt": self.opt.state_dict()}
        return _write(state, self._file(file))

    def load(self, file: str | Path, with_opt: bool | None = None, strict: bool = True) -> Any:
        """Read what `save` wrote, wherever model and optimizer are now. Runs no code that the file may contain.

        Args:
            file: as for `save`.
            with_opt: the optimizer's state too; None: if there is one.
            strict: refuse a file with other parameters than the model's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such file, or of another model or optimizer.
        """
        path = self._file(file)
        state = _read(path, weights_only=True)
        full = isinstance(state, dict) and state.keys() == {"model", "opt"}
        if with_opt and not full:
            raise ValueError(f"{path} has no optimizer's state; load it with with_opt=False")
        try:
            self.model.load_state_dict(state["model"] if full else state, strict=strict)
        except (RuntimeError, TypeError, AttributeError) as error:
            remedy = "load it into the model it was saved from, or with strict=False what fits by name"
            raise ValueError(f"{path} is of another model; {remedy}: {error}") from error
        if full and with_opt is not False:
            if self.opt is None:
                self.create_opt()
            try:
                self.opt.load_state_dict(state["opt"])
            except (ValueError, KeyError, TypeError) as error:
                remedy = "load it with with_opt=False, or make the optimizer as it was"
                raise ValueError(f"{path} is of another optimizer; {remedy}: {error}") from error
        return self

    def export(self, fname: str | Path = "export.pkl") -> Path:
        """Write the whole Learner, for predictions elsewhere: without data, optimizer and callbacks' hooks.

        It is a pickle: whoever loads it must have the code of your model, and trust you. To hand on weights, `save`.

        Args:
            fname: relative to ``learn.path``.

        Raises:
            ValueError: something of the Learner cannot be pickled, or a fit runs that it would cut short.
        """
        self._clean_up_for_export()
        path = Path(self.path) / fname
        kept = dict(self.__dict__)
        self._forget_batch()
        self.dls, self.opt, self.logger, self._running = NoData(self.dls), None, print_line, False
        try:
            return _write(self, path)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            remedy = (
                "use functions and classes from the top of a module, no lambdas, for all that the Learner has"
            )
            raise ValueError(f"{path} cannot be written: {error}; {remedy}") from error
        finally:
            self.__dict__.update(kept)

    def _clean_up_for_export(self) -> None:
        """Callbacks give back what no file can have; those that need it in a fit that runs are in the way."""
        cleaning = [cb for cb in self.cbs if type(cb).clean_up is not Callback.clean_up]
        if self._running and cleaning:
            names = ", ".join(map(repr, cleaning))
            raise ValueError(
                f"export in a fit would end what these callbacks do in it: {names}; export when it has ended, or save "
                f"the weights with learn.save"
            )
        for cb in cleaning:
            cb.clean_up()

    def _file(self, file: str | Path) -> Path:
        path = Path(self.path) / file
        return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def load_learner(fname: str | Path, cpu: bool = True) -> Any:
    """The Learner of a file that ``learn.export`` wrote, ready to predict; to train it, give it data: ``learn.dls``.

    **Loading runs whatever code the file contains. Do so only with files that you trust**, as you would run a program
    of the same origin. Weights alone are safe: `Learner.save` and `Learner.load`.

    Args:
        fname: the whole path.
        cpu: bring the model to the CPU; else where it was.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it was not written by ``export``.
    """
    path = Path(fname)
    learn = _read(path, weights_only=False, map_location="cpu" if cpu else None)
    if not isinstance(learn, Saving):
        raise ValueError(f"{path} has no Learner but a {type(learn).__name__}; weights are for learn.load")
    return learn


class NoData:
    """In the place of an exported Learner's loaders: what they say of batches, but no batches."""

    def __init__(self, dls: Any) -> None:
        self.__dict__.update({k: getattr(dls, k) for k in ("n_inp", "vocab") if hasattr(dls, k)})

    def __getitem__(self, i: int) -> Any:
        raise ValueError(
            "this Learner was exported, without data: set learn.dls = (train, valid), or give dl"
        )


def _write(state: Any, path: Path) -> Path:
    """All or nothing: what was there before stays until the new file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        torch.save(state, part)
        return part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path, weights_only: bool, map_location: str | None = "cpu") -> Any:
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))
        found = f"there are {', '.join(there)}" if there else "there is none of its kind"
        raise FileNotFoundError(f"{path} does not exist; in its folder {found}")
    try:
        return torch.load(path, map_location=map_location, weights_only=weights_only)
    except READ_ERRORS as error:
        raise ValueError(
            f"{path} cannot be read: is it whole, and was it written by fusedopt? {error}"
        ) from error
