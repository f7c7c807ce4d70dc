"""Laws of the structure record: a cut network comes back bit by bit from plain data."""

import io
import json
from typing import Any

import pytest
import torch
from small import REAL, SMALL, case, random_channels
from torch import nn

from ldt.pruning.structure import SIZES, apply_changes, changes, channels, rebuild, record


def on_disk(value: Any) -> Any:
    """What comes back from a file that is read without trusting it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def sizes(model: nn.Module) -> dict[str, Any]:
    """Every size and shape that a network knows of itself, without the record's help."""
    found: dict[str, Any] = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if not list(module.children()):
            keys = (*SIZES, "normalized_shape")
            found[name] = {key: getattr(module, key) for key in keys if hasattr(module, key)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_a_cut_network_is_rebuilt_bit_by_bit(name: str) -> None:
    subject, fresh = case(name), case(name, seed=2)
    graph = subject.graph()
    graph.remove(random_channels(graph, seed=0))
    kept = on_disk({"structure": record(subject.model), "state": subject.model.state_dict()})
    assert kept["structure"] == record(subject.model)

    rebuild(fresh.model, kept["structure"], kept["state"])
    fresh.model.load_state_dict(kept["state"], strict=True)
    assert sizes(fresh.model) == sizes(subject.model)
    images = subject.batches[0].images
    for one, other in zip(subject.outputs(images), fresh.outputs(images), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, "gfl_tiny", "yolox_nano"])
def test_what_changed_is_enough_to_rebuild_and_nothing_where_nothing_was_cut(name: str) -> None:
    subject, fresh = case(name), case(name, seed=2)
    model = subject.model
    assert changes(fresh.model, record(model), model.state_dict()) == ({}, {})
    graph = subject.graph()
    graph.remove(random_channels(graph, seed=0))
    told = changes(fresh.model, record(model), model.state_dict())
    assert 0 < len(told[0]) <= len(record(model))
    assert json.loads(json.dumps(told)) == list(told)  # plain data

    apply_changes(fresh.model, *told)
    fresh.model.load_state_dict(model.state_dict(), strict=True)
    assert sizes(fresh.model) == sizes(model)


def test_a_rebuilt_network_can_be_cut_again() -> None:
    subject, fresh = case("upsampling"), case("upsampling", seed=2)
    graph = subject.graph()
    graph.remove(random_channels(graph, seed=0))
    rebuild(fresh.model, record(subject.model), subject.model.state_dict())
    fresh.model.load_state_dict(subject.model.state_dict())
    for each in (subject, fresh):
        again = each.graph()
        again.remove(random_channels(again, seed=1))
    images = subject.batches[0].images
    assert torch.equal(subject.outputs(images)[0], fresh.outputs(images)[0])


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_the_record_is_plain_data(name: str) -> None:
    for layer, found in record(case(name).model).items():
        assert type(layer) is str
        assert all(type(key) is str and type(value) is int for key, value in found.items())


def test_an_uncut_network_stays_as_it_is() -> None:
    subject = case("residual")
    before = dict(subject.model.named_parameters())
    rebuild(subject.model, record(subject.model), subject.model.state_dict())
    assert all(before[name] is p for name, p in subject.model.named_parameters())


def test_flags_survive() -> None:
    subject, fresh = case("chain"), case("chain", seed=2)
    graph = subject.graph()
    graph.remove({group: [0, 1] for group in graph.groups})
    fresh.model.backbone.requires_grad_(False)
    rebuild(fresh.model, record(subject.model), subject.model.state_dict())
    frozen = {n for n, p in fresh.model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in fresh.model.named_parameters() if n.startswith("backbone")}


def test_the_record_of_another_network_is_refused() -> None:
    pyramid, chain = case("pyramid").model, case("chain").model
    with pytest.raises(ValueError, match=r"'backbone\.0\.0\.0'.*another detector"):
        rebuild(pyramid, record(chain), chain.state_dict())


def test_a_layer_cannot_grow() -> None:
    model = case("chain").model
    structure = record(model)
    structure["neck.0"]["out_channels"] += 1
    with pytest.raises(ValueError, match=r"out_channels=11 for 'neck\.0', where .* has 10"):
        rebuild(model, structure, model.state_dict())


@pytest.mark.parametrize("shape", [(11, 12, 3, 3), (10, 12, 1, 1), (10, 12)])
def test_a_tensor_cannot_grow_or_change_its_kernel(shape: tuple[int, ...]) -> None:
    model = case("chain").model
    state = {**model.state_dict(), "neck.0.weight": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"'neck\.0\.weight'.*another detector"):
        rebuild(model, record(model), state)


def test_a_missing_tensor_is_named() -> None:
    model = case("chain").model
    state = {k: v for k, v in model.state_dict().items() if k != "neck.0.bias"}
    with pytest.raises(ValueError, match=r"no tensor 'neck\.0\.bias'"):
        rebuild(model, record(model), state)


def test_channels_are_those_of_convolutions_and_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    assert channels(record(model)) == {"0": 8, "3": 2}
