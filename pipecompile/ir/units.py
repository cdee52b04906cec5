"""Numbers in readable form: three digits and a unit."""

from __future__ import annotations

from collections.abc import Sequence


def seconds_text(seconds: float) -> str:
    """``0.00123`` -> ``"1.23 ms"``."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{_rounded(seconds * factor, 3)} {unit}"
    return "0" if seconds == 0 else f"{_rounded(seconds * 1e6, 3)} us"


def bytes_text(nbytes: int) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    return _scaled(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"), 2)


def count_text(count: float) -> str:
    """``124439808`` -> ``"124 M"``."""
    return _scaled(count, 1000, ("", "k", "M", "G", "T"), 3)


def names_text(names: Sequence[str], limit: int = 3) -> str:
    """The first names and the number of the others: ``"add, view +4"``."""
    more = f" +{len(names) - limit}" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def plural(count: int, word: str) -> str:
    """``"1 node"``, ``"2 nodes"``."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _scaled(number: float, base: int, units: tuple[str, ...], digits: int) -> str:
    index = 0
    while number >= base and index < len(units) - 1:
        number, index = number / base, index + 1
    return f"{_rounded(number, digits) if index else f'{number:.0f}'} {units[index]}".rstrip()


def _rounded(number: float, digits: int) -> str:
    """At least ``digits`` digits, and all those before the point: ``1.23``, ``12.3``, ``123``, ``1234``."""
    before = len(f"{number:.0f}")
    return f"{number:.{max(0, digits - before)}f}"
