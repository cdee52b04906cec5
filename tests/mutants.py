"""All mutants, and the table of what ``verify="first"`` says of each: ``python tests/mutants.py``."""

from __future__ import annotations

import re

import torch
from broken import Mutant
from mutants_batching import BATCHING
from mutants_capture import CAPTURE
from mutants_runtime import RUNTIME

from pipecompile.errors import ExactnessError

PARTS = {"capture": CAPTURE, "batching": BATCHING, "split and runtime": RUNTIME}
MUTANTS = tuple(mutant for part in PARTS.values() for mutant in part)


def refused(mutant: Mutant) -> str:
    """What the first call says where a mutant is compared with the unsplit model; empty if it says nothing."""
    with mutant.breaks():
        try:
            mutant.split("first")
        except ExactnessError as error:
            return str(error)
    return ""


def summary(message: str) -> tuple[str, str]:
    """The first quantity that differs, and where it begins."""
    lines = message.splitlines()
    where = next(line for line in lines if line.startswith(("the first module", "every module", "which module")))
    gradient = re.search(r"differs is that of '([^']*)'", where)
    module = re.search(r"output differs is '([^']*)' .*?(on microbatches|as it was captured)", where)
    if module:
        return lines[1].strip(), f"output of `{module[1]}`, {module[2]}"
    return lines[
        1
    ].strip(), f"outputs agree; gradient of `{gradient[1]}`" if gradient else "outputs and gradients agree"


def main() -> None:
    """Prints the table, in markdown."""
    for part, mutants in PARTS.items():
        print(f"| {part}: mutant | what is broken | wrong without the check | what differs first | where it begins |")
        print("|---|---|---|---|---|")
        for mutant in mutants:
            right = mutant.split("never") if mutant.draws else mutant.eager()
            with mutant.breaks():
                wrong = mutant.apart(mutant.split("never"), right)
            message = refused(mutant)
            first, where = summary(message) if message else ("**not caught**", "")
            print(f"| {mutant.name} | {mutant.broken} | {len(wrong)} | {first} | {where} |")
        print()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
