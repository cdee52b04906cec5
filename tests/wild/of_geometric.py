"""torch_geometric: convolutions of ``torch_geometric.nn.conv`` on one graph and on a batch of signals over a graph, models.

A graph is one sample: its nodes are not rows that can be dealt out. Those entries run as one microbatch (``whole``).
Signals over a fixed graph are of (batch, nodes, features), which most convolutions take.
"""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, alternating, wild

NODES = 7
GRAPH = "one graph"
# name: (arguments, keyword arguments); what takes node features and edges alone
CONVOLUTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "GCNConv": ((6, 5), {}), "ChebConv": ((6, 5, 2), {}), "SAGEConv": ((6, 5), {}), "GraphConv": ((6, 5), {}), "GatedGraphConv": ((6, 2), {}),
    "ResGatedGraphConv": ((6, 5), {}), "GATConv": ((6, 5), {"heads": 2}), "GATv2Conv": ((6, 5), {"heads": 2}), "TransformerConv": ((6, 5), {"heads": 2}),
    "AGNNConv": ((), {}), "TAGConv": ((6, 5), {"K": 2}), "ARMAConv": ((6, 5), {}), "SGConv": ((6, 5), {}), "SSGConv": ((6, 5, 0.1), {}), "APPNP": ((2, 0.1), {}),
    "MFConv": ((6, 5), {}), "FeaStConv": ((6, 5), {"heads": 2}), "LEConv": ((6, 5), {}), "ClusterGCNConv": ((6, 5), {}), "GENConv": ((6, 5), {}), "FiLMConv": ((6, 5), {}),
    "EGConv": ((6, 8), {"num_heads": 2, "num_bases": 2}), "GeneralConv": ((6, 5), {}),
    "LGConv": ((), {}), "MixHopConv": ((6, 5), {"powers": [0, 1, 2]}), "AntiSymmetricConv": ((6,), {}), "HypergraphConv": ((6, 5), {}), "CGConv": ((6,), {}),
}  # fmt: skip
WITH_MLP = ("GINConv", "EdgeConv")
STATIC = (
    "GCNConv",
    "SAGEConv",
    "GraphConv",
    "ChebConv",
    "TAGConv",
    "SGConv",
    "ARMAConv",
    "LEConv",
    "ClusterGCNConv",
    "SSGConv",
    "APPNP",
    "LGConv",
    "GINConv",
    "ResGatedGraphConv",
)
MODELS: dict[str, dict[str, Any]] = {
    name: {"in_channels": 6, "hidden_channels": 8, "num_layers": 2, "out_channels": 3} for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN")
}  # fmt: skip


def entries() -> tuple[Wild, ...]:
    import torch_geometric.nn as gnn

    def conv(name: str) -> nn.Module:
        if name in WITH_MLP:
            return getattr(gnn, name)(
                nn.Sequential(nn.Linear(12 if name == "EdgeConv" else 6, 8), nn.ReLU(), nn.Linear(8, 6))
            )  # type: ignore[no-any-return]
        args, kwargs = CONVOLUTIONS[name]
        return getattr(gnn, name)(*args, **kwargs)  # type: ignore[no-any-return]

    names = (*CONVOLUTIONS, *WITH_MLP)
    return alternating([
        *(wild("geometric", name, lambda name=name: _Deep(conv(name)), _graph, whole=GRAPH, lengths=(8,)) for name in names),
        *(wild("geometric", f"{name} (signals)", lambda name=name: _Deep(conv(name)), _signals, lengths=(8,)) for name in STATIC),
        *(wild("geometric", name, lambda name=name: getattr(gnn, name)(**MODELS[name]), _graph, whole=GRAPH, lengths=(8,)) for name in MODELS),
        wild("geometric", "PNA", lambda: gnn.PNA(6, 8, 2, 3, aggregators=["mean", "max", "std"], scalers=["identity", "amplification"], deg=torch.tensor([0, 3, 4])), _graph, whole=GRAPH, lengths=(8,)),
        wild("geometric", "MLP", lambda: gnn.MLP([6, 8, 3], norm="layer_norm"), lambda draw: ((draw.floats(6),), {}), whole="its layer norm is over all nodes", lengths=(8,)),
        wild("geometric", "GraphUNet", lambda: gnn.GraphUNet(6, 8, 3, depth=2), _graph, whole=GRAPH, lengths=(8,)),
        wild("geometric", "AttentiveFP", lambda: gnn.AttentiveFP(6, 8, 3, edge_dim=4, num_layers=2, num_timesteps=2), _molecules, whole=GRAPH, lengths=(8,)),
        wild("geometric", "LINKX", lambda: gnn.LINKX(NODES, 6, 8, 3, num_layers=2), _fixed_graph, whole=GRAPH, lengths=(8,)),
        wild("geometric", "LightGCN", lambda: gnn.LightGCN(NODES, 6, 2), lambda draw: ((_edges(NODES),), {}), whole=GRAPH, lengths=(8,)),
        wild("geometric", "PMLP", lambda: gnn.PMLP(6, 8, 3, 2, norm=False), _graph, whole=GRAPH, lengths=(8,)),
        wild("geometric", "NeuralFingerprint", lambda: gnn.NeuralFingerprint(6, 8, 3, 2), _batched_graph, whole=GRAPH, lengths=(8,)),
        wild("geometric", "GCN, pooled", lambda: _Pooled(gnn.GCN(6, 8, 2), gnn.global_mean_pool), _batched_graph, whole=GRAPH, lengths=(8,)),
        wild("geometric", "GIN, top-k pooled", lambda: _TopK(), _batched_graph, whole=GRAPH, lengths=(8,)),
        wild("geometric", "DeepGCNLayer", lambda: gnn.DeepGCNLayer(gnn.GENConv(6, 6), nn.LayerNorm(6), nn.ReLU(), block="res+"), _graph, whole=GRAPH, lengths=(8,)),
        wild("geometric", "SGFormer", lambda: gnn.SGFormer(6, 8, 3, trans_num_layers=1, gnn_num_layers=1), _batched_graph, whole=GRAPH, lengths=(8,)),
        wild("geometric", "GPSConv", lambda: gnn.GPSConv(6, gnn.GCNConv(6, 6), heads=2, norm=None, attn_type="multihead"), _batched_graph, whole=GRAPH, lengths=(8,)),
        wild("geometric", "GCNConv, sparse adjacency", lambda: _Deep(conv("GCNConv")), _sparse, whole=GRAPH, lengths=(8,)),
        wild("geometric", "SAGEConv, CSR adjacency", lambda: _Deep(conv("SAGEConv")), _csr, whole=GRAPH, lengths=(8,)),
    ])  # fmt: skip


def _edges(nodes: int) -> Tensor:
    """A ring, with chords."""
    i = torch.arange(nodes)
    sources, targets = torch.cat([i, i, i]), torch.cat([(i + 1) % nodes, (i - 1) % nodes, (i + 3) % nodes])
    return torch.stack([sources, targets])


def _graph(draw: Draw) -> Inputs:
    return (draw.floats(6), _edges(draw.batch)), {}


def _fixed_graph(draw: Draw) -> Inputs:
    whole = Draw(NODES, draw.length, draw.generator)
    return (whole.floats(6), _edges(NODES)), {}


def _batched_graph(draw: Draw) -> Inputs:
    """Two graphs in one, with the number of the graph of each node."""
    return (draw.floats(6), _edges(draw.batch), torch.arange(draw.batch) // 3), {}


def _molecules(draw: Draw) -> Inputs:
    edges = _edges(draw.batch)
    attributes = Draw(edges.shape[1], 1, draw.generator).floats(4)
    return (draw.floats(6), edges, attributes, torch.arange(draw.batch) // 3), {}


def _signals(draw: Draw) -> Inputs:
    return (draw.floats(NODES, 6), _edges(NODES)), {}


def _sparse(draw: Draw) -> Inputs:
    edges = _edges(draw.batch)
    return (
        draw.floats(6),
        torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1]), (draw.batch,) * 2).coalesce(),
    ), {}


def _csr(draw: Draw) -> Inputs:
    (x, adjacency), _ = _sparse(draw)
    return (x, adjacency.to_sparse_csr()), {}


class _Deep(nn.Module):
    """A convolution between two layers, as models have them."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(6, 6), conv, nn.LazyLinear(3)
        with torch.no_grad():
            self(*_graph(Draw(4, 8, torch.Generator().manual_seed(0)))[0])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = self.conv(self.first(x.to(self.first.weight.dtype)).relu(), edges)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.last(hidden.relu())  # type: ignore[no-any-return]


class _Pooled(nn.Module):
    def __init__(self, model: nn.Module, pool: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.pool, self.head = model, pool, nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        return self.head(self.pool(self.model(x, edges), batch))  # type: ignore[no-any-return]


class _TopK(nn.Module):
    def __init__(self) -> None:
        import torch_geometric.nn as gnn

        super().__init__()
        self.conv, self.pool, self.head = gnn.GCNConv(6, 8), gnn.TopKPooling(8, ratio=0.5), nn.Linear(8, 3)
        self.mean = gnn.global_mean_pool

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        hidden = self.conv(x, edges).relu()
        hidden, edges, _, batch, _, _ = self.pool(hidden, edges, None, batch)
        return self.head(self.mean(hidden, batch))  # type: ignore[no-any-return]
