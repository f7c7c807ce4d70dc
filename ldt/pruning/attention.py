"""Attention layers whose widths per head can be pruned, in place of those of torch and mmdet.

A head's queries and keys keep one width and its values another; all heads of a layer lose the same
number of channels. torch's :class:`nn.MultiheadAttention` and Swin's window attention store the
three projections in one tensor of three equal parts. :func:`make_prunable` replaces them by layers
with a projection each, which compute the same; files with the former tensors still load. The
scale of the products remains that of the unpruned heads. Position encodings, which are computed,
remember which channels are left of them.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmdet.models.backbones.swin import WindowMSA
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.models.layers import CdnQueryGenerator, SinePositionalEncoding
from mmdet.models.layers.transformer.utils import ConditionalAttention
from torch import Tensor, nn

PROJECTIONS = ("q", "k", "v")


class Products(nn.Module):
    """The two matrix products of attention, softmax(scale q k^T + bias) v, for each head."""

    def __init__(self, num_heads: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.drop = nn.Dropout(dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return [N, queries, width of v]; all inputs are [N, tokens, width]."""
        q, k, v = (self.heads(x).transpose(1, 2) for x in (q, k, v))
        weights = (q * self.scale) @ k.transpose(2, 3)  # explicit: FLOP counters see it
        if bias is not None:
            weights = weights + bias
        return (self.drop(weights.softmax(-1)) @ v).transpose(1, 2).flatten(2)

    def heads(self, x: Tensor) -> Tensor:
        """View [N, tokens, width] as [N, tokens, heads, width of a head]."""
        return x.unflatten(2, (self.num_heads, -1))

    def bias(self, q: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Return what is added to the products for masks as torch has them; None without any.

        Args:
            q: the queries.
            mask: [queries, keys] or [N * heads, queries, keys].
            padding: [N, keys].
        """
        found = None if padding is None else _additive(padding, q)[:, None, None]
        if mask is not None:
            own = _additive(mask, q)
            own = own.unflatten(0, (-1, self.num_heads)) if own.ndim == 3 else own
            found = own if found is None else found + own
        return found


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers to add, -inf where a boolean one is True."""
    if mask.is_floating_point():
        return mask.to(like)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask.bool(), -torch.inf)


class SplitProjections(nn.Module):
    """A layer with the projections ``q``, ``k`` and ``v``, which once were parts of one tensor.

    Attributes:
        fused: prefix of the names of the former tensors.
        output: name of the layer that reads all heads.
    """

    fused: str
    output: str
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        split_projections(state_dict, prefix, self.fused)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _adopt(self, fused: Mapping[str, Tensor], trained: bool) -> None:
        """Create the projections from the tensors ``weight`` and, where there is one, ``bias``."""
        weight, bias = fused["weight"], fused.get("bias")
        for name, own in zip(PROJECTIONS, weight.detach().chunk(3), strict=True):
            layer = nn.Linear(own.shape[1], own.shape[0], bias is not None, device="meta")
            layer.weight = nn.Parameter(own.clone(), requires_grad=trained)
            setattr(self, name, layer)
            if bias is not None:
                part = bias.detach().chunk(3)[PROJECTIONS.index(name)]
                layer.bias = nn.Parameter(part.clone(), requires_grad=trained)


class PrunableAttention(SplitProjections):
    """Compute what a :class:`nn.MultiheadAttention` computes; returns no attention weights."""

    fused, output = "in_proj_", "out_proj"

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.batch_first = attention.batch_first
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        fused = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        self._adopt(fused, weight.requires_grad)
        self.out_proj = attention.out_proj
        scale = attention.head_dim**-0.5
        self.products = Products(attention.num_heads, scale, attention.dropout)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Return the output, in the order of dimensions of the input, and None."""
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.q(query), self.k(key), self.v(value)
        out = self.out_proj(
            self.products(q, k, v, self.products.bias(q, attn_mask, key_padding_mask))
        )
        return out if self.batch_first else out.transpose(0, 1), None


class PrunableWindowAttention(SplitProjections):
    """Compute what Swin's :class:`WindowMSA` computes."""

    fused, output = "qkv.", "proj"
    relative_position_index: Tensor

    def __init__(self, attention: WindowMSA) -> None:
        super().__init__()
        qkv = attention.qkv
        self._adopt(dict(qkv.named_parameters()), qkv.weight.requires_grad)
        self.proj, self.proj_drop = attention.proj, attention.proj_drop
        self.relative_position_bias_table = attention.relative_position_bias_table
        index = cast(Tensor, attention.relative_position_index)
        self.register_buffer("relative_position_index", index)
        self.products = Products(attention.num_heads, attention.scale, attention.attn_drop.p)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the output for windows [windows, tokens, width]; ``mask`` repeats in images."""
        tokens = x.shape[1]
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(1, tokens, tokens, -1).permute(0, 3, 1, 2)
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        return self.proj_drop(self.proj(self.products(self.q(x), self.k(x), self.v(x), bias)))


class PrunableConditionalAttention(ConditionalAttention):
    """Conditional DETR's attention, whose contents and positions may have unequal widths."""

    products: Products
    output = "out_proj"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        query_pos: Tensor | None = None,
        ref_sine_embed: Tensor | None = None,
        key_pos: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_first: bool = False,
    ) -> Tensor:
        """Return the output, [N, queries, width], with the query added."""
        if not self.cross_attn:
            key, key_pos = query, query_pos
        q, k, v = self.qcontent_proj(query), self.kcontent_proj(key), self.v_proj(key)
        places = self.kpos_proj(key_pos)
        if not self.cross_attn or is_first or self.keep_query_pos:
            q, k = q + self.qpos_proj(query_pos), k + places
        if self.cross_attn:
            q, k = self._beside(q, self.qpos_sine_proj(ref_sine_embed)), self._beside(k, places)
        bias = self.products.bias(q, attn_mask, key_padding_mask)
        return query + self.proj_drop(self.out_proj(self.products(q, k, v, bias)))

    def _beside(self, content: Tensor, places: Tensor) -> Tensor:
        """Concatenate the widths of every head."""
        return torch.cat([self.products.heads(x) for x in (content, places)], 3).flatten(2)

    @property
    def adds_places(self) -> bool:
        """Whether the positions are added to the contents, so that their widths are equal."""
        return getattr(self, "qpos_proj", None) is not None


class PrunablePositions(SinePositionalEncoding):
    """A position encoding of which only the channels ``kept`` are returned."""

    kept: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return [N, channels, h, w]."""
        return super().forward(*args, **kwargs)[:, self.kept]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}kept", torch.arange(2 * self.num_feats))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def make_prunable(model: nn.Module) -> None:
    """Replace the attention layers of a model by equal ones whose widths can be pruned, in place.

    Layers that are prunable already stay.
    """
    for module in list(model.modules()):
        if isinstance(module, ConditionalAttention) and type(module) is ConditionalAttention:
            width = module.embed_dims * (2 if module.cross_attn else 1) // module.num_heads
            products = Products(module.num_heads, width**-0.5, module.attn_drop.p)
            module.__class__ = PrunableConditionalAttention
            module.add_module("products", products)
        if type(module) is SinePositionalEncoding:
            like = next(model.parameters())
            module.__class__ = PrunablePositions
            module.register_buffer("kept", torch.arange(2 * module.num_feats, device=like.device))
        for name, child in module.named_children():
            if type(child) is WindowMSA:
                setattr(module, name, PrunableWindowAttention(child))
            elif isinstance(module, MultiheadAttention) and _separable(child):
                setattr(module, name, PrunableAttention(cast(nn.MultiheadAttention, child)))


def _separable(attention: nn.Module) -> bool:
    """Return whether it is an attention layer of torch with three projections of one width."""
    if type(attention) is not nn.MultiheadAttention or attention.in_proj_weight is None:
        return False
    return attention.bias_k is None and not attention.add_zero_attn


def split_projections(values: dict[str, Tensor], prefix: str, fused: str) -> None:
    """Replace the tensors of three projections by those of each, in place.

    Args:
        values: a state dict.
        prefix: of the layer's names in it.
        fused: of the former names in the layer.
    """
    for kind in ("weight", "bias"):
        both = values.pop(f"{prefix}{fused}{kind}", None)
        if both is not None:
            for name, own in zip(PROJECTIONS, both.chunk(3), strict=True):
                values[f"{prefix}{name}.{kind}"] = own


def upgraded(
    model: nn.Module, structure: Mapping[str, dict[str, int]], state: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, int]], dict[str, Tensor]]:
    """Return a structure and a state dict with the present names of projections.

    Args:
        model: as its config builds it.
        structure: a record of :mod:`ldt.pruning.structure`, perhaps of an earlier version.
        state: a state dict that belongs to it.
    """
    sizes, values = dict(structure), dict(state)
    for name, module in model.named_modules():
        if isinstance(module, SplitProjections):
            split_projections(values, f"{name}.", module.fused)
            whole = sizes.pop(f"{name}.{module.fused.rstrip('.')}", None)
            if whole is not None:
                third = {**whole, "out_features": whole["out_features"] // 3}
                sizes.update({f"{name}.{own}": third for own in PROJECTIONS})
        if isinstance(module, PrunablePositions):
            values.setdefault(f"{name}.kept", module.kept)
    return sizes, values


def update_embedding_widths(model: nn.Module) -> None:
    """Update what detectors remember of the width of their embeddings, after pruning."""
    for module in model.modules():
        known: Any = module
        if isinstance(module, nn.Embedding):
            known.embedding_dim = module.weight.shape[1]
        if isinstance(module, CdnQueryGenerator):
            known.embed_dims = known.label_embedding.weight.shape[1]
        if isinstance(module, DetectionTransformer) and hasattr(module, "encoder"):
            known.embed_dims = embedding_width(module)


def embedding_width(detector: Any) -> int:
    """Return the width of the tokens of a detector with a transformer behind its neck."""
    return detector.encoder.layers[0].norms[0].weight.shape[0]
