"""Random models as Python text: a class whose forward is a chain of random statements, each on random earlier values.

    x (batch, length, D)   late (batch, length, D)   ids (batch, length)   mask (batch, length)   scale (D,)
    bias: a tensor or None; strength: a number

Each value has a kind, so that every statement fits:

    h  float (batch, length, D)     p  float (batch, D)     t  float (batch,)     u  float (D,)
    i  integers (batch, length)     m  flags (batch, length)

A program is drawn from its seed alone. ``shrunk`` removes what a failure does not need.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple

import torch
from effects import Blend, StraightThrough
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

D, V = 6, 11
LAYERS = 5
INPUTS = {"h": ["x", "late"], "i": ["ids"], "m": ["mask"], "u": ["scale"], "p": [], "t": []}

# What gives a new value: its kind, then an expression over values by kind and over the model's own layers ({l}).
EXPRESSIONS = [
    ("h", "torch.tanh(self.layers[{l}]({h1}))"),
    ("h", "torch.tanh(self.layers[{l}]({h1}))"),
    ("h", "torch.tanh(self.layers[{l}]({h1}))"),
    ("h", "self.layers[{l}]({h1}) + {h2}"),
    ("h", "{h1} + {h2}"),
    ("h", "(1 - torch.tanh({h1})) ** 2"),
    ("h", "{h1} * torch.sigmoid({h2})"),
    ("h", "torch.where({h1} > 0, {h1}, 0.3 * {h2})"),
    ("h", "{h1} + {h2}.detach()"),
    ("h", "torch.cat([{h1}[..., :3], {h2}[..., 3:]], dim=-1)"),
    ("h", "self.layers[{l}]({h1}.reshape(-1, D)).view({h1}.shape[0], -1, D)"),
    ("h", "{h1} - {h1}.mean(dim=1, keepdim=True)"),
    ("h", "torch.softmax({h1} @ {h2}.mT, dim=-1) @ {h2}"),
    ("h", "torch.einsum('bld,bmd->blm', {h1}, {h2}).softmax(-1) @ {h1}"),
    ("h", "F.scaled_dot_product_attention({h1}[:, None], {h2}[:, None], {h1}[:, None], is_causal=True)[:, 0]"),
    ("h", "{h1} + torch.arange({h1}.shape[1]).view(-1, 1) / {h1}.shape[1]"),
    ("h", "{h1} / ({h2}.numel() // {h2}.shape[0])"),
    ("h", "({h1} + 0.1).relu_()"),
    ("h", "F.relu({h1} * 1, inplace=True)"),
    ("h", "{h1} * self.frequencies"),
    ("h", "{h1} / (1 + self.count)"),
    ("h", "{h1} - self.mean"),
    ("h", "StraightThrough.apply({h1})"),
    ("h", "sum(Blend.apply({h1}, {h2}, 0.25))"),
    ("h", "torch.cat({h1}.chunk(2, dim=-1)[::-1], dim=-1)"),
    ("h", "{h1} + F.one_hot({h2}.argmax(dim=-1), D).to({h1}.dtype)"),
    ("h", "self.words({i1})"),
    ("h", "F.embedding({i1}, self.head.weight) + {h1}"),
    ("h", "{h1} * {m1}.unsqueeze(-1)"),
    ("h", "{h1}.masked_fill(~{m1}.unsqueeze(-1), 0.25)"),
    ("h", "{h1} + {p1}.unsqueeze(1)"),
    ("h", "{h1} * {t1}.tanh().view(-1, 1, 1)"),
    ("h", "{h1} * {u1}"),
    ("h", "{h1} * self.gain"),
    ("h", "{h1} * strength"),
    ("h", "{h1} if bias is None else {h1} + bias.unsqueeze(1)"),
    ("h", "{h1} if ids.max() < V - 1 else {h2} * 2"),
    ("h", "{h1} if {h2}.shape[1] > 3 else 0.5 * {h2}"),
    ("h", "F.pad({h1}, (0, 0, 1, 0))[:, :-1]"),
    ("h", "torch.stack([{h1}, {h2}]).mean(0)"),
    ("h", "{h1}.flip(1).cumsum(1) / 4"),
    ("h", "{h1}[:, torch.arange({h1}.shape[1]).flip(0)]"),
    ("h", "torch.cat([{h1}, {h2}], dim=1)[:, ::2]"),
    ("h", "{h1}.index_select(1, torch.arange({h1}.shape[1])) @ self.layers[{l}].weight"),
    ("h", "F.layer_norm({h1}, (D,))"),
    ("h", "self.norm({h1})"),
    ("h", "self.batch_norm({h1}.transpose(1, 2)).transpose(1, 2)"),
    ("h", "self.convolution({h1}.transpose(1, 2)).transpose(1, 2)"),
    ("h", "self.recurrent({h1})[0]"),
    ("h", "self.attention({h1}, {h2}, {h2}, need_weights=False)[0]"),
    ("h", "self.block({h1})['out']"),
    ("h", "self.block({h1}, scale=strength)['parts'][0]"),
    ("h", "self.twice(self.twice({h1}))"),
    ("h", "checkpoint(self.twice, {h1}, use_reentrant=False)"),
    ("p", "{h1}.mean(1)"),
    ("p", "{h1}[:, -1]"),
    ("p", "{h1}.amax(dim=1)"),
    ("p", "torch.tanh(self.layers[{l}]({p1}))"),
    ("p", "{p1} - {h1}[:, 0]"),
    ("p", "{p1} * {u1}"),
    ("t", "{h1}.square().mean((1, 2))"),
    ("t", "{p1}.sum(-1)"),
    ("t", "{t1}.clamp(-1, 1) * 2"),
    ("u", "self.layers[{l}].bias * 2"),
    ("u", "self.frequencies + {u1}"),
    ("u", "self.layers[{l}]({u1})"),
    ("m", "{h1}.sum(-1) > 0"),
    ("m", "{m1} & ~{m2}"),
    ("m", "{i1} > 3"),
    ("i", "{h1}.argmax(-1)"),
    ("i", "({i1} * 3 + 1) % V"),
    ("i", "{m1}.long()"),
    ("i", "torch.where({m1}, {i1}, 0)"),
]  # fmt: skip

# What takes several lines, or writes in place; {n} is the new value, where there is one.
BLOCKS = [
    ("", "{h1}.add_({h2})"),
    ("", "{h1}[..., 1:3].mul_(0.5)"),
    ("", "view = {h1}[:, 1:]\nview += 1"),
    ("", "{h1}.transpose(0, 1)[0].add_(1)"),
    ("", "{h1}.view(-1, D)[:, 0] = 0.25"),
    ("", "{h1}[:, 0] = {h2}[:, -1]"),
    ("", "{h1}.masked_fill_({m1}.unsqueeze(-1), 0.7)"),
    ("", "{p1}.mul_(0.5).add_({u1})"),
    ("", "{i1}.clamp_(max=4)"),
    ("", "self.count += 1"),
    ("", "self.mean = 0.9 * self.mean + 0.1 * {h1}.detach().mean(dim=(0, 1))"),
    ("", "with torch.no_grad():\n    self.mean.mul_(0.5).add_({p1}.mean(0))"),
    ("", "self.latest.copy_({h1}.detach()[0, -1])"),
    ("h", "{n} = torch.zeros_like({h1})\n{n}[..., ::2] = {h2}[..., ::2]\n{n} += {h1}"),
    ("h", "{n} = torch.empty_like({h1})\n{n}.copy_({h2}).masked_fill_({h2} > 0.2, 0.7)"),
    ("h", "with torch.no_grad():\n    gate = torch.sigmoid(self.layers[{l}]({h1}))\n{n} = {h2} * gate"),
    (
        "h",
        "with torch.no_grad():\n    gate = {h1}.sigmoid()\n    with torch.enable_grad():\n"
        "        {n} = self.layers[{l}]({h2})\n{n} = {n} * gate",
    ),
    ("h", "{n} = {h1}\nfor layer in self.layers[:2]:\n    {n} = {n} + 0.5 * torch.tanh(layer({n}))"),
    ("h", "{n} = {h1}\nfor step in {h2}.unbind(1):\n    {n} = {n} * 0.9 + step.unsqueeze(1)"),
    ("h", "if self.training:\n    {n} = {h1} * 2\nelse:\n    {n} = {h1}"),
    ("t", "rows, columns = {p1}.shape\n{n} = {p1}.sum(1) / columns"),
]

# Terms of the loss: each a mean over samples, so that microbatches weigh by their rows.
LOSSES = [
    "{h1}.square().mean()",
    "F.mse_loss({h1}, {h2}.detach())",
    "F.cross_entropy(self.head({h1}).flatten(0, 1), {i1}.flatten())",
    "{t1}.mean()",
    "F.smooth_l1_loss({p1}, {h1}[:, 0])",
    "({h1} * {m1}.unsqueeze(-1)).sum() / {h1}.numel()",
]

# What the outputs are wrapped in, where the loss is outside; {a}, {b} and {c} are values.
OUTSIDE = [
    "{a}",
    "({a}, {b})",
    "{{'a': {a}, 'more': [{b}, {c}]}}",
    "Pair({a}, {{'b': {b}}})",
    "[{a}, None, ({b}, 'text')]",
]
INSIDE = ["loss", "{{'loss': loss, 'a': {a}}}", "{{'loss': loss, 'parts': ({a}, [{b}])}}", "Loss(loss, {a})"]

MODEL = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range({layers}))
        self.words, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.norm, self.batch_norm, self.convolution = nn.LayerNorm(D), nn.BatchNorm1d(D), nn.Conv1d(D, D, 3, padding=1)
        self.recurrent, self.attention = nn.GRU(D, D, batch_first=True), nn.MultiheadAttention(D, 2, batch_first=True)
        self.block, self.twice = Block(), nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("latest", torch.zeros(D))
        self.register_buffer("frequencies", torch.linspace(0.5, 1.5, D))
{changes}
    def forward(self, x, late, ids, *, mask, scale, bias=None, strength=0.5):
{body}
"""


class Block(nn.Module):
    """A module with an option and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        hidden = torch.tanh(self.first(x)) * scale
        return {"out": x + self.second(hidden), "parts": (hidden, "text", None)}


class Pair(NamedTuple):
    first: Tensor
    second: dict[str, Tensor]


class Loss(NamedTuple):
    loss: Tensor
    last: Tensor


CHANGES = [
    "self.layers[1].weight = self.layers[3].weight",
    "self.head.weight = self.words.weight",
    "self.layers[2] = self.layers[0]",
    "self.twice[0] = self.layers[4]",
    "self.layers[1].requires_grad_(False)",
    "self.words.requires_grad_(False)",
    "self.gain.requires_grad_(False)",
    "self.unused = nn.Parameter(torch.ones(2))",
    "self.batch_norm.eval()",
]


@dataclass(frozen=True)
class Statement:
    """Lines of a forward; ``name`` is the value that they make, of ``kind``, or empty."""

    text: str
    kind: str = ""
    name: str = ""


@dataclass(frozen=True)
class Program:
    """A model's text in parts, and the arguments that it is called with."""

    seed: int
    changes: tuple[str, ...]
    statements: tuple[Statement, ...]
    loss: tuple[str, ...]  # lines that bind ``loss``, where it is inside
    output: str
    with_bias: bool
    wants_gradient: bool  # whether x does

    @property
    def inside(self) -> bool:
        return bool(self.loss)

    @property
    def source(self) -> str:
        lines = [line for s in self.statements for line in s.text.splitlines()]
        body = [*lines, *self.loss, f"return {self.output}"]
        changes = "".join(f"        {line}\n" for line in self.changes)
        return MODEL.format(layers=LAYERS, changes=changes, body="\n".join(f"        {line}" for line in body))

    def build(self) -> nn.Module:
        file = f"<random model {self.seed}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        names = {"torch": torch, "nn": nn, "F": F, "D": D, "V": V, "checkpoint": checkpoint}
        names |= {kind.__name__: kind for kind in (Block, Pair, Loss, StraightThrough, Blend)}
        exec(compile(self.source, file, "exec"), names)
        torch.manual_seed(self.seed)
        return names["Model"]().double()  # type: ignore[no-any-return, operator]

    def inputs(self, rows: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(rows * 100 + length)
        x, late = torch.randn(2, rows, length, D, dtype=torch.float64, generator=generator)
        ids = torch.randint(V - 1, (rows, length), generator=generator)
        mask = torch.rand(rows, length, generator=generator) < 0.7
        scale = torch.rand(D, dtype=torch.float64, generator=generator)
        kwargs: dict[str, Any] = {"mask": mask, "scale": scale}
        if self.with_bias:
            kwargs["bias"] = torch.randn(rows, D, dtype=torch.float64, generator=generator)
        return (x.requires_grad_(self.wants_gradient), late, ids), kwargs

    @property
    def writes(self) -> bool:
        """Whether buffers are written, so that microbatches leave others than the whole batch."""
        return any(f"self.{name}" in self.source.split("def forward")[1] for name in ("count +", "mean", "latest")) or (
            "self.batch_norm(" in self.source
        )


def drawn(seed: int) -> Program:
    """The program of a seed."""
    draw = Random(seed)
    values = {kind: list(names) for kind, names in INPUTS.items()}
    statements = [
        Statement("v0 = torch.tanh(self.layers[0](x))", "h", "v0"),
        Statement(f"v1 = self.layers[1]({draw.choice(['x', 'v0', 'late'])})", "h", "v1"),
    ]
    values["h"] += ["v0", "v1"]
    length = draw.randint(5, 12)
    while len(statements) < length:
        kind, text = draw.choice(BLOCKS if draw.random() < 0.3 else EXPRESSIONS)
        name = f"v{len(statements)}"
        block = (kind, text) in BLOCKS
        filled = _filled(text, values, draw, name)
        if filled is None:
            continue
        statements.append(Statement(filled if block else f"{name} = {filled}", kind, name if kind else ""))
        if kind:
            values[kind].append(name)
    inside = draw.random() < 0.6
    terms = list(_some(LOSSES, draw.randint(1, 3), values, draw)) if inside else []
    loss = ("loss = " + " + ".join(terms),) if terms else ()
    chosen = dict(zip("abc", (draw.choice(values[kind][-3:]) for kind in _outputs(values, draw)), strict=True))
    last = [name for kind in "hhpt" for name in values[kind] if name.startswith("v")]
    chosen["a"] = last[-1] if last else "self.layers[0](x)"
    output = draw.choice(INSIDE if inside else OUTSIDE).format(**chosen)
    changes = tuple(change for change in CHANGES if draw.random() < 0.15)
    return Program(seed, changes, tuple(statements), loss, output, draw.random() < 0.5, draw.random() < 0.2)


def _outputs(values: dict[str, list[str]], draw: Random) -> list[str]:
    return [draw.choice([kind for kind in "hhptim" if values[kind]]) for _ in "abc"]


def _some(texts: list[str], count: int, values: dict[str, list[str]], draw: Random) -> Iterator[str]:
    while count:
        filled = _filled(draw.choice(texts), values, draw, "")
        if filled is not None:
            count -= 1
            yield filled


def _filled(text: str, values: dict[str, list[str]], draw: Random, name: str) -> str | None:
    """A template with its holes filled; None if there is no value of a kind."""
    holes = {}
    for hole in sorted(set(re.findall(r"{(\w+)}", text))):
        if hole == "l":
            holes[hole] = str(draw.randrange(LAYERS))
        elif hole == "n":
            holes[hole] = name
        elif not values[hole[0]]:
            return None
        else:
            known = values[hole[0]]
            holes[hole] = known[int(draw.random() ** 0.5 * len(known))]
    return text.format(**holes)


def shrunk(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A smaller program that fails too: statements go, or become another name of an earlier value."""
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(program):
            if fails(smaller):
                program, progress = smaller, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    for change in program.changes:
        yield replace(program, changes=tuple(c for c in program.changes if c != change))
    for index in reversed(range(len(program.statements))):
        statement = program.statements[index]
        before, after = program.statements[:index], program.statements[index + 1 :]
        rest = " ".join([*(s.text for s in after), *program.loss, program.output])
        if not statement.name or not re.search(rf"\b{statement.name}\b", rest):
            yield replace(program, statements=(*before, *after))
            continue
        earlier = [*INPUTS[statement.kind], *(s.name for s in before if s.kind == statement.kind)]
        if earlier and statement.text != f"{statement.name} = {earlier[-1]}":
            alias = Statement(f"{statement.name} = {earlier[-1]}", statement.kind, statement.name)
            yield replace(program, statements=(*before, alias, *after))
