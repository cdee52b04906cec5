"""What 64 and 1,024 ranks would do, and what planning for them and the control channel cost, without any data.

    python benchmarks/many_ranks.py --ranks 64,1024

A uniform chain of 64 stages, each one layer of Llama's 70 billion parameters in bfloat16, one row of 2,048 tokens per
microbatch, on H100s in hosts of eight; more ranks are replicas of the stages. Seconds of a layer are its operations at
the data sheet's rate. The control channel is the real one: a thread for each rank, in a few processes, against one
TCPStore. Its figures depend on what else this machine does: a thousand ranks share its few cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from pipecompile.distributed.control import Control
from pipecompile.distributed.watch import Pace
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node, Parameter, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ir.units import bytes_text, seconds_text
from pipecompile.planning.planned import planned
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import one_f_one_b
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.simulator import simulate

WIDTH, INNER, LENGTH, KEYS = 8192, 28672, 2048, 1024  # of a layer; features of keys and of values
STAGES = 64
RATE = 989e12  # multiplications and additions per second
PROCESSES = 8
PACE = Pace(beat=1.0, silent=60.0)
console = Console(width=120)
T = TypeVar("T")


def chain(layers: int) -> CostedGraph:
    """Two nodes per layer: attention, and the network after it."""
    weights = {"attention": 2 * WIDTH * (WIDTH + KEYS), "mlp": 3 * WIDTH * INNER}
    hidden = TensorSpec((1, LENGTH, WIDTH), "bfloat16", requires_grad=True)
    nodes, costs, parameters = [Node("x", "input", outputs=(hidden,), rematerialized=True)], [Cost()], []
    for layer in range(layers):
        for kind, count in weights.items():
            name = f"layers.{layer}.{kind}"
            parameters.append(Parameter(name, TensorSpec((count,), "bfloat16", requires_grad=True)))
            nodes.append(Node(name, "linear", (len(nodes) - 1,), (hidden,), (name,)))
            products = count * LENGTH + (kind == "attention") * 2 * LENGTH**2 * WIDTH
            saved = 2 * LENGTH * (4 * WIDTH if kind == "attention" else WIDTH + 4 * INNER)
            costs.append(Cost(2 * products / RATE, 4 * products / RATE, saved, 2 * count))
    return CostedGraph(Graph(tuple(nodes), (0,), (len(nodes) - 1,), tuple(parameters)), tuple(costs), "computed")


def timed(job: Callable[[], T]) -> tuple[T, str]:
    start = time.process_time()
    return job(), seconds_text(time.process_time() - start)


def simulated(count: int, microbatches: int, plans: bool) -> list[str]:
    """A row of the table: what is predicted, and the CPU seconds of the prediction.

    Args:
        plans: whether the planner makes the plan; otherwise it is the uniform one, whose memory is not computed.
    """
    cluster, stages = Cluster.from_name(f"{count}xH100"), min(count, STAGES)
    costed, replicas = chain(stages), (count // stages,) * stages
    if plans:
        work = Workload(one_f_one_b, microbatches, recompute="never", offload="never")
        options = PlanOptions(recompute="never", offload="never", replicas=replicas)
        found, planning = timed(lambda: planned(costed, cluster, work, options))
        plan, costs, memory = found.plan, found.stage_costs, bytes_text(max(found.memory().ranks))
    else:
        layer = costed.costs[1] + costed.costs[2]
        plan, costs = Plan.chain(stages, nbytes=costed.graph.nodes[1].nbytes, replicas=replicas), (layer,) * count
        planning = memory = "-"
    bare = one_f_one_b(plan, microbatches)
    timeline, simulation = timed(lambda: simulate(bare, costs, cluster))
    program, lowering = timed(lambda: lower(bare, timeline))
    busy = sum(timeline.busy(rank) for rank in range(count)) / count
    ends = [seconds_text(timeline.makespan), f"{1 - busy / timeline.makespan:.1%}", memory]
    instructions = sum(map(len, program.ranks))
    return [f"{count:,}", f"{microbatches:,}", *ends, f"{instructions:,}", planning, simulation, lowering]


def controlled(count: int) -> list[str]:
    """A row: seconds from the first rank's begin until all have given signs, the CPU of the store, and the seconds
    until all know why one has failed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    each = count // PROCESSES
    args = [(store.port, range(k * each, (k + 1) * each), count) for k in range(PROCESSES)]
    processes = [context.Process(target=run_ranks, args=arg) for arg in args]
    for process in processes:
        process.start()
    wait_for(store, "imported", PROCESSES)
    store.set("begin", "now")
    start = time.perf_counter()
    wait_for(store, "begun", PROCESSES)
    begun, cpu, at = time.perf_counter() - start, time.process_time(), time.perf_counter()
    time.sleep(10)
    share = (time.process_time() - cpu) / (time.perf_counter() - at)
    store.set("fail", "now")
    failed = time.perf_counter()
    wait_for(store, "known", PROCESSES)
    known = time.perf_counter() - failed
    for process in processes:
        process.join()
    return [f"{count:,}", f"{begun:.1f} s", f"{share:.0%}", f"{known:.2f} s"]


def run_ranks(port: int, ranks: range, count: int) -> None:
    """The control channels of some ranks; when it is told to, rank 0 fails."""
    store = dist.TCPStore("127.0.0.1", port)
    store.add("imported", 1)
    store.get("begin")
    prefix: Any = dist.PrefixStore
    controls = [Control(r, count, lambda: prefix("ranks", dist.TCPStore("127.0.0.1", port)), PACE) for r in ranks]
    while any(control.watch.rounds < 2 for control in controls):
        time.sleep(0.1)
    store.add("begun", 1)
    store.get("fail")
    if 0 in ranks:
        controls[0].report(controls[0].mine("", "failed"))
    for control in controls:
        control.watch.until(lambda: False)
        assert control.cause is not None
    store.add("known", 1)
    for control in controls:
        control.close()


def wait_for(store: dist.TCPStore, key: str, count: int) -> None:
    while store.add(key, 0) < count:
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="64,1024")
    parser.add_argument("--microbatches", default="2", help="per rank")
    parser.add_argument("--planned", type=int, default=256, help="ranks up to which the planner makes the plan")
    options = parser.parse_args()
    counts = [int(count) for count in options.ranks.split(",")]
    names = ("step", "bubble", "memory", "instructions", "planning", "simulation", "lowering")
    table = Table("ranks", "microbatches", *names, title="predicted, and the CPU seconds of that")
    for count in counts:
        table.add_row(*simulated(count, int(options.microbatches) * count, plans=count <= options.planned))
    console.print(table)
    table = Table("ranks", "all give signs", "CPU of the store", "a failure is known", title="control channel")
    for count in counts:
        table.add_row(*controlled(count))
    console.print(table)


if __name__ == "__main__":
    main()
