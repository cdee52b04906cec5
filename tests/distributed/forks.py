"""The parent of all ranks: imports torch once, and forks a process for each rank of each scene.

It reads a scene as a line of JSON, answers with a line of the ranks' process ids, and with a line for each that ends.
A rank returns from ``serve`` and ends as a script does: with its exception printed, and its exit functions called.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sympy.combinatorics  # noqa: F401  these are what the first capture in a process would import
import torch
import torch._dynamo
import torch._inductor.config
import torch.distributed as dist
import torch.export
import transformers.modeling_utils  # noqa: F401
from hosts import move_to
from scene import store

import pipecompile  # noqa: F401

Scene = Mapping[str, Any]


def serve() -> Scene:
    """Forks ranks until there are no more scenes; returns in a rank alone, with its scene."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or each rank would, at its end, copy the memory of all that was imported
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
    signal.alarm(scene["limit"] + 30)  # if nobody is left who would end it


def play(scene: Scene) -> None:
    """Runs the scene in a process group and leaves its result, or its error, in a file."""
    file = Path(scene["folder"], f"{scene['rank']}.pt")
    try:
        if names := os.environ.get("SCENE_HOSTS"):
            store()  # a connection that is not cut
            move_to(names.split(",")[scene["rank"]])
        dist.init_process_group("gloo")
        module, name = scene["function"].split(":")
        result = getattr(importlib.import_module(module), name)(**scene["arguments"])
    except BaseException as error:
        torch.save((None, type(error).__name__, str(error)), file)
        raise
    torch.save((result, None, ""), file)


if __name__ == "__main__":
    mine = serve()
    become_rank(mine)
    play(mine)
