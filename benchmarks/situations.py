"""What steps look like beside the middle of the road: between real passes, with parts left out, under FSDP2.

A row says what happens before every step, off the clock and to every provider alike, and what its numbers must reach.
Rows with processes of their own are run as ``main``, in one or two of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

import fusedopt
import fusedopt.optim

from .cases import CASES, Pair, Separable, SmallTensors, Training
from .measure import ROOT, Effort, Race, Row, agree, in_new_process, step_rows
from .providers import PROVIDERS, RULES, Rule, Runner

CASE = "situations"
"""Under which they stand in the results."""
STEPS_CHECKED = 8
"""Steps in which all must agree: Lookahead moves in the sixth, RAdam adapts then, and each head has had its turn."""


@dataclass(frozen=True)
class Bound:
    """``≥``: another's time over ours; ``≤``: our time over another's. Against nobody: what was measured itself."""

    sign: str
    limit: float
    against: str | None = "torch fused"
    what: str = "step"
    unit: str = "×"


@dataclass
class Scene:
    """One provider before a step, its ``k``-th."""

    runner: Runner
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    k: int = 0

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.runner.optimizer.param_groups

    def set(self, **values: Any) -> None:
        """Write into every group."""
        for group in self.groups:
            group.update(values)

    def keep(self, kept: Callable[[int], bool]) -> None:
        """Take the gradients of all others away."""
        for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
            p.grad = g if kept(i) else None


Change = Callable[[Scene], Any]


@dataclass(frozen=True)
class Situation:
    """One row.

    change: before every step; None: rates and momentum change, as in all other benchmarks. start: what is done to the
    tensors once. plain: the rule of ``fusedopt plain``, which need not compute the same. wrap: changes a provider.
    times: steps that are timed as one. network: whose passes are between steps. world: processes of a sharded model.
    checked: steps in which all must agree. first_step: of a process is measured, and nothing else.
    """

    name: str
    bounds: tuple[Bound, ...]
    change: Change | None = None
    rule: Rule = RULES["AdamW"]
    providers: tuple[str, ...] = ("torch fused", "fusedopt")
    case: str = "500x64"
    start: Callable[[list[Tensor]], Any] = lambda params: None
    plain: Rule | None = None
    plain_agrees: bool = True
    wrap: Callable[[Runner, Sequence[Tensor]], Any] = lambda runner, params: None
    times: int = 1
    network: type[SmallTensors] | type[Separable] | None = None
    world: int = 0
    checked: int = STEPS_CHECKED
    extension: bool = True
    first_step: bool = False

    @property
    def id(self) -> str:
        """Its name on the command line."""
        return "/".join(self.key)

    @property
    def key(self) -> tuple[str, str, str]:
        """Case, rule and mode in the results."""
        return CASE, self.rule.name, self.name

    def runners(self, params: Sequence[Tensor]) -> list[Runner]:
        """All providers, which do what the row says before they step."""
        grads = [p.grad for p in params]
        out = [PROVIDERS[name](self.rule, params, [self.rule.lr]) for name in self.providers]
        if self.plain:
            runner = PROVIDERS["fusedopt"](self.plain, params, [self.plain.lr])
            out.append(replace(runner, name="fusedopt plain", comparable=self.plain_agrees))
        for runner in out:
            self.wrap(runner, params)
            if self.change:
                runner.set, runner.prepare = (
                    lambda *_: None,
                    partial(_before, self.change, Scene(runner, params, grads)),
                )
            if self.times > 1:
                runner.step = partial(_repeat, runner.step, self.times)
        return out


def _before(change: Change, scene: Scene) -> None:
    change(scene)
    scene.k += 1


def _repeat(step: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        step()


# --
# What happens before a step


def nothing(scene: Scene) -> None:
    """The same step again."""


def numpy_rate(scene: Scene) -> None:
    """What LambdaLR makes of a function with np.cos."""
    scene.set(lr=1e-3 * (1.5 + np.cos(scene.k / 1000)))


def tensor_rate(scene: Scene) -> None:
    if scene.k == 0:
        scene.set(lr=torch.tensor(1e-3))
    scene.groups[0]["lr"].fill_(1e-3 * (1.5 + math.cos(scene.k / 1000)))


def tensor_betas(scene: Scene) -> None:
    if scene.k == 0:
        scene.set(betas=(torch.tensor(0.9), torch.tensor(0.999)))
    scene.groups[0]["betas"][0].fill_(0.9 + 0.05 * math.cos(scene.k))


def layer_drop(scene: Scene) -> None:
    """A tenth of all tensors has no gradient, other ones in each step."""
    total = len(scene.params)
    dropped = {*random.Random(scene.k).sample(range(total), math.ceil(total / 10))}
    scene.keep(lambda i: i not in dropped)


def heads_in_turn(scene: Scene) -> None:
    """The last fifth is five heads, one of which has gradients."""
    total = len(scene.params)
    scene.keep(lambda i: i < 0.8 * total or i % 5 == scene.k % 5)


def new_data(scene: Scene) -> None:
    """What SAM does when it goes back to where it was."""
    for p in scene.params:
        p.data = p.data.clone()


def new_state(scene: Scene) -> None:
    for state in scene.runner.optimizer.state.values():
        state.update({k: state[k].clone() for k in ("exp_avg", "exp_avg_sq")})


def gradient_as_it_was(scene: Scene) -> None:
    scene.params[0].grad = scene.grads[0]


def channels_last(params: list[Tensor]) -> None:
    params[0].grad = params[0].grad.to(memory_format=torch.channels_last)


def transposed(params: list[Tensor]) -> None:
    params.insert(0, params.pop(1))
    params[0].grad = params[0].grad.t().contiguous().t()


def relaid(runner: Runner, params: Sequence[Tensor]) -> None:
    """torch's fused AdamW on CPUs takes every gradient to be laid out as its parameter is; its caller sees to that."""
    if runner.name != "torch fused":
        return
    p, step = params[0], runner.step

    def contiguous_first() -> None:
        p.grad = p.grad.contiguous()
        step()

    runner.step = contiguous_first


def new_groups(scene: Scene) -> None:
    scene.groups[:] = map(dict, scene.groups)


def tuple_of_params(scene: Scene) -> None:
    scene.set(params=tuple(scene.groups[0]["params"]))


def new_strings(scene: Scene) -> None:
    scene.set(name="".join(("bo", "dy")))


def decay_on_and_off(scene: Scene) -> None:
    scene.set(weight_decay=(0.0, 0.01)[scene.k % 2])


def whole_rate_and_not(scene: Scene) -> None:
    scene.set(lr=(1, 0.5)[scene.k % 2])


def factor_as_argument(scene: Scene) -> None:
    """For a callback whose schedule is in its arguments."""
    for group in scene.groups:
        if "factor" in group:
            group["factor"] = math.exp(-scene.k / 1000)


def another_optimizer(scene: Scene) -> None:
    """One that has loaded what the one before has saved."""
    runner = scene.runner
    new = PROVIDERS[runner.name](RULES["AdamW"], scene.params, [1e-3]).optimizer
    new.load_state_dict(runner.optimizer.state_dict())
    runner.optimizer, runner.step = new, new.step


# --
# Callbacks

BETA = 0.9


def constant_momentum(p, lr, grad_avg=None, **kwargs):
    """Reads a module's constant."""
    if grad_avg is None:
        grad_avg = torch.zeros_like(p.data)
    grad_avg.mul_(BETA).add_(p.grad.data, alpha=1 - BETA)
    p.data.sub_(grad_avg, alpha=lr)
    return {"grad_avg": grad_avg}


def given_momentum(p, lr, beta, grad_avg=None, **kwargs):
    """The same with an argument."""
    if grad_avg is None:
        grad_avg = torch.zeros_like(p.data)
    grad_avg.mul_(beta).add_(p.grad.data, alpha=1 - beta)
    p.data.sub_(grad_avg, alpha=lr)
    return {"grad_avg": grad_avg}


def own_schedule(p, lr, step=0, **kwargs):
    """Has its schedule inside."""
    p.data.sub_(p.grad.data, alpha=lr * math.exp(-step / 1000))
    return {"step": step + 1}


def given_schedule(p, lr, factor, step=0, **kwargs):
    """The same with an argument."""
    p.data.sub_(p.grad.data, alpha=lr * factor)
    return {"step": step + 1}


def cumulative(p, lr, **kwargs):
    """Has an operation that does not fuse."""
    p.data.sub_(torch.cumsum(p.grad.data, 0), alpha=1e-3 * lr)


def _rule(name: str, *cbs: Callable, **hypers: Any) -> Rule:
    return Rule(name, partial(fusedopt.Optimizer, cbs=list(cbs)), dict(lr=1e-3, **hypers))


ADAM = Rule("Adam", fusedopt.Adam, dict(lr=1e-3))
ADAM_CBS = fusedopt.Adam([torch.zeros(1)], lr=1e-3).cbs
LOOKAHEAD = Rule("Lookahead(Adam)", lambda p, lr: fusedopt.Lookahead(fusedopt.Adam(p, lr=lr)), dict(lr=1e-3))
RANGER = Rule("ranger", fusedopt.ranger, dict(lr=1e-3))
CLIPPED = replace(RULES["AdamW"], ours=partial(fusedopt.optim.AdamW, max_grad_norm=1.0))
LAMB = RULES["LAMB"]


# --
# Under FSDP2


class Layers(nn.Sequential):
    """A stack of small layers: 4 tensors each."""

    def __init__(self, count: int = 75, width: int = 64) -> None:
        super().__init__(
            *(nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh()) for _ in range(count))
        )


def sharded(layers: int) -> list[nn.Parameter]:
    """A model's parameters with gradients, shared out among all processes."""
    torch.manual_seed(0)
    model = Layers(layers)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    model(torch.randn(8, 64)).square().sum().backward()
    return list(model.parameters())


def local_parts(params: Sequence[Tensor]) -> list[Tensor]:
    """What of sharded parameters and gradients is here, in the same memory."""
    parts = [p.to_local().detach() for p in params]
    for part, p in zip(parts, params, strict=True):
        part.grad = p.grad.to_local()
    return parts


def all_at_once(scene: Scene) -> None:
    dist.barrier()


def gradients_restored(scene: Scene) -> None:
    """clip_grad_norm_ changes them."""
    if scene.k == 0:
        scene.grads = [g.clone() for g in scene.grads]
    for p, g in zip(scene.params, scene.grads, strict=True):
        torch.mul(g.to_local(), (1.0, -0.5, 0.7)[scene.k % 3], out=p.grad.to_local())
    dist.barrier()


def clip_first(runner: Runner, params: Sequence[Tensor]) -> None:
    if runner.name != "torch fused":
        return
    step = runner.step

    def clipped() -> None:
        clip_grad_norm_(params, 1.0)
        step()

    runner.step = clipped


# --
# The rows

_ALONE = ("fusedopt",)
_CHECKED = ("eager", "fusedopt")
_PLAIN = "fusedopt plain"


def _faster(limit: float, against: str = "torch fused") -> tuple[Bound, ...]:
    return (Bound("≥", limit, against),)


def _within(limit: float, against: str) -> tuple[Bound, ...]:
    return (Bound("≤", limit, against),)


def _at_most(limit: float, unit: str, what: str) -> tuple[Bound, ...]:
    return (Bound("≤", limit, None, what, unit),)


def _trained(name: str, network: Any) -> Situation:
    providers = ("torch fused", "bare loop", "fusedopt")
    return Situation(name, _faster(9) + _within(1.5, "bare loop"), network=network, providers=providers)


def _classes() -> list[Situation]:
    """Classes of pytorch-optimizer, if it is there, fused: against their own step, and against callbacks."""
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return []
    module = importlib.import_module("pytorch_optimizer")
    alike = {"Lion": RULES["Lion"], "AdaBelief": RULES["AdaBelief"]}
    rows = []
    for name in ("Lion", "AdaBelief", "Adan", "StableAdamW", "ScheduleFreeAdamW"):
        kind = partial(_in_training, getattr(module, name))
        rule = Rule(name, fusedopt.fuse(kind), dict(lr=1e-3), kind)
        plain = alike.get(name)
        bounds = _faster(15, "torch default") + (_within(1.2, _PLAIN) if plain else ())
        providers = ("torch default", "fusedopt")
        rows.append(
            Situation(
                "a class, fused",
                bounds,
                None,
                rule,
                providers,
                plain=plain,
                plain_agrees=False,
                wrap=_not_compared if name == "ScheduleFreeAdamW" else Situation.wrap,
            )
        )
    return rows


def _not_compared(runner: Runner, params: Sequence[Tensor]) -> None:
    """For a class that writes into gradients, which all providers have in common."""
    runner.comparable = False


def _in_training(kind: Callable[..., Any], params: Any, **hypers: Any) -> Any:
    opt = kind(params, **hypers)
    if callable(getattr(opt, "train", None)):
        opt.train()
    return opt


def _under_fsdp2(world: int) -> list[Situation]:
    name, row = f"FSDP2, processes: {world}", partial(Situation, bounds=_faster(1.5), world=world, checked=3)
    return [
        row(name, change=all_at_once),
        row(f"{name}, max_grad_norm", rule=CLIPPED, wrap=clip_first, change=gradients_restored),
        row(name, bounds=_faster(1.5, "eager"), rule=LAMB, providers=_CHECKED, change=all_at_once),
    ]


SITUATIONS = (
    Situation("the same step again", _faster(12), nothing),
    _trained("between passes", SmallTensors),
    _trained("between passes of another network", Separable),
    Situation("lr a np.float64", _faster(8), numpy_rate),
    Situation("lr a tensor", _faster(8), tensor_rate),
    Situation("betas tensors", _faster(8), tensor_betas),
    Situation("a random tenth without gradients", _faster(5), layer_drop),
    Situation("heads in turn", _faster(5), heads_in_turn),
    Situation("p.data replaced", _faster(5), new_data),
    Situation("state replaced", _faster(5), new_state),
    *(
        Situation(
            f"a gradient {how.__name__}", _faster(4), gradient_as_it_was, case="200-mixed", start=how, wrap=relaid
        )
        for how in (channels_last, transposed)
    ),
    Situation("groups rebuilt", _faster(4), new_groups),
    Situation("params a tuple", _faster(4), tuple_of_params),
    Situation("new strings in a group", _faster(4), new_strings),
    Situation("weight decay 0 and 0.01", _faster(4), decay_on_and_off),
    Situation("lr int and float", _faster(4), whole_rate_and_not),
    *_under_fsdp2(1),
    *_under_fsdp2(2),
    *(
        Situation("six steps", _within(1.5, _PLAIN), nothing, rule, _CHECKED, plain=ADAM, plain_agrees=False, times=6)
        for rule in (LOOKAHEAD, RANGER)
    ),
    Situation(
        "a callback reads a constant", _within(1.2, _PLAIN), nothing,
        _rule("momentum", constant_momentum), _ALONE, plain=_rule("momentum", given_momentum, beta=0.9),
    ),
    Situation(
        "a callback has a schedule", _within(1.2, _PLAIN), factor_as_argument,
        _rule("SGD", own_schedule), _ALONE, plain=_rule("SGD", given_schedule, factor=1.0),
    ),
    Situation(
        "a callback that does not fuse", _within(1.0, "eager"), nothing,
        _rule("Adam", cumulative, *ADAM_CBS, mom=0.9, sqr_mom=0.99, eps=1e-5, wd=0.01), _CHECKED,
    ),
    *_classes(),
    Situation("a first step with loaded state", _at_most(5, "µs", "step per tensor"), another_optimizer),
    Situation("without the extension", _faster(1), nothing, extension=False),
    Situation("numbers change", _at_most(60, "µs", "host"), providers=("fusedopt",)),
    Situation("a process's first, empty cache", _at_most(0.08, "s", "first step"), first_step=True),
)  # fmt: skip


# --
# Measuring


def measure(situation: Situation, effort: Effort) -> list[Row]:
    """Everything about one row, in an eighth of the time that other cases get."""
    if situation.first_step:
        return first_steps(situation, effort)
    effort = replace(effort, seconds=effort.seconds / 8)
    if situation.world or not situation.extension:
        return in_processes([situation], effort)
    return here(situation, effort)


def here(situation: Situation, effort: Effort, layers: int = 75) -> list[Row]:
    """Agreement and race, in this process. ``layers``: of a sharded model, with 4 tensors each."""
    between = None
    if situation.world:
        params = sharded(layers)
        # As many steps in every process, which wait for each other; the eager loop takes a second for one.
        rounds = effort.rounds[0] // 2 if "eager" in situation.providers else effort.rounds[0] * 2
        effort = replace(effort, seconds=0.0, rounds=(rounds, rounds), turn=1e9, steps=2)
    elif situation.network:
        training = Training(network=situation.network)
        params, between = training.tensors(), training.run
    else:
        params = CASES[situation.case].tensors()
        situation.start(params)
    runners = situation.runners(params)
    seconds, _ = agree(runners, local_parts(params) if situation.world else params, situation.checked)
    records = Race(runners, effort, between).run()
    rows = step_rows(Pair(*situation.key[:2], situation.providers, situation.name), runners, records, seconds)
    ours, key = records["fusedopt"], (*situation.key, "fusedopt")
    for bound in situation.bounds:
        if bound.what == "step per tensor":
            rows.append(Row.of(key, bound.what, bound.unit, [s * 1e6 / len(params) for s in ours.steps]))
        if bound.what == "host":
            rows.append(Row.of(key, bound.what, bound.unit, [s * 1e6 for s in ours.host]))
    return rows


def first_steps(situation: Situation, effort: Effort) -> list[Row]:
    """A first step in a fresh process with an empty compile cache."""
    samples = []
    for _ in range(effort.repeats):
        with tempfile.TemporaryDirectory() as folder:
            found = in_new_process(situation.case, situation.rule.name, "fusedopt", Path(folder))
            samples.append(found["first"])
    return [Row.of((*situation.key, "fusedopt"), "first step", "s", samples)]


START = """import sys
if sys.argv[1] == "without": sys.modules["fusedopt._C"] = None
from benchmarks.situations import main
main(*sys.argv[2:])"""


def in_processes(several: Sequence[Situation], effort: Effort, layers: int = 75) -> list[Row]:
    """`here` in fresh processes, for one row after another: what the first process finds.

    How many there are, and with what, is the first row's say: all have to agree on it.
    """
    first = several[0]
    what = json.dumps([[SITUATIONS.index(row) for row in several], asdict(effort), layers])
    command = [sys.executable, "-c", START, "with" if first.extension else "without", what]
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [*command, str(rank), folder],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(first.world or 1)
        ]
        said = [process.communicate() for process in started]
    for process, (_, error) in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"{', '.join(row.id for row in several)} failed:\n{error}")
    return [Row(**row) for row in json.loads(said[0][0].splitlines()[-1])]


def main(what: str, rank: str, folder: str) -> None:
    """One process of some rows."""
    indices, effort, layers = json.loads(what)
    several, effort["rounds"] = [SITUATIONS[index] for index in indices], tuple(effort["rounds"])
    world = several[0].world
    if world:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
        init = f"file://{folder}/init"
        dist.init_process_group(
            "gloo", init_method=init, rank=int(rank), world_size=world, timeout=timedelta(minutes=2)
        )
    print(json.dumps([asdict(found) for row in several for found in here(row, Effort(**effort), layers)]))
    if world:
        dist.destroy_process_group()
