"""What the zoo's run has found, as a page of tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

from zoo.check import EXACT, STAGES
from zoo.entry import Entry
from zoo.forked import Found

KINDS = ("exact", "ours", "foreign", "wrong", "hang")


def verdict(found: Found, stages: int) -> str:
    """``exact``, or a kind and what was seen: ``ours: CaptureError: ...``."""
    if "raised" in found.facts:
        return f"foreign: {found.facts['raised']}"
    said = str(found.facts.get(f"stages {stages}", "hang"))
    return f"hang: {found.ended}" if said == "hang" else said


def kind(found: Found, stages: int) -> str:
    return verdict(found, stages).split(":")[0]


def page(entries: Mapping[str, Entry], results: Sequence[Found], command: str) -> str:
    order = {name: position for position, name in enumerate(entries)}
    ranked = sorted(results, key=lambda found: order[found.name])
    rows = [_row(entries[found.name], found) for found in ranked]
    head = [
        "# Models",
        f"`{command}`: every model of the zoo, tiny and random, split into 2 and 4 stages and trained for steps of two "
        "batch sizes and two lengths under 1F1B, over 2 microbatches, beside the unsplit model. *Exact*: the "
        "loss and every gradient, by name, are the unsplit model's.",
        summary(entries, results),
        "## Every model",
        "| model | family | nodes | capture, seconds, sizes open / fixed | captures | leaves | 2 stages | 4 stages |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(rows),
    ]
    return "\n\n".join(head) + "\n"


def elsewhere(page: str) -> str:
    """What a page says of other libraries, which another run writes (``tests/wild_run.py``)."""
    _, heading, rest = page.partition("\n## Other libraries")
    return heading + rest


def summary(entries: Mapping[str, Entry], results: Sequence[Found]) -> str:
    """Totals by family, and what all of them needed."""
    families = list(dict.fromkeys(entry.family for entry in entries.values()))
    columns = " | ".join(f"{name}, {stages} stages" for stages in STAGES for name in KINDS)
    lines = [f"| family | models | {columns} |", "|---|" + "---|" * (1 + len(KINDS) * len(STAGES))]
    for family in (*families, "all"):
        members = [found for found in results if family in ("all", entries[found.name].family)]
        if members:
            counts = [Counter(kind(found, stages) for found in members) for stages in STAGES]
            cells = " | ".join(str(count[name] or "") for count in counts for name in KINDS)
            lines.append(f"| {family} | {len(members)} | {cells} |")
    return "\n".join(lines) + "\n\n" + _needs(results)


def _needs(results: Sequence[Found]) -> str:
    seconds = [found.facts["seconds"] for found in results if "seconds" in found.facts]
    static = [found.facts["static seconds"] for found in results if "seconds" in found.facts]
    leaves = sum(found.facts.get("leaves", 0) > 0 for found in results)
    again, more = (sum(_captures(found) > count for found in results) for count in (1, 2))
    if not seconds:
        return "No model was captured."
    each = sum(seconds) / sum(found.facts["nodes"] for found in results if "seconds" in found.facts)
    return (
        f"Capture with symbolic sizes takes {median(seconds):.2f} s (of one core) at the median, {max(seconds):.1f} s "
        f"at most, {1000 * each:.1f} ms a node; with static ones {median(static):.2f} s at the median, "
        f"{max(static):.1f} s at most. {leaves} models needed a leaf, {again} a recapture ({more} more than one)."
    )


def _captures(found: Found) -> int:
    return max((found.facts.get(f"captures {stages}", 0) for stages in STAGES), default=0)


def _row(entry: Entry, found: Found) -> str:
    facts = found.facts
    seconds = f"{facts['seconds']:.2f} / {facts['static seconds']:.2f}" if "seconds" in facts else ""
    verdicts = [verdict(found, stages) for stages in STAGES]
    if verdicts[0] != EXACT and _message(verdicts[0]) == _message(verdicts[1]):
        verdicts[1] = "the same"
    cells = [
        entry.name,
        entry.family,
        facts.get("nodes", ""),
        seconds,
        _captures(found) or "",
        facts.get("leaves", "") or "",
    ]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in (*cells, *verdicts)) + " |"


def _message(said: str) -> str:
    return said.split(" [")[0]
