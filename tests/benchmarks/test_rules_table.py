"""docs/rules_table.md is what ``python -m benchmarks.rules`` writes, and has every rule."""

from benchmarks import rules as written
from fusedopt import rules, table
from fusedopt.optimizer import Optimizer


def test_the_document_is_what_the_kernels_say():
    assert written.TABLE.read_text(encoding="utf-8") == written.document(), "python -m benchmarks.rules"


def test_a_kernel_that_costs_more_is_noticed():
    row = table.row("rules", "Lion")
    other = table.Row(
        "Lion", "rules", lambda params, **options: rules.LaProp(params, **options), None, row.variants
    )
    assert [(c.launches, c.bytes, c.buffers) for c in map(written.cost, (row, other))] == [
        (1, 20, 1),
        (1, 28, 2),
    ]


def test_what_runs_eagerly_is_said(recwarn):
    def reads(p, lr, **kwargs):
        p.data.sub_(p.grad, alpha=lr * p.grad.mean().item())

    row = table.Row(
        "Reads", "rules", lambda params, **o: Optimizer(params, reads, lr=0.1, **o), None, (table.Variant(),)
    )
    assert written.cost(row).eager == ("reads",)


def test_every_rule_has_a_row():
    found = {name for name in rules.__all__ if name[0].isupper()}
    assert {row.name for row in table.RULES} == found


def test_torch_calls_are_a_cost():
    """A launch between two programs, or several, and what they are given and give."""
    muon, lion = (written.cost(table.row("rules", name)) for name in ("Muon", "Lion"))
    assert lion.calls == "none" and "10 addmm" in muon.calls and muon.launches == 2
    soap = written.cost(table.row("rules", "SOAP"))
    assert soap.calls.count(";") == soap.launches - 2 == 1 and soap.matrices == 4
