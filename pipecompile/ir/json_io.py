"""Nouns to and from JSON, by their fields (cattrs does the work)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import cattrs

from pipecompile.errors import InputError

converter = cattrs.Converter(forbid_extra_keys=True)


class Json:
    """Mixin of the nouns that are saved: ``noun == type(noun).from_json(noun.to_json())``."""

    def to_json(self) -> str:
        return json.dumps(converter.unstructure(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what ``to_json`` wrote.

        Raises:
            InputError: the text is not JSON, or its fields are not those of this noun, or not such as it can have.
        """
        try:
            return converter.structure(json.loads(text), cls)
        except cattrs.BaseValidationError as error:
            raise InputError(
                f"not a {cls.__name__}: {'; '.join(cattrs.transform_error(error, format_exception=_told))}"
            ) from error
        except RecursionError as error:
            raise InputError(f"not a {cls.__name__}: brackets within brackets, too deep to be read") from error
        except ValueError as error:
            raise InputError(f"not a {cls.__name__}: {error}") from error
        except Exception as error:  # what cattrs meets where it looks for a dict and finds something else
            raise InputError(f"not a {cls.__name__}: a JSON object with its fields is expected ({error})") from error

    def save(self, path: str | Path) -> None:
        """Writes ``to_json`` into a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            InputError: it does not hold this noun.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"not a {cls.__name__}: {error}") from error
        return cls.from_json(text)


def _told(error: BaseException, kind: type | None) -> str:
    """What is wrong with a field: the words of the noun that refuses it, where it has some."""
    words = str(error) if type(error) is ValueError else ""
    return words or cattrs.v.format_exception(error, kind)
