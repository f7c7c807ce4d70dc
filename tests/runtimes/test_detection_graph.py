"""A detector as a graph detects what mmdet detects, and nothing is changed by making one."""

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import case, random_channels
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from ldt.detectors.fixed_shapes import fixed_shapes
from ldt.detectors.forward import eval_with_gradients, one_image
from ldt.runtimes import detection_graph as graphs
from ldt.runtimes.detection_graph import DetectionGraph, RawGraph, to_onnx
from ldt.runtimes.parity import Differences, Found, compare, detected, of_outputs
from ldt.runtimes.sessions import F32

pytest.importorskip("onnxruntime")
SIZE, MOST = (70, 100), 50
OFTEN = settings(max_examples=15, deadline=None, database=None)


def detector_of(name: str, cut: bool = False, threshold: float | None = None) -> Any:
    """One of mmdet's with random norms, and a threshold that half of its boxes pass."""
    detector = case(name).target
    if cut:
        with eval_with_gradients(detector.model):
            found = detector.trace(["backbone", "neck"])
            found.remove(random_channels(found, seed=0))
    settings: Any = detector.model.bbox_head.test_cfg
    settings.score_thr = 0.0
    with torch.no_grad():
        scores = detected(detector, images(1)[0], 10_000).scores
    settings.score_thr = float(np.median(scores)) if threshold is None else threshold
    return detector


def images(count: int = 3, size: tuple[int, int] = SIZE) -> list[Tensor]:
    """Pixels with squares in them."""
    generator = torch.Generator().manual_seed(7)
    found = torch.randint(0, 256, (count, 1, 3, *size), generator=generator).float()
    for index in range(count):
        found[index, :, index % 3, 10 : 40 + index, 5 : 30 + 9 * index] = 250
    return list(found)


def ordered(found: Found) -> Found:
    """Detections in an order that does not depend on that of equal scores."""
    order = np.lexsort((*found.boxes.T, found.labels, found.scores))
    return Found(found.boxes[order], found.scores[order], found.labels[order])


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["gfl_tiny", "yolox_nano", "retinanet"])
def test_the_graph_finds_what_mmdet_finds_bit_for_bit(name, cut):
    detector = detector_of(name, cut)
    for image in images():
        with torch.no_grad():
            expected = detected(detector, image, MOST)
            found = of_outputs([
                each.numpy() for each in DetectionGraph(detector, SIZE, MOST, None)(image)
            ])  # fmt: skip
        assert len(expected.scores) > 0
        for mine, theirs in zip(ordered(expected), ordered(found), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any) -> dict[str, Path]:
    """Files of one detector: detections and raw maps."""
    folder = tmp_path_factory.mktemp("files")
    detector = detector_of("gfl_tiny", cut=True)
    return {
        "boxes": to_onnx(detector, folder / "boxes.onnx", SIZE, raw=False, most=MOST),
        "raw": to_onnx(detector, folder / "raw.onnx", SIZE),
    }


class Opened:
    """A file without metadata in a runtime."""

    def __init__(self, file: Path, runtime: str, outputs: str) -> None:
        self.about: Any = type("About", (), {})()
        self.about.outputs, self.about.shape = outputs, SIZE
        self.about.max_detections, self.about.threshold = MOST, None
        if runtime == "onnxruntime":
            import onnxruntime

            session = onnxruntime.InferenceSession(file)
            self.run = lambda image: session.run(None, {"image": image})
        else:
            sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
            import openvino

            compiled = openvino.Core().compile_model(file, "CPU", F32)
            self.run = lambda image: list(compiled([image]).to_tuple())

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        return self.run(image)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("outputs", ["boxes", "raw"])
def test_a_file_computes_what_the_detector_computes(written, runtime, outputs):
    kind = "raw" if outputs == "raw" else "detections"
    opened: Any = Opened(written[outputs], runtime, kind)
    detector = detector_of("gfl_tiny", cut=True)
    differences = compare(detector, opened, images(4))  # exported with an image of zeros
    assert differences.small
    assert differences.images == 4
    assert (differences.boxes > 0) == (kind == "detections")
    if kind == "detections":
        assert [output.shape for output in opened(images(1)[0].numpy())] == [
            (1, MOST, 4),
            (1, MOST),
            (1, MOST),
        ]


@pytest.mark.slow
def test_an_image_without_objects_has_none_in_a_file_either(tmp_path):
    detector = detector_of("gfl_tiny", threshold=1.0)
    opened = Opened(to_onnx(detector, tmp_path / "a.onnx", SIZE, raw=False), "onnxruntime", "")
    boxes, scores, labels = opened(images(1)[0].numpy())
    assert not boxes.any()
    assert not scores.any()
    assert (labels == -1).all()


def snapshot(detector: Any) -> dict[str, Any]:
    """What exporting might leave changed: functions of libraries, modes, weights, settings."""
    held = {
        f"{name}.{key}": id(value)
        for name, module in list(sys.modules.items())
        if name.startswith(("mmdet", "mmcv", "torch.onnx", "torchvision"))
        for key, value in list(vars(module).items())
        if callable(value)
    }
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    return {
        "held": held | {"extractor": id(SingleRoIExtractor.forward)},
        "modes": [module.training for module in detector.model.modules()],
        "settings": deepcopy(detector.model.bbox_head.test_cfg.to_dict()),
        "grad": [parameter.requires_grad for parameter in detector.model.parameters()],
        "enabled": torch.is_grad_enabled(),
        "weights": {key: value.clone() for key, value in detector.model.state_dict().items()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_exporting_leaves_everything_as_it_was(fails, tmp_path, monkeypatch):
    detector = detector_of("gfl_tiny")
    detector.model.train()
    detector.model.backbone.eval()
    to_onnx(detector, tmp_path / "first.onnx", SIZE, raw=False)  # imports what it needs
    before = snapshot(detector)
    if fails:
        monkeypatch.setattr(graphs.F, "pad", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            to_onnx(detector, tmp_path / "a.onnx", SIZE, raw=False, most=500)
        monkeypatch.undo()
    else:
        to_onnx(detector, tmp_path / "a.onnx", SIZE, raw=False)
    after = snapshot(detector)
    weights = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


class Deform(nn.Module):
    """A deformable convolution as mmcv's modules call it."""

    def __init__(self, weight: Tensor, options: dict[str, Any]) -> None:
        super().__init__()
        self.weight, self.options = weight, options

    def forward(self, maps: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        from mmcv.ops import modulated_deform_conv

        return modulated_deform_conv.modulated_deform_conv2d(
            maps, offset, mask, self.weight, None, *self.options.values()
        )


@pytest.mark.slow
@OFTEN
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    deform_groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 100),
)
def test_a_traced_deformable_convolution_is_torchvisions(
    kernel, stride, padding, dilation, groups, deform_groups, seed
):
    torch.manual_seed(seed)
    height, width = 9, 11
    weight = torch.randn(6, 4 // groups, *kernel)
    sides = [
        (side + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for side, k in zip((height, width), kernel, strict=True)
    ]
    taps = kernel[0] * kernel[1]

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.randn(1, 4, height, width),
            3 * torch.randn(1, 2 * taps * deform_groups, *sides),
            torch.rand(1, taps * deform_groups, *sides),
        )

    options = {"stride": stride, "padding": padding, "dilation": dilation}
    module = Deform(weight, {**options, "groups": groups, "deform_groups": deform_groups})
    with fixed_shapes(1), torch.no_grad():
        traced = torch.jit.trace(module, inputs(), check_trace=False)
    maps, offset, mask = inputs()
    expected = deform_conv2d(maps, offset, weight, None, stride, padding, dilation, mask)
    torch.testing.assert_close(traced(maps, offset, mask), expected, rtol=1e-4, atol=1e-4)


def found(*rows: tuple[float, float, int]) -> Found:
    """Detections from left edge, score and label; boxes are 10 pixels wide."""
    left = np.array([row[0] for row in rows], np.float32)
    boxes = np.stack([left, left, left + 10, left + 10], 1)
    return Found(boxes, np.array([row[1] for row in rows]), np.array([row[2] for row in rows]))


@pytest.mark.parametrize(
    ("other", "small"),
    [
        (found((0, 0.9, 0), (50, 0.5, 0), (20, 0.5, 1)), True),
        (found((0, 0.9, 0), (20, 0.5, 1), (50, 0.5, 0)), True),  # in another order
        (found((0.05, 0.9005, 0), (20, 0.5, 1), (50, 0.5, 0)), True),
        (found((0.2, 0.88, 0), (20, 0.5, 1), (50, 0.5, 0)), False),
        (found((0, 0.9, 0), (20, 0.5, 1), (50, 0.49, 0)), False),
        (found((0, 0.9, 0), (22, 0.5, 1), (50, 0.5, 0)), True),  # one tie
        (found((0, 0.9, 0), (22, 0.5, 1), (52, 0.5, 0)), False),  # too many
        (found((0, 0.9, 1), (20, 0.5, 0), (50, 0.5, 1)), False),
        (found((50, 0.5, 0)), False),
    ],
)
def test_what_counts_as_the_same_detections(other, small):
    differences = Differences()
    differences.add(found((0, 0.9, 0), (20, 0.5, 1), (50, 0.5, 0)), other)
    assert differences.small == small


def test_raw_graph_is_the_heads_maps():
    detector = detector_of("gfl_tiny")
    (image,) = images(1, (64, 128))
    with torch.no_grad():
        maps = RawGraph(detector, (64, 128))(image)
        batch = one_image(image[0], (64, 128))
        expected = detector.raw_maps(detector.network_input(batch))
    assert all(torch.equal(one, other) for one, other in zip(maps, expected, strict=True))
