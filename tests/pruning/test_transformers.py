"""Laws of pruning transformers: detectors with an encoder and a decoder, Swin and PVT."""

import ldt

# isort: split
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from pruned_files import data_of
from small import composed, prepared, random_channels
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm

from ldt.build import build_module
from ldt.criteria.base import score_groups
from ldt.criteria.ldt import LDTCriterion
from ldt.criteria.methods import find_method
from ldt.detectors import models
from ldt.detectors.adapter import Detector
from ldt.detectors.forward import eval_with_gradients, raw_forward
from ldt.detectors.models import PlainConfig, build, model_config
from ldt.evaluation.profiling import count_macs, count_parameters
from ldt.pruning import structure
from ldt.pruning.attention import PrunablePositions
from ldt.pruning.budget import select_channels
from ldt.pruning.costs import CostModel
from ldt.pruning.dependency import ChannelParameter
from ldt.pruning.graph import PruningGraph

SIZE = (64, 96)
RESNET = {"depth": 18, "base_channels": 8, "frozen_stages": -1}
TWO = {"encoder": {"num_layers": 2}, "decoder": {"num_layers": 2}}
LEVELS = {"backbone": RESNET, "neck": {"in_channels": [16, 32, 64]}, **TWO}
LEVEL = {"backbone": RESNET, "neck": {"in_channels": [64]}, **TWO}
SWIN = {"embed_dims": 24, "depths": [2, 2, 1, 1]}
DETRS: dict[str, tuple[str, dict[str, Any]]] = {
    "detr": ("detr/detr_r50_8xb2-150e_coco", LEVEL),
    "conditional": ("conditional_detr/conditional-detr_r50_8xb2-50e_coco", LEVEL),
    "dab": ("dab_detr/dab-detr_r50_8xb2-50e_coco", LEVEL),
    "deformable": ("deformable_detr/deformable-detr_r50_16xb2-50e_coco", LEVELS),
    "dino": ("dino/dino-4scale_r50_8xb2-12e_coco", LEVELS),
    "ddq": ("ddq/ddq-detr-4scale_r50_8xb2-12e_coco", LEVELS),
}
FPN = {"out_channels": 16}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (
        "swin/retinanet_swin-t-p4-w7_fpn_1x_coco",
        {"backbone": SWIN, "neck": {"in_channels": [48, 96, 192], **FPN}},
    ),
    "pvt": ("pvt/retinanet_pvt-t_fpn_1x_coco", {"neck": FPN}),
    "pvt_v2": ("pvt/retinanet_pvtv2-b0_fpn_1x_coco", {"neck": FPN}),
}
ALL = {**DETRS, **BACKBONES}


@cache
def config(name: str) -> PlainConfig:
    file, options = ALL[name]
    if name in BACKBONES:
        options = {**options, "bbox_head": {"in_channels": 16, "feat_channels": 16}}
    else:
        options = {**options, "num_queries": 12}
    return model_config(f"mmdet::{file}.py", options, 3, pretrained=False)


def detector(name: str) -> Detector:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(config(name)).eval()
    for parameter in model.parameters():  # heads start with zeros
        if float(parameter.detach().std(correction=0)) == 0:
            parameter.data += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    return Detector(model, SIZE)


def scope(name: str) -> list[str]:
    return ["backbone", "neck", *(["encoder", "decoder"] if name in DETRS else [])]


def traced(found: Detector, name: str) -> PruningGraph:
    with eval_with_gradients(found.model):
        return found.trace(scope(name))


def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(2))


def outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return raw_forward(model, images())


def masked_outputs(graph: PruningGraph, removed: dict[str, list[int]]) -> list[Tensor]:
    """Outputs with the removed channels 0 behind all layers that make them, and in no statistic."""
    dead: dict[nn.Module, set[int]] = {}
    for name, channels in removed.items():
        for member in graph.groups[name].members:
            if member.side != "in":
                own = zip(member.channels.tolist(), member.roots.tolist(), strict=True)
                gone = {channel for channel, root in own if root in channels}
                dead.setdefault(member.layer, set()).update(gone)

    def mask(layer: nn.Module) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            last = isinstance(layer, (nn.Linear, nn.LayerNorm))
            dim = output.ndim - 1 if last else 1
            kept = torch.tensor([c for c in range(output.shape[dim]) if c not in dead[layer]])
            whole = torch.zeros_like(output)
            part = output.index_select(dim, kept)
            if isinstance(layer, nn.LayerNorm):
                weight, bias = layer.weight[kept], layer.bias[kept]
                part = layer_norm(inputs[0][..., kept], weight.shape, weight, bias, layer.eps)
            if isinstance(layer, nn.GroupNorm):
                x, weight, bias = inputs[0][:, kept], layer.weight[kept], layer.bias[kept]
                part = group_norm(x, layer.num_groups, weight, bias, layer.eps)
            return whole.index_copy(dim, kept, part)

        return hook

    parameters = [layer for layer in dead if isinstance(layer, ChannelParameter)]
    before = [layer.values.detach().clone() for layer in parameters]
    hooks = [layer.register_forward_hook(mask(layer)) for layer in dead]
    for layer in parameters:
        layer.values.data.index_fill_(layer.dim, torch.tensor(sorted(dead[layer])).long(), 0)
    try:
        return outputs(graph.model)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, values in zip(parameters, before, strict=True):
            layer.values.data.copy_(values)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_prunable_layers_compute_what_mmdet_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = build(config(name)).eval()
    with monkeypatch.context() as patch:
        patch.setattr(models, "make_prunable", lambda _model: None)
        plain = build(config(name)).eval()
    ours.load_state_dict(plain.state_dict())  # under mmdet's names
    assert_equal(outputs(ours), outputs(plain))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_cutting_equals_masking_and_what_is_rebuilt(name: str) -> None:
    found = detector(name)
    graph = traced(found, name)
    share = 0.85 if name in DETRS else 0.5  # more at full size
    prunable, whole = graph.prunable_share()
    assert prunable >= share * whole
    removed = random_channels(graph, seed=0)
    before, masked = outputs(found.model), masked_outputs(graph, removed)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(before, masked, strict=True))
    graph.remove(removed)
    sliced = outputs(found.model)
    assert_equal(sliced, masked)
    state = found.model.state_dict()
    rebuilt = build(config(name), initialise=False).eval()
    structure.rebuild(rebuilt, structure.record(found.model), state)
    rebuilt.load_state_dict(state)
    assert all(map(torch.equal, outputs(rebuilt), sliced))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_what_is_saved_is_what_is_counted(name: str, budget: Any) -> None:
    found = detector(name)
    graph = traced(found, name)

    def count() -> int:
        if budget == "params":
            return count_parameters(found.model)
        return count_macs(found.model, found.raw_maps, (1, 3, *SIZE))

    before, costs = count(), CostModel(graph, budget)
    scores = {n: torch.rand(g.size).double() for n, g in graph.groups.items()}
    chosen = select_channels(graph, scores, costs, save=0.3 * before, tolerance=0.005 * before)
    told = costs.saved(chosen)
    graph.remove(chosen)
    assert before - count() == pytest.approx(told, rel=1e-3)
    assert 1 - count() / before == pytest.approx(0.3, abs=0.006)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr", "conditional", "dino", "swin", "pvt"])
def test_a_pruned_transformer_trains(name: str) -> None:
    found = detector(name)
    graph = traced(found, name)
    graph.remove(random_channels(graph, seed=1))
    found.model.train()
    batch = prepared(2, SIZE, torch.Generator().manual_seed(0))
    found.losses(batch)[0].backward()
    gradients = [p.grad for p in found.model.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(g.isfinite().all()) for g in gradients)


CRITERIA = ("ldt", "group_fisher", "chip", "hrank", "px", "taylor", "obd")
WEIGHTS = ("l1", "l2", "lamp", "fpgm", "random")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr", "deformable", "swin", "pvt"])
@pytest.mark.parametrize("criterion", [*CRITERIA, *WEIGHTS])
def test_every_criterion_scores_or_abstains(name: str, criterion: str) -> None:
    found = detector(name)
    generator = torch.Generator().manual_seed(0)
    batches = [prepared(n, SIZE, generator) for n in (3, 2)]
    with eval_with_gradients(found.model):
        graph = found.trace(scope(name))
        whole = set(graph.groups)
        scores = score_groups(find_method(criterion).criterion, found, graph, batches)
    assert scores
    assert set(scores) == set(graph.groups) <= whole
    for group, own in scores.items():
        assert own.shape == (graph.groups[group].size,)
        assert bool(own.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr", "deformable"])
def test_ldt_traces_the_output_of_an_encoder(name: str) -> None:
    found = detector(name)
    found = Detector(found.model, SIZE, neck="encoder")
    generator = torch.Generator().manual_seed(0)
    batches = [prepared(n, SIZE, generator) for n in (3, 2)]
    with eval_with_gradients(found.model):
        graph = found.trace(scope(name))
        maps = found.features(batches[0])
        score_groups(criterion := LDTCriterion(), found, graph, batches)
    assert all(m.ndim == 4 and m.shape[1] == 256 for m in maps)
    reached = {name for name, layer in graph.scored.items() if criterion.batch_scores[layer]}
    assert any(layer.startswith("encoder") for layer in reached)


def test_positions_keep_what_the_tokens_keep() -> None:
    found = detector("detr")
    graph = traced(found, "detr")
    (group,) = [g for g in graph.groups.values() if g.holds(PrunablePositions)]
    graph.remove({group.name: [0, 5]})
    positions: Any = found.model.positional_encoding
    kept = [c for c in range(256) if c not in (0, 5)]
    assert positions.kept.tolist() == kept
    assert found.model.embed_dims == 254


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["detr/detr_r50_8xb2-150e_coco", "deformable_detr/deformable-detr_r50_16xb2-50e_coco"]
)
def test_a_checkpoint_is_opened_with_equal_outputs(family: str, tmp_path: Path) -> None:
    options = ["detector=mmdet", f"detector.config=mmdet::{family}.py", "run_name=x"]
    options += ["recipe=short", "detector.pretrained=false", "+detector.options.num_queries=12"]
    given = composed(*options)
    plain: Any = OmegaConf.to_container(given, resolve=True)
    module = build_module(given, plain, data_of(tmp_path))
    with eval_with_gradients(module.detector):
        graph = module.adapter.trace(["backbone", "neck", "encoder", "decoder"])
        graph.remove(random_channels(graph, seed=0))
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "pruned.ckpt")
    opened = ldt.load_pruned(tmp_path / "pruned.ckpt").eval()
    assert all(map(torch.equal, outputs(opened), outputs(module.detector.eval())))
