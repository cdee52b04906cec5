"""Costed graphs that look like real models, made without torch: for everything that reads a graph and runs none."""

from __future__ import annotations

from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node, Parameter, TensorSpec
from pipecompile.ir.plan import Plan

BATCH, LENGTH = 2, 128


class Builder:
    """Adds node after node, and keeps a module path for those to come."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.costs: list[Cost] = []
        self.parameters: dict[str, Parameter] = {}
        self.path = ""
        self.source = "model.py:1"

    def input(self, name: str, *shape: int, dtype: str = "int64") -> int:
        return self._add(Node(name, "input", outputs=(TensorSpec(shape, dtype),), rematerialized=True), Cost())

    def rematerialized(self, op: str, inputs: list[int], *shape: int) -> int:
        specs = (TensorSpec(shape, "int64"),)
        node = Node(self._name(op), op, tuple(inputs), specs, (), self.path, self.source, rematerialized=True)
        return self._add(node, Cost(2e-6))

    def call(self, op: str, inputs: list[int], *shape: int, weights: dict[str, tuple[int, ...]] | None = None) -> int:
        """A node whose cost follows from its shapes."""
        for name, size in (weights or {}).items():
            self.parameters[name] = Parameter(name, TensorSpec(size, "float32", True))
        spec = TensorSpec(shape, "float32", True)
        work = sum(p.nbytes for name in weights or {} for p in [self.parameters[name].spec]) * BATCH * LENGTH / 4
        forward = spec.nbytes / 2e10 + (0 if op == "embedding" else work / 2e11)
        names = tuple(weights or {})
        node = Node(self._name(op), op, tuple(inputs), (spec,), names, self.path, self.source)
        return self._add(node, Cost(forward, 2 * forward, spec.nbytes))

    def _name(self, op: str) -> str:
        return f"{op}_{len(self.nodes)}"

    def _add(self, node: Node, cost: Cost) -> int:
        self.nodes.append(node)
        self.costs.append(cost)
        return len(self.nodes) - 1

    def costed(self, outputs: list[int]) -> CostedGraph:
        inputs = tuple(i for i, node in enumerate(self.nodes) if node.op == "input")
        graph = Graph(tuple(self.nodes), inputs, tuple(outputs), tuple(self.parameters.values()))
        return CostedGraph(graph, tuple(self.costs), "counted")


def gpt2(layers: int = 12, width: int = 768, words: int = 50257) -> CostedGraph:
    """Like GPT-2 small: heavy embedding and head, tied, a mask that every layer reads."""
    b = Builder()
    ids, labels = b.input("input_ids", BATCH, LENGTH), b.input("labels", BATCH, LENGTH)
    b.path, b.source = "transformer", "modeling_gpt2.py:580"
    positions = b.rematerialized("arange", [ids], 1, LENGTH)
    mask = b.rematerialized("tril", [b.rematerialized("ones", [ids], LENGTH, LENGTH)], LENGTH, LENGTH)
    hidden = (BATCH, LENGTH, width)
    tied = {"transformer.wte.weight": (words, width)}
    b.path = "transformer.wte"
    tokens = b.call("embedding", [ids], *hidden, weights=tied)
    b.path = "transformer.wpe"
    places = b.call("embedding", [positions], *hidden, weights={"transformer.wpe.weight": (1024, width)})
    b.path = "transformer"
    x = b.call("add", [tokens, places], *hidden)
    b.path = "transformer.drop"
    x = b.call("dropout", [x], *hidden)
    for layer in range(layers):
        x = _block(b, f"transformer.h.{layer}", x, mask, width)
    x = _norm(b, "transformer.ln_f", x, width)
    b.path, b.source = "lm_head", "modeling_gpt2.py:720"
    logits = b.call("linear", [x], BATCH, LENGTH, words, weights=tied)
    b.path, b.source = "", "modeling_gpt2.py:731"
    loss = b.call("cross_entropy", [b.call("view", [logits], BATCH * LENGTH, words), labels])
    return b.costed([loss, logits])


def _norm(b: Builder, path: str, x: int, width: int) -> int:
    b.path = path
    weights = {f"{path}.weight": (width,), f"{path}.bias": (width,)}
    return b.call("layer_norm", [x], BATCH, LENGTH, width, weights=weights)


def _linear(b: Builder, path: str, x: int, width: int, out: int) -> int:
    b.path = path
    b.call("size", [x])
    flat = b.call("view", [x], BATCH * LENGTH, width)
    weights = {f"{path}.weight": (width, out), f"{path}.bias": (out,)}
    return b.call("view", [b.call("addmm", [flat], BATCH * LENGTH, out, weights=weights)], BATCH, LENGTH, out)


def _block(b: Builder, path: str, x: int, mask: int, width: int) -> int:
    b.source = "modeling_gpt2.py:310"
    normed = _norm(b, f"{path}.ln_1", x, width)
    qkv = _linear(b, f"{path}.attn.c_attn", normed, width, 3 * width)
    b.path, b.source = f"{path}.attn", "modeling_gpt2.py:224"
    heads = [BATCH, 12, LENGTH, width // 12]
    split = [b.call("getitem", [b.call("split", [qkv], BATCH, LENGTH, width)], BATCH, LENGTH, width) for _ in range(3)]
    parts = [b.call("transpose", [b.call("view", [s], *heads)], *heads) for s in split]
    here = b.rematerialized("getitem", [mask], LENGTH, LENGTH)
    attended = b.call("scaled_dot_product_attention", [*parts, here], *heads)
    for op in ("transpose", "contiguous", "reshape"):
        attended = b.call(op, [attended], BATCH, LENGTH, width)
    projected = _linear(b, f"{path}.attn.c_proj", attended, width, width)
    b.path = f"{path}.attn.resid_dropout"
    dropped = b.call("dropout", [projected], BATCH, LENGTH, width)
    b.path, b.source = path, "modeling_gpt2.py:330"
    x = b.call("add", [x, dropped], BATCH, LENGTH, width)
    h = _linear(b, f"{path}.mlp.c_fc", _norm(b, f"{path}.ln_2", x, width), width, 4 * width)
    b.path, b.source = f"{path}.mlp.act", "activations.py:47"
    for op in ("pow", "mul", "add", "mul", "tanh", "add", "mul", "mul"):
        h = b.call(op, [h], BATCH, LENGTH, 4 * width)
    h = _linear(b, f"{path}.mlp.c_proj", h, 4 * width, width)
    b.path, b.source = path, "modeling_gpt2.py:341"
    return b.call("add", [x, h], BATCH, LENGTH, width)


def unet(depth: int = 4) -> CostedGraph:
    """A U-Net: the output of every level on the way down is read again on the way up."""
    b = Builder()
    x = b.input("image", BATCH, 3, 64, 64, dtype="float32")
    skips = []
    for level in range(depth):
        x = _double_convolution(b, f"down.{level}", x, 3 if level == 0 else 16 << level, 32 << level, 64 >> level)
        skips.append(x)
        b.path, b.source = f"pool.{level}", "unet.py:31"
        x = b.call("max_pool2d", [x], BATCH, 32 << level, 32 >> level, 32 >> level)
    x = _double_convolution(b, "bottom", x, 16 << depth, 32 << depth, 64 >> depth)
    for level in reversed(range(depth)):
        b.path, b.source = "", "unet.py:38"
        x = b.call("interpolate", [x], BATCH, 64 << level, 64 >> level, 64 >> level)
        x = b.call("cat", [skips[level], x], BATCH, 96 << level, 64 >> level, 64 >> level)
        x = _double_convolution(b, f"up.{level}", x, 96 << level, 32 << level, 64 >> level)
    b.path = "head"
    weights = {"head.weight": (2, 32, 1, 1)}
    return b.costed([b.call("conv2d", [x], BATCH, 2, 64, 64, weights=weights)])


def _double_convolution(b: Builder, path: str, x: int, channels: int, out: int, size: int) -> int:
    for half, inner in (("0", channels), ("1", out)):
        b.path, b.source = f"{path}.convolutions.{half}", "unet.py:12"
        x = b.call("conv2d", [x], BATCH, out, size, size, weights={f"{b.path}.weight": (out, inner, 3, 3)})
        b.path = f"{path}.norms.{half}"
        x = b.call("batch_norm", [x], BATCH, out, size, size, weights={f"{b.path}.weight": (out,)})
        b.path = path
        x = b.call("relu", [x], BATCH, out, size, size)
    return x


def by_time(costed: CostedGraph, num_stages: int) -> Plan:
    """Cuts the nodes, in their order, into stages of equal time."""
    bound = costed.seconds / num_stages
    stage_of = [0]
    done = 0.0
    for cost in costed.costs[:-1]:
        done += cost.seconds
        stage_of.append(min(num_stages - 1, stage_of[-1] + int(done > bound * (stage_of[-1] + 1))))
    return Plan.of(costed.graph, stage_of)
