import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import typer
from costed import gpt2
from torch import nn
from typer.testing import CliRunner, Result

import pipecompile.api
from pipecompile import PlanOptions
from pipecompile.cli import costed_model
from pipecompile.cli import main as cli
from pipecompile.compiler import plan_call
from pipecompile.compiler.disk_cache import DiskCache
from pipecompile.errors import InputError
from pipecompile.ir.graph import Cost
from pipecompile.profile import profile
from pipecompile.render.formats import FORMATS
from pipecompile.render.stage_graph import StageGraph
from pipecompile.schedule import SCHEDULES

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()

def make():
    return Net(), {"x": torch.ones(6, 8)}

def counted():
    net, calls = Net(), iter(range(1, 10**6))
    net.layers[0].register_forward_hook(lambda net, args, out: out * next(calls))
    return net, {"x": torch.rand(6, 8)}

def misfit():
    return Net(), {"y": torch.ones(6, 8)}

class Both(Net):
    def forward(self, x):
        h = self.layers[0](x)
        return {"loss": h.square().mean(), "wide": h.repeat(1, 100)}

def both():
    return Both(), {"x": torch.ones(6, 8)}
"""


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(cli.app, list(words))


def stop() -> None:
    raise SystemExit(0)


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


@pytest.fixture
def costed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans a graph like GPT-2's, made by hand, whatever the model."""
    monkeypatch.setattr(costed_model, "captured", lambda *_, **__: None)
    monkeypatch.setattr(costed_model, "topics", lambda _: {"guards": ["s0 = 8"]})
    monkeypatch.setattr(costed_model, "costed", lambda *_: gpt2(layers=3, width=48, words=600))


# The program


def test_version_is_printed():
    assert run("--version").stdout.startswith("pipecompile 0.")


def test_help_names_the_commands_and_their_forms():
    assert run("--help").exit_code == 0
    text = run("plan", "--help").stdout
    assert "module:function" in text
    assert "hf:gpt2" in text
    assert "--stages" in text


@pytest.mark.parametrize("command", ["plan", "check"])
def test_help_fits_the_command_line(command):
    parameters = typer.main.get_command(cli.app).commands[command].params
    helps = {each.opts[0]: each.help for each in parameters if each.help}
    assert {"--pin", "--replicas", "--objective"} <= helps.keys()
    of_python = re.compile(r"[{}`]|\(\d|\bcompile\b|\breport\b")
    assert {flag: text for flag, text in helps.items() if of_python.search(text)} == {}


def test_defaults_are_shown_once_and_plain():
    text = " ".join(run("check", "--help").stdout.replace("│", "").split())
    for default in ("auto", "pace", "10.0", "microbatch"):
        assert f"[default: {default}]" in text


def test_no_command_shows_the_help():
    assert "Usage" in run().output


def test_module_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "pipecompile", "schedule", "gpipe"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "rank 3" in done.stdout


# plan


def test_plan_of_a_function_here_prints_table_and_prediction(nets):
    result = run("plan", "nets:make", "--costs", "count", "--microbatch", "3", "--microbatches", "4")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "stage rank modules params forward backward weights saved in out" in words
    assert "layers.0…" in words
    assert "1f1b, 4 microbatches: predicted step" in words
    assert "bubble" in words


def test_plan_without_outputs_keeps_only_the_loss(nets):
    def kept(*words: str) -> int:
        result = run("plan", "nets:both", "--stages", "1", "--costs", "count", "--json", *words)
        assert result.exit_code == 0, result.output
        (stage,) = json.loads(result.stdout)["stages"]
        return stage["memory"]["outputs"]

    assert kept() >= 8 * 6 * 800 * 4 > 2 * 8 * 4 >= kept("--outputs", "loss")
    result = run("plan", "nets:both", "--outputs", "none")
    assert result.exit_code == 2
    assert "outputs 'none' is not known" in result.output


def test_plan_measures_by_default(nets):
    result = run("plan", "nets.py:make", "--json")
    assert result.exit_code == 0, result.output
    it = json.loads(result.stdout)
    assert it["costs"].startswith("measured: cpu")
    assert it["step"]["seconds"] > 0


def test_plan_takes_the_schedule_that_compile_takes(nets, monkeypatch):
    """Seconds are 20 ms a row for each linear layer, where both profile."""

    def measured(captured, graph, *args, **kwargs):
        counted = profile(captured, graph, "count")
        linear = Cost(0.02 * captured.microbatch, 0.04 * captured.microbatch)
        costs = tuple(linear if node.op == "linear" else Cost() for node in graph.nodes)
        return replace(counted, costs=costs, measured=True)

    monkeypatch.setattr(costed_model, "profile", measured)
    monkeypatch.setattr(plan_call, "profile", measured)
    for words, options in (
        ([], {}),
        (["--schedule", "1f1b"], {"schedule": "1f1b"}),
        (["--replicas", "1,1"], {"plan": PlanOptions(replicas=[1, 1])}),
        (["--costs", "count"], {"costs": "count"}),
    ):
        result = run("plan", "nets.py:make", "-m", "4", "--microbatch", "2", *words, "--json")
        assert result.exit_code == 0, result.output
        it = json.loads(result.stdout)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), nn.Linear(8, 2))
        pipe = pipecompile.compile(
            model, ["cpu"] * 2, microbatches=4, loss_fn=lambda out, target: out.square().mean(), **options
        )
        pipe(torch.ones(8, 8), target=torch.ones(8, 2))
        assert it["schedule"] == pipe.pipeline.schedule
        assert [each["schedule"] for each in it["schedules"]] == ([] if words else ["zb-h1", "1f1b"])
        text = run("plan", "nets.py:make", "-m", "4", "--microbatch", "2", *words).stdout
        assert f"{it['schedule']}, 4 microbatches: predicted step" in text
        assert ("zb-h1, one stage on each rank" in text) is not bool(words)


def test_plan_of_a_config_needs_no_network_and_no_memory(tmp_path):
    small = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50}
    (tmp_path / "config.json").write_text(json.dumps(small))
    result = run("plan", f"hf:{tmp_path}", "--costs", "count", "--length", "8", "--json")
    assert result.exit_code == 0, result.output
    stages = json.loads(result.stdout)["stages"]
    assert [stage["modules"][-1] for stage in stages][-1] == "lm_head"
    assert stages[0]["bytes_out"] == stages[1]["bytes_in"] > 0


def test_plan_shows_replicas(costed):
    result = run("plan", "any:thing", "--replicas", "1,2")
    assert result.exit_code == 0, result.output
    assert "stages 1, 2 are replicas (microbatches are distributed round-robin)" in result.stdout
    stages = json.loads(run("plan", "any:thing", "--replicas", "1,2", "--json").stdout)["stages"]
    assert [(stage["rank"], stage["replica_of"]) for stage in stages] == [(0, 0), (1, 1), (2, 1)]


def test_plan_says_what_auto_has_tried(costed):
    result = run("plan", "any:thing", "--stages", "3", "--replicas", "auto", "--json")
    assert result.exit_code == 0, result.output
    it = json.loads(result.stdout)
    assert len(it["candidates"]) >= 3
    assert [1, 1, 1] in [candidate["replicas"] for candidate in it["candidates"]]
    assert sum(it["candidates"][0]["replicas"]) == len(it["stages"]) == 3
    text = run("plan", "any:thing", "--stages", "3", "--replicas", "auto").stdout
    assert f"{it['candidates'][0]['replicas']}: predicted step" in text


def test_json_says_what_the_table_says(costed):
    it = json.loads(run("plan", "any:thing", "--stages", "3", "--schedule", "gpipe", "-m", "5", "--json").stdout)
    assert it["schedule"] == "gpipe"
    assert it["microbatches"] == 5
    assert [stage["stage"] for stage in it["stages"]] == [0, 1, 2]
    assert len(it["step"]["peak_bytes"]) == 3
    busiest = max(stage["forward"] + stage["backward"] for stage in it["stages"])
    assert 0 < it["step"]["bubble"] < 1
    assert it["step"]["seconds"] >= 5 * busiest


@pytest.mark.parametrize(("suffix", "format"), [(".gv", "dot"), (".mmd", "mermaid"), *((f".{f}", f) for f in FORMATS)])
def test_output_file_tells_the_format(costed, tmp_path, suffix, format):
    path = tmp_path / f"plan{suffix}"
    result = run("plan", "any:thing", "--output", str(path))
    assert result.exit_code == 0, result.output
    assert "stage" in result.stdout
    assert f"wrote {path}" in result.stderr
    starts = {"dot": "digraph", "mermaid": "flowchart", "json": "{", "html": "<!doctype html>"}
    assert path.read_text(encoding="utf-8").startswith(starts[format])


def test_format_without_a_file_writes_nothing_else_to_stdout(costed):
    result = run("plan", "any:thing", "--format", "json")
    assert len(StageGraph.from_json(result.stdout).stages) == 2
    assert "predicted" in result.stderr


def test_pipedream_is_predicted_too(nets):
    result = run("plan", "nets:make", "--costs", "count", "--schedule", "pipedream", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["schedule"] == "pipedream"


# schedule


def test_schedule_draws_every_rank_and_the_known_bubble():
    result = run("schedule", "1f1b", "--stages", "4", "--microbatches", "8")
    assert result.exit_code == 0
    assert [f"rank {rank}" in result.stdout for rank in range(5)] == [True] * 4 + [False]
    assert f"{3 / 11:.1%}".replace("%", "") in result.stdout  # (stages - 1) / (microbatches + stages - 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_can_be_drawn(name):
    assert run("schedule", name, "-n", "12", "-m", "2").exit_code == 0


def test_a_schedule_with_several_stages_per_rank_has_fewer_ranks():
    result = run("schedule", "zb-v", "-n", "4", "-m", "3", "--program", "--backward", "2")
    assert "0: 0F0 0F1 0F2 3F0 3B0 3W0" in result.stdout
    assert "W  weights" in result.stdout
    assert ("rank 1" in result.stdout, "rank 2" in result.stdout) == (True, False)
    odd = run("schedule", "zb-v", "-n", "3")
    assert odd.exit_code == 2
    assert "zb-v' has 2 stages on each rank, so --stages must be a multiple of 2; got 3" in odd.stderr


def test_a_schedule_goes_to_files_and_comes_from_them(tmp_path):
    csv, trace, grid = tmp_path / "order.csv", tmp_path / "trace.json", tmp_path / "mine.txt"
    assert run("schedule", "zb-h1", "-n", "2", "-m", "2", "--csv", str(csv), "--trace", str(trace)).exit_code == 0
    assert csv.read_text().splitlines()[0] == "0F0,0F1,0I0,0W0,0I1,0W1"
    assert "0F0" in {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    again = run("schedule", str(csv), "--program")
    assert "0: 0F0 0F1 0B0 0W0 0B1 0W1" in again.stdout
    grid.write_text("F0 F1 . B1 B0\n.  F0 F1 B1 B0\n")
    assert "1: 1F0 1F1 1B1 1B0" in run("schedule", str(grid), "--program").stdout
    grid.write_text("F0 B0\nF0 F1")
    assert "0F1 is missing" in run("schedule", str(grid)).stderr
    assert "cannot read" in run("schedule", str(tmp_path / "none.txt")).stderr
    assert "must be one of sequential" in run("schedule", "zigzag").stderr


def test_schedule_is_written_as_a_picture(tmp_path):
    path = tmp_path / "gpipe.svg"
    assert run("schedule", "gpipe", "--svg", str(path)).exit_code == 0
    assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_schedule_prints_the_program():
    result = run("schedule", "1f1b", "-n", "2", "-m", "2", "--program")
    assert "0: 0F0 0F1 0B0 0B1\n1: 1F0 1B0 1F1 1B1\n" in result.stdout


def test_stages_may_have_times_of_their_own():
    equal = run("schedule", "gpipe", "-n", "2", "-m", "1", "--forward", "1,1", "--backward", "2").stdout
    assert "makespan 6" in equal
    uneven = run("schedule", "gpipe", "-n", "2", "-m", "1", "--forward", "1,3", "--backward", "2", "--transfer", "0.5")
    assert "makespan 9" in uneven.stdout


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan nets", "error: 'nets' is not the name of a model; write module:function"),
        ("plan nets:nothing", "error: nets has no function 'nothing'"),
        ("plan nets:misfit", "error: the model's forward cannot be called with these arguments"),
        (
            "plan nets:make --costs guess",
            "error: costs='guess' is not a file that can be read (No such file",
        ),
        (
            "plan nets:make --schedule 1f2b",
            "error: schedule '1f2b' is not known; it must be one of sequential, gpipe",
        ),
        (
            "plan nets:make --format png",
            "error: format 'png' is not known; it must be one of dot, mermaid, json",
        ),
        (
            "plan nets:make --json --format dot",
            "error: --json and --format would both go to the terminal; add --output",
        ),
        ("plan nets:make --device gpu", "error: "),
        (
            "plan nets:make --output plan.png",
            "error: the suffix of plan.png is not a known format; add --format, one of dot",
        ),
        ("plan nets:make --costs count -o no/plan.gv", "error: cannot write no/plan.gv: No such file or directory"),
        ("plan nets:make --costs count --microbatch 7", "error: --microbatch 7 is more than the 6 samples"),
        ("plan nets:make --costs count --stages 90", "error: "),
        ("plan nets:make --replicas many", "error: --replicas 'many' is not a list of numbers; write auto, or"),
        ("plan nets:make --replicas 1,0", "error: replicas=[1, 0]; it must list the number of devices of each stage"),
        (
            "plan nets:make --replicas 1,2 --stages 3",
            "error: --replicas 1,2 is for 2 stages, but --stages is 3",
        ),
        (
            "plan nets:make --replicas 1,2 --cluster 2xH100",
            "error: --replicas 1,2 is for 3 devices, but there are 2",
        ),
        (
            "plan nets:make --replicas auto -s pipedream",
            "error: --replicas does not work with --schedule pipedream",
        ),
        ("plan nets:make --costs count --objective speed", "error: objective='speed' is not known; it must be one of"),
        ("plan nets:make --costs count --recompute maybe", "error: recompute='maybe' is not known; it must be one of"),
        ("plan nets:make --costs count --pin 0", "error: --pin 0 does not end in =number; write name=number"),
        ("check nets:make --batch-norm synced", "error: batch_norm='synced' is not known; it must be 'microbatch' or"),
        ("check nets:make --in-dims x=first", "error: --in-dims x=first does not end in =number"),
        ("schedule zigzag", "error: schedule 'zigzag' is not known"),
        ("schedule gpipe --forward fast", "error: --forward 'fast' is not a number of seconds"),
        ("schedule gpipe --backward -1", "error: --backward '-1' is negative or not finite"),
        ("schedule gpipe --forward 1,2", "error: --forward has 2 numbers for 4 stages; give one, or 4"),
        ("schedule gpipe --svg no/plan.svg", "error: cannot write no/plan.svg"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(nets, words, message):
    result = run(*words.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("words", ["plan", "plan nets:make --stages 0", "schedule gpipe --microbatches no", "paint"])
def test_malformed_command_line_exits_with_2(words):
    assert run(*words.split()).exit_code == 2


def test_debug_shows_where_an_error_came_from():
    result = run("--debug", "schedule", "zigzag")
    assert isinstance(result.exception, InputError)
    assert result.exit_code == 1


# check


def test_check_compares_a_split_model_with_the_unsplit_one(nets: Path):
    result = run("check", "nets:make", "--stages", "3", "--double")
    assert result.exit_code == 0, result.output
    assert "layers.3" in result.stdout
    assert "exact: " in result.stdout


@pytest.mark.parametrize("none", ["None", "none"])
def test_an_argument_without_a_batch_is_written_as_none(nets: Path, monkeypatch: pytest.MonkeyPatch, none: str):
    given = []

    def note(*args, batching, **options):
        given.append(batching.in_dims)
        stop()

    monkeypatch.setattr(pipecompile.api, "compile", note)
    run("check", "nets:make", "--in-dims", "x=1", "--in-dims", f"table={none}")
    assert given == [{"x": 1, "table": None}]


def test_check_exits_with_1_on_a_difference(nets: Path):
    result = run("check", "nets:counted")
    assert result.exit_code == 1, result.output
    assert "NOT exact" in result.stdout


def test_check_takes_a_transformers_model(tmp_path: Path):
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("check", f"hf:{tmp_path}", "--microbatches", "2", "--length", "16")
    assert result.exit_code == 0, result.output
    assert "transformer.h.1" in result.stdout


@pytest.mark.parametrize(("backend", "code"), [("eager", 0), ("cudagraphs", 2)])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile reads it
def test_check_compiles_the_stages(nets: Path, backend: str, code: int) -> None:
    assert run("check", "nets:make", "--stage-compile", backend).exit_code == code


def test_check_refuses_what_is_no_synchronous_schedule(nets: Path):
    result = run("check", "nets:make", "--schedule", "pipedream")
    assert result.exit_code == 2
    assert "sequential, gpipe, 1f1b" in result.stderr


def test_stages_are_counted_over_all_ranks(nets: Path):
    result = run("plan", "nets:make", "--costs", "count", "--schedule", "zb-v", "--stages", "4", "--json")
    facts = json.loads(result.stdout)
    assert [stage["rank"] for stage in facts["stages"]] == [0, 1, 1, 0]
    assert len(facts["step"]["peak_bytes"]) == 2
    assert run("check", "nets:make", "--schedule", "zb-v", "--stages", "4", "--microbatches", "2").exit_code == 0
    for command in ("check", "plan"):
        result = run(command, "nets:make", "--schedule", "zb-v", "--stages", "3")
        assert result.exit_code == 2
        assert "'zb-v' has 2 stages on each rank, so --stages must be a multiple of 2; got 3" in result.stderr


def test_auto_says_what_it_has_weighed(nets: Path):
    facts = json.loads(run("plan", "nets:make", "--costs", "count", "-s", "auto", "--stages", "2", "--json").stdout)
    names = [each["schedule"] for each in facts["schedules"]]
    assert facts["schedule"] == names[0]
    assert {"1f1b", "zb-h1", "interleaved-1f1b", "zb-v"} <= set(names)
    assert "predicted step" in run("plan", "nets:make", "--costs", "count", "-s", "auto", "--stages", "2").stdout
    assert {each["microbatches"] for each in facts["schedules"]} == {1, 2, 4, 8, 16}  # of 8 x 6 rows
    assert facts["microbatches"] == facts["schedules"][0]["microbatches"]
    given = run("plan", "nets:make", "--costs", "count", "-s", "auto", "-m", "4", "--stages", "2", "--json").stdout
    assert {each["microbatches"] for each in json.loads(given)["schedules"]} == {4}
    best = run("schedule", "auto", "--stages", "4", "-m", "8").stdout.splitlines()
    assert best[0].startswith("interleaved-zb ")
    within = run("schedule", "auto", "--stages", "4", "-m", "8", "--memory", "3").stdout
    assert within.startswith("v-half ")
    assert "1f1b" not in within


def test_without_typer_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    from pipecompile.__main__ import main

    for name in [name for name in sys.modules if name.startswith("pipecompile.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"needs typer.*pip install 'pipecompile\[cli\]'"):
        main()


def test_the_cache_is_shown_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing is kept" in run("cache").output
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path))
    assert DiskCache(tmp_path).write("costs-1", [1.0], {"what": "costs", "model": "Net"}) == ""
    (tmp_path / "plan-1.json").write_text("{")
    (tmp_path / "mine.txt").write_text("")
    shown = run("cache").output
    assert "Net" in shown
    assert "ignored: it is not JSON" in " ".join(shown.split())
    facts = json.loads(run("cache", "--json").output)
    assert facts["folder"] == str(tmp_path)
    assert {entry.get("model") for entry in facts["entries"]} == {"Net", None}
    assert "removed 2 entries" in run("cache", "--clear").output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_page_that_cannot_be_drawn_is_refused_before_the_work(nets, monkeypatch):
    figures = ("figures", "page_figures", "graph_figure", "memory_figure", "time_axis", "timeline_figure")
    drawing = ("bokeh", *(f"pipecompile.render.{name}" for name in figures))
    for name in [name for name in sys.modules if name.startswith(drawing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bokeh", None)
    monkeypatch.setattr(costed_model, "captured", None)  # is not called
    result = run("plan", "nets:make", "--output", "plan.html")
    assert result.exit_code == 2
    assert "pip install 'pipecompile[report]'" in " ".join(result.output.split())
