"""Assigns nodes to stages: the solver, and the conversion of a model to its problem and back."""

from pipecompile.partition.carry_placement import carry_over as carry_over
from pipecompile.partition.from_graph import partition as partition
from pipecompile.partition.from_graph import scored as scored
from pipecompile.partition.memory_model import ADAM as ADAM
from pipecompile.partition.memory_model import Training as Training
from pipecompile.partition.rank_assignment import assign as assign
from pipecompile.partition.rank_assignment import suited as suited
from pipecompile.partition.replica_search import Step as Step
from pipecompile.partition.replica_search import deals as deals
from pipecompile.partition.solver.problem import Net as Net
from pipecompile.partition.solver.problem import Problem as Problem
from pipecompile.partition.solver.problem import Seat as Seat
from pipecompile.partition.solver.solver import Solution as Solution
from pipecompile.partition.solver.solver import solve as solve
