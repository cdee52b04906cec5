"""The folder of entries: complete or absent, whatever happens to a process, the disk or the files."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pipecompile.compiler import disk_cache
from pipecompile.compiler.disk_cache import FORMAT, DiskCache
from pipecompile.errors import InputError

CONTENT = {"numbers": list(range(5000)), "name": "naïve"}


def forked(run: Callable[[], Any]) -> int:
    """Starts a process that runs a function and ends, without any clean-up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child runs none of the threads' code
        child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return child


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "not" / "yet")


def test_what_was_written_is_read(cache: DiskCache) -> None:
    assert cache.read("costs-1") == (None, "")
    assert cache.write("costs-1", CONTENT, {"what": "costs"}) == ""
    assert cache.write("costs-1", CONTENT, {"what": "costs", "model": "Net"}) == ""
    assert cache.read("costs-1") == (CONTENT, "")
    (entry,) = cache.entries()
    assert entry.about == {"what": "costs", "model": "Net"}
    assert entry.ignored == ""


def test_a_process_that_is_killed_while_it_writes_leaves_no_entry(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write("plan-1", {"old": True}, {})

    def half(entry: Any, file: Any) -> NoReturn:
        file.write(json.dumps(entry)[:100])
        file.flush()
        os._exit(9)

    with monkeypatch.context() as patched:
        patched.setattr(disk_cache.json, "dump", half)
        child = forked(lambda: cache.write("plan-1", {"old": False}, {}))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert cache.folder is not None
    assert len(list(cache.folder.iterdir())) == 2  # what it has left is under another name
    assert cache.read("plan-1") == ({"old": True}, "")
    assert len(cache.entries()) == 1
    monkeypatch.setattr(disk_cache, "ABANDONED", -1.0)
    assert cache.write("plan-2", {}, {}) == ""
    assert {path.suffix for path in cache.folder.iterdir()} == {".json"}


def test_two_processes_at_once_never_show_a_part(cache: DiskCache) -> None:
    contents = [{"by": by, "numbers": [by] * 20_000} for by in (1, 2)]

    def write(content: Any) -> None:
        for _ in range(20):
            assert cache.write("costs-1", content, {}) == ""

    children = {forked(lambda content=content: write(content)) for content in contents}
    seen = 0
    while children:
        content, why = cache.read("costs-1")
        assert why == ""
        assert content is None or content in contents
        seen += content is not None
        children -= {child for child in children if os.waitpid(child, os.WNOHANG)[0]}
    assert seen > 0
    assert [entry.ignored for entry in cache.entries()] == [""]


def test_a_full_disk_is_told_and_leaves_nothing(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(entry: Any, file: Any) -> NoReturn:
        file.write("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk_cache.json, "dump", full)
    assert "No space left on device" in cache.write("costs-1", CONTENT, {})
    assert cache.folder is not None
    assert list(cache.folder.iterdir()) == []
    assert cache.read("costs-1") == (None, "")


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file" / "folder")
    assert "Not a directory" in cache.write("costs-1", CONTENT, {})
    assert cache.read("costs-1")[0] is None
    assert cache.entries() == []
    assert cache.clear() == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "", "is not JSON"),
        (lambda text: "[" * 200_000, "is not JSON"),
        (lambda text: '{"weights": [1, 2]}', "is not an entry"),
        (lambda text: "null", "is not an entry"),
        (lambda text: text.replace(f'"format": {FORMAT}', '"format": 7'), "format 7"),
        (lambda text: text.replace("4999", "4998"), "checksum"),
        (lambda text: text.replace("costs-1", "costs-2"), "another key"),
    ],
)
def test_what_is_corrupt_foreign_or_old_is_ignored(cache: DiskCache, change: Callable[[str], str], why: str) -> None:
    cache.write("costs-1", CONTENT, {})
    path = cache.path("costs-1")
    path.write_text(change(path.read_text()))
    content, told = cache.read("costs-1")
    assert content is None
    assert why in told
    assert why in cache.entries()[0].ignored
    assert cache.write("costs-1", CONTENT, {}) == ""
    assert cache.read("costs-1") == (CONTENT, "")


def test_bytes_that_are_no_text_are_ignored(cache: DiskCache) -> None:
    cache.write("costs-1", CONTENT, {})
    cache.path("costs-1").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in cache.read("costs-1")[1]


def test_the_oldest_entries_go(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "MOST", 3)
    for number in range(5):
        cache.write(f"costs-{number}", number, {})
        os.utime(cache.path(f"costs-{number}"), (number, number))
    assert [entry.path.stem for entry in cache.entries()] == ["costs-4", "costs-3", "costs-2"]


def test_a_folder_that_may_not_be_looked_at_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path, *args: Any, **kwargs: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path / "mine"))
    with monkeypatch.context() as patched:
        for name in ("stat", "mkdir", "iterdir", "open"):
            patched.setattr(Path, name, forbidden)
        cache = DiskCache.of_user()
        assert cache.read("costs-1") == (None, "cannot be read (Permission denied)")
        assert "Permission denied" in cache.write("costs-1", CONTENT, {})
        assert cache.entries() == []


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPECOMPILE_CACHE", "OFF")
    assert DiskCache.of_user().folder is None
    assert DiskCache.of_user().write("costs-1", CONTENT, {}) == ""
    assert DiskCache.of_user().read("costs-1") == (None, "")
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path / "mine"))
    assert DiskCache.of_user().folder == tmp_path / "mine"
    monkeypatch.delenv("PIPECOMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DiskCache.of_user().folder is not None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="is a file"):
        DiskCache.of_user()
