"""Whatever happens to a rank, all others end, and raise the same error."""

from __future__ import annotations

import gc
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from threading import Thread

import pytest
import torch.distributed as dist
from control_scenes import PATIENT
from launcher import Ended, Hurt, Launcher, report

import pipecompile
from pipecompile.distributed import watch
from pipecompile.distributed.control import Control, store_of_the_group
from pipecompile.distributed.watch import Cause, Pace, Stillness
from pipecompile.distributed.worker import Worker, is_lost
from pipecompile.errors import InputError
from pipecompile.runtime.transport import Aborted


def text_of(ended: list[Ended], *but: int) -> str:
    """The text of the RankError that all ranks raised, but these."""
    found = [each for each in ended if each.rank not in but]
    assert [(each.error, each.code) for each in found] == [("RankError", 1)] * len(found), report(ended)
    assert len({each.text for each in found}) == 1, report(ended)
    host = f" (host {watch.socket.gethostname()})"
    return found[0].text.replace(host, "")


# Between processes


def test_an_exception_in_a_stage_is_raised_by_all(launcher: Launcher) -> None:
    ended = launcher.run("control_scenes:one_raises", 3, rank=1)
    assert text_of(ended) == "rank 1: stage 1, 1F0: ValueError: the model's own"
    assert "The above exception was the direct cause of" in ended[1].output


def test_of_two_failures_at_once_one_is_raised_by_all(launcher: Launcher) -> None:
    ended = launcher.run("control_scenes:two_raise", 3)
    assert text_of(ended) in [f"rank {r}: stage {r}, {r}B3: ValueError: too large" for r in (0, 1)]


def test_an_exception_in_the_script_ends_the_others(launcher: Launcher) -> None:
    ended = launcher.run("control_scenes:one_raises_outside", 3, rank=1)
    assert (ended[1].error, ended[1].code) == ("KeyError", 1)
    assert text_of(ended, 1) == "rank 1: ended without closing the pipeline: KeyError: 'data'"


@pytest.mark.parametrize(
    ("close", "how"), [(False, "ended without closing the pipeline"), (True, "closed the pipeline")]
)
def test_a_rank_that_ends_while_it_is_waited_for_is_a_failure(launcher: Launcher, close: bool, how: str) -> None:
    ended = launcher.run("control_scenes:one_ends_early", 2, rank=1, close=close, peer=1)
    assert (ended[1].code, ended[1].error) == (0, None)
    assert text_of(ended, 1) == f"rank 1: {how} while rank 0 waited for it; all ranks must make the same calls"


def test_a_rank_that_ended_and_is_not_waited_for_is_no_failure(launcher: Launcher) -> None:
    assert launcher.returned("control_scenes:the_first_ends_before_the_others_do", 3) == ["None"] * 3


def test_a_rank_that_is_killed_is_noticed_by_its_silence(launcher: Launcher) -> None:
    ended = launcher.run("control_scenes:all_wait", 3, hurt=Hurt(1, signal.SIGKILL, at="waiting"))
    assert ended[1].code == -signal.SIGKILL
    assert text_of(ended, 1) == "rank 1: gave no sign for 4 s: it was stopped or killed, or is unreachable"


def test_a_rank_that_is_stopped_and_wakes_raises_what_the_others_raised(launcher: Launcher) -> None:
    ended = launcher.run("control_scenes:all_wait", 3, hurt=Hurt(1, signal.SIGSTOP, at="waiting"))
    assert text_of(ended) == "rank 1: gave no sign for 4 s: it was stopped or killed, or is unreachable"
    assert ended[1].seconds >= max(ended[0].seconds, ended[2].seconds)


def test_a_keyboard_interrupt_of_one_rank_ends_all(launcher: Launcher) -> None:
    ended = launcher.run("control_scenes:all_wait", 3, hurt=Hurt(1, signal.SIGINT, at="waiting"))
    assert ended[1].error == "KeyboardInterrupt"
    assert text_of(ended, 1) == "rank 1: ended without closing the pipeline: KeyboardInterrupt"


def test_a_killed_rank_is_noticed_by_its_lost_connection(launcher: Launcher) -> None:
    hurt = Hurt(1, signal.SIGKILL, at="waiting")
    ended = launcher.run("control_scenes:one_waits_in_gloo", 2, hurt=hurt, rank=-1)
    assert "rank 1: its connection to rank 0 was lost and it reported nothing (killed?)" in text_of(ended, 1)


def test_a_wait_in_gloo_is_left_when_another_rank_fails(launcher: Launcher) -> None:
    ended = launcher.run("control_scenes:one_waits_in_gloo", 2, rank=1)
    assert text_of(ended) == "rank 1: stage 1, 1F0: ValueError: the model's own"


def test_a_pipeline_is_not_told_of_the_failure_of_the_one_before(launcher: Launcher) -> None:
    for said in launcher.returned("control_scenes:two_pipelines_one_after_the_other", 2):
        assert [text.split(" (")[0] for text in said] == ["RankError: rank 0", "RankError: rank 1"]
        assert [text.split("): ")[1] for text in said] == ["failure 0", "failure 1"]


def test_collectives_run_in_a_worker(launcher: Launcher) -> None:
    assert launcher.returned("control_scenes:collectives", 2, rounds=3) == [8.0, 8.0]


# Where rank 0 hosts the store


def test_the_host_of_the_store_stays_until_all_know_why_it_failed(launcher: Launcher) -> None:
    ended = launcher.run("control_scenes:the_host_raises", 3, agent=False)
    assert text_of(ended) == "rank 0: stage 0, 0F0: ValueError: the model's own"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_all_end_without_the_store(launcher: Launcher, number: int) -> None:
    hurt = Hurt(0, number, at="waiting")
    ended = launcher.run("control_scenes:all_wait", 3, agent=False, hurt=hurt)
    assert text_of(ended, 0) == watch.STORE
    assert ended[0].code == (1 if number == signal.SIGSTOP else -signal.SIGKILL), report(ended)


# In one process

PLACES = count()
Open = Callable[..., list[Control]]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens the controls of a new pipeline, one for each rank; all are closed in the end."""
    store, all_opened = dist.HashStore(), []

    def open_(size: int, pace: Pace = PATIENT) -> list[Control]:
        place = f"place {next(PLACES)}"
        controls = [Control(rank, size, lambda: dist.PrefixStore(place, store), pace) for rank in range(size)]
        all_opened.extend(controls)
        return controls

    yield open_
    for control in all_opened:
        control.close()


def threads(name: str) -> list[Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_what_is_ready_is_not_waited_for_and_time_may_be_up(opened: Open) -> None:
    (control,) = opened(1)
    assert control.wait_for(lambda: True)
    assert control.wait_for(lambda: True, 0)
    assert not control.wait_for(lambda: False, 0.01)


def test_a_wait_ends_when_it_is_notified(opened: Open) -> None:
    (control,) = opened(1, Pace(beat=300))
    box: list[int] = []

    def fill() -> None:
        with control.changed:
            box.append(1)
            control.changed.notify_all()

    thread = Thread(target=fill)
    thread.start()
    assert control.wait_for(lambda: bool(box), 200)
    thread.join()


def test_the_first_of_many_causes_stays(opened: Open) -> None:
    controls = opened(4)
    raised: list[str] = []
    reports = [
        Thread(target=lambda c=c: raised.append(str(c.report(c.mine("", f"failure of {c.rank}"))))) for c in controls
    ]
    for thread in reports:
        thread.start()
    for thread in reports:
        thread.join()
    assert len(raised) == 4
    assert len(set(raised)) == 1
    assert raised[0] == str(controls[0].cause)
    assert str(controls[0].report(controls[0].mine("", "later"))) == raised[0]


def test_a_cause_that_comes_between_look_and_report_is_the_first() -> None:
    store, first = dist.HashStore(), Cause(1, "h", "", "first")

    class Late(dist.PrefixStore):
        def check(self, keys: list[str]) -> bool:
            found = super().check(keys)
            if keys == ["failure"]:
                super().compare_set("failure", "", first.to_json())
            return found

    control = Control(0, 1, lambda: Late("late", store), PATIENT)
    assert str(control.report(control.mine("", "second"))) == "rank 1 (host h): first"
    control.close()


def test_a_rank_that_ended_gives_no_sign_and_is_not_blamed(opened: Open) -> None:
    first, second, _ = opened(3, Pace(beat=0.01, silent=1.0))
    first.close()
    assert second.wait_for(lambda: 0 in second.watch.ended, peer=2)
    assert not second.wait_for(lambda: False, 2.0, peer=2)
    assert second.cause is None


def test_nothing_is_waited_for_after_a_failure(opened: Open) -> None:
    one, other = opened(2)
    one.report(one.mine("", "failure"))
    with pytest.raises(Aborted):
        other.wait_for(lambda: other.cause is not None and False)
    with pytest.raises(Aborted):
        other.wait_for(lambda: True)


def test_a_closed_control_waits_for_nothing_and_can_report(opened: Open) -> None:
    (control,) = opened(1)
    control.close()
    control.lost(None, RuntimeError("connection closed"))
    assert control.cause is None
    with pytest.raises(Aborted):
        control.wait_for(lambda: False)
    assert "has closed the pipeline, so it cannot be used any more" in str(control.error())
    assert "failure" in str(control.report(control.mine("", "failure")))


def test_a_rank_that_does_not_begin_is_a_failure_in_the_end() -> None:
    store = dist.HashStore()
    control = Control(0, 2, lambda: store, Pace(beat=0.01, absent=0.1))
    with pytest.raises(Aborted):
        control.wait_for(lambda: False)
    assert str(control.error()) == "rank 1: did not start its pipeline for 0.1 s"
    control.close()


def test_a_lost_connection_waits_for_a_better_cause(opened: Open) -> None:
    one, other = opened(2, Pace(beat=0.05, grace=300))
    hint = Thread(target=lambda: one.lost(1, RuntimeError("connection closed")))
    hint.start()
    other.report(other.mine("stage 1, 1F0", "ValueError: better"))
    hint.join()
    assert str(one.error()).endswith("stage 1, 1F0: ValueError: better")


def test_a_lost_connection_of_nobody_in_particular_is_that_of_the_rank_that_falls_silent() -> None:
    store = dist.HashStore()
    store.set("sign/1", "7 there")  # its last one
    control = Control(0, 2, lambda: store, Pace(beat=0.02, silent=4.0, grace=300.0))
    control.lost(None, RuntimeError("Connection closed by peer"))
    assert str(control.error()).startswith("rank 1 (host there): gave no sign for 1 s: it was stopped or killed")


def test_a_lost_connection_of_nobody_in_particular_is_that_of_a_rank_that_a_socket_knows_to_have_ended() -> None:
    store = dist.HashStore()
    store.set("sign/2", "7 there")
    control = Control(0, 3, lambda: store, Pace(beat=0.02, silent=300.0, grace=0.1))
    control.watch.gone += [list, lambda: [2]]
    control.lost(None, RuntimeError("Connection closed by peer"))
    assert str(control.error()) == (
        "rank 2 (host there): its connection to rank 0 was lost and it reported nothing (killed?): Connection closed "
        "by peer"
    )
    control.close()


def test_a_forgotten_control_ends_its_threads() -> None:
    store = dist.HashStore()
    control = Control(7, 8, lambda: store, PATIENT)
    worker = Worker(control, 3)
    found = threads("pipecompile control 7") + threads("pipecompile 7 with 3")
    assert len(found) == 2
    assert all(thread.daemon for thread in found)
    del worker, control
    gc.collect()
    for thread in found:
        thread.join(300)
        assert not thread.is_alive()
    assert store.get("end/7") == b"ended without closing the pipeline"


def test_the_stillness_of_a_value_is_counted_while_this_process_is_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 0.5, 100.0, 100.25, 100.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    still = Stillness(step=1.0)
    assert [still(value) for value in "aaaba"] == [0.0, 0.5, 1.5, 0.0, 0.0]


def test_a_cause_reads_and_is_kept_as_text() -> None:
    cause = Cause(2, "h", "stage 1, 1B3", "ValueError: ü")
    assert str(cause) == "rank 2 (host h): stage 1, 1B3: ValueError: ü"
    assert Cause.from_json(cause.to_json()) == cause
    assert json.loads(cause.to_json())["rank"] == 2
    assert str(Cause(None, "", "", "gone")) == "gone"


# The worker


def test_a_worker_calls_in_order_and_returns_or_raises(opened: Open) -> None:
    (control,) = opened(1)
    worker, seen = Worker(control), []
    worker.put(lambda: seen.append(1))
    assert worker.call(lambda: [*seen, 2]) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0)
    assert worker.call(lambda: 3) == 3


def test_a_job_that_raises_ends_the_run(opened: Open) -> None:
    one, other = opened(2)
    worker = Worker(one, 1)
    worker.put(lambda: [][0])
    with pytest.raises(Aborted):
        other.wait_for(lambda: False)
    assert str(other.error()).endswith("IndexError: list index out of range")
    with pytest.raises(Aborted):
        worker.call(lambda: 1)


def test_a_call_that_hangs_is_left(opened: Open) -> None:
    one, other = opened(2)
    held = threading.Event()
    hurry = Thread(target=lambda: other.report(other.mine("", "failure")))
    hurry.start()
    with pytest.raises(Aborted):
        Worker(one, 1).call(held.wait)
    held.set()
    hurry.join()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4"), True),
        (ConnectionResetError("reset"), False),
        (OSError("Broken pipe"), True),
        (RuntimeError("expected scalar type Float"), False),
        (ValueError("connection"), False),
    ],
)
def test_a_lost_connection_is_known_by_its_error(error: Exception, lost: bool) -> None:
    assert is_lost(error) == lost


# The store of the process group


def test_without_a_process_group_the_error_says_how_to_start_one() -> None:
    with pytest.raises(InputError, match="init_process_group"):
        store_of_the_group()


def test_a_store_that_cannot_be_opened_twice_is_refused() -> None:
    dist.init_process_group("fake", rank=0, world_size=2)
    try:
        with pytest.raises(InputError, match="a second thread cannot open the Store"):
            store_of_the_group()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
def test_each_pipeline_and_each_run_has_keys_of_its_own(
    kind: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = {
        "hash": dist.HashStore,
        "file": lambda: dist.FileStore(f"{tmp_path}/store", 1),
        "tcp": lambda: dist.TCPStore("127.0.0.1", 0, is_master=True),
    }[kind]()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        opens = [
            store_of_the_group(),
            store_of_the_group(),
            store_of_the_group(name="named"),
            store_of_the_group(name="named"),
        ]
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        opens.append(store_of_the_group(name="named"))
        opens.append(store_of_the_group([0, 1], "named"))
        for number, open_ in enumerate(opens):
            open_().set("key", str(number))
        assert [open_().get("key") for open_ in opens] == [b"0", b"1", b"3", b"3", b"4", b"5"]
        assert opens[0]().compare_set("failure", "", "first") == b"first"
        assert opens[0]().compare_set("failure", "", "second") == b"first"
    finally:
        dist.destroy_process_group()


def test_the_error_is_public() -> None:
    assert issubclass(pipecompile.RankError, pipecompile.ExecutionError)
