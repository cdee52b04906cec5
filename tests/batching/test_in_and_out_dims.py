"""``in_dims=`` and ``out_dims=``: the user's word on which tensors have a batch, and where."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.capture.batch_dims import find_batch
from pipecompile.errors import CaptureError, InputError
from pipecompile.ir.instruction import Forward


class TimeFirst(nn.Module):
    """A recurrent model whose batch is in dimension 1, with a table that has as many rows as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 5)
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, table: Tensor, scales: tuple[float, ...] = (1.0,)) -> dict[str, Tensor]:
        hidden, _ = self.rnn(x)
        scores = self.linear(hidden) + table.sum(0)
        return {"scores": scores * sum(scales), "loss": scores.square().mean()}


class Pooled(nn.Module):
    """Gives something that mixes samples beside a loss that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.linear(x)
        centred = self.head(hidden - hidden.mean(0))
        return {"loss": self.head(hidden).square().mean(), "centred": centred, "centre": centred.mean(0)}


def sequence(rows: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, rows, 4, dtype=torch.float64)


def assert_same_step(pipe: Any, unsplit: nn.Module, *args: Any, **kwargs: Any) -> None:
    mine, expected = pipe(*args, **kwargs), unsplit(*args, **kwargs)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
    mine["loss"].backward()
    expected["loss"].backward()
    for (name, parameter), other in zip(pipe.named_parameters(), unsplit.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("rows", [5, 4, 2, 1])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("dim", [1, -2])
def test_a_batch_in_another_dimension(rows: int, stages: int, dim: int) -> None:
    torch.manual_seed(0)
    model = TimeFirst().double()
    pipe = pipecompile.compile(
        model,
        ["cpu"] * stages,
        microbatches=2,
        batching=pipecompile.Batching(in_dims={"x": dim, "table": None, "scales": None}),
    )
    table = torch.randn(rows, 3, dtype=torch.float64)
    assert_same_step(pipe, deepcopy(model), sequence(rows), table, scales=(0.5,) * rows)
    forwards = [i for rank in pipe.pipeline.program.ranks for i in rank if isinstance(i, Forward)]
    assert len(forwards) == stages * min(rows, 2)


def test_another_batch_size_runs_on_the_same_capture() -> None:
    torch.manual_seed(0)
    model = TimeFirst().double()
    pipe = pipecompile.compile(
        model, ["cpu", "cpu"], microbatches=2, batching=pipecompile.Batching(in_dims={"x": 1, "table": None})
    )
    table = torch.randn(7, 3, dtype=torch.float64)
    for rows in (5, 8, 3):
        unsplit = deepcopy(model)
        model.zero_grad()
        assert_same_step(pipe, unsplit, x=sequence(rows), table=table)
    assert pipe.pipeline.captures == 1


def test_the_gradient_of_an_input_comes_in_its_own_shape() -> None:
    torch.manual_seed(0)
    model = TimeFirst().double()
    pipe = pipecompile.compile(
        model, ["cpu", "cpu"], microbatches=2, batching=pipecompile.Batching(in_dims={"x": 1, "table": None})
    )
    table = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    x = sequence(5).requires_grad_()
    mine = torch.autograd.grad(pipe(x, table)["loss"], (x, table))
    expected = torch.autograd.grad(model(x, table)["loss"], (x, table))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_it_verifies() -> None:
    torch.manual_seed(0)
    pipe = pipecompile.compile(
        TimeFirst().double(),
        ["cpu", "cpu"],
        microbatches=2,
        batching=pipecompile.Batching(in_dims={"x": 1, "table": None}),
    )
    result = pipe.pipeline.verify(sequence(4), torch.randn(7, 3, dtype=torch.float64))
    assert result.exact, str(result)


def test_a_tensor_inside_an_argument_is_named_with_its_keys() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": (self.linear(batch["x"].transpose(0, 1)) * batch["w"]).sum()}

    torch.manual_seed(0)
    model = Nested().double()
    pipe = pipecompile.compile(
        model, ["cpu", "cpu"], microbatches=2, batching=pipecompile.Batching(in_dims={"batch_x": 1, "batch_w": None})
    )
    assert_same_step(pipe, deepcopy(model), {"x": sequence(5)[0].T, "w": torch.randn(5, 3, dtype=torch.float64)[0]})


@pytest.mark.parametrize(
    ("in_dims", "message"),
    [
        ({"x": 3, "table": None}, r"dimension 3 as the batch dimension of 'x', whose shape is \(6, 5, 4\)"),
        ({"x": 1, "table": 0}, r"'table' has 7 rows, but the batch has 5|'x' has 5 rows, but the batch has 7"),
        ({"y": 1}, r"in_dims has 'y', which is not an argument of the model; it takes \['x', 'table', 'scales'\]"),
        ({"x": "1"}, r"in_dims\['x'\] = '1'; it must be the number of a dimension"),
    ],
)
def test_dimensions_of_inputs_that_cannot_be(in_dims: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipecompile.compile(TimeFirst(), ["cpu"], batching=pipecompile.Batching(in_dims=in_dims))(
            sequence(5).float(), torch.randn(7, 3)
        )


def test_an_output_that_mixes_may_be_each_microbatchs_own() -> None:
    torch.manual_seed(0)
    model = Pooled().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    pipe = pipecompile.compile(
        model, ["cpu", "cpu"], microbatches=2, batching=pipecompile.Batching(out_dims={"centred": 0, "centre": None})
    )
    out = pipe(x)
    parts = [model(part) for part in x.split([3, 2])]
    torch.testing.assert_close(out["centred"], torch.cat([part["centred"] for part in parts]), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out["centre"], parts[0]["centre"], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out["loss"], model(x)["loss"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("out_dims", "message"),
    [
        ({"centred": 1}, r"out_dims= gives 1 for output 'centred', but .* that grow with the batch are \[0\]"),
        ({"centred": None}, r"out_dims= gives None for output 'centred'"),
        ({"centred": 7}, r"out_dims= gives 7 for output 'centred', which has 2 dimensions"),
        (
            {"scores": 0},
            r"out_dims= names 'scores', which is not an output of the model; its outputs are loss, centred, centre",
        ),
    ],
)
def test_dimensions_of_outputs_that_cannot_be(out_dims: Any, message: str) -> None:
    pipe = pipecompile.compile(
        Pooled(), ["cpu", "cpu"], microbatches=2, batching=pipecompile.Batching(out_dims={"centre": None, **out_dims})
    )
    with pytest.raises(InputError, match=message):
        pipe(torch.randn(5, 4))


def test_an_asynchronous_schedule_joins_outputs_by_hand_too() -> None:
    def piped(dim: int) -> Any:
        return pipecompile.compile(
            Pooled(),
            ["cpu"],
            microbatches=2,
            schedule="pipedream",
            batching=pipecompile.Batching(out_dims={"centred": dim, "centre": None}),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )

    assert piped(0)(torch.randn(5, 4))["centred"].shape == (5, 2)
    with pytest.raises(InputError, match=r"out_dims= gives 5 for output 'centred', which has 2 dimensions"):
        piped(5)(torch.randn(5, 4))


class Recurrent(nn.Module):
    """Its states have the batch in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(5, 5, 2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor, states: Any = None) -> Any:
        y, states = self.rnn(x, states)
        return self.out(y), states


@pytest.mark.parametrize("begins", ["without states", "with states"])
def test_states_of_an_rnn_are_refused_with_the_dimensions_to_pass(begins: str) -> None:
    torch.manual_seed(0)
    model = Recurrent().double()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    states = tuple(torch.randn(2, 2, 4, 5, dtype=torch.float64))
    pipe = pipecompile.compile(model, ["cpu"] * 2, microbatches=2, costs="count")
    if begins == "without states":
        pipe(x)
    with pytest.raises(
        CaptureError, match=r"microbatches=1, or, if .*batching=Batching\(in_dims=\{'states_0': 1, 'states_1': 1\}\)"
    ):
        pipe(x, states)
    batching = pipecompile.Batching(in_dims={"states_0": 1, "states_1": 1})
    pipe = pipecompile.compile(model, ["cpu"] * 2, microbatches=2, costs="count", batching=batching)
    torch.testing.assert_close(pipe(x, states), model(x, states))


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [
        ([(4, 3, 5), (2, 4, 5), (2, 4, 5)], 4),  # states of two layers
        ([(4, 3, 5), (3, 3)], 4),  # a mask over time
        ([(7, 7), (4, 7, 5), (4, 7)], 4),  # a matrix from nodes to nodes comes first
        ([(4, 4), (4, 4)], 4),
        ([(10,), (32, 10), (32, 10)], 32),  # weights of classes come first
        ([(4,), (2, 4, 5)], 4),
        ([()], None),
    ],
)
def test_the_rows_of_a_batch(shapes: list[tuple[int, ...]], rows: int | None) -> None:
    tensors = {f"x{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}
    assert find_batch(tensors, {}, {}).rows == rows
