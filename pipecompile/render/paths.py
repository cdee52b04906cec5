"""Module paths (``"h.3.attn"``; empty for the model itself) and unique short names for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence


class Names:
    """Short names for the modules of one model: the shortest suffix of a path that no other path has.

    A name keeps all its numbers and the word before the first one: ``"h.3.attn"``, not ``"attn"`` or ``"3.attn"``.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        every = {prefix for path in paths for prefix in prefixes(path)}
        self._count = Counter(end for path in every for end in _ends(path))

    def short(self, path: str) -> str:
        words = words_of(path)
        numbered = next((at for at, word in enumerate(words) if word.isdigit()), len(words))
        least = len(words) - max(0, numbered - 1)
        ends = (end for count, end in enumerate(_ends(path), start=1) if count >= least)
        return next((end for end in ends if self._count[end] == 1), path)

    def run(self, first: str, last: str) -> str:
        """A name for consecutive modules: ``"h.0…5"``, ``"wte … drop"``, ``"h.3.attn … ln_2"``."""
        if first == last:
            return self.short(first)
        if is_numbered(first) and is_numbered(last) and parent_of(first) == parent_of(last):
            return f"{self.short(first)}…{words_of(last)[-1]}"
        start, end = self.short(first), words_of(self.short(last))
        shared = min(len(words_of(common([start, ".".join(end)]))), len(end) - 1)
        return f"{start} … {'.'.join(end[shared:])}"


def words_of(path: str) -> list[str]:
    return path.split(".") if path else []


def prefixes(path: str) -> Iterator[str]:
    """``""``, ``"a"``, ``"a.b"`` for ``"a.b"``."""
    words = words_of(path)
    return (".".join(words[:count]) for count in range(len(words) + 1))


def common(paths: Sequence[str]) -> str:
    """The innermost module that contains all paths."""
    first, last = min(map(words_of, paths)), max(map(words_of, paths))
    same = next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return ".".join(first[:same])


def parent_of(path: str) -> str:
    return path.rpartition(".")[0]


def is_numbered(path: str) -> bool:
    return path.rpartition(".")[2].isdigit()


def _ends(path: str) -> Iterator[str]:
    """``"b"``, ``"a.b"`` for ``"a.b"``."""
    words = words_of(path)
    return (".".join(words[-count:]) for count in range(1, len(words) + 1))
