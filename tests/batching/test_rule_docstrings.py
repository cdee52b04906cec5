"""Every batching rule states, in the first line of its docstring, which shapes it takes to which."""

from __future__ import annotations

from pipecompile.batching.rules import RULES


def test_every_rule_states_its_shapes() -> None:
    rules = {rule for _, rule in RULES.values()}
    assert len(rules) > 50
    silent = sorted(
        f"{rule.__module__}.{rule.__name__}" for rule in rules if "->" not in (rule.__doc__ or "").partition("\n")[0]
    )
    assert not silent, "\n".join(silent)
