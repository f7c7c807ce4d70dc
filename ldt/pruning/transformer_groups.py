"""The coupled groups inside transformer layers, which their classes tell without tracing.

The hidden units of a feed-forward network are one group. Of an attention layer the widths of the
queries and keys are one, and those of the values another; every head loses as many channels. What
lies within a group is closed: it reads the layer's input, and another layer reads its output.

The tokens of a DETR-like detector have one width from the neck to its heads: what they are added to
and read by is one further group (:func:`token_group`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mmcv.cnn.bricks.transformer import FFN
from mmcv.ops import MultiScaleDeformableAttention
from torch import nn

from ldt.config.names import below
from ldt.pruning.attention import (
    PrunableConditionalAttention,
    PrunablePositions,
    SplitProjections,
    embedding_width,
)
from ldt.pruning.layer_types import Side


@dataclass(frozen=True)
class InnerGroup:
    """Layers that share channels within a transformer layer; channel c of each is the group's c.

    Attributes:
        producers: names of the layers whose outputs they are; the first is the root.
        consumers: names of the layers that read them.
        parts: heads, which lose equally many channels.
        products: for a producer, how many products of queries and keys, or of attention weights
            and values, each of its channels takes part in.
        core: name of the module that computes these.
        tokens: names of producers whose outputs belong to positions of feature maps even in a
            decoder.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...] = ()
    parts: int = 1
    products: Mapping[str, int] = field(default_factory=dict)
    core: str = ""
    tokens: frozenset[str] = frozenset()


def inner_groups(model: nn.Module) -> list[InnerGroup]:
    """Return the groups within all transformer layers of a model."""
    names = {module: name for name, module in model.named_modules()}
    found: list[InnerGroup] = []
    for module, name in names.items():
        if isinstance(module, FFN):
            found += _hidden_units(module, names)
        elif isinstance(module, SplitProjections):
            found += _heads(name, module)
        elif isinstance(module, PrunableConditionalAttention):
            found += _conditional_heads(name, module)
        elif isinstance(module, MultiScaleDeformableAttention):
            value = f"{name}.value_proj"
            consumers = (f"{name}.output_proj",)
            found.append(
                InnerGroup((value,), consumers, module.num_heads, tokens=frozenset([value]))
            )
    return found


def _hidden_units(network: Any, names: Mapping[nn.Module, str]) -> Iterator[InnerGroup]:
    layers = [names[m] for m in network.layers.modules() if isinstance(m, nn.Linear)]
    for one, other in pairwise(layers):
        yield InnerGroup((one,), (other,))


def _heads(name: str, module: Any) -> Iterator[InnerGroup]:
    q, k, v = (f"{name}.{own}" for own in ("q", "k", "v"))
    heads, core, tokens = module.products.num_heads, f"{name}.products", frozenset([k, v])
    yield InnerGroup((q, k), (), heads, {q: 1}, core, tokens)
    yield InnerGroup((v,), (f"{name}.{module.output}",), heads, {v: 1}, core, tokens)


def _conditional_heads(name: str, module: PrunableConditionalAttention) -> Iterator[InnerGroup]:
    content = [f"{name}.{side}content_proj" for side in "qk"]
    sine = [f"{name}.qpos_sine_proj"] if module.cross_attn else []
    q_place, k_place, v = (f"{name}.{own}" for own in ("qpos_proj", "kpos_proj", "v_proj"))
    heads, core = module.products.num_heads, f"{name}.products"
    tokens = frozenset([content[1], k_place, v]) if module.cross_attn else frozenset()
    if module.adds_places:
        added = (*content, q_place, k_place, *sine)
        yield InnerGroup(added, (), heads, {added[0]: 1 + module.cross_attn}, core, tokens)
    else:
        yield InnerGroup(tuple(content), (), heads, {content[0]: 1}, core, tokens)
        yield InnerGroup((*sine, k_place), (), heads, {sine[0]: 1}, core, tokens)
    yield InnerGroup((v,), (f"{name}.out_proj",), heads, {v: 1}, core, tokens)


@dataclass(frozen=True)
class TokenSide:
    """A side of a layer, or a parameter, with all channels of the tokens.

    Attributes:
        name: of the layer or of the parameter.
        side: as of a :class:`~ldt.pruning.coupled_groups.Member`.
        copies: it has the channels this many times, one after the other.
    """

    name: str
    side: Side
    copies: int = 1


# sides whose width is that of positions of reference points, of sampled points or of predictions
FIXED_INPUTS = ("qpos_sine_proj", "pos_trans_fc")
FIXED_OUTPUTS = ("sampling_offsets", "attention_weights")
SCALES = "decoder.query_scale"  # of encoded reference points
OUTSIDE = ("backbone", "neck", "bbox_head", "data_preprocessor")


def token_group(model: Any) -> list[TokenSide]:
    """Return where the channels of tokens are behind the neck of a DETR-like detector.

    Empty if it has no such tokens, or position encodings that are learnt.
    """
    encoder = getattr(model, "encoder", None)
    if not hasattr(encoder, "layers") or not isinstance(
        getattr(model, "positional_encoding", None), PrunablePositions
    ):
        return []
    width, inner = embedding_width(model), inner_groups(model)
    made = {name for group in inner for name in group.producers}
    read = {name for group in inner for name in group.consumers}
    found = [TokenSide("positional_encoding", "both")]
    scales = _last_of_scales(model)
    for name, module in model.named_modules():
        if below(name, OUTSIDE):
            continue
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            reads = name not in read and last not in FIXED_INPUTS
            makes = name not in made and last not in FIXED_OUTPUTS and name != scales
            if reads and module.in_features == width:  # twice as many: encoded boxes
                found.append(TokenSide(name, "in"))
            found += _side(name, "out", module.out_features, width) if makes else []
        elif isinstance(module, nn.LayerNorm):
            found += _side(name, "both", module.normalized_shape[0], width)
        elif isinstance(module, nn.Embedding) and name != SCALES:
            found += _side(f"{name}.weight", "both", module.weight.shape[1], width)
    if hasattr(model, "level_embed"):
        found.append(TokenSide("level_embed", "both"))
    return found + [TokenSide(name, "in") for name in _head_inputs(model.bbox_head)]


def _side(name: str, side: Side, size: int, width: int) -> list[TokenSide]:
    copies = {width: 1, 2 * width: 2}.get(size)
    return [TokenSide(name, side, copies)] if copies else []


def _last_of_scales(model: nn.Module) -> str:
    """Return the name of the last layer that scales encoded reference points, if there is one."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return next((name for name in reversed(layers) if below(name, [SCALES])), "")


def _head_inputs(head: nn.Module) -> Iterator[str]:
    """Yield the layers of a head that read tokens: the first one of each branch."""
    seen = set()
    for name, module in head.named_modules(prefix="bbox_head"):
        parts = name.split(".")
        branch = tuple(parts[: 3 if parts[1:2] and parts[1].endswith("branches") else 2])
        if isinstance(module, nn.Linear) and branch not in seen:
            seen.add(branch)
            if name != "bbox_head.fc_reg" or not hasattr(head, "reg_ffn"):
                yield name
