"""Nouns to and from JSON, by their fields (cattrs does the work)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import cattrs

converter = cattrs.Converter(forbid_extra_keys=True)


class Json:
    """Mixin of the nouns that are saved: ``noun == type(noun).from_json(noun.to_json())``."""

    def to_json(self) -> str:
        return json.dumps(converter.unstructure(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: the text is not JSON, or its fields are not those of this noun.
        """
        try:
            return converter.structure(json.loads(text), cls)
        except cattrs.BaseValidationError as error:
            raise ValueError(f"not a {cls.__name__}: {'; '.join(cattrs.transform_error(error))}") from error

    def save(self, path: str | Path) -> None:
        """Writes ``to_json`` into a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it does not hold this noun.
        """
        return cls.from_json(Path(path).read_text(encoding="utf-8"))
