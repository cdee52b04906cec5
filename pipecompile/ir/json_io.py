"""Conversion of dataclasses to and from JSON, by their fields (with cattrs)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import cattrs

from pipecompile.errors import InputError

converter = cattrs.Converter(forbid_extra_keys=True)
_REMEDY = "use what save() or to_json() wrote"


class Json:
    """Mixin for dataclasses that can be saved: ``it == type(it).from_json(it.to_json())``."""

    def to_json(self) -> str:
        """The fields as a JSON object, which ``from_json`` reads."""
        return json.dumps(converter.unstructure(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads the text that ``to_json`` wrote.

        Raises:
            InputError: the text is not JSON, or its fields do not fit this class.
        """
        try:
            return converter.structure(json.loads(text), cls)
        except cattrs.BaseValidationError as error:
            wrong = ", ".join(cattrs.transform_error(error, format_exception=_told))
            raise InputError(f"not a {cls.__name__}: {wrong}; {_REMEDY}") from error
        except RecursionError as error:
            raise InputError(f"not a {cls.__name__}: brackets are nested too deeply; {_REMEDY}") from error
        except ValueError as error:
            raise InputError(f"not a {cls.__name__}: {error}; {_REMEDY}") from error
        except Exception as error:  # cattrs found something else than a dict
            raise InputError(
                f"not a {cls.__name__}: the text must be a JSON object with its fields ({error})"
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes ``to_json()`` to the file ``path``, which is replaced if it exists."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads the file ``path`` that ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            InputError: the file does not hold an object of this class.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"not a {cls.__name__}: {error}; {_REMEDY}") from error
        return cls.from_json(text)


def _told(error: BaseException, kind: type | None) -> str:
    """What is wrong with a field: the class's own message, if it has one."""
    words = str(error) if type(error) is ValueError else ""
    return words or cattrs.v.format_exception(error, kind)
