from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import NBYTES, costs, plans, units
from rich.text import Text

from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.graph import Cost
from pipecompile.ir.instruction import Forward
from pipecompile.ir.plan import Plan
from pipecompile.ir.timeline import Span, Timeline
from pipecompile.ir.units import bytes_text, seconds_text
from pipecompile.render.cells import SHADES, ticks
from pipecompile.render.timeline import timeline_svg, timeline_text
from pipecompile.schedule import gpipe, one_f_one_b, pipedream, sequential
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.simulator import simulate

PAIR = simulate(one_f_one_b(Plan.chain(2), 3), [Cost(1.0, 2.0)] * 2)


def drawn(timeline: Timeline, width: int) -> str:
    return "\n".join(line.rstrip() for line in timeline_text(timeline, width).plain.splitlines())


def test_a_timeline_is_drawn_a_row_a_rank_with_dots_for_idle_time():
    assert drawn(PAIR, 60).splitlines()[:3] == [
        "                                              busy",
        "rank 0   F0 F1······  B0   F2  B1  ···  B2    75 %",
        "rank 1  ··· F0  B0   F1  B1   F2  B2  ······  75 %",
    ]


@given(plans().flatmap(lambda plan: st.tuples(st.just(plan), costs(plan))), st.integers(1, 6), st.integers(60, 160))
def test_no_line_is_wider_than_asked(plan_and_costs, num_microbatches, width):
    plan, stage_costs = plan_and_costs
    text = timeline_text(simulate(gpipe(plan, num_microbatches), stage_costs), width)
    assert text.plain.count("rank") == plan.num_ranks
    assert max(map(len, text.plain.splitlines())) <= width


def cells_of(text: Text, rank: int) -> list[tuple[str, str]]:
    """The label and the colour of each coloured stretch in a rank's row."""
    line = text.split("\n")[1 + rank]
    return [
        (line.plain[s.start : s.end].strip(), str(s.style).split()[-1]) for s in line.spans if " on #" in str(s.style)
    ]


def test_cells_have_the_colour_of_their_kind_in_two_shades():
    (f0, f1), (b0, b1) = SHADES["F"], SHADES["B"]
    assert cells_of(timeline_text(PAIR, 80), 1) == [
        ("F0", f0), ("B0", b0), ("F1", f1), ("B1", b1), ("F2", f0), ("B2", b0),
    ]  # fmt: skip


def test_a_stage_is_named_where_a_rank_runs_several():
    timeline = simulate(gpipe(Plan.chain(2, (0, 0)), 1), units(Plan.chain(2)))
    assert [label for label, _ in cells_of(timeline_text(timeline, 60), 0)] == ["0F0", "1F0", "1B0", "0B0"]


def test_a_cell_too_narrow_for_its_label_shows_its_kind():
    timeline = simulate(gpipe(Plan.chain(1), 10), units(Plan.chain(1)))
    assert {label for label, _ in cells_of(timeline_text(timeline, 40), 0)} == {"F", "B"}


def test_the_shortest_cell_has_a_whole_number_of_columns_so_that_equal_cells_look_equal():
    timeline = simulate(gpipe(Plan.chain(3), 4), units(Plan.chain(3)))
    for width in range(60, 120):
        row = timeline_text(timeline, width).split("\n")[1]
        assert len({span.end - span.start for span in row.spans if " on #" in str(span.style)}) == 1


def test_legend_makespan_and_bubble_stand_under_the_rows():
    *_, legend, summary = drawn(PAIR, 80).splitlines()
    assert legend.split() == ["F", "forward", "B", "backward", "···", "idle"]
    assert summary.strip() == f"makespan {seconds_text(12)} · bubble 25.0 %"


def test_steps_are_in_the_legend_if_they_take_time():
    program = pipedream(Plan.chain(2), range(3))
    stage_costs = units(Plan.chain(2))
    assert "step" in drawn(simulate(program, stage_costs, step_seconds=1.0), 80)
    assert "step" not in drawn(simulate(program, stage_costs), 80)


def test_peak_memory_is_shown_where_it_is_known():
    timeline = simulate(gpipe(Plan.chain(2), 2), [Cost(1, 1, saved_bytes=1 << 20)] * 2)
    lines = drawn(timeline, 80).splitlines()
    assert lines[0].split() == ["busy", "peak"]
    assert lines[1].endswith(f"67 %  {bytes_text(2 << 20)}")
    assert lines[0].split() != drawn(PAIR, 80).splitlines()[0].split()


def test_a_measured_timeline_may_start_at_any_time():
    late = Timeline(tuple(Span(s.rank, s.instruction, s.start + 1e5, s.end + 1e5) for s in PAIR.spans), 2)
    assert drawn(late, 80) == drawn(PAIR, 80)
    assert [cell.attrib for cell in elements(late, "rect")] == [cell.attrib for cell in elements(PAIR, "rect")]


@pytest.mark.parametrize(
    ("makespan", "most", "expected"),
    [(10, 5, [0, 2, 4, 6, 8, 10]), (0.033, 4, [0, 0.01, 0.02, 0.03]), (7, 1, [0]), (0, 4, [0]), (1, 1, [0, 1])],
)
def test_the_axis_has_round_times(makespan, most, expected):
    assert ticks(makespan, most) == pytest.approx(expected)


# as svg


def elements(timeline: Timeline, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(timeline_svg(timeline)).iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def titles(timeline: Timeline) -> list[str]:
    return [str(title.text) for title in elements(timeline, "title")]


def test_the_svg_tells_of_each_cell_what_it_is_and_when():
    summary, *cells = titles(PAIR)
    assert summary == f"makespan {seconds_text(12)} · bubble 25.0 %"
    assert len(cells) == 12
    assert cells[0] == f"0F0: forward of stage 0, microbatch 0; 0 to {seconds_text(1)}, duration {seconds_text(1)}"


def test_cells_lie_where_their_times_are():
    bar = {cell[0].text.split(":")[0]: cell[1].attrib for cell in elements(PAIR, "g") if cell.get("class") == "cell"}
    assert len(bar) == 12
    left = {name: float(rect["x"]) for name, rect in bar.items()}
    second = left["0F1"] - left["0F0"]
    starts = {str(span.instruction): span.start for span in PAIR.spans}
    assert left == pytest.approx({name: left["0F0"] + starts[name] * second for name in left}, abs=0.02)
    assert {rect["y"] for name, rect in bar.items() if name[0] == "0"} == {bar["0F0"]["y"]}
    assert bar["0F0"]["y"] != bar["1F0"]["y"]


def test_a_lowered_timeline_shows_its_transfers():
    cluster = Cluster.of(["gpu"] * 3, Link(bandwidth=NBYTES))
    program, stage_costs = one_f_one_b(Plan.chain(3, nbytes=NBYTES), 2), [Cost(1.0, 2.0)] * 3
    timeline = simulate(lower(program, simulate(program, stage_costs, cluster)), stage_costs, cluster)
    found = [words for words in titles(timeline) if ">" in words]
    assert len(found) == 8
    assert (
        found[0] == f"0F0>1: to stage 1 on rank 1; {seconds_text(1)} to {seconds_text(2)}, duration {seconds_text(1)}"
    )


def test_the_svg_is_one_file_and_knows_the_dark():
    text = timeline_svg(PAIR)
    assert "prefers-color-scheme: dark" in text
    assert text.count("http") == 1  # the name space


def test_labels_are_left_out_where_they_do_not_fit():
    timeline = simulate(one_f_one_b(Plan.chain(4), 200), units(Plan.chain(4)))
    labels = [text.text for text in elements(timeline, "text")]
    assert "F0" not in labels
    assert f"makespan {seconds_text(406)} · bubble 1.5 %" in labels


@pytest.mark.parametrize(
    "timeline",
    [
        Timeline((), 2),
        Timeline((Span(0, Forward(0, 0), 0.0, 0.0),), 1),
        simulate(sequential(Plan.chain(1), 1), [Cost(1e-9, 1e-9)]),
        simulate(sequential(Plan.chain(12), 1), units(Plan.chain(12), 1e5, 1e6)),
    ],
    ids=["empty", "no time", "nanoseconds", "days"],
)
def test_odd_timelines_can_be_drawn(timeline):
    assert drawn(timeline, 80).count("rank") == timeline.num_ranks
    assert len(elements(timeline, "svg")) == 1
