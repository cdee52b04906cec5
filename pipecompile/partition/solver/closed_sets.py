"""Many closed sets at once, as the rows of a matrix.

A plan is a chain of closed sets: the atoms of stages 0 to k, for each k. A *family* holds candidates for one set of
that chain, with the numbers that later steps need: weight, bytes, and the seconds of the nets that are *open*, which
means that they have ends on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipecompile.partition.solver.problem import Bools, Floats, Ints, Problem

Words = NDArray[np.uint64]


@dataclass(frozen=True, eq=False, repr=False)
class Family:
    """Closed sets of one problem, by weight. ``members[i, v]`` is whether set i contains atom v."""

    problem: Problem
    members: Bools

    @staticmethod
    def of(problem: Problem, sets: Iterable[Bools]) -> Family:
        """The given sets, single or in stacks, without repeats, by weight."""
        stack = np.vstack([np.zeros((0, len(problem)), np.bool_), *sets])
        if not len(stack):
            return Family(problem, stack)
        _, first = np.unique(np.packbits(stack, axis=1), axis=0, return_index=True)
        return Family.by_weight(problem, stack[np.sort(first)])

    @staticmethod
    def by_weight(problem: Problem, stack: Bools) -> Family:
        """Sorts a stack of sets without repeats by weight."""
        weight = stack @ problem.weight
        order = np.argsort(weight, kind="stable")
        family = Family(problem, stack[order])
        family.__dict__["weight"] = weight[order]
        return family

    @staticmethod
    def nothing(problem: Problem) -> Family:
        return Family(problem, np.zeros((1, len(problem)), np.bool_))

    @staticmethod
    def everything(problem: Problem) -> Family:
        return Family(problem, np.ones((1, len(problem)), np.bool_))

    def __len__(self) -> int:
        return len(self.members)

    def select(self, which: Bools | Ints | slice) -> Family:
        """A part of the family, with the values computed so far."""
        chosen = Family(self.problem, self.members[which])
        for name in ("weight", "size", "words", "kept", "saved", "ends_inside", "open_seconds"):
            if name in self.__dict__:
                chosen.__dict__[name] = self.__dict__[name][which]
        return chosen

    @cached_property
    def weight(self) -> Floats:
        return np.asarray(self.members @ self.problem.weight)

    @cached_property
    def size(self) -> Ints:
        """The number of atoms of each set."""
        return np.asarray(self.members.sum(axis=1, dtype=np.int64))

    @cached_property
    def words(self) -> Words:
        """The sets as packed bits."""
        spare = np.zeros((len(self), -len(self.problem) % 64), np.bool_)
        return np.asarray(np.packbits(np.hstack([self.members, spare]), axis=1).view(np.uint64))

    def have(self, atoms: Bools) -> Bools:
        """Which sets contain all of the atoms."""
        wanted = Family(self.problem, atoms[None]).words
        return np.asarray(((self.words & wanted) == wanted).all(axis=1))

    def lack(self, atoms: Bools) -> Bools:
        """Which sets contain none of the atoms."""
        return np.asarray(((self.words & Family(self.problem, atoms[None]).words) == 0).all(axis=1))

    @cached_property
    def kept(self) -> Floats:
        return np.asarray(self.members @ self.problem.kept)

    @cached_property
    def saved(self) -> Floats:
        return np.asarray(self.members @ self.problem.saved)

    @cached_property
    def ends_inside(self) -> Ints:
        """``ends_inside[i, e]`` is the number of ends of net e in set i."""
        ends, begins = self.problem.net_ends
        if not len(ends):
            return np.zeros((len(self), 0), np.int32)
        return np.asarray(np.add.reduceat(self.members[:, ends], begins, axis=1, dtype=np.int32))

    @cached_property
    def open_seconds(self) -> Floats:
        return np.asarray(self.is_open @ self.problem.net_seconds)

    @property
    def is_open(self) -> Bools:
        return np.asarray((self.ends_inside > 0) & (self.ends_inside < self.problem.net_sizes))
