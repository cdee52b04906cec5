"""What ``make wild`` has found: a line for each model, a section of tables for docs/models.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.check import EXACT
from zoo.forked import Found

from wild.check import MICROBATCHES

HEADING = "## Other libraries"
KINDS = ("exact", "refused", "foreign", "wrong", "hung")
REMEDY = re.compile(
    r"(leaf_modules|microbatches|in_dims|out_dims|allow_mixing|batch_norm|register_buffer)\b.?=?|nn\.Parameter|"
    r"\b(pass|use|call|move|make|give|keep|name|return|compute|write|set|run|say|register|put|turn|train) "
)
WANTED = 0.97  # of the models, exact


@dataclass(frozen=True)
class Result:
    library: str
    name: str
    verdicts: dict[str, str] = field(default_factory=dict)  # by stages: ``exact``, or a kind and what was seen
    facts: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(library: str, found: Found) -> Result:
        facts = dict(found.facts)
        raised = facts.get("raised")
        stages = {str(n): str(facts.pop(f"stages {n}", "hang")) for n in MICROBATCHES}
        verdicts = {n: f"foreign: {raised}" if raised else _named(said, found.ended) for n, said in stages.items()}
        return Result(library, found.name, verdicts, facts)

    def kind(self, stages: str) -> str:
        return self.verdicts[stages].split(":")[0]

    @property
    def reasons(self) -> list[str]:
        """What is not exact, each thing once."""
        return list(dict.fromkeys(said.split(" [")[0] for said in self.verdicts.values() if said != EXACT))


def _named(said: str, ended: str) -> str:
    if said == "hang":
        return f"hung: {ended}" if ended in ("", "hang") else f"foreign: {ended}"
    return re.sub(r"^ours", "refused", said)


def line(result: Result) -> str:
    said = list(dict.fromkeys(result.verdicts.values()))
    note = f" ({result.facts['dtype']})" if result.facts.get("dtype", "float64") != "float64" else ""
    return f"{result.library}/{result.name}: {' / '.join(said)}{note}"


def names_remedy(said: str) -> bool:
    return REMEDY.search(said) is not None


def fails(results: Sequence[Result]) -> bool:
    """Whether something is neither exact nor a refusal with a remedy, or too little is exact."""
    all_said = [said for result in results for said in result.verdicts.values()]
    bad = [said for said in all_said if said != EXACT and not (said.startswith("refused") and names_remedy(said))]
    exact = sum(set(result.verdicts.values()) == {EXACT} for result in results)
    return bool(bad) or not results or exact < WANTED * len(results)


def section(results: Sequence[Result], every: bool = True) -> str:
    """The section of docs/models.md: totals by library, then all that is not exact, with the reason."""
    stages = [str(n) for n in MICROBATCHES]
    columns = " | ".join(f"{kind}, {n} stages" for n in stages for kind in KINDS)
    rows = [f"| library | models | {columns} |", "|---|" + "---|" * (1 + len(KINDS) * len(stages))]
    for library in (*dict.fromkeys(r.library for r in results), "all"):
        members = [r for r in results if library in ("all", r.library)]
        counts = [Counter(r.kind(n) for r in members) for n in stages]
        cells = " | ".join(str(count[kind] or "") for count in counts for kind in KINDS)
        rows.append(f"| {library} | {len(members)} | {cells} |")
    text = [
        HEADING,
        "`make wild`: tiny models of other libraries, random, chosen by walking each library's registry. 2 stages with "
        "one microbatch, 3 stages with two; batches of 4, 6 and 5 rows, another length or picture size where the model "
        "takes one; every other model has its loss inside. *Exact*: loss, outputs, every gradient and every buffer, "
        "by name, are the unsplit model's. Models that normalise over the batch are compared with the unsplit model "
        "over the same microbatches. Where rows are not samples (the nodes of a graph), or statistics are over more "
        "than a microbatch's rows, 3 stages run one microbatch.",
        "\n".join(rows),
        *(["\n".join(_not_exact(results))] if any(r.reasons for r in results) else []),
    ]
    if every:
        text.append("Every model: " + "; ".join(_names(results)) + ".")
    return "\n\n".join(text) + "\n"


def _not_exact(results: Sequence[Result]) -> Iterator[str]:
    yield "| not exact | reason |\n|---|---|"
    for result in results:
        for reason in result.reasons:
            yield f"| {result.library}/{result.name} | {reason[:300]} |".replace("|", "\\|").replace("\\|", "|", 2)


def _names(results: Sequence[Result]) -> Iterator[str]:
    for library in dict.fromkeys(r.library for r in results):
        yield f"{library}: " + ", ".join(r.name for r in results if r.library == library)


def with_section(page: str, new: str) -> str:
    """A page with this section in the place of the one that it has, or at its end."""
    before, _, rest = page.partition(HEADING)
    _, mark, after = rest.partition("\n## ")
    return before.rstrip() + "\n\n" + new + (mark + after if mark else "")
