"""What the run over ragged batches has found, as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zoo.check import STAGES
from zoo.entry import Entry
from zoo.forked import Found
from zoo.ragged import ATTENDED, BATCHES, MICROBATCHES

COLUMNS = (
    "model", "family", "called", "dtype", "attention", "steps", "exact", "refused", "uncut", "tail", "captures",
    "difference", "seen",
)  # fmt: skip


def page(entries: Mapping[str, Entry], results: Sequence[Found], command: str) -> str:
    order = {name: position for position, name in enumerate(entries)}
    ranked = sorted(results, key=lambda found: order[found.name])
    rows = [_row(entries[found.name], found, variant) for found in ranked for variant in _variants(found)]
    left_out = [found.name for found in ranked if not any(_tallies(found))]
    head = [
        "# Padded, ragged batches",
        f"`{command}`: models of the zoo, tiny and random, on padded batches of {_listed(BATCHES)} rows in "
        f"{_listed(MICROBATCHES)} microbatches, split into {_listed(STAGES)} stages under 1F1B. Each row has its own "
        "number of valid tokens: in one batch the first microbatch has none and the last row all, in the other the "
        "first microbatch has all and the last none, and between them the lengths grow. Labels are -100 in the "
        "padding, the attention mask is 0 there. *Exact*: the loss and every gradient, by name, are those of the "
        "unsplit model on the whole batch.",
        summary(results),
        "*Difference*: the largest of the loss or of a gradient, by its largest entry. About 1e-7 is the rounding of "
        "models that compute their loss in float32 whatever their weights are. *router loss*: with "
        "`output_router_logits=True`; *num_items*: with `num_items_in_batch=`, for one batch size; *as built*: experts "
        "in grouped products, which torch has in float32 only, for one batch size; the other lines of these models "
        "have `batched_mm` experts in float64. *Tail*: what mixes samples is computed once from the whole batch. "
        "*Uncut*: steps of fewer microbatches than asked for.",
        *(
            [f"Left out, since the unsplit model gives no numbers for such a batch: {', '.join(left_out)}."]
            * bool(left_out)
        ),
        "## Every model",
        f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n" + "\n".join(rows),
    ]
    return "\n\n".join(head) + "\n"


def summary(results: Sequence[Found]) -> str:
    """What all models have come to, in one line."""
    tallies = [tally for found in results for _, tally in _tallies(found)]
    sums: Counter[str] = Counter()
    for tally in tallies:
        sums.update({name: tally[name] for name in ("steps", "exact", "refused", "uncut")})
    run = sum(any(_tallies(found)) for found in results)
    tails = sum(any(tally["tail"] for _, tally in _tallies(found)) for found in results)
    worst = max((tally["worst"] for tally in tallies), default=0.0)
    wrong = sum(any("wrong" in line for line in troubles(found)) for found in results)
    other = sum(any("wrong" not in line for line in troubles(found)) for found in results)
    return (
        f"{run} models, {sums['steps']} steps: {sums['exact']} exact (largest difference {worst:.1e}), "
        f"{sums['refused']} refused, {sums['steps'] - sums['exact'] - sums['refused']} neither; {wrong} models with a "
        f"wrong number, {other} with a foreign error or none at all; {tails} with a tail of the whole batch, "
        f"{sums['uncut']} steps of fewer microbatches than asked for."
    )


def troubles(found: Found) -> list[str]:
    """What is neither exact nor refused."""
    raised = [f"foreign: {found.facts['raised']}"] if "raised" in found.facts else []
    hangs = [f"{key} {found.ended}" for key, fact in found.facts.items() if fact == "hang"]
    seen = [line for _, tally in _tallies(found) for line in tally["seen"] if not line.startswith("refused")]
    return [*raised, *hangs, *seen]


def line(found: Found) -> str:
    """A model in one line."""
    tallies = [tally for _, tally in _tallies(found)]
    if troubles(found):
        return f"{found.name}: {'; '.join(troubles(found))}"
    steps, exact, uncut = (sum(tally[name] for tally in tallies) for name in ("steps", "exact", "uncut"))
    refused = next((said for tally in tallies for said in tally["seen"]), "")
    return f"{found.name}: {exact} of {steps} exact, {uncut} uncut, {', '.join(_variants(found))} {refused}"


def _tallies(found: Found) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, fact in found.facts.items():
        if isinstance(fact, dict):
            yield key.split(":")[0], fact


def _variants(found: Found) -> list[str]:
    return list(dict.fromkeys(name for name, _ in _tallies(found)))


def _row(entry: Entry, found: Found, variant: str) -> str:
    tallies = [tally for name, tally in _tallies(found) if name == variant]
    sums = [sum(tally[name] for tally in tallies) for name in ("steps", "exact", "refused", "uncut")]
    attention = str(found.facts[f"{variant}: attention"])
    tail = next((tally["tail"] for tally in tallies if tally["tail"]), "")
    cells = [
        entry.name, entry.family, variant, found.facts[f"{variant}: dtype"],
        "" if attention == ATTENDED[0] else attention, *(number or "" for number in sums), _mixing(tail),
        max(tally["captures"] for tally in tallies), f"{max(tally['worst'] for tally in tallies):.0e}",
        "; ".join(dict.fromkeys(said for tally in tallies for said in tally["seen"])),
    ]  # fmt: skip
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _mixing(tail: str) -> str:
    """What mixes samples, without the place in the model's source."""
    return tail.partition("memory: ")[2].partition(" (")[0]


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
