"""A folder of JSON files that outlive the process: what was measured and planned.

    <folder>/costs-1f0c….json    {"format": 1, "key": "costs-1f0c…", "about": {…}, "sha256": "…", "content": {…}}

A file is complete or absent: it is written under another name and renamed. Whatever cannot be read, is of another
format or does not have its checksum is ignored, with a reason. Several processes may use a folder at once; the last one
that writes an entry wins. The folder keeps the ``MOST`` entries that were written last.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from pipecompile.errors import InputError

VARIABLE = "PIPECOMPILE_CACHE"
OFF = "off"
FORMAT = 2
MOST = 500  # entries
ABANDONED = 3600.0  # seconds after which a file that was not renamed is of a process that has ended
ENTRY, UNFINISHED = ".json", ".unfinished"


@dataclass(frozen=True)
class Entry:
    """A file of the cache.

    Attributes:
        about: what it is about, in words, for people; empty if the file cannot be read.
        ignored: why it is not used; empty if it is good.
    """

    path: Path
    nbytes: int
    about: Mapping[str, str]
    ignored: str = ""


@dataclass(frozen=True)
class DiskCache:
    """A folder of entries, which need not exist yet; without a folder, nothing is kept."""

    folder: Path | None

    @staticmethod
    def of_user() -> DiskCache:
        """The folder that the environment names, or that of the user's system.

        Raises:
            InputError: the variable names a file.
        """
        named = os.environ.get(VARIABLE, "")
        if named.lower() == OFF:
            return DiskCache(None)
        folder = Path(named).expanduser() if named else user_cache_path("pipecompile", appauthor=False)
        if _is_file(folder):
            raise InputError(
                f"{VARIABLE}={named!r} is a file, but costs and plans are kept in a folder; name a folder, or '{OFF}'"
            )
        return DiskCache(folder)

    def path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}{ENTRY}"

    def read(self, key: str) -> tuple[Any, str]:
        """The content of an entry, and why it is ignored; (None, "") if there is none."""
        if self.folder is None:
            return None, ""
        try:
            text = self.path(key).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None, ""
        except (OSError, UnicodeDecodeError) as error:
            return None, f"cannot be read ({_reason(error)})"
        content, _, why = _opened(text, key)
        return content, why

    def write(self, key: str, content: Any, about: Mapping[str, str]) -> str:
        """Writes an entry in one piece. Returns why it could not be written; empty if it was."""
        if self.folder is None:
            return ""
        text = json.dumps(content)
        entry = {"format": FORMAT, "key": key, "about": dict(about), "sha256": _checksum(text), "content": content}
        unfinished = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.folder, prefix=f"{key}-", suffix=UNFINISHED, encoding="utf-8", delete=False
            ) as file:
                unfinished = Path(file.name)
                json.dump(entry, file)
            unfinished.replace(self.path(key))
        except BaseException as error:
            if unfinished is not None:
                with suppress(OSError):
                    unfinished.unlink()
            if not isinstance(error, OSError):
                raise
            return f"cannot be written to {self.folder} ({_reason(error)})"
        self._prune()
        return ""

    def entries(self) -> list[Entry]:
        """All entries, the newest first."""
        found = []
        for path in self._files(ENTRY):
            with suppress(OSError):
                found.append((path.stat().st_mtime, _entry(path)))
        return [entry for _, entry in sorted(found, key=lambda pair: pair[0], reverse=True)]

    def clear(self) -> int:
        """Removes all entries, and what processes that were killed have left. Returns the number of entries.

        Raises:
            OSError: a file cannot be removed.
        """
        entries = [*self._files(ENTRY)]
        for path in [*entries, *self._files(UNFINISHED)]:
            path.unlink(missing_ok=True)
        return len(entries)

    def _files(self, suffix: str) -> Iterator[Path]:
        if self.folder is not None:
            with suppress(OSError):
                yield from [path for path in self.folder.iterdir() if path.name.endswith(suffix) and path.is_file()]

    def _prune(self) -> None:
        """Removes the oldest entries, if there are too many, and files that were not renamed."""
        with suppress(OSError):  # other processes remove files too
            old = [p for p in self._files(UNFINISHED) if p.stat().st_mtime < time.time() - ABANDONED]
            entries = sorted(self._files(ENTRY), key=lambda path: path.stat().st_mtime)
            for path in (*old, *entries[: max(0, len(entries) - MOST)]):
                path.unlink(missing_ok=True)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # it may not even be looked at; nothing will be read or written there
        return False


def _entry(path: Path) -> Entry:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Entry(path, path.stat().st_size, {}, f"cannot be read ({_reason(error)})")
    _, about, why = _opened(text, path.name.removesuffix(ENTRY))
    return Entry(path, len(text.encode()), about, why)


def _opened(text: str, key: str) -> tuple[Any, dict[str, str], str]:
    """The content of a file's text, what it is about, and why it is ignored."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, {}, f"is not JSON ({error})"
    if not isinstance(entry, dict) or "format" not in entry or "content" not in entry:
        return None, {}, "is not an entry of this cache"
    about = entry.get("about")
    about = {str(k): str(v) for k, v in about.items()} if isinstance(about, dict) else {}
    if entry["format"] != FORMAT:
        return None, about, f"has format {entry['format']!r}, but this version reads {FORMAT}"
    if entry.get("key") != key:
        return None, about, "is the entry of another key"
    if entry.get("sha256") != _checksum(json.dumps(entry["content"])):
        return None, about, "does not have its checksum"
    return entry["content"], about, ""


def _checksum(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
