"""Models of libraries with one or some each: vit-pytorch, deepctr-torch, curated-transformers, ncps, piq, geomloss..."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, alternating, itself, wild

WORDS = 20


def entries() -> tuple[Wild, ...]:
    made = [*_pictures(), *_clicks(), *_texts(), *_series(), *_criteria(), *_others()]
    return alternating(made)


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _one(name: str, make: Callable[[], nn.Module], *shape: int, **facts: Any) -> Wild:
    return wild("further", name, make, lambda draw: ((draw.floats(*shape),), {}), lengths=(8,), **facts)


def _pictures() -> list[Wild]:
    def vit(name: str, path: str, *shape: int, **config: Any) -> Wild:
        return _one(
            f"vit-pytorch {name}",
            lambda: _class(f"vit_pytorch.{path}")(num_classes=3, **config),
            *(shape or (3, 16, 16)),
        )

    plain = {"dim": 16, "depth": 2, "heads": 2, "mlp_dim": 24}
    patches = {"image_size": 16, "patch_size": 4}
    return [
        vit("SimpleViT", "simple_vit.SimpleViT", **patches, **plain),
        vit("DeepViT", "deepvit.DeepViT", **patches, **plain),
        vit("CaiT", "cait.CaiT", **patches, **plain, cls_depth=1),
        vit("XCiT", "xcit.XCiT", **patches, **plain, cls_depth=1),
        vit("CvT", "cvt.CvT", 3, 32, 32, s1_emb_dim=8, s2_emb_dim=8, s3_emb_dim=8, s2_heads=1, s3_heads=1, s2_depth=1, s3_depth=1),
        vit("NesT", "nest.NesT", **patches, dim=16, heads=1, num_hierarchies=2, block_repeats=(1, 1)),
        vit("CrossViT", "cross_vit.CrossViT", image_size=16, sm_dim=8, lg_dim=16, sm_patch_size=4, lg_patch_size=8, sm_enc_heads=2, sm_enc_mlp_dim=16, lg_enc_depth=1, lg_enc_heads=2, lg_enc_mlp_dim=16, cross_attn_depth=1, cross_attn_heads=2, depth=1),
        vit("MaxViT", "max_vit.MaxViT", 3, 16, 16, dim=8, depth=(1, 1), dim_head=4, dim_conv_stem=8, window_size=2),
        vit("ViT, signals", "vit_1d.ViT", 3, 16, seq_len=16, patch_size=4, **plain),
    ]  # fmt: skip


def _clicks() -> list[Wild]:
    def click(kind: str, **config: Any) -> Wild:
        def make() -> nn.Module:
            inputs = import_module("deepctr_torch.inputs")
            columns = [inputs.SparseFeat(name, vocabulary_size=5, embedding_dim=4) for name in "abc"]
            columns += [inputs.DenseFeat(name, 1) for name in "xy" if kind != "AFM"]
            return _class(f"deepctr_torch.models.{kind}")(columns, columns, **config)

        return wild(
            "further",
            f"deepctr {kind}",
            make,
            lambda draw: ((torch.cat([draw.ids(5, 3), draw.floats(2)], 1),), {}),
            lengths=(8,),
        )

    hidden = {"dnn_hidden_units": (8, 8)}
    return [
        click("DeepFM", **hidden), click("xDeepFM", **hidden, cin_layer_size=(8, 4)), click("DCN", **hidden), click("AutoInt", **hidden, att_head_num=2),
        click("FiBiNET", **hidden), click("NFM", **hidden), click("AFM"), click("WDL", **hidden),
    ]  # fmt: skip


class Curated(nn.Module):
    """A model of curated-transformers with the object that it takes as a mask."""

    def __init__(self, kind: str, config: dict[str, Any]) -> None:
        super().__init__()
        models = import_module("curated_transformers.models")
        made = getattr(models, f"{kind}Config")(**config)
        self.model = (getattr(models, f"{kind}Encoder", None) or getattr(models, f"{kind}Decoder"))(made)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        masked = import_module("curated_transformers.layers").AttentionMask(mask)
        return self.model(ids, masked).last_hidden_layer_state  # type: ignore[no-any-return]


def _texts() -> list[Wild]:
    def text(kind: str, **config: Any) -> Wild:
        return wild(
            "further",
            f"curated-transformers {kind}",
            lambda: Curated(kind, config),
            lambda draw: ((draw.ids(WORDS, draw.length), draw.mask().bool()), {}),
        )

    size = {
        "hidden_width": 16,
        "intermediate_width": 24,
        "n_attention_heads": 2,
        "n_hidden_layers": 2,
        "n_pieces": WORDS,
        "dtype": torch.float32,
    }
    steady = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, **size}
    return [
        text("BERT", embedding_width=16, **steady), text("ALBERT", embedding_width=8, **steady),
        text("GPTNeoX", **steady), text("Llama", **{k: v for k, v in steady.items() if k != "n_attention_heads"}, n_query_heads=2, n_key_value_heads=1),
    ]  # fmt: skip


class First(nn.Module):
    """The first of what a recurrent model returns, through a layer."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.model(x)
        return self.head(found[0] if isinstance(found, tuple) else found)  # type: ignore[no-any-return]


class Spikes(nn.Module):
    """Spiking neurons that keep their voltage from step to step of time, and begin anew in each call."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        neuron = import_module("spikingjelly.activation_based.neuron")
        self.net = nn.Sequential(
            nn.Linear(6, 12), getattr(neuron, kind)(**options), nn.Linear(12, 3), getattr(neuron, kind)(**options)
        )

    def forward(self, x: Tensor) -> Tensor:
        import_module("spikingjelly.activation_based.functional").reset_net(self.net)
        return torch.stack([self.net(9 * x) for _ in range(3)]).mean(0)


def _series() -> list[Wild]:
    def series(draw: Draw) -> Inputs:
        return (draw.floats(draw.length, 6),), {}

    def ltc() -> nn.Module:
        return First(_class("ncps.torch.LTC")(6, _class("ncps.wirings.AutoNCP")(10, 4)), 4)

    return [
        wild("further", "ncps CfC", lambda: First(_class("ncps.torch.CfC")(6, 8), 8), series),
        wild("further", "ncps CfC (memory)", lambda: First(_class("ncps.torch.CfC")(6, 8, mixed_memory=True), 8), series),
        wild("further", "ncps LTC", ltc, series),
        _one("pytorch-tcn TCN", lambda: _class("pytorch_tcn.TCN")(6, [8, 8, 8], dropout=0.0), 6, 16),
        _one("spikingjelly LIFNode", lambda: Spikes("LIFNode", v_threshold=0.2), 6),
        _one("spikingjelly ParametricLIFNode", lambda: Spikes("ParametricLIFNode", v_threshold=0.2), 6),
        _one("spikingjelly IFNode", lambda: Spikes("IFNode"), 6),
    ]  # fmt: skip


class Restored(nn.Module):
    """A picture made of another, and a criterion of image quality."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = (
            nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1)),
            loss,
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.net(x).sigmoid(), y)  # type: ignore[no-any-return]


class Clouds(nn.Module):
    """Points moved, and their distance from others."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.net(x), y).mean()  # type: ignore[no-any-return]


class Chosen(nn.Module):
    """Scores through a sparse softmax and a loss of them."""

    def __init__(self, sparse: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.first, self.sparse, self.last, self.loss = nn.Linear(6, 8), sparse, nn.Linear(8, 4), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.last(self.sparse(self.first(x))), y)  # type: ignore[no-any-return]


def _criteria() -> list[Wild]:
    def quality(kind: str, size: int = 32, **options: Any) -> Wild:
        def sample(draw: Draw) -> Inputs:
            return (draw.floats(3, size, size), draw.floats(3, size, size).sigmoid()), {}

        return wild(
            "further",
            f"piq {kind}",
            lambda: Restored(_class(f"piq.{kind}")(**options)),
            sample,
            loss=itself,
            inside=True,
            lengths=(8,),
        )

    def cloud(kind: str, **options: Any) -> Wild:
        def sample(draw: Draw) -> Inputs:
            return (draw.floats(7, 2), draw.floats(9, 2)), {}

        return wild(
            "further",
            f"geomloss {kind}",
            lambda: Clouds(_class("geomloss.SamplesLoss")(kind, backend="tensorized", **options)),
            sample,
            loss=itself,
            inside=True,
            lengths=(8,),
        )

    def chosen(name: str, sparse: str, loss: str) -> Wild:
        def sample(draw: Draw) -> Inputs:
            return (draw.floats(6), draw.ids(4)), {}

        return wild(
            "further",
            f"entmax {name}",
            lambda: Chosen(_class(f"entmax.{sparse}")(dim=-1), _class(f"entmax.{loss}")()),
            sample,
            loss=itself,
            inside=True,
            lengths=(8,),
        )

    return [
        quality("SSIMLoss", kernel_size=5), quality("VIFLoss", 48), quality("GMSDLoss"), quality("FSIMLoss"), quality("HaarPSILoss"),
        cloud("sinkhorn", blur=0.5), cloud("energy"), cloud("gaussian", blur=0.5),
        chosen("Sparsemax", "Sparsemax", "SparsemaxLoss"), chosen("Entmax15", "Entmax15", "Entmax15Loss"), chosen("EntmaxBisect", "EntmaxBisect", "EntmaxBisectLoss"),
    ]  # fmt: skip


class Process(nn.Module):
    """A variational Gaussian process behind a layer, with its bound as the loss."""

    def __init__(self) -> None:
        super().__init__()
        gp = import_module("gpytorch")

        class Surface(gp.models.ApproximateGP):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                points = torch.randn(5, 2)
                q = gp.variational.CholeskyVariationalDistribution(5)
                super().__init__(gp.variational.VariationalStrategy(self, points, q))
                self.mean_module, self.covar_module = (
                    gp.means.ConstantMean(),
                    gp.kernels.ScaleKernel(gp.kernels.RBFKernel()),
                )

            def forward(self, x: Tensor) -> Any:
                return gp.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

        self.net, self.process = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), Surface()
        self.likelihood = gp.likelihoods.GaussianLikelihood()
        self.bound = gp.mlls.VariationalELBO(self.likelihood, self.process, num_data=8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.bound(self.process(self.net(x)), y)  # type: ignore[no-any-return]


class Tensors(nn.Module):
    """Products of equivariant features."""

    def __init__(self) -> None:
        super().__init__()
        o3 = import_module("e3nn.o3")
        self.first = o3.Linear("4x0e + 2x1o", "4x0e + 2x1o")
        self.product = o3.FullyConnectedTensorProduct("4x0e + 2x1o", "4x0e + 2x1o", "4x0e + 2x1o")
        self.last = o3.Linear("4x0e + 2x1o", "3x0e")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.product(x, x))  # type: ignore[no-any-return]


def _others() -> list[Wild]:
    def graph() -> nn.Module:
        return _class("egnn_pytorch.EGNN_Network")(num_tokens=WORDS, dim=8, depth=2, num_nearest_neighbors=3)

    def points(draw: Draw) -> Inputs:
        return (draw.ids(WORDS, 6), draw.floats(6, 3)), {}

    def rows(draw: Draw) -> Inputs:
        return (draw.ids(4, 3), draw.floats(2)), {}

    def table(kind: str, **options: Any) -> Wild:
        return wild(
            "further",
            f"tab-transformer {kind}",
            lambda: _class(f"tab_transformer_pytorch.{kind}")(
                categories=(4, 4, 4), num_continuous=2, dim=8, depth=2, heads=2, **options
            ),
            rows,
            lengths=(8,),
        )

    return [
        wild("further", "egnn EGNN_Network", graph, points, lengths=(8,)), table("TabTransformer", mlp_act=nn.ReLU()), table("FTTransformer"),
        _one("siren SirenNet", lambda: _class("siren_pytorch.SirenNet")(6, 8, 3, num_layers=3), 6),
        wild("further", "gpytorch SVGP", Process, lambda draw: ((draw.floats(6), draw.floats()), {}), loss=itself, inside=True, lengths=(8,)),
        _one("e3nn products", Tensors, 10),
    ]  # fmt: skip
