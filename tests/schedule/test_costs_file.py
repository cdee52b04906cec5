"""The file of benchmarks/schedules.py, and what the benchmark prints for it."""

import importlib.util
import json
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from pipecompile.errors import InputError
from pipecompile.schedule.shape import v_shape

FILE = Path(__file__).parents[2] / "benchmarks" / "schedules.py"
ROWS, FIGURES = FILE.with_name("schedule_rows.csv"), FILE.with_name("schedule_figures.csv")
HEADER = "name,p,n,f,b,w,c,mem_f,mem_b,mem_w,cap"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmarks_schedules", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def read(benchmark, tmp_path):
    def from_text(text):
        path = tmp_path / "costs.csv"
        path.write_text(text, encoding="utf-8")
        return benchmark.read(path)

    return from_text


def test_empty_cells_spaces_and_floats_are_read(read):
    a, b, c = read(
        f"\ufeff{HEADER}\n a , 4, 8.0 ,1,1.5, 2 ,,,,,\n\nb,1,1,1,0,0,0,2,-1,-1,inf\n,2,1,1,1,1,.5,2,1,1, 4\n"
    )
    assert (a.name, a.p, a.n, a.c, a.cap) == ("a", 4, 8, 0, inf)
    assert {(rank.times, rank.memory) for rank in a.ranks} == {((1, 1.5, 2), (1, 0, -1))}
    assert len(a.ranks) == 4
    assert (b.ranks[0].memory, b.cap) == ((2, -1, -1), inf)
    assert (c.name, c.ranks[1].memory, c.cap) == ("line 5", (2, -1, -1), 4)


def test_columns_may_stand_in_any_order_and_others_are_named(read, capsys):
    (case,) = read("cap,mem_w,mem_b,mem_f,c,w,b,f,n,p,name,who\n8,-1,-1,2,0,3,2,1,6,4,x,me\n")
    assert (case.p, case.n, case.ranks[3].times, case.cap) == (4, 6, (1, 2, 3), 8)
    assert "not used: 'who'" in capsys.readouterr().err


def test_a_backward_may_add_memory(read):
    assert read(f"{HEADER}\nx,2,2,1,1,1,0,1,0.6,-1.6,9\n")[0].ranks[0].memory == (1, 0.6, -1.6)


def test_ranks_may_differ_and_a_stage_takes_its_part_of_its_rank(read):
    (case,) = read(f"# unequal\n{HEADER}\n  # ranks\nx,3,4,1 2 3,4,5 6 7,0,2 4 6,-1 -2 -3,,9\n")
    costs = case.costs(v_shape(3))
    assert costs.f == (0.5, 1, 1.5, 1.5, 1, 0.5)
    assert (costs.b, costs.w) == ((2,) * 6, (2.5, 3, 3.5, 3.5, 3, 2.5))
    assert (costs.mem_f, costs.mem_w) == ((1, 2, 3, 3, 2, 1), (-0.5, -1, -1.5, -1.5, -1, -0.5))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column name, p, n"),
        ("name,p,n,f,b\n", "no column w, c, mem_f"),
        (f"{HEADER},p\n", "a column twice"),
        (f"{HEADER}\nx,4,8,1,1,\n", "line 2: no value for w"),
        (f"{HEADER}\nx,4,8,1,one,1,,,,,\n", "line 2: b is 'one', which is not a number"),
        (f"{HEADER}\nx,4,8,1,-1,1,,,,,\n", "b must be a time, finite and not negative; got -1"),
        (f"{HEADER}\nx,4,8,1,inf,1,,,,,\n", "b must be a time"),
        (f"{HEADER}\nx,4,8,1,nan,1,,,,,\n", "b is nan"),
        (f"{HEADER}\nx,4,8,0,0,0,,,,,\n", "nothing to schedule"),
        (f"{HEADER}\nx,1e12,1,1,1,1,,,,,\n", "1 microbatches on 1000000000000 ranks are more than 10,000,000"),
        (f"{HEADER}\nx,0,8,1,1,1,,,,,\n", "p must be an integer of 1 or more; got 0"),
        (f"{HEADER}\nx,4,2.5,1,1,1,,,,,\n", "n must be an integer of 1 or more; got 2.5"),
        (f"{HEADER}\nx,4,inf,1,1,1,,,,,\n", "n must be an integer"),
        (f"{HEADER}\nx,4,8,1,1,1,-1,,,,\n", "c must be a time"),
        (f"{HEADER}\nx,4,8,1,1,1,,2,-1,0,\n", "F adds mem_f=2.0, of which B and W must free all"),
        (f"{HEADER}\nx,4,8,1,1,1,,-2,1,1,\n", "mem_f not negative"),
        (f"{HEADER}\nx,4,8,1,1,1,,1,-2,1,\n", "W adds mem_w=1.0; what W does must free memory, or leave it as it is"),
        (f"{HEADER}\nx,4,8,1,1,1,,1,-2,,\n", "W adds mem_w=1.0"),
        (f"{HEADER}\nx,4,8,1,1,1,,,,,-3\n", "cap must not be negative"),
        (f"{HEADER}\nx,4,8,1,1,1,,,,,3,4\n", "12 cells for 11 columns"),
        (f"{HEADER}\nx,4,8,1 2 3,1,1,,,,,3\n", "f has 3 numbers for 4 ranks; give one, or one for each rank"),
        (f"{HEADER}\nx,2,8,1 -2,1,1,,,,,3\n", "f must be a time, finite and not negative; got 1 -2"),
        (f"{HEADER}\nx,2,8,1,1,1,,1 2,-1,,3\nx,2,8,1,1,1,,1 2,-1,0,3\n", "line 3: F adds mem_f=2.0"),
        (f"{HEADER}\nx,2,8,1e308,1,1,,,,,3\n", "the times of 8 microbatches add up to infinity"),
        (f"{HEADER}\nx,2 2,8,1,1,1,,,,,3\n", "p is '2 2', which is not a number"),
        (HEADER.replace(",", ";"), "no column name.* with commas"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(read, text, words):
    with pytest.raises(InputError, match=words):
        read(text)


@pytest.mark.parametrize("row", ["x,1,1,1,1,1,0,1,0,-1,", "x,3,2,1,2,0,0,1,0,-1,", "x,2,3,0,1,0,5,1,-1,0,2"])
def test_odd_cases_have_every_schedule_and_the_best_is_the_best(benchmark, read, row):
    (case,) = read(f"{HEADER}\n{row}\n")
    found = {result.schedule: result for result in benchmark.results(case)}
    assert {"1f1b", "zb-h1", "zb", "auto"} <= set(found)
    assert found["auto"].span_rate == min(result.span_rate for result in found.values())
    assert found["auto-makespan"].makespan_rate == min(result.makespan_rate for result in found.values())
    assert all(0 <= result.span_rate < 1 and result.peak <= case.cap for result in found.values())


def test_only_what_meets_the_cap_is_printed_as_json_without_torch(tmp_path):
    path = tmp_path / "costs.csv"
    path.write_text(f"{HEADER}\nroom,2,3,1,1,1,0,1,0,-1,1.5\nnone,2,3,1,1,1,0,1,0,-1,0.5\n")
    command = [sys.executable, "-X", "importtime", str(FILE), "--costs", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert {tuple(result) for result in results} == {("name", "schedule", "span_rate", "makespan_rate", "peak")}
    assert {result["name"] for result in results} == {"room"}
    assert all(result["peak"] <= 1.5 for result in results)
    assert "1f1b" not in {result["schedule"] for result in results}
    assert "none: no schedule meets cap=0.5: one microbatch on a rank needs 1" in done.stderr
    assert "torch" not in done.stderr


def test_reference_rows_are_no_worse_than_their_figures(benchmark, capsys):
    """The small ones; ``--against`` has all."""
    cases = [case for case in benchmark.read(ROWS) if case.p <= 3 or case.name.startswith("sample unequal")]
    found = [result for case in cases for result in benchmark.results(case)]
    assert benchmark.compare(found, benchmark.read_figures(FIGURES))
    assert capsys.readouterr().out.splitlines()[-1] == "1 better, 9 equal, 0 worse"


def test_every_reference_row_has_a_figure_and_every_figure_a_row_and_a_schedule(benchmark):
    cases, figures = benchmark.read(ROWS), benchmark.read_figures(FIGURES)
    assert len({case.name for case in cases}) == len(cases)
    assert {figure.name for figure in figures} <= {case.name for case in cases}
    assert {case.name for case in cases} - {figure.name for figure in figures} == {"V p=8 n=24 unequal zb-v"}
    assert {figure.schedule for figure in figures} <= {*benchmark.RECIPES, "zb", "auto", "auto-makespan"}


def test_figures_are_compared_to_their_last_digit(benchmark, capsys, tmp_path):
    path = tmp_path / "figures.csv"
    lines = ["x,zb,span,0.125,a", "x,zb,span,0.1249,b", "x,zb,makespan,0.26,c", "x,zb-v,span,0.9,d", "y,zb,span,0,e"]
    path.write_text("\n".join(["name,schedule,metric,figure,source", *lines]))
    found = [benchmark.Result(name="x", schedule="zb", span_rate=0.1252, makespan_rate=0.25, peak=1.0)]
    assert not benchmark.compare(found, benchmark.read_figures(path))
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert words == ["equal", "worse", "better", "worse"]  # what has no order is worse; y is no case


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x,zb,span,0.1", "4 cells for 5 columns"),
        ("x,zb,time,0.1,a", "metric must be span or makespan; got 'time'"),
        ("x,zb,span,1.5,a", "from 0 to below 1; got 1.5"),
        ("x,zb,span,nan,a", "figure is nan"),
    ],
)
def test_what_is_wrong_with_a_figure_is_said_with_its_line(benchmark, tmp_path, line, words):
    path = tmp_path / "figures.csv"
    path.write_text(f"name,schedule,metric,figure,source\n{line}\n")
    with pytest.raises(InputError, match=f"line 2: .*{words}"):
        benchmark.read_figures(path)
