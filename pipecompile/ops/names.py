"""Names of modules and parameters in generated code, where they are data: ``nn.ModuleDict({"it's": ...})`` is legal.

torch.fx writes a dotted name into the code of a graph as it stands: a part that is an identifier as an attribute, any
other between quotes. Python's keywords are identifiers to it, quotes and line ends are not escaped. So a graph is given
names that spell themselves out safely.
"""

from __future__ import annotations

import keyword


def in_code(name: str) -> str:
    """A dotted name, equal to the given one, that generated code may hold."""
    return name if all(map(_is_safe, name.split("."))) else _Name(name)


def _is_safe(part: str) -> bool:
    """Whether torch.fx writes a part of a name as Python reads it; Python reads identifiers beyond ASCII normalised."""
    return part.isascii() and (part.isdigit() or (part.isidentifier() and not keyword.iskeyword(part)))


class _Name(str):
    """A name whose parts, as torch.fx takes it apart, are written between quotes and escaped."""

    __slots__ = ()

    def split(self, *args: object, **kwargs: object) -> list[str]:
        return [part if _is_safe(part) else _Part(part) for part in str(self).split(*args, **kwargs)]  # type: ignore[arg-type]


class _Part(str):
    __slots__ = ()

    def isidentifier(self) -> bool:
        return False

    def __format__(self, spec: str) -> str:
        return self.encode("unicode_escape").decode("ascii").replace('"', '\\"')
