"""Drives a headless Chromium over its DevTools protocol: pages from disk, of any width, light or dark.

Found by name on PATH. Needs nothing that bokeh does not bring: tornado speaks websockets.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
SECONDS = 120  # for a browser that starts beside other tests
DRAWN = """new Promise(resolve => {
    const [it] = Bokeh.documents;
    it.is_idle ? resolve(true) : it.idle.connect(() => resolve(true));
})"""


def find() -> str | None:
    """The path of a Chromium."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. ``errors`` and ``requests`` are those of the last visit, but for its own file."""

    def __init__(self, socket: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._socket, self._loop, self._number = socket, loop, 0
        self._events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """A command and its answer."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, params), SECONDS))

    async def _call(self, method: str, params: dict[str, Any]) -> Any:
        self._number += 1
        await self._socket.write_message(json.dumps({"id": self._number, "method": method, "params": params}))
        while (message := await self._next()).get("id") != self._number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    async def _next(self) -> dict[str, Any]:
        text = await self._socket.read_message()
        if text is None:
            raise RuntimeError("the browser has ended")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message

    async def _until(self, method: str) -> None:
        while not any(event["method"] == method for event in self._events):
            await self._next()

    def visit(self, path: Path, width: int, dark: bool = False, height: int = 900) -> None:
        """Opens a file, and waits until its figures are drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._loop.run_until_complete(asyncio.wait_for(self._until("Page.loadEventFired"), SECONDS))
        self.run(DRAWN)
        self.errors = [text for event in self._events for text in _errors(event)]
        sent = [event["params"]["request"]["url"] for event in self._events if event["method"] == SENT]
        self.requests = [url for url in sent if url != path.resolve().as_uri() and not url.startswith("data:")]

    def run(self, source: str) -> Any:
        """The value of a JavaScript expression; waits for a promise."""
        done = self.call("Runtime.evaluate", expression=source, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(str(done["exceptionDetails"]))
        return done["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A mouse event at a place of the window: ``mouseMoved``, ``mousePressed``, ``mouseWheel``."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def picture(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])


SENT = "Network.requestWillBeSent"


def _errors(event: dict[str, Any]) -> Iterator[str]:
    params = event["params"]
    match event["method"]:
        case "Runtime.exceptionThrown":
            yield str(params["exceptionDetails"])
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
            yield str(params["args"])
        case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
            yield str(params["entry"])


@contextmanager
def started(executable: str, folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile, until the end of the block."""
    command = [executable, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    loop = asyncio.new_event_loop()
    try:
        address = _address(process)
        socket = loop.run_until_complete(_connected(address))
        yield Browser(socket, loop)
        socket.close()
    finally:
        process.terminate()
        process.communicate()
        loop.close()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("DevTools listening on ws://"):
            host = line.split("://")[1].split("/")[0]
            with urllib.request.urlopen(f"http://{host}/json/list") as answer:
                tabs = json.load(answer)
            return str(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
    raise RuntimeError(f"the browser did not start: {''.join(said[-5:])}")


async def _connected(address: str) -> Any:
    from tornado.websocket import websocket_connect

    return await websocket_connect(address, max_message_size=1 << 28)
