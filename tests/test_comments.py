"""Text of other people in generated source: titles, names of callbacks, files, classes, hyperparameters and state keys.

None of it may leave the comment that it stands in, in any language. What is compared is the source without comments:
it must not depend on the text.
"""

import ast
import functools
import io
import re
import tokenize

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt.backends.cpp import render as cpp
from fusedopt.backends.cuda import render as cuda
from fusedopt.backends.triton import render as triton_renderer
from fusedopt.compile import cache
from fusedopt.ir.comments import LONGEST, one_line
from fusedopt.ir.program import Buffer, Graph, Program, identifier, interpret, render_python, verify

LINE_ENDS = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
HOSTILE = [
    *(f"x{end}#error left the comment{end}" for end in LINE_ENDS),
    *(
        "x\\",
        "x\\\n",
        "x\\ ",
        "x??/",
        "x??/\n#error",
        "*/ #error /*",
        '"""',
        "'''",
        "{0}{1}",
        "%s",
        "\0",
        "\ud800",
    ),
    *(
        "\udfff\n",
        "\U0001f600",
        "\u202e",
        "x" * 10_000,
        "\\" * 10_000,
        "\n" * 10_000,
        "",
        " ",
        "#",
        "//",
        "é",
    ),
    '#include "cpu_example.inc"\n',
    "# ---- generated ----\n",
]
texts = st.one_of(
    st.sampled_from(HOSTILE),
    st.lists(st.sampled_from([*HOSTILE[:40], *"ab\\/?*\"'#\t "]), max_size=12).map("".join),
    st.text(st.characters(exclude_categories=()), max_size=60),
)


def program(where: str, key: str) -> Program:
    """One that uses a state key, a hyperparameter's tensor, a slot, and says where its values come from."""
    graph = Graph()
    state, p = (graph.leaf("load", n, kind="F") for n in (f"state.{key}", "param"))
    hyper = graph.leaf("load", f"hyper.{key}")
    x = graph.op("mul", state, graph.leaf("slot", 0), where=lambda: f"{where}, {where}:1")
    x = graph.op("sub", p, graph.op("add", x, hyper, where=lambda: where), where=lambda: f"{where}, a.py:2")
    buffers = {n: Buffer(torch.float32, "F") for n in ("param", f"state.{key}")}
    buffers[f"hyper.{key}"] = Buffer(torch.float32, "S")
    stores = (("param", x), (f"state.{key}", x))
    made = Program(torch.float32, tuple(buffers.items()), tuple(graph.values), stores, 1)
    verify(made)
    return made


def without_comments(source: str, start: str) -> str:
    """Lines as the laxest reader sees them, without what follows ``//`` or ``#``."""
    return "\n".join(line.split(start)[0].rstrip() for line in source.splitlines())


@functools.cache  # what a source is compared with is the same for all examples
def python_tokens(source: str) -> list[str]:
    ast.parse(source)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [t.string for t in tokens if t.type not in (tokenize.COMMENT, tokenize.NL)]


def check(source: str) -> None:
    source.encode("ascii")
    assert not re.search(r"[^ -~\n]", source)
    assert not any(line.endswith(("\\", "??/")) for line in source.split("\n"))
    assert all(len(line) <= LONGEST + 120 for line in source.split("\n"))


@settings(derandomize=True, deadline=None)
@given(texts, texts, texts)
@example("x\n#error", "x\n#error", "x\n#error")
@example("\ud800", "\ud800\\", "x\\")
@pytest.mark.parametrize("renderer", [cpp, cuda, triton_renderer], ids=lambda r: r.__name__.split(".")[-1])
def test_what_is_compiled_does_not_depend_on_titles_and_names(renderer, title, where, slot):
    hostile = renderer.render(program(where, "exp"), [slot], title)
    plain = renderer.render(program("callback", "exp"), ["lr"], "title")
    check(hostile)
    start = "#" if renderer is triton_renderer else "//"
    assert without_comments(hostile, start) == without_comments(plain, start)
    if renderer is triton_renderer:
        assert python_tokens(hostile) == python_tokens(plain)


@given(texts)
@example("x\n    import os  #")
def test_the_printed_program_runs_whatever_its_names_are(where):
    hostile, plain = render_python(program(where, "exp")), render_python(program("callback", "exp"))
    check(hostile)
    assert python_tokens(hostile) == python_tokens(plain)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(texts)
@example("exp avg")
@example("x" * 10_000)
@example("lr\n")
def test_state_keys_and_hyperparameters_become_identifiers(key):
    names = [identifier(f"state.{key}"), identifier(f"hyper.{key}")]
    assert len(set(names)) == 2
    for name in names:
        assert re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) and len(name) < 200
    made = program("callback", key)
    for renderer in (cpp, cuda, triton_renderer):
        check(renderer.render(made))
    namespace = {"torch": torch}
    exec(render_python(made), namespace)
    tensors = {"param": torch.rand(3), f"state.{key}": torch.rand(3), f"hyper.{key}": torch.tensor(0.5)}
    found = namespace["program"](*(tensors[n] for n, _ in made.buffers), 0.25)
    expected = interpret(made, tensors, [0.25])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@given(texts, texts)
def test_different_keys_have_different_names(a, b):
    assert (identifier(f"state.{a}") == identifier(f"state.{b}")) == (a == b)


def test_a_name_that_was_made_is_not_taken_for_a_key():
    made = identifier("state.a b")
    assert identifier(f"state.{made}") != made
    assert identifier("state.hyper_lr") != identifier("hyper.lr")


@given(texts)
def test_what_can_be_shown_is_kept(text):
    safe = one_line(text)
    assert len(safe) <= LONGEST and one_line(safe[:100].replace("\\", "/")) == safe[:100].replace("\\", "/")
    if re.fullmatch(r"[ -Z^-~]{,1000}", text) and "??" not in text:
        assert safe == text


def test_a_long_text_is_cut():
    assert one_line("x" * 10_000) == "x" * (LONGEST - 3) + "..."
    assert one_line("x" * LONGEST) == "x" * LONGEST


@given(texts)
def test_files_have_plain_names(name):
    assert re.fullmatch(r"[\w-]{0,80}_[0-9a-f]{20}", cache.stem(name, "0" * 64), re.ASCII)


# ---------------------------------------------------------------- compiled


def code(marker) -> str:
    """Text that makes a file when a library with it is loaded."""
    return (
        "\n#include <cstdio>\n__attribute__((constructor)) static void boom() "
        f'{{ FILE* f = std::fopen("{marker}", "w"); if (f) std::fclose(f); }}\n//'
    )


def stepped(callback, optimizer=fusedopt.Optimizer, backend="cpp", **options) -> fusedopt.Optimizer:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = optimizer([p], callback, lr=0.1, backend=backend, **options)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))
    return opt


def descend(p, lr, **kwargs):
    p.data.sub_(p.grad, alpha=lr)


def endings(text: str) -> list[str]:
    return [f"x{text}", f"x{text}".replace("\n", "\r"), "x\\", f"x\ud800{text}", "\\" * 10_000]


@pytest.mark.parametrize("k", range(5))
def test_titles_and_class_names_with_code_do_not_run_it(k, tmp_path):
    name = endings(code(tmp_path / "executed"))[k]
    stepped(descend, title=name)
    if "\ud800" not in name:  # which no class can be called
        stepped(descend, type(name, (fusedopt.Optimizer,), {}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("k", range(5))
def test_callbacks_and_files_with_code_in_their_names_do_not_run_it(k, tmp_path):
    name = endings(code(tmp_path / "executed"))[k]

    def other(p, lr, **kwargs):
        p.data.sub_(p.grad, alpha=lr)

    other.__name__ = other.__qualname__ = name
    stepped(other)
    if "\ud800" not in name:
        other.__code__ = other.__code__.replace(co_name=name, co_filename=f"/a/{name}")
        stepped(other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("k", range(5))
def test_state_and_hyperparameters_with_code_in_their_names_do_not_run_it(k, tmp_path):
    name = endings(code(tmp_path / "executed"))[k]

    class Keeping:
        def __call__(self, p, lr, **kwargs):
            p.data.sub_(p.grad * kwargs[name], alpha=lr)
            return {f"{name}.": kwargs.get(f"{name}.", torch.zeros_like(p.data)) + p.grad}

    stepped(Keeping(), **{name: 1.0})
    assert list(tmp_path.iterdir()) == []
