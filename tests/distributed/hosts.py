"""Network namespaces as hosts: each has an address on one switch, and can be cut off.

Needs Linux, root and iproute2. The names of a run are its own, and so is its network, which no interface of the machine
can reach.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DEVICE, PREFIX, PORT = "pc0", "10.213.77", "29577"
NEW_NETWORK, NEW_NAME = 0x40000000, 0x04000000  # CLONE_NEWNET, CLONE_NEWUTS


@dataclass(frozen=True)
class Hosts:
    """Namespaces, one for each rank, connected by another one."""

    switch: str
    names: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """Of ranks on these hosts, the first of which has the store of the process group."""
        first = {"MASTER_ADDR": f"{PREFIX}.1", "MASTER_PORT": PORT, "TORCHELASTIC_USE_AGENT_STORE": "False"}
        return {**first, "GLOO_SOCKET_IFNAME": DEVICE, "SCENE_HOSTS": ",".join(self.names)}

    def cut(self, host: int, how: str) -> None:
        """Cuts a host off: its link goes "down", which it sees, or the switch drops what it sends and would get."""
        if how == "down":
            _run(f"ip -n {self.names[host]} link set {DEVICE} down")
        else:
            _run(f"ip -n {self.switch} link set port{host} nomaster")


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Makes hosts, and removes them at the end."""
    made = Hosts(f"pc{os.getpid()}switch", tuple(f"pc{os.getpid()}host{host}" for host in range(count)))
    try:
        for name in (made.switch, *made.names):
            _run(f"ip netns add {name}")
            _run(f"ip -n {name} link set lo up")
        _run(f"ip -n {made.switch} link add bridge0 type bridge")
        _run(f"ip -n {made.switch} link set bridge0 up")
        for host, name in enumerate(made.names):
            _run(f"ip link add {DEVICE} netns {name} type veth peer name port{host} netns {made.switch}")
            _run(f"ip -n {made.switch} link set port{host} master bridge0 up")
            _run(f"ip -n {name} addr add {PREFIX}.{host + 1}/24 dev {DEVICE}")
            _run(f"ip -n {name} link set {DEVICE} up")
        yield made
    finally:
        for name in (*made.names, made.switch):
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


@cache
def lack() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if shutil.which("ip") is None:
        return "needs iproute2"
    try:
        with hosts(1):
            return ""
    except subprocess.CalledProcessError:
        return "needs the right to make network namespaces"


def move_to(name: str) -> None:
    """Moves this process to a host. What it has opened before stays where it was."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(Path("/run/netns", name), os.O_RDONLY)
    try:
        for failed in (libc.setns(handle, NEW_NETWORK), libc.unshare(NEW_NAME)):
            if failed:
                raise OSError(ctypes.get_errno(), f"cannot move to host {name}")
    finally:
        os.close(handle)
    socket.sethostname(name.rpartition("pc")[2].lstrip("0123456789"))


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, stderr=subprocess.DEVNULL)
