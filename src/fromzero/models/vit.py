"""vit: images in, class scores or numbers out: cut into patches, which a transformer reads as the words of a sentence.

Dims: B batch, C channels, H height, W width, T tokens of an image (the class token and its patches), D width, K outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromzero.errors import ModelError, ShapeError
from fromzero.models.families import Config, Family, TensorMap

SIZES: dict[str, dict[str, int]] = {
    "vit-tiny": {"width": 192, "depth": 12, "heads": 3},  # arXiv:2012.12877 table 1
    "vit-small": {"width": 384, "depth": 12, "heads": 6},  # the same
    "vit-base": {"width": 768, "depth": 12, "heads": 12},  # arXiv:2010.11929 table 1
}
Pixel = float | Sequence[float]  # one number for all channels, or one for each
_KEYS: dict[str, tuple[str, Any]] = {  # option → key of a published config.json, and what transformers takes where it is not there
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "hidden": ("intermediate_size", 3072),
    "dropout": ("hidden_dropout_prob", 0.0),
    "eps": ("layer_norm_eps", 1e-12),
}


class ViT(nn.Module):
    """A class token and a token for each patch, with learned positions; `depth` transformer blocks; a head on the class token.

    patch:      height and width of a patch in pixels; must divide the image's
    hidden:     width of the hidden layer of a block; 4 · width if None
    dropout:    after every Linear but the one of queries, keys and values, and after the positions: appendix B.1.
                Attention weights get none
    mean, std:  of pixels in [0, 1]; 0.5 makes them [-1, 1], as Google's weights want

    source: arXiv:2010.11929 section 3.1. Matrices, class token and positions begin normal with spread 0.02, cut at twice that,
            as in arXiv:2012.12877 section 6; the first paper's code has 0.02 for the positions only
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: int,
        *,
        patch: int = 16,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        hidden: int | None = None,
        dropout: float = 0.0,
        eps: float = 1e-6,
        mean: Pixel = 0.5,
        std: Pixel = 0.5,
    ) -> None:
        super().__init__()
        if len(inputs) != 3:
            raise ValueError(f"vit takes images (channels, height, width); the data has inputs of shape {tuple(inputs)}")
        _, height, wide = inputs
        if patch < 1 or height % patch or wide % patch:
            fitting = [str(n) for n in range(2, 33) if gcd(height, wide) % n == 0]
            mend = f"give patch: {', '.join(fitting)}" if fitting else "give images of another size"
            raise ValueError(f"patches of {patch}×{patch} do not fill images of {height}×{wide}; {mend}")
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads do not share a width of {width} evenly; give heads: a divisor of it")
        self.embedding = Embedding(inputs, width, patch, dropout, mean, std)
        self.blocks = nn.ModuleList(Block(width, heads, hidden or 4 * width, dropout, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, outputs)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    @property
    def stages(self) -> tuple[str, ...]:
        return ("embedding", *(f"blocks.{i}" for i in range(len(self.blocks))), "norm", "head")

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) float in [0, 1].  returns: (B, K)  raises: ShapeError for images of another size than it was built for"""
        x = self.embedding(x)  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x[:, 0]))  # (B, D) → (B, K)
        return scores


class Embedding(nn.Module):
    """The class token, and one token a patch, row by row from the top left; to each its position is added."""

    mean: Tensor
    std: Tensor

    def __init__(self, inputs: Sequence[int], width: int, patch: int, dropout: float, mean: Pixel, std: Pixel) -> None:
        super().__init__()
        self.shape = channels, height, wide = tuple(inputs)
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (height // patch) * (wide // patch), width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) in [0, 1].  returns: (B, T, D)"""
        if tuple(x.shape[1:]) != self.shape:
            raise ShapeError(
                f"images of shape {tuple(x.shape[1:])} do not fit a vit built for {self.shape}",
                why="it has learned a position for each patch of these",
                mend=f"give it images of {self.shape[1]}×{self.shape[2]} (data.input: {{size: …, channels: …}})",
            )
        patches = self.patches((x - self.mean) / self.std).flatten(2).transpose(1, 2)  # (B, T - 1, D)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], dim=1)  # (B, T, D)
        embedded: Tensor = self.dropout(tokens + self.positions)
        return embedded


class Block(nn.Module):
    """x + attention of norm(x), then x + two Linears of norm(x) with GELU between."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D).  returns: the same shape"""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, D / heads) each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, D)
        x = x + self.dropout(self.out(mixed))
        inner = self.dropout(F.gelu(self.expand(self.norm2(x))))  # (B, T, hidden)
        after: Tensor = x + self.dropout(self.contract(inner))
        return after


def _build(config: Config, *, inputs: Sequence[int] | None = None, outputs: int | None = None, **options: Any) -> ViT:
    """options: others of ViT, such as mean and std for weights that want them.

    raises: ModelError where the config asks for what we do not compute
    """
    height, wide = _pair(config.get("image_size", 224))
    patch, across = _pair(config.get("patch_size", 16))
    act, bias = config.get("hidden_act", "gelu"), config.get("qkv_bias", True)
    if act != "gelu" or not bias or patch != across:
        said = f"hidden_act {act}, qkv_bias {bias}, patch_size {patch}×{across}"
        raise ModelError(f"a vit has gelu, biases and square patches here; its config.json has {said}", key="model")
    found = {ours: config.get(theirs, default) for ours, (theirs, default) in _KEYS.items()}
    labels = len(config.get("id2label") or ()) or int(config.get("num_labels", 2))
    return ViT(inputs or (config.get("num_channels", 3), height, wide), outputs or labels, **{"patch": patch, **found, **options})


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _names(config: Config, present: Collection[str]) -> TensorMap:
    """A bare ViTModel has no prefix and no head."""
    headed = "classifier.weight" in present if present else config.get("architectures") != ["ViTModel"]
    before = "vit." if any(name.startswith("vit.") for name in present) or (headed and not present) else ""
    kinds = ("weight", "bias")
    layers = {"embedding.patches": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    names: TensorMap = {}
    for index in range(config.get("num_hidden_layers", 12)):
        ours, theirs = f"blocks.{index}", f"encoder.layer.{index}"
        layers |= {f"{ours}.norm1": f"{theirs}.layernorm_before", f"{ours}.norm2": f"{theirs}.layernorm_after"}
        layers |= {f"{ours}.expand": f"{theirs}.intermediate.dense", f"{ours}.contract": f"{theirs}.output.dense"}
        layers |= {f"{ours}.out": f"{theirs}.attention.output.dense"}
        for kind in kinds:
            parts = tuple(f"{before}{theirs}.attention.attention.{part}.{kind}" for part in ("query", "key", "value"))
            names[f"{ours}.qkv.{kind}"] = (parts, "cat", (config.get("hidden_size", 768),) * 3)
    same = {f"{ours}.{kind}": f"{before}{theirs}.{kind}" for ours, theirs in layers.items() for kind in kinds}
    same |= {"embedding.token": f"{before}embeddings.cls_token", "embedding.positions": f"{before}embeddings.position_embeddings"}
    if headed:
        same |= {f"head.{kind}": f"classifier.{kind}" for kind in kinds}
    return names | {ours: ((theirs,), "same", ()) for ours, theirs in same.items()}


def written_vit(model: ViT) -> dict[str, Any]:
    """The config.json of such a model, however it was made; mean and std of its pixels belong into a preprocessor_config.json."""
    channels, height, width = model.embedding.shape
    first, outputs = model.blocks[0], model.head.out_features
    assert isinstance(first, Block)
    sizes = {"hidden_size": model.norm.normalized_shape[0], "num_hidden_layers": len(model.blocks), "num_attention_heads": first.heads}
    sizes |= {"intermediate_size": first.expand.out_features, "patch_size": model.embedding.patches.kernel_size[0]}
    shape = {"image_size": height if height == width else [height, width], "num_channels": channels}
    rest = {"layer_norm_eps": model.norm.eps, "hidden_dropout_prob": model.embedding.dropout.p, "hidden_act": "gelu", "qkv_bias": True}
    labels = {str(index): f"LABEL_{index}" for index in range(outputs)}
    return {"model_type": "vit", "architectures": ["ViTForImageClassification"], **sizes, **shape, **rest, "id2label": labels}


FAMILY = Family(build=_build, names=_names, ignored=("*pooler.dense.*",), reads="image")
