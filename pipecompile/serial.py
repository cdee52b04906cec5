"""Nouns to and from JSON, by their fields (cattrs does the work)."""

from __future__ import annotations

import json
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
