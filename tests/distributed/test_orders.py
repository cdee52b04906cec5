"""One process does things in another order than the others, or catches what it alone has raised: none goes on alone."""

from __future__ import annotations

from typing import Any

import pytest
from launcher import Ended, Launcher, report


def results(ended: list[Ended]) -> list[Any]:
    """What all ranks returned. After a failure a process may end without the interpreter's cleanup, and so with 1."""
    assert [each.error for each in ended] == [None] * len(ended), report(ended)
    assert all(each.result for each in ended), report(ended)
    return [each.result for each in ended]


@pytest.fixture(scope="module")
def orders(launcher: Launcher) -> list[Any]:
    return results(launcher.run("order_scenes:orders", 2))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("other backward", ["after the backward of call 7 with the gradient 1", "after the backward of call 8 with"]),
        ("other backward, deferred", ["the backward of call 7, and rank 1 at call 9, the backward of call 8"]),
        ("hook", ["after the backward of call 7 with the gradient 1, and rank 1 at call 8, a call of capture 0"]),
        ("hook, deferred", [", after the backward of call 7, and rank 1 at call 9, a call of capture 0 with"]),
        ("flush", ["a call of capture 0 with gradients on", "and rank 1 at call 10, to flush the pipeline; "]),
        ("rerun", ["to run call 7 again: a second backward, ", "and rank 1 at call 9, a call of capture 0"]),
    ],
)
def test_all_refuse_what_one_does_otherwise(orders: list[Any], name: str, says: list[str]) -> None:
    (refused, *others), *more = (each[name] for each in orders)
    assert refused.startswith("InputError: ranks 0 and 1 do not make the same call: ")
    assert all(words in refused for words in says), refused
    assert [said[0] for said in more] == [refused]
    if name != "rerun":  # where what follows is as if nothing had been
        assert not others
        assert [said[1:] for said in more] == [[]]


def test_all_count_the_same_steps_whatever_one_was_refused(orders: list[Any]) -> None:
    for refused, *others in (each["capture"] for each in orders):
        assert "do not make the same call" in refused
        assert others
        assert not any(others)


def test_what_fails_in_one_where_it_is_caught_ends_all(launcher: Launcher) -> None:
    found = results(launcher.run("order_scenes:failures", 3))
    words = {
        "preparing": "rank 1 (host {}): MemoryError: no room for buffers",
        "agreement": "rank 1 (host {}): KeyboardInterrupt",
        "pickle": "rank 1 (host {}): ",
        "first": "rank 0 (host {}): KeyboardInterrupt",
    }
    host = found[1]["first"][0].partition("(host ")[2].partition(")")[0]
    for name, text in words.items():
        said = {each for result in found for each in result[name] if each}
        assert len(said) == 1, said
        assert said.pop().startswith(f"RankError: {text.format(host)}")


def test_a_part_that_one_process_passes_otherwise_is_refused_by_all(launcher: Launcher) -> None:
    words = {"type": "x: float64 [rows, 10]", "length": "x: float32 [rows, 3]"}
    found = results(launcher.run("order_scenes:other_parts", 4))
    for result in found:
        assert result["nothing"] == [""]
        for name, part in words.items():
            refused, after = result[name]
            assert refused == found[0][name][0]
            assert part in refused
            assert "whose parts differ in their numbers of rows only (pad all sequences to one length)" in refused
            assert not after


def test_a_pipeline_that_one_process_makes_while_another_calls(launcher: Launcher) -> None:
    first, second = launcher.run("order_scenes:compiles_beside", 2, limit=1, hangs=1)
    assert first.error == "RankError", report([first, second])
    assert "while rank 1 waits in compile() of another pipeline, so neither can go on" in first.text
