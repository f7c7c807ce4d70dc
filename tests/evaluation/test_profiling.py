"""Small nets cost what pencil and paper say, the paper's detectors what the paper says."""

import copy
from pathlib import Path

# before mmdet, which needs the operators of mmcv
from ldt.evaluation.profiling import (
    count_macs,
    count_parameters,
    latency,
)

# isort: split
import mmdet
import pytest
import torch
from torch import Tensor, nn

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"


class SharedHead(nn.Module):
    """One convolution with batch norm for two maps, as a detector's head has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(self.conv(x)), self.norm(self.conv(x[..., ::2, ::2]))


POSITIONS = 6 * 8
SMALL = {  # net, multiply-adds for an input of (2, 3, 6, 8)
    "conv": (nn.Conv2d(3, 8, 3, padding=1), 2 * 27 * 8 * POSITIONS),
    "stride": (nn.Conv2d(3, 8, 3, padding=1, stride=2), 2 * 27 * 8 * POSITIONS // 4),
    "groups": (nn.Conv2d(3, 6, 1, groups=3), 2 * 1 * 6 * POSITIONS),
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(3 * POSITIONS, 5)), 2 * 3 * POSITIONS * 5),
    "batch": (nn.BatchNorm2d(3), 2 * 2 * 3 * POSITIONS),
    "batch, not affine": (nn.BatchNorm2d(3, affine=False), 2 * 3 * POSITIONS),
    "group": (nn.GroupNorm(3, 3), 2 * 2 * 3 * POSITIONS),
    "layer": (nn.LayerNorm(8), 2 * 2 * 3 * POSITIONS),
    "layer, not affine": (nn.LayerNorm(8, elementwise_affine=False), 2 * 3 * POSITIONS),
    "free": (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)), 0),
    "shared": (SharedHead(), 2 * (27 + 2) * 8 * (POSITIONS + POSITIONS // 4)),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", SMALL)
def test_multiply_adds_of_small_nets(name, device):
    net, expected = SMALL[name]
    net = copy.deepcopy(net).to(device)
    assert count_macs(net, net, (2, 3, 6, 8)) == expected


def test_counting_leaves_the_net_as_it_was():
    net = SharedHead().train()
    net.norm.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = []
    count_macs(net, lambda x: (modes.append(net.training), net(x)), (2, 3, 6, 8))
    assert modes == [False]
    assert net.training
    assert net.conv.training
    assert not net.norm.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_counting_restores_the_mode_after_an_error():
    net = SharedHead().train()
    with pytest.raises(RuntimeError):
        count_macs(net, net, (1, 4, 6, 8))
    assert all(module.training for module in net.modules())


def test_counting_needs_a_batch_shape():
    net = SharedHead()
    with pytest.raises(ValueError, match="four positive sizes"):
        count_macs(net, net, (3, 6, 8))  # pyright: ignore[reportArgumentType]


def test_shared_parameters_count_once():
    layer = nn.Linear(4, 5)
    assert count_parameters(nn.Sequential(layer, layer)) == 25


def test_latency_runs_as_often_as_it_says():
    calls = []

    def forward() -> None:
        calls.append(torch.is_inference_mode_enabled())

    measured = latency(forward, runs=31, warmup=2, device="cpu")
    assert calls == [True] * 33
    assert 0 < measured.p10_ms <= measured.median_ms <= measured.p90_ms
    assert measured.threads == torch.get_num_threads()
    assert measured.device


@pytest.mark.slow
def test_latency_tells_slow_from_fast():
    x = torch.rand(300, 300)
    slow = latency(lambda: [x @ x for _ in range(20)], device="cpu")
    assert slow.median_ms > 2 * latency(lambda: x @ x, device="cpu").median_ms


@pytest.mark.parametrize(("runs", "warmup"), [(29, 5), (30, 0)])
def test_latency_refuses_a_rough_number(runs, warmup):
    with pytest.raises(ValueError, match="at least 30"):
        latency(lambda: None, runs=runs, warmup=warmup, device="cpu")
