"""Plans are remembered under keys that tell schedules apart."""

from __future__ import annotations

from pipecompile.compiler.fingerprint import plan_key
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.plan_options import DEFAULT_PLAN
from pipecompile.planning.training_spec import Workload
from pipecompile.planning.updates import UpdateCost
from pipecompile.schedule import SCHEDULES
from pipecompile.schedule.own import own


def key(schedule: object, **options: object) -> str:
    work = Workload(schedule.steady, 2, placement=schedule.placement, **options)
    return plan_key("costs", Cluster.of(["cpu", "cpu"]), work, DEFAULT_PLAN, "")


def test_every_schedule_has_a_key_of_its_own_and_keeps_it() -> None:
    grids = ["0: F0 F1 B0 B1\n1: F0 B0 F1 B1", "0: F0 F1 B0 B1\n1: F0 F1 B0 B1"]
    kinds = [*SCHEDULES.values(), *(own(grid, 2, 2).schedule for grid in grids)]
    keys = [key(kind) for kind in kinds]
    assert len(set(keys)) == len(kinds)
    assert keys == [key(kind) for kind in kinds]
    assert key(SCHEDULES["1f1b"], recompute="never") not in keys


def test_optimizers_inside_the_pipeline_have_keys_of_their_own() -> None:
    cost = UpdateCost(per_parameter=1e-5, per_byte=1e-9)
    for name, differs in (("pipedream", True), ("1f1b", False)):
        kind = SCHEDULES[name]
        given = [(lambda: 0.0, cost), (lambda: 2.0, cost), (lambda: 2.0, None)]
        keys = {
            key(kind, asynchronous=kind.is_asynchronous, optimizer_state=state, update=update)
            for state, update in given
        }
        assert len(keys) == (3 if differs else 1)
