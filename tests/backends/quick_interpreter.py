"""Triton's interpreter without what it does again and again."""

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
