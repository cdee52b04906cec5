"""A thousand bubbles and peaks against the formulas of the papers."""

from itertools import chain as chained

from pipecompile.schedule.phases import in_phases, zb_v
from pipecompile.schedule.policy import (
    breadth_first,
    gpipe,
    interleaved,
    interleaved_zb,
    merge,
    one_f_one_b,
    zb_h1,
    zb_h2,
)
from pipecompile.schedule.replay import replay
from pipecompile.schedule.shape import chain, looped
from pipecompile.schedule.stage_costs import StageCosts

TIMES = ((1, 1, 1), (3, 4, 2), (10, 11, 7), (5, 5, 5), (12, 12, 6))


def run(policy, shape, n, times, c=0):
    """Of times per chunk."""
    f, b, w = ((seconds,) * shape.num_stages for seconds in times)
    costs = StageCosts(f, b, w, (c,) * len(shape.edges))
    return replay(merge(policy(shape, n), shape, n), costs)


def one_stage_per_rank(p):
    """What is checked, what is seen, what is expected."""
    for times in TIMES:
        (f, b, w), shape = times, chain(p)
        for n in (p, p + 1, 2 * p, 3 * p + 1):
            work = n * (f + b + w)
            all_first, alternating = run(gpipe, shape, n, times), run(one_f_one_b, shape, n, times)
            yield ("gpipe", all_first.makespan, work + (p - 1) * (f + b + w))
            yield ("gpipe peak", all_first.peaks, (n,) * p)
            yield ("1f1b", alternating.makespan, work + (p - 1) * (f + b + w))
            yield ("1f1b peak", alternating.peaks, tuple(min(n, p - r) for r in range(p)))
            h1 = run(zb_h1, shape, n, times)
            yield ("zb-h1", h1.makespan, work + (p - 1) * (f + b - w))
            yield ("zb-h1 peak", h1.peaks, (p,) * p)
            if n >= 2 * p:
                for c in (0, 1) if w < min(f, b) else (0,):
                    h2 = run(zb_h2, shape, n, times, c)
                    yield ("zb-h2", h2.span, work + (p - 1) * max(0, f + b + 2 * c - 2 * w))
                yield ("zb-h2 peak", h2.peaks, (2 * p - 1,) * p)


def several_chunks_per_rank(p, v):
    shape = looped(p, v)
    for times in TIMES:
        f, b, w = times
        for n in (p, 2 * p, 4 * p):
            work = n * v * (f + b + w)
            depth, breadth = run(interleaved, shape, n, times), run(breadth_first, shape, n, times)
            yield ("interleaved", depth.makespan, work + (p - 1) * (f + b + w))
            in_flight = (min(n * v, (v - 1) * p + 2 * (p - 1 - r) + 1) for r in range(p))
            yield ("interleaved peak", depth.peaks, tuple(in_flight))
            yield ("bfs", breadth.makespan, work + (p - 1) * (f + b + w))
            yield ("bfs peak", breadth.peaks, (n * v,) * p)
            if n > p:
                yield ("interleaved-zb peak", max(run(interleaved_zb, shape, n, times).peaks), (v - 1) * p + p)


def v_shapes(p):
    """No bubble by span if all take equally long, and the memory of 1F1B."""
    for n in (2 * p, 3 * p + 1, 6 * p):
        for seconds in (1, 7):
            equal = (seconds,) * (2 * p)
            once = replay(in_phases(zb_v, p, n), StageCosts(equal, equal, equal))
            yield ("zb-v", once.span, 6 * n * seconds)
            yield ("zb-v peak", once.peak, 2 * p)
            yield ("zb-v makespan", once.makespan, 6 * n * seconds + (p - 1) * seconds)


def test_a_thousand_bubbles_and_peaks_are_those_of_the_formulas():
    found = list(
        chained(
            *map(one_stage_per_rank, (1, 2, 3, 4, 6, 8)),
            *(several_chunks_per_rank(*sizes) for sizes in ((2, 2), (2, 3), (4, 2), (4, 3), (4, 4), (8, 2))),
            *map(v_shapes, (1, 2, 3, 4, 8)),
        )
    )
    assert [(name, seen, expected) for name, seen, expected in found if seen != expected] == []
    assert len(found) > 1000
