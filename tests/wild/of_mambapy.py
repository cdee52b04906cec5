"""mambapy: its models, and its parallel scan as a module."""

from __future__ import annotations

from typing import Any

from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, alternating, wild


def entries() -> tuple[Wild, ...]:
    return alternating([
        wild("mambapy", "Mamba", lambda: _mamba(pscan=True), _hidden),
        wild("mambapy", "Mamba (sequential)", lambda: _mamba(pscan=False), _hidden),
        wild("mambapy", "Mamba (inner norms)", lambda: _mamba(pscan=True, inner_layernorms=True), _hidden),
        wild("mambapy", "VMamba", _vision, _hidden),
        wild("mambapy", "Jamba", _jamba, lambda draw: ((draw.ids(20, draw.length),), {})),
        wild("mambapy", "pscan", Scan, lambda draw: ((draw.floats(8, 4, 3), draw.floats(8, 4, 3)), {}), lengths=(8,)),
    ])  # fmt: skip


def _mamba(**options: Any) -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=8, n_layers=2, d_state=4, **options))


def _vision() -> nn.Module:
    from mambapy.vim import MambaConfig, VMamba

    return VMamba(MambaConfig(d_model=8, n_layers=2, d_state=4, bidirectional=True))


def _jamba() -> nn.Module:
    from mambapy.jamba import JambaLM, JambaLMConfig

    config = {"d_model": 8, "n_layers": 2, "mlp_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2, "d_state": 4}  # fmt: skip  # noqa: E501
    return JambaLM(JambaLMConfig(vocab_size=20, **config))


class Scan(nn.Module):
    """A recurrence of gates and inputs of (batch, length, width, states), by the parallel scan."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, a: Tensor, x: Tensor) -> Tensor:
        from mambapy.pscan import pscan

        return pscan(self.gate(a).sigmoid(), self.value(x))  # type: ignore[no-any-return]


def _hidden(draw: Draw) -> Inputs:
    return (draw.floats(draw.length, 8),), {}
