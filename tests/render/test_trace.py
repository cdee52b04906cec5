import json
from dataclasses import replace

from pipecompile.ir.between_stages import Made
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.graph import Cost
from pipecompile.ir.plan import Plan
from pipecompile.ir.timeline import Timeline
from pipecompile.render.cells import cells, drawn_kinds, wires
from pipecompile.render.trace import trace
from pipecompile.schedule import one_f_one_b
from pipecompile.schedule.catalog import RECIPES
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.order_program import program_of
from pipecompile.schedule.several_processes import shared
from pipecompile.schedule.simulator import simulate


def simulated(program, *seconds):
    cluster = Cluster.of([f"rank {rank}" for rank in range(len(program.ranks))], Link(float("inf"), 0.5))
    costs = [Cost(*seconds)] * program.plan.num_stages
    return simulate(lower(program, simulate(program, costs, cluster)), costs, cluster)


def test_predicted_and_measured_are_two_processes_one_above_the_other():
    program = one_f_one_b(Plan.chain(2), 2)
    events = json.loads(trace({"predicted": simulated(program, 1, 2), "measured": simulated(program, 1.5, 2)}))
    names = {e["pid"]: e["args"]["name"] for e in events["traceEvents"] if e["name"] == "process_name"}
    order = {e["pid"]: e["args"]["sort_index"] for e in events["traceEvents"] if e["name"] == "process_sort_index"}
    assert (names, order) == ({0: "predicted", 1: "measured"}, {0: 0, 1: 1})
    drawn = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in events["traceEvents"] if e["ph"] == "X"]
    assert [e for e in drawn if e[2] == "0F0"] == [(0, 0, "0F0", 0.0, 1e6), (1, 0, "0F0", 0.0, 1.5e6)]
    assert (0, 1, "0F0>1", 1e6, 0.5e6) in drawn
    assert not any("<" in name for _, _, name, *_ in drawn)


def test_a_trace_has_every_computation_once_with_its_kind():
    order = RECIPES["zb-v"].order(2, 3)
    program = program_of(order, Plan.chain(4, order.shape.rank_of))
    events = json.loads(trace({"zb-v": simulated(program, 1, 2)}))["traceEvents"]
    computed = [e for e in events if e["ph"] == "X" and e["cat"] != "transfer"]
    assert len(computed) == 3 * 4 * 3 == len({e["name"] for e in computed})
    assert {e["cat"] for e in computed} == {"forward", "backward", "weights"}
    threads = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads == {"rank 0", "rank 1", "rank 0 transfers", "rank 1 transfers"}


def test_outputs_on_their_way_to_all_ranks_are_drawn():
    plan = replace(Plan.chain(2), made=(Made(1, once=4),))
    timeline = simulated(shared(one_f_one_b(plan, 2), 3), 1, 2)
    assert [(wire.source, wire.target, wire.words[:21]) for wire in wires(timeline) if "A" in wire.words] == [
        (1, 0, "1A1@1/3>0: to rank 0;"),
        (1, 2, "1A1@1/3>2: to rank 2;"),
    ]
    events = json.loads(trace({"predicted": timeline}))["traceEvents"]
    shares = {e["name"]: e["tid"] for e in events if e.get("cat") == "share"}
    assert shares == {"1A1@0/3": 0, "1A1@1/3": 4, "1A1@2/3": 8}
    assert "A" not in drawn_kinds(timeline), "they take no time in a simulation"
    took = [replace(s, end=s.end + 1) if str(s.instruction) == "1A1@0/3" else s for s in timeline.spans]
    (cell,) = [cell for cell in cells(Timeline((*took,), 3)) if cell.kind == "A"]
    assert (cell.rank, cell.label) == (0, "A1"), "a rank that has an output of another stage does not run it"
    assert cell.words.startswith("1A1@0/3: share of stage 1, microbatch 1; ")
