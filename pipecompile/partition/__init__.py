"""Which stage each node goes to: the solver, and what turns a model into its numbers and back."""

from pipecompile.partition.assign import assign as assign
from pipecompile.partition.assign import suited as suited
from pipecompile.partition.carry import carry_over as carry_over
from pipecompile.partition.costed import Objective as Objective
from pipecompile.partition.costed import partition as partition
from pipecompile.partition.costed import scored as scored
from pipecompile.partition.deal import Step as Step
from pipecompile.partition.deal import deals as deals
from pipecompile.partition.solver.problem import Net as Net
from pipecompile.partition.solver.problem import Problem as Problem
from pipecompile.partition.solver.problem import Seat as Seat
from pipecompile.partition.solver.solve import Solution as Solution
from pipecompile.partition.solver.solve import solve as solve
from pipecompile.partition.training import ADAM as ADAM
from pipecompile.partition.training import Training as Training
