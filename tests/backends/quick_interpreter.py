"""Triton's interpreter without what it does again and again."""

import types
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Before every call of a function, in a kernel too, it looks through the whole language for what to patch, and
    finds it patched: most of its time. From here on the language stays patched, and it looks no more.

    For processes in which everything is interpreted, and Tritons that work so: others are left as they are.
    """

    def ours() -> None:
        """Sees the language as kernels do; the language's own functions see tl.core."""

    if hasattr(interpreter, "_LangPatchScope"):
        for function in (ours, tl.sum.fn):
            interpreter._patch_lang(function)
        interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def rewrite_once() -> None:
    """It writes each kernel file's functions anew, from their source: those of the skeleton, which are the same in
    every file, are written once from here on. Functions of one code and one signature differ in their globals alone.
    """
    written: dict[tuple[types.CodeType, str], types.FunctionType] = {}
    first_time = interpreter.FunctionRewriter.rewrite_ast

    def rewrite(self: Any) -> types.FunctionType:
        fn = self.fn
        key = fn.__code__, repr((fn.__annotations__, fn.__defaults__, fn.__kwdefaults__))
        if key not in written:
            written[key] = first_time(self)
        same = written[key]
        there = fn.__globals__
        there.update({name: value for name, value in vars(interpreter).items() if name not in there})
        again = types.FunctionType(same.__code__, there, fn.__name__, same.__defaults__, same.__closure__)
        again.__annotations__, again.__kwdefaults__ = same.__annotations__, same.__kwdefaults__
        return again

    interpreter.FunctionRewriter.rewrite_ast = rewrite


def look_types_up_once() -> None:
    """NumPy's type for one of Triton's is looked up in a table that the interpreter makes for every operation."""
    found: dict[str, np.dtype] = {}
    first_time = interpreter._get_np_dtype

    def numpy_type(given: Any) -> np.dtype:
        if given.name not in found:
            found[given.name] = first_time(given)
        return found[given.name]

    interpreter._get_np_dtype = numpy_type


def join_in_halves() -> None:
    """A block is joined by a function of two numbers as on a GPU: one half with the other, and again what that leaves.

    The interpreter calls the function for one number after another, a hundred times as often.
    """
    interpreter.ReduceOps.generic_reduce = in_halves


def in_halves(reduction: Any, given: tuple[Any, ...]) -> list[Any]:
    """What takes the place of `ReduceOps.generic_reduce`, for one block along one axis."""
    assert len(given) == 1 and reduction.axis is not None and not reduction.keep_dims
    (block,) = given
    found = block
    while (n := found.handle.data.shape[reduction.axis]) > 1:
        assert n % 2 == 0, "a block has a power of two of elements along each axis"
        halves = np.split(found.handle.data, 2, axis=reduction.axis)
        found = reduction.combine_fn.fn(*(reduction.to_tensor(half, block.dtype) for half in halves))
    return [reduction.to_tensor(np.take(found.handle.data, 0, axis=reduction.axis), block.dtype)]
