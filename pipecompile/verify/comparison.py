"""Compares one step of two models by name: outputs, gradients, buffers, parameters and Python attributes.

A tolerance for each tensor tells rounding from error. Sums of the same terms in another order differ by a few units in
the last place of the largest term, so the tolerance is a fraction of the tensor's largest value, plus a far smaller
fraction of the model's largest gradient: a gradient may be nothing but the rounding of larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipecompile.ops.torch_internals import DisableTorchFunction
from pipecompile.verify.results import Difference, Kind

ULPS = 64  # units in the last place of the largest gradient, allowed in any gradient
MOST = 0.01  # fraction of the largest gradient: an upper bound, since in 16 bits more would hide errors
FINE = (torch.float32, torch.float64)  # dtypes whose own differences round by far less than is allowed


@dataclass(frozen=True)
class Run:
    """The results of one step, by name."""

    outputs: Mapping[str, Any]
    gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    input_gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)  # parameters that the step has written
    attributes: Mapping[str, Any] = field(default_factory=dict)  # attributes that the step has set
    structure: Any = None  # the tree of the output: its types and keys
    wanting: frozenset[str] = frozenset()  # outputs that require a gradient
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # all parameters, as they were before the step
    left: Mapping[str, bool] = field(
        default_factory=dict
    )  # tensors left in the model, and whether they require a gradient

    def parts(self) -> Iterator[tuple[Kind, Mapping[str, Any]]]:
        """The kinds of results, each with its values by name."""
        yield "output", self.outputs
        yield "gradient", self.gradients
        yield "input gradient", self.input_gradients
        yield "buffer", self.buffers
        yield "parameter", self.parameters
        yield "attribute", self.attributes


def differences(split: Run, whole: Run, coarsest: torch.dtype | None = None) -> tuple[Difference, ...]:
    """The differences of two runs, tensor by tensor.

    Args:
        whole: the unsplit model's run, whose magnitudes are used.
        coarsest: the least precise floating dtype that the model computes in.
    """
    with DisableTorchFunction():  # what is compared was drawn before
        return tuple(_differences(split, whole, coarsest))


def _differences(split: Run, whole: Run, coarsest: torch.dtype | None) -> Iterator[Difference]:
    gradients = [g for g in (*whole.gradients.values(), *whole.input_gradients.values()) if g is not None]
    largest = max(map(magnitude, gradients), default=0.0)
    found = [*_of_outputs(split, whole)]
    for (kind, ours), (_, theirs) in zip(split.parts(), whole.parts(), strict=True):
        level = largest if "gradient" in kind else 0.0
        for name in dict.fromkeys((*theirs, *ours)):
            unchanged = whole.weights.get(name, _MISSING) if kind == "parameter" else _MISSING
            pair = ours.get(name, unchanged), theirs.get(name, unchanged)
            found.append(difference(kind, name, *pair, level, coarsest))
    yield from (it for it in found if it is not None)


def _of_outputs(split: Run, whole: Run) -> Iterator[Difference | None]:
    """Differences in the structure of the output, and in which tensors require a gradient."""
    if split.structure != whole.structure:
        yield Difference(
            kind="output",
            name="the structure",
            largest=math.inf,
            scale=0.0,
            allowed=0.0,
            seen=f"{split.structure} instead of {whole.structure}",
        )
    for name in split.wanting ^ whole.wanting if split.wanting and whole.wanting else ():
        yield _takes("output", name, name in whole.wanting)
    for name in split.left.keys() & whole.left.keys():
        if split.left[name] != whole.left[name]:
            yield _takes("attribute", name, whole.left[name])


def _takes(kind: Kind, name: str, expected: bool) -> Difference:
    """The difference of a tensor of which only one model's requires a gradient."""
    seen = "without a gradient" if expected else "with a gradient, unlike the unsplit model's"
    return Difference(kind=kind, name=name, largest=math.inf, scale=0.0, allowed=0.0, seen=seen)


def difference(
    kind: Kind, name: str, ours: Any, theirs: Any, level: float = 0.0, coarsest: torch.dtype | None = None
) -> Difference | None:
    """The difference of two values; None if both are None.

    Args:
        level: for a gradient, the largest magnitude of any gradient of the model.
    """
    if ours is None and theirs is None:
        return None
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        same = isinstance(ours, Tensor) == isinstance(theirs, Tensor) and _equal(ours, theirs)
        return Difference(
            kind=kind,
            name=name,
            largest=0.0 if same else math.inf,
            scale=0.0,
            allowed=0.0,
            seen="" if same else _both(ours, theirs),
        )
    scale = magnitude(theirs)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype or ours.layout != theirs.layout:
        return Difference(kind=kind, name=name, largest=math.inf, scale=scale, allowed=0.0, seen=_both(ours, theirs))
    largest = distance(ours, theirs)
    return Difference(
        kind=kind,
        name=name,
        largest=largest,
        scale=scale,
        allowed=allowed(ours.dtype, scale, level, coarsest) if largest else 0.0,
    )


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference of two elements; infinite if only one of two is finite, 0 if all are equal."""
    a, b = ours.detach(), theirs.detach().to(ours.device)
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if torch.equal(a, b) or not a.numel():
        return 0.0
    if a.dtype == b.dtype and a.dtype in FINE:
        largest = float((a - b).abs_().max())
        if math.isfinite(largest) and largest > 0:  # else values are not finite, or too close for their dtype
            return largest
    wide = torch.complex128 if a.dtype.is_complex else torch.float64
    gap = (a.to(wide) - b.to(wide)).abs()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), torch.zeros_like(gap), gap)
    return float(gap.max()) if bool(gap.isfinite().all()) else math.inf


def allowed(dtype: torch.dtype, scale: float, level: float = 0.0, coarsest: torch.dtype | None = None) -> float:
    """The largest difference that rounding explains in a tensor of a dtype and of magnitude ``scale``."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    eps = max(torch.finfo(dtype).eps, 0.0 if coarsest is None else torch.finfo(coarsest).eps)
    return math.sqrt(eps) * scale + min(ULPS * eps, MOST) * level


def coarsest_type(values: Iterable[Any]) -> torch.dtype | None:
    """The least precise floating dtype of the tensors among ``values``; None without such tensors."""
    types = {v.dtype for v in values if isinstance(v, Tensor) and (v.dtype.is_floating_point or v.dtype.is_complex)}
    return max(types, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def magnitude(tensor: Tensor) -> float:
    """The largest magnitude of a finite element."""
    values = tensor.detach()
    values = values if values.layout == torch.strided else values.to_dense()
    values = values.float() if values.dtype == torch.bool else values
    if not values.numel():
        return 0.0
    largest = float(values.abs().max())
    if math.isfinite(largest) and largest >= 0:  # the absolute value of the smallest integer is negative
        return largest
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


_MISSING = _Missing()


def _equal(ours: Any, theirs: Any) -> bool:
    """Whether two Python values are equal; NaN equals NaN."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, float) and math.isnan(ours):
        return math.isnan(theirs)
    same = ours == theirs
    return bool(same.all()) if hasattr(same, "all") else bool(same)


def _both(ours: Any, theirs: Any) -> str:
    return f"{_described(ours)} instead of {_described(theirs)}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "none" if value is None else f"{value!r:.60}"


def names_of(differences: Sequence[Difference], kind: Kind) -> list[str]:
    """The names of one kind that differ by more than rounding."""
    return [it.name for it in differences if it.kind == kind and it.verdict == "different"]
