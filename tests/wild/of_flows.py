"""Normalizing flows of zuko, nflows and normflows, trained by the negative log-likelihood of a batch."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, alternating, wild

SIZE, GIVEN = 4, 3
HIDDEN = {"hidden_features": (12, 12)}


class Likelihood(nn.Module):
    """The negative log-likelihood of each row, given others."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.embed, self.flow = nn.Linear(GIVEN, GIVEN), flow

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return -self.flow(torch.tanh(self.embed(given))).log_prob(x)  # type: ignore[no-any-return]


class Plain(nn.Module):
    """The negative log-likelihood of each row, by ``log_prob`` of the flow."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.enter, self.flow = nn.Linear(SIZE, SIZE), flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(self.enter(x))  # type: ignore[operator, no-any-return]


def entries() -> tuple[Wild, ...]:
    return alternating([*_of_zuko(), *_of_nflows(), *_of_normflows()])


def _of_zuko() -> list[Wild]:
    def flow(kind: str, **config: Any) -> Wild:
        def make() -> nn.Module:
            import zuko

            return Likelihood(getattr(zuko.flows, kind)(SIZE, GIVEN, **config))

        return _entry(f"zuko {kind}", make, lambda draw: ((draw.floats(SIZE).tanh(), draw.floats(GIVEN)), {}))

    return [
        flow("MAF", transforms=2, **HIDDEN), flow("NSF", transforms=2, bins=4, **HIDDEN), flow("NICE", transforms=2, **HIDDEN),
        flow("NCSF", transforms=2, bins=4, **HIDDEN), flow("SOSPF", transforms=2, degree=2, polynomials=2, **HIDDEN),
        flow("BPF", transforms=2, degree=4, **HIDDEN), flow("NAF", transforms=1, signal=4, network=HIDDEN, **HIDDEN),
        flow("UNAF", transforms=1, signal=4, network=HIDDEN, **HIDDEN), flow("GF", transforms=2, components=3, **HIDDEN),
        flow("GMM", components=3, **HIDDEN),
    ]  # fmt: skip


def _of_nflows() -> list[Wild]:
    def flow(name: str, layers: Callable[[Any], list[nn.Module]]) -> Wild:
        def make() -> nn.Module:
            import nflows.transforms as t
            from nflows.distributions import StandardNormal
            from nflows.flows import Flow

            return Plain(Flow(t.CompositeTransform(layers(t)), StandardNormal([SIZE])))

        return _entry(f"nflows {name}", make, lambda draw: ((draw.floats(SIZE),), {}))

    def net(inside: int, outside: int) -> nn.Module:
        from nflows.nn.nets import ResidualNet

        return ResidualNet(inside, outside, hidden_features=12, num_blocks=1)  # type: ignore[no-any-return]

    mask = torch.tensor([1, 0, 1, 0])
    rest = {"hidden_features": 12, "num_blocks": 1}
    return [
        flow("MaskedAffineAutoregressive", lambda t: [t.MaskedAffineAutoregressiveTransform(SIZE, **rest), t.ReversePermutation(SIZE), t.MaskedAffineAutoregressiveTransform(SIZE, **rest)]),
        flow("rational-quadratic autoregressive", lambda t: [t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(SIZE, num_bins=4, tails="linear", tail_bound=3.0, **rest)]),
        flow("AffineCoupling", lambda t: [t.AffineCouplingTransform(mask, net), t.LULinear(SIZE), t.AffineCouplingTransform(1 - mask, net)]),
        flow("rational-quadratic coupling", lambda t: [t.PiecewiseRationalQuadraticCouplingTransform(mask, net, num_bins=4, tails="linear", tail_bound=3.0), t.RandomPermutation(SIZE), t.SVDLinear(SIZE, 2)]),
        flow("Householder, ActNorm", lambda t: [t.ActNorm(SIZE), t.HouseholderSequence(SIZE, 2), t.AffineCouplingTransform(mask, net)]),
        flow("BatchNorm", lambda t: [t.AffineCouplingTransform(mask, net), t.BatchNorm(SIZE), t.AffineCouplingTransform(1 - mask, net)]),
    ]  # fmt: skip


def _of_normflows() -> list[Wild]:
    def flow(name: str, layers: Callable[[Any], list[nn.Module]]) -> Wild:
        def make() -> nn.Module:
            import normflows as nf

            return Plain(nf.NormalizingFlow(nf.distributions.base.DiagGaussian(SIZE), layers(nf)))

        return _entry(f"normflows {name}", make, lambda draw: ((draw.floats(SIZE),), {}))

    return [
        flow("RealNVP", lambda nf: [f for _ in range(2) for f in (nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 12, SIZE], init_zeros=True)), nf.flows.Permute(SIZE, mode="swap"))]),
        flow("NSF autoregressive", lambda nf: [nf.flows.AutoregressiveRationalQuadraticSpline(SIZE, 1, 12, num_bins=4), nf.flows.LULinearPermute(SIZE)]),
        flow("NSF coupled", lambda nf: [nf.flows.CoupledRationalQuadraticSpline(SIZE, 1, 12, num_bins=4), nf.flows.LULinearPermute(SIZE)]),
        flow("MAF", lambda nf: [nf.flows.MaskedAffineAutoregressive(SIZE, 12, num_blocks=1), nf.flows.Permute(SIZE, mode="swap")]),
        flow("masked affine, ActNorm", lambda nf: [nf.flows.MaskedAffineFlow(torch.tensor([1, 0, 1, 0]), nf.nets.MLP([SIZE, 12, SIZE]), nf.nets.MLP([SIZE, 12, SIZE])), nf.flows.ActNorm(SIZE)]),
    ]  # fmt: skip


def _entry(name: str, make: Callable[[], nn.Module], sample: Callable[[Draw], Inputs]) -> Wild:
    return wild("flows", name, make, sample, loss=torch.mean, lengths=(8,))
