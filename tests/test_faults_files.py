"""Files that hold something else than they should: the reader says so, whatever they hold."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import D, blocks

import pipecompile
from pipecompile.errors import InputError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.json_io import Json

WRONG = [
    "", "null", "[]", "{}", "true", "NaN", "-1", '"nodes"', "[[]]", "1e999", "\ufeff{}", "\x00", '{"graph": null}',
    "[" * 5000, "[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000,
]  # fmt: skip
INSTEAD = [None, [], {}, "x", "", -1, 10**30, float("nan"), float("inf"), True, [None], {"a": 1}, 1.5, [[[]]]]


def pipe() -> Any:
    made = pipecompile.compile(
        torch.nn.Sequential(*blocks(4)),
        devices=["cpu"] * 2,
        microbatches=2,
        costs="count",
        loss_fn=torch.nn.MSELoss(),
    )
    x = torch.randn(4, D)
    made.pipeline.prepare(x, target=x)
    return made


def nouns() -> dict[str, Json]:
    made = pipe()
    costed, plan = made.pipeline.costs, made.pipeline.plan
    return {"profile": costed, "graph": costed.graph, "plan": plan, "cluster": Cluster.of(["a", "b"])}


@pytest.fixture(scope="module")
def saved() -> dict[str, Json]:
    return nouns()


KINDS = ("profile", "graph", "plan", "cluster")


@pytest.mark.parametrize("text", WRONG, ids=lambda text: repr(text[:12]))
@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_no_such_noun(saved: dict[str, Json], kind: str, text: str) -> None:
    noun = type(saved[kind])
    with pytest.raises(InputError, match=f"not a {noun.__name__}: ."):
        noun.from_json(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_one_place_changed_is_read_or_refused(saved: dict[str, Json], kind: str) -> None:
    noun, text = saved[kind], saved[kind].to_json()
    refused = 0
    for seed in range(300):
        try:
            type(noun).from_json(_changed(text, random.Random(seed)))
        except InputError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("content", [text.encode() for text in WRONG] + [b"\xff\xfe", b"\x80"])
def test_a_profile_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"does not contain costs \(not a CostedGraph"):
        pipecompile.compile(torch.nn.Sequential(*blocks(4)), devices=["cpu"] * 2, costs=path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("forward", -1.0, "takes -1.0 s"),
        ("backward", float("nan"), "takes 0.* s and nan s"),
        ("forward", float("inf"), "takes inf s"),
        ("saved_bytes", -8, "holds -8 and"),
    ],
)
def test_costs_that_cannot_be(saved: dict[str, Json], field: str, value: float, words: str) -> None:
    data = json.loads(saved["profile"].to_json())
    data["costs"][2][field] = value
    with pytest.raises(InputError, match=words):
        type(saved["profile"]).from_json(json.dumps(data))


def test_a_footprint_in_a_storage_that_is_not_there(saved: dict[str, Json]) -> None:
    data = json.loads(saved["profile"].to_json())
    data["footprints"][2]["saved"] = [10_000]
    with pytest.raises(InputError, match="names storages"):
        type(saved["profile"]).from_json(json.dumps(data))


def test_what_was_saved_is_read(saved: dict[str, Json], tmp_path: Path) -> None:
    for name, noun in saved.items():
        noun.save(tmp_path / name)
        assert type(noun).load(tmp_path / name) == noun


def _changed(text: str, rng: random.Random) -> str:
    """A text with a character changed, its end cut off, or one value in it exchanged or left out."""
    kind = rng.random()
    if kind < 0.1:
        return text[: rng.randrange(len(text))]
    if kind < 0.2:
        place = rng.randrange(len(text))
        return text[:place] + rng.choice('[]{},:"\\\x00é0') + text[place + 1 :]
    value = json.loads(text)
    *path, last = rng.choice([path for path in _paths(value, ()) if path])
    owner = value
    for key in path:
        owner = owner[key]
    if rng.random() < 0.2 and isinstance(owner, dict):
        del owner[last]
    else:
        owner[last] = rng.choice(INSTEAD)
    return json.dumps(value)


def _paths(value: Any, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in _paths(item, (*path, key)))]
