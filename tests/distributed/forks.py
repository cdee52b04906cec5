"""The parent of all ranks: imports all that they need once, and forks a process for each rank of each scene.

It reads a scene as a line of JSON, answers with a line of the ranks' process ids, and with a line for each that ends.
A rank returns from ``serve`` and ends as a script does: with its exception printed, and its exit functions called. What
follows, the interpreter's cleanup, would free all that was imported, page by page: most of a short scene's time. It is
left out (``_end``) where a scene returned that is not about how processes end; in ``make long`` nowhere.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ABOUT_ENDS = ("control_scenes", "failing_scenes")
RETURNED: list[str] = []  # the scene of a rank that leaves out the cleanup


@atexit.register
def _end() -> None:
    """Called after all other exit functions, as it is registered first."""
    if RETURNED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# ruff: noqa: E402
import sympy.sets.setexpr  # these are what the first capture in a process would import
import sympy.tensor.tensor  # noqa: F401
import torch
import torch._dynamo
import torch._inductor.config
import torch._subclasses.schema_check_mode
import torch.distributed as dist
import torch.export
import torch.utils.serialization
import transformers.modeling_utils  # noqa: F401
from hosts import move_to
from long import LONG
from scene import store

import pipecompile

HERE = Path(__file__).parent
Scene = Mapping[str, Any]


def import_all() -> None:
    """The package, whose parts are imported where they are first used, and the scenes with the models they train."""
    for found in pkgutil.walk_packages(pipecompile.__path__, "pipecompile."):
        if not found.name.startswith(("pipecompile.__main__", "pipecompile.cli")):
            importlib.import_module(found.name)
    for name in ("transformers.models.gpt2.modeling_gpt2", *(path.stem for path in sorted(HERE.glob("*_scenes.py")))):
        importlib.import_module(name)


def serve() -> Scene:
    """Forks ranks until there are no more scenes; returns in a rank alone, with its scene."""
    torch.set_num_threads(1)
    if not LONG:
        gc.set_threshold(20_000, 20, 50)
    gc.collect()
    gc.freeze()  # or each rank would, at its end, copy the memory of all that was imported
    import_all()  # not frozen: the capture finds who holds a function with gc.get_referrers
    for line in sys.stdin:
        scene = json.loads(line)
        pids = []
        for rank in range(scene["size"]):
            pid = os.fork()
            if pid == 0:
                return scene | {"rank": rank}
            os.setpgid(pid, pid)
            pids.append(pid)
        say(pids)
        for _ in pids:
            pid, status = os.waitpid(-1, 0)
            say([pids.index(pid), os.waitstatus_to_exitcode(status)])
    sys.exit(0)


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


def become_rank(scene: Scene) -> None:
    """The surroundings that torchrun gives to a rank; its output goes to a file."""
    rank, size = str(scene["rank"]), str(scene["size"])
    os.environ.update(scene["environment"], RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size)
    for target, name, mode in ((0, os.devnull, "r"), (1, f"{scene['folder']}/{rank}.txt", "w")):
        with open(name, mode) as file:
            os.dup2(file.fileno(), target)
    os.dup2(1, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.alarm(scene["limit"] + 900)  # if nobody is left who would end it


def host_store(rank: int) -> dist.Store | None:
    """Opens the store of the process group in rank 0, at a port that is free, and tells the others."""
    hosted = None
    if rank == 0:
        hosted = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        store().set("port", str(hosted.port))
    os.environ["MASTER_PORT"] = store().get("port").decode()
    return hosted


def play(scene: Scene) -> None:
    """Runs the scene in a process group and leaves its result, or its error, in a file."""
    file = Path(scene["folder"], f"{scene['rank']}.pt")
    try:
        if names := os.environ.get("SCENE_HOSTS"):
            store()  # a connection that is not cut
            move_to(names.split(",")[scene["rank"]])
        if os.environ["MASTER_PORT"] == "0":
            hosted = host_store(scene["rank"])  # noqa: F841  held until the end
        dist.init_process_group("gloo")
        module, name = scene["function"].split(":")
        result = getattr(importlib.import_module(module), name)(**scene["arguments"])
    except BaseException as error:
        torch.save((None, type(error).__name__, str(error)), file)
        raise
    torch.save((result, None, ""), file)
    if module not in ABOUT_ENDS and not LONG:
        RETURNED.append(name)


if __name__ == "__main__":
    mine = serve()
    become_rank(mine)
    play(mine)
