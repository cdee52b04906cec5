"""Programs with copies of activations: what is valid, when they run, what they free, and how they are drawn."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipecompile.errors import ProgramError
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.graph import Cost
from pipecompile.ir.instruction import Backward, Fetch, Forward, Offload, parse
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.planning.offloading import resident
from pipecompile.render.timeline import timeline_svg, timeline_text
from pipecompile.render.trace import trace
from pipecompile.schedule import SYNCHRONOUS, backward_only, forward_only
from pipecompile.schedule.grid import read_grid, write_grid, write_torch_csv
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.order_program import order_of, program_of
from pipecompile.schedule.simulator import simulate

ONE = Plan.chain(1)
TEXT = "0: 0F0 0H0 0F1 0F2 0F3 0G0 0B3 0B0 0B1 0B2"
LINK = Link(bandwidth=10.0, latency=0.5)
HOST = Cluster((Device("a"),), host=LINK)
COSTS = [Cost(1.0, 2.0, saved_bytes=5)]  # a copy takes 1.0 s


def program(text: str, plan: Plan = ONE) -> Program:
    found = Program.parse(text, plan)
    found.validate()
    return found


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0H0 0F0 0F1 0G0 0B0 0B1", "0H0 is not after 0F0, which saves what it copies; put it after"),
        ("0F0 0F1 0B0 0H0 0B1 0G0", "0H0 is after 0B0, which has used what it copies; put it before"),
        ("0F0 0H0 0F1 0B0 0G0 0B1", "0B0|0G0 is after 0B0"),
        ("0F0 0H0 0F1 0B0 0B1", "0B0 needs what 0H0 has copied to the host; put 0G0 before it"),
        ("0F0 0F1 0G0 0B0 0B1", "0G0 is not after 0H0, whose copy it fetches; put 0H0 before it"),
        ("0F0 0G0 0H0 0F1 0B0 0B1", "0G0 is not after 0H0"),
        ("0F0 0H0 0G0 0F1 0B0 0B1", "0G0 is too near to 0H0"),
        ("0F0 0H0 0H0 0F1 0G0 0B0 0B1", "0H0 occurs 2 times"),
        ("0F0 0H0 0F1 0G0 0G0 0B0 0B1", "0G0 occurs 2 times"),
        ("0F0 0H1 0F1 0B0 0B1", "0H1 is not after 0F1"),
    ],
)
def test_a_copy_in_the_wrong_place_is_refused(row: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        program(f"0: {row}")


def test_copies_have_no_result_to_send() -> None:
    with pytest.raises(ProgramError, match="an Offload has no result to send"):
        parse("0H3>1")


def test_a_copy_has_ended_after_the_next_computation() -> None:
    found = program("0: 0F0 0H0 0F1 0H1 0F2 0G0 0B0 0G1 0B1 0B2")
    ended = {str(i): [*map(str, offloads)] for i, offloads in found.ended_before.items()}
    assert ended == {"0F2": ["0H0"], "0G0": ["0H1"]}


def test_copies_overlap_with_computation_and_hold_up_what_comes_too_soon() -> None:
    slow = replace(HOST, host=Link(bandwidth=2.0, latency=0.5))  # a copy takes 3 s, each direction by itself
    spans = {str(s.instruction): (s.start, s.end) for s in simulate(program(TEXT), COSTS, slow).spans}
    assert spans["0H0"] == (1.0, 4.0)
    assert spans["0F1"] == (1.0, 2.0)
    assert spans["0F2"] == (4.0, 5.0)  # waits for 0H0
    assert spans["0G0"] == (6.0, 9.0)
    assert spans["0B3"] == (6.0, 8.0)
    assert spans["0B0"] == (9.0, 11.0)  # waits for 0G0


def test_a_device_of_the_host_copies_nothing() -> None:
    timeline = simulate(program(TEXT), COSTS, Cluster.of(["cpu"]))
    assert timeline.makespan == 12.0


def test_what_is_away_is_not_held() -> None:
    timeline = simulate(program(TEXT), COSTS, HOST)
    assert timeline.makespan == 12.0
    assert timeline.peak_bytes == (20,)  # four at 0B3, where the first has come back
    assert simulate(program(TEXT.replace("0G0 0B3", "0B3 0G0")), COSTS, HOST).peak_bytes == (15,)
    assert simulate(program("0: 0F0 0F1 0F2 0F3 0B3 0B0 0B1 0B2"), COSTS, HOST).peak_bytes == (20,)


@pytest.mark.parametrize("name", SYNCHRONOUS)
@pytest.mark.parametrize("microbatches", [1, 2, 5, 9])
def test_every_schedule_places_them_and_no_stage_holds_more(name: str, microbatches: int) -> None:
    stages, ranks = (6, (0, 1, 2, 2, 1, 0)) if name in ("zb-v", "v-half", "v-min", "dualpipe-v") else (6, (0, 1, 2) * 2)
    if name in ("sequential", "gpipe", "1f1b", "zb-h1", "zb-h2"):
        stages, ranks = 3, (0, 1, 2)
    if name.startswith("interleaved-1f1b-"):
        stages = 3 * int(name[-1])
        ranks = tuple(stage % 3 for stage in range(stages))
    plan = Plan.chain(stages, ranks)
    bare = SYNCHRONOUS[name](plan, microbatches)
    found = SYNCHRONOUS[name](replace(plan, offloaded=tuple(range(stages))), microbatches)
    without = [tuple(i for i in row if not isinstance(i, Offload | Fetch)) for row in found.ranks]
    assert without == [*bare.ranks]
    assert all(few <= many for few, many in zip(resident(found), resident(bare), strict=True))
    if microbatches == 9 and name == "gpipe":
        assert resident(found) == (3, 3, 3)
    lowered = lower(found, simulate(found, [COSTS[0]] * stages, Cluster((Device("a"),) * 3, host=LINK)))
    assert [i for i in lowered.instructions if isinstance(i, Offload | Fetch)] == [
        i for i in found.instructions if isinstance(i, Offload | Fetch)
    ]


def test_the_halves_of_a_step_carry_what_is_away() -> None:
    plan = replace(Plan.chain(2), offloaded=(0, 1))
    assert str(forward_only(plan, 2)) == "0: 0F0 0H0 0F1 0H1\n1: 1F0 1H0 1F1 1H1"
    back = backward_only(plan, 3)
    assert {Offload(1, 2), Forward(1, 2)} <= back.carried
    assert [i for i in back.ranks[1] if isinstance(i, Fetch | Backward)] == [
        *map(parse, ["1G0", "1G1", "1B0", "1G2", "1B1", "1B2"])
    ]


def test_a_grid_and_an_order_keep_them() -> None:
    order = read_grid("0: F0 H0 F1 F2 F3 G0 B3 B0 B1 B2")
    assert program_of(order, ONE) == program(TEXT)
    assert order_of(program(TEXT)) == order
    assert read_grid(write_grid(order)) == order
    with pytest.raises(ProgramError, match="0H0 copies activations to the host, for which torch's files have no word"):
        write_torch_csv(order)


def test_drawings_show_them() -> None:
    timeline = simulate(program(TEXT), COSTS, HOST)
    lines = timeline_text(timeline, 80).plain.splitlines()
    assert [line.split()[0:2] for line in lines[2:4]] == [["to", "host"], ["from", "host"]]
    assert "H0" in lines[2]
    assert "G0" in lines[3]
    assert "copy to host of stage 0, microbatch 0" in timeline_svg(timeline)
    events = json.loads(trace({"predicted": timeline}))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {e["name"]: names[e["tid"]] for e in events if e["name"] in ("0H0", "0G0", "0F0")} == {
        "0H0": "rank 0 to host",
        "0G0": "rank 0 from host",
        "0F0": "rank 0",
    }
    assert timeline.busy(0) == 12.0
