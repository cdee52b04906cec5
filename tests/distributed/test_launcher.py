from __future__ import annotations

import os
import signal

import launcher as launcher_file
import pytest
import torch
from launcher import Hurt, Launcher, report


def left(pid: int) -> bool:
    """Whether a rank, or a process that it started, is there."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("agent", [True, False])
def test_ranks_return_what_the_scene_returns(launcher: Launcher, agent: bool) -> None:
    first, second = launcher.returned("launcher_scenes:adds", 2, agent=agent, number=1.5)
    assert first == second == (False, torch.tensor([4.5]))


def test_an_exception_is_one_of_its_rank_and_ends_it_like_a_script(launcher: Launcher) -> None:
    good, bad = launcher.run("launcher_scenes:raises_on", 2, rank=1)
    assert (good.code, good.error, good.result) == (0, None, good.pid)
    assert (bad.code, bad.error, bad.text, bad.result) == (1, "ValueError", "the scene's own", None)
    assert "hello from 1" in bad.output
    assert "Traceback" in bad.output
    assert not left(good.pid)
    assert not left(bad.pid)


def test_a_rank_that_hangs_is_killed_and_shows_its_stack(launcher: Launcher) -> None:
    good, bad = launcher.run("launcher_scenes:hangs_on", 2, limit=1, hangs=1, rank=1)
    assert (good.code, bad.code, bad.error) == (0, None, None)
    assert "in await_moment" in bad.output
    assert not left(bad.pid)
    assert "in await_moment" in report([good, bad])


def test_ranks_that_are_not_said_to_hang_are_killed_too(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_file, "LIMIT", 1)
    ended = launcher.run("launcher_scenes:all_hang", 2, limit=1, hangs=1)
    assert [each.code for each in ended] == [None, None], report(ended)
    assert all("in await_moment" in each.output for each in ended)


def test_scenes_after_one_that_failed_are_as_before(launcher: Launcher) -> None:
    launcher.run("launcher_scenes:raises_on", 2, rank=0)
    assert launcher.returned("launcher_scenes:adds", 2, number=1.0)[0] == (False, torch.tensor([3.0]))


@pytest.mark.parametrize(
    ("number", "code", "result"),
    [
        (signal.SIGKILL, -signal.SIGKILL, None),
        (signal.SIGINT, 0, "interrupted"),
        (signal.SIGSTOP, 0, "went on"),
    ],
)
def test_a_rank_is_hurt_when_the_scene_says(launcher: Launcher, number: int, code: int, result: str | None) -> None:
    good, bad = launcher.run("launcher_scenes:is_hurt", 2, hurt=Hurt(1, number, at="pausing"))
    assert (good.code, good.result) == (0, "went on")
    assert (bad.code, bad.result) == (code, result), report([good, bad])


def test_a_scene_that_is_not_there_fails(launcher: Launcher) -> None:
    with pytest.raises(AssertionError, match="AttributeError"):
        launcher.returned("launcher_scenes:nothing", 1)


def test_a_launcher_that_was_not_used_has_nothing_to_close() -> None:
    Launcher().close()
