import json
import re

import pytest
from costed import Builder, by_time, gpt2, unet
from rich.console import Console

from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.ir.plan import Plan, with_replicas
from pipecompile.ir.units import bytes_text, count_text, seconds_text
from pipecompile.render.formats import FORMATS
from pipecompile.render.labels import stage_lines
from pipecompile.render.modules import MOST_BOXES
from pipecompile.render.page import Page
from pipecompile.render.paths import Names
from pipecompile.render.stage_graph import StageGraph, stage_graph
from pipecompile.render.table import NUMBERS, table

HOSTILE = "</script><script>alert('x')</script>\"&]]>\\ \x00`--> ; end\n%%{init}%% 😀"


def view_of(costed: CostedGraph, num_stages: int) -> StageGraph:
    return stage_graph(costed, by_time(costed, num_stages))


@pytest.fixture(params=["gpt2-2", "gpt2-4", "gpt2-8", "unet-4", "unet-1", "gpt2-4-with_replicas"])
def view(request: pytest.FixtureRequest) -> StageGraph:
    name, num_stages, *replicas = request.param.split("-")
    costed = {"gpt2": gpt2, "unet": unet}[name]()
    return replicated(costed) if replicas else view_of(costed, int(num_stages))


def replicated(costed: CostedGraph) -> StageGraph:
    """Four stages, of which the second has two replicas and the last one three."""
    replica_of = with_replicas((1, 2, 1, 3))
    first = sorted(set(replica_of))
    stage_of = [None if stage is None else first[stage] for stage in by_time(costed, 4).stage_of]
    return stage_graph(costed, Plan.of(costed.graph, stage_of, replica_of=replica_of))


@pytest.fixture
def hostile() -> StageGraph:
    b = Builder()
    x = b.input(HOSTILE, 2, 3)
    b.path, b.source = f"{HOSTILE}.a", HOSTILE
    x = b.call(HOSTILE, [x], 2, 3, weights={HOSTILE: (3, 3)})
    b.path = f"{HOSTILE}.b"
    return stage_graph(b.costed([b.call(HOSTILE, [x], 2, 3, weights={HOSTILE: (3, 3)})]), _plan_of(b, [0, 0, 1]))


def _plan_of(b: Builder, stages: list[int | None]) -> Plan:
    return Plan.of(b.costed([len(b.nodes) - 1]).graph, stages)


def path_model(*paths: str, cut: int | None = None) -> StageGraph:
    """A chain with a node in each module; a second stage starts at ``cut``."""
    b = Builder()
    x = b.input("x", 2)
    for path in paths:
        b.path = path
        x = b.call("relu", [x], 2)
    return stage_graph(b.costed([x]), _plan_of(b, [0] + [int(cut is not None and i >= cut) for i in range(len(paths))]))


def labels(view: StageGraph) -> list[str]:
    return [module.label for module in view.modules]


# The stage graph


def test_every_placed_node_is_in_one_module_of_its_stage(view):
    placed = {node: module.stage for module in view.modules for node in module.nodes}
    assert placed == {node: stage for node, stage in enumerate(view.plan.stage_of) if stage is not None}
    assert sum(len(module.nodes) for module in view.modules) == len(placed) > 50


def test_modules_hold_consecutive_nodes_so_that_edges_point_forward(view):
    assert view.edges
    assert all(edge.source < edge.target for edge in view.edges)


def test_crossing_edges_carry_what_the_channels_carry(view):
    carried: dict[tuple[int, int], list[int]] = {}
    for edge in view.crossings:
        ends = view.modules[edge.source].stage, view.modules[edge.target].stage
        carried.setdefault(ends, []).extend(edge.values)
    assert {ends: tuple(sorted(values)) for ends, values in carried.items()} == {
        (channel.source, channel.target): channel.values for channel in view.cuts
    }
    assert sum(edge.nbytes for edge in view.crossings) == sum(channel.nbytes for channel in view.cuts)


def test_a_replica_is_a_stage_whose_modules_are_drawn_once():
    view = replicated(gpt2())
    assert [len(stage.modules) > 0 for stage in view.stages] == [True, True, False, True, True, False, False]
    assert [stage.blocks for stage in view.stages[4:]] == [view.stages[4].blocks] * 3
    assert [(cut.source, cut.target) for cut in view.cuts] == [(0, 1), (1, 3), (3, 4)]
    words = "\n".join(printed(view))
    assert "stages 1, 2 are replicas (microbatches are distributed round-robin)" in words
    assert "stages 4, 5, 6 are replicas (microbatches are distributed round-robin)" in words
    assert "replicas: stage 2" in stage_lines(view, 1)
    assert "a replica of stage 1" in stage_lines(view, 2)
    assert view.plan.tied
    assert view.tied(4) == ()
    seconds = [stage.cost.seconds for stage in view.stages]
    paces = [seconds[0], seconds[1] / 2, seconds[3], seconds[4] / 3]
    assert view.balance == pytest.approx(max(paces) * 7 / (seconds[0] + seconds[1] + seconds[3] + seconds[4]))


def test_bytes_in_and_out_balance(view):
    assert sum(stage.bytes_in for stage in view.stages) == sum(stage.bytes_out for stage in view.stages)
    assert view.stages[0].bytes_in == view.stages[-1].bytes_out == 0


def test_no_stage_has_more_boxes_than_a_person_reads():
    view = view_of(gpt2(layers=48), 8)
    assert max(len(stage.modules) for stage in view.stages) <= MOST_BOXES


def test_module_times_sum_to_the_time_of_the_model(view):
    total = sum(module.cost.seconds for module in view.modules)
    rematerialized = [
        cost for cost, node in zip(view.costed.costs, view.costed.graph.nodes, strict=True) if node.rematerialized
    ]
    assert total == pytest.approx(view.costed.seconds - sum(cost.seconds for cost in rematerialized))


def test_tied_weight_is_told_by_both_stages():
    view = view_of(gpt2(), 2)
    assert view.tied(0) == (("transformer.wte.weight", (1,)),)
    assert view.tied(1) == (("transformer.wte.weight", (0,)),)


def test_rematerialized_nodes_are_counted_in_each_stage_that_needs_them():
    view = view_of(gpt2(), 2)
    assert [view.node(i).name for i in view.stages[0].inputs] == ["input_ids"]
    assert [view.node(i).name for i in view.stages[1].inputs] == ["input_ids", "labels"]
    shared = set(view.stages[0].rematerialized) & set(view.stages[1].rematerialized)
    assert {view.node(i).op for i in shared} == {"ones", "tril"}


def test_balance_is_busiest_over_mean():
    b = Builder()
    x = b.call("relu", [b.call("relu", [b.input("x", 2)], 2)], 2)
    costed = CostedGraph(b.costed([x]).graph, (Cost(), Cost(1.0, 2.0), Cost(1.0, 0.0)), "counted")
    assert stage_graph(costed, Plan.of(costed.graph, [0, 0, 1])).balance == 3 / 2


def test_plan_for_another_graph_is_refused():
    with pytest.raises(ValueError, match="the plan has 68 nodes, but the graph has 565"):
        stage_graph(gpt2(), by_time(unet(), 2))


# Modules


def test_path_is_cut_at_numbered_blocks():
    view = path_model("bert.embeddings.word", "bert.embeddings.norm", "bert.layer.0.attention.q", "bert.layer.0.mlp")
    assert labels(view) == ["embeddings", "layer.0"]
    assert [module.paths for module in view.modules] == [("bert.embeddings",), ("bert.layer.0",)]


def test_numbered_leaves_are_one_module_until_the_plan_cuts_it():
    paths = ["features.0", "features.1", "features.2", "features.3", "classifier"]
    assert labels(path_model(*paths)) == ["features", "classifier"]
    assert labels(path_model(*paths, cut=2)) == ["features.0", "features.1", "features.2", "features.3", "classifier"]


def test_block_that_the_plan_cuts_shows_its_parts():
    paths = ["h.0.attn.q", "h.0.attn.k", "h.0.mlp", "h.1.attn.q", "h.1.mlp"]
    assert labels(path_model(*paths, cut=2)) == ["h.0.attn", "h.0.mlp", "h.1"]


def test_long_run_of_blocks_becomes_one_box():
    paths = [f"h.{layer}.{part}" for layer in range(6) for part in ("attn", "mlp")]
    assert labels(path_model("wte", *paths, "head")) == ["wte", "h.0…5", "head"]
    assert labels(path_model("wte", *paths[:8], "head")) == ["wte", "h.0", "h.1", "h.2", "h.3", "head"]


def test_what_the_model_itself_computes_is_named_by_its_operations():
    assert labels(path_model("a.0.x", "", "b.0.x")) == ["a.0", "relu", "b.0"]


def test_same_block_number_in_two_towers_keeps_the_longer_name():
    paths = ["encoder.block.0.x", "encoder.block.0.y", "decoder.block.0.x", "decoder.block.0.y"]
    assert labels(path_model(*paths)) == ["encoder.block.0", "decoder.block.0"]


def test_block_is_told_from_the_part_of_its_twin_in_the_other_tower():
    paths = ["encoder.block.0.x", "encoder.block.0.y", "decoder.block.0.x", "decoder.block.0.z"]
    assert labels(path_model(*paths, cut=1)) == ["encoder.block.0.x", "block.0.y", "decoder.block.0"]


def test_module_that_two_stages_hold_without_a_value_between_stays_whole():
    b = Builder()
    x = b.input("x", 2)
    b.path = "tower.0.a"
    left = b.call("relu", [x], 2)
    b.path = "tower.0.b"
    right = b.call("relu", [x], 2)
    b.path = "head"
    view = stage_graph(b.costed([b.call("add", [left, right], 2)]), _plan_of(b, [0, 0, 1, 1]))
    assert labels(view) == ["tower.0", "tower.0", "head"]


@pytest.mark.parametrize(
    ("first", "last", "name"),
    [
        ("model.h.0", "model.h.0", "h.0"),
        ("model.h.0", "model.h.2", "h.0…2"),
        ("model.h.0.a", "model.h.0.b", "h.0.a … b"),
        ("model.h.0.a", "model.h.0", "h.0.a … 0"),
        ("model.wte", "model.h.0", "wte … h.0"),
    ],
)
def test_run_of_modules_is_named_by_its_ends(first, last, name):
    assert Names(["model.h.0.a", "model.h.0.b", "model.h.2.b", "model.wte"]).run(first, last) == name


# Formats


def test_json_round_trip(view):
    text = FORMATS["json"](Page(view=view))
    assert StageGraph.from_json(text) == view
    assert set(json.loads(text)) == {"costed", "plan", "stages", "modules", "edges"}


def test_json_can_be_read_without_us():
    it = json.loads(FORMATS["json"](Page(view=view_of(unet(), 4))))
    nodes = it["costed"]["graph"]["nodes"]
    skips = [
        (nodes[value]["path"], it["modules"][edge["target"]]["stage"])
        for edge in it["edges"]
        for value in edge["values"]
        if it["modules"][edge["target"]]["stage"] > it["modules"][edge["source"]]["stage"] + 1
    ]
    assert skips == [("down.0", 3), ("down.1", 3), ("down.2", 3), ("down.3", 2)]


def test_dot_has_a_cluster_for_each_stage_and_an_edge_for_each_edge(view):
    lines = FORMATS["dot"](Page(view=view)).splitlines()
    assert sum("subgraph cluster_" in line for line in lines) == len(view.stages)
    edges = [re.match(r"\s*m(\d+) -> m(\d+) \[", line) for line in lines]
    found = [(int(it[1]), int(it[2])) for it in edges if it]
    assert found == [(edge.source, edge.target) for edge in view.edges]


def test_mermaid_has_a_subgraph_for_each_stage_and_a_thick_edge_for_each_crossing(view):
    text = FORMATS["mermaid"](Page(view=view))
    assert text.startswith("flowchart TB\n")
    assert text.count("subgraph s") == len(view.stages)
    thick = re.findall(r"^  m(\d+) == \"[^\"]+\" ==> m(\d+)$", text, re.MULTILINE)
    assert [(int(a), int(b)) for a, b in thick] == [(edge.source, edge.target) for edge in view.crossings]


def test_hostile_names_stay_strings_in_dot(hostile):
    text = FORMATS["dot"](Page(view=hostile))
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    assert '"' not in outside
    assert "alert" not in outside
    assert outside.count("{") == outside.count("}") == 1 + len(hostile.stages)


def test_hostile_names_stay_strings_in_mermaid(hostile):
    text = FORMATS["mermaid"](Page(view=hostile))
    outside = re.sub(r'"[^"\n]*"', "", text)
    assert "alert" not in outside
    assert not re.search(r"[;`%<]", outside)


def test_hostile_names_survive_json(hostile):
    assert StageGraph.from_json(FORMATS["json"](Page(view=hostile))) == hostile


# The table


def printed(view: StageGraph, width: int = 100) -> list[str]:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table(view, width))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_table_at_a_hundred_columns():
    assert printed(view_of(gpt2(), 2)) == [
        "",
        " stage  rank  modules                params  forward  backward  weights    saved       in      out",
        " " + "─" * 97,
        "     0     0  wte, wpe, drop, h.0…8  97.9 M   100 ms    200 ms  373 MiB  484 MiB      0 B  3.0 MiB",
        "     1     1  h.8…11, ln_f, lm_head  65.2 M   100 ms    200 ms  249 MiB  320 MiB  3.0 MiB      0 B",
        "",
        "   all                                124 M   200 ms    401 ms  622 MiB  804 MiB  3.0 MiB  3.0 MiB",
        "",
        "one microbatch, counted",
        "bottleneck / mean: 1.00",
        "tied: transformer.wte.weight in stages 0, 1",
    ]


def test_table_lists_the_modules_below_where_the_terminal_is_narrow():
    lines = printed(view_of(gpt2(), 2), width=80)
    assert "stage 1: h.8…11, ln_f, lm_head" in lines
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines if "MiB" in line)
    (heading,) = (line for line in lines if line.lstrip().startswith("stage  rank"))
    assert all(name in heading.split() for name in NUMBERS), "a column is cut; give it a shorter name"


def test_table_prints_markup_in_names_as_it_is():
    assert any("[bold]x, [/]y" in line for line in printed(path_model("[bold]x", "[/]y")))


# Units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (seconds_text(0), "0"),
        (seconds_text(3.2e-8), "0.03 us"),
        (seconds_text(0.00123), "1.23 ms"),
        (seconds_text(83.25), "83.2 s"),
        (bytes_text(0), "0 B"),
        (bytes_text(1023), "1023 B"),
        (bytes_text(1536), "1.5 KiB"),
        (bytes_text(5 * 2**40), "5.0 TiB"),
        (count_text(12), "12"),
        (count_text(124_439_808), "124 M"),
    ],
)
def test_numbers_are_short(text, expected):
    assert text == expected
