"""What stands for mmcv's compiled module, how it is found, and its operators on scores."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

from ldt.detectors.mmcv_ops import install

install()
import mmcv.ops  # noqa: E402
from mmcv import _ext  # noqa: E402

pytestmark = pytest.mark.skipif(
    not _ext.__file__.endswith("mmcv_ext.py"), reason="a compiled mmcv is installed and in use"
)
INSTALL_FILE = Path(__file__).parents[2] / "ldt" / "detectors" / "mmcv_ops.py"


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


# ---------------------------------------------------------------- the module that is found


def run_python(code, *args):
    command = [sys.executable, "-c", code, str(INSTALL_FILE), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_install_is_idempotent_and_loads_nothing_heavy():
    code = """
import runpy, sys
before = list(sys.meta_path)
install = runpy.run_path(sys.argv[1])["install"]
install(), install()
print(sys.meta_path[:-1] == before, {"torch", "torchvision", "mmcv", "numpy"} & set(sys.modules))
"""
    assert run_python(code) == "True set()"


def test_a_compiled_mmcv_wins(tmp_path):
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").touch()
    code = """
import runpy, sys
from importlib.util import find_spec
runpy.run_path(sys.argv[1])["install"]()
sys.path.insert(0, sys.argv[2])
print(find_spec("mmcv._ext").origin)
"""
    # Ours as long as that mmcv has none: it is the file below, and nothing else, that decides.
    assert run_python(code, tmp_path) == str(INSTALL_FILE.with_name("mmcv_ext.py"))
    compiled = tmp_path / "mmcv" / "_ext.py"
    compiled.touch()
    assert run_python(code, tmp_path) == str(compiled)


def test_the_finder_answers_for_nothing_else():
    finder = next(f for f in sys.meta_path if type(f).__module__ == "ldt.detectors.mmcv_ops")
    assert finder.find_spec("mmcv._ext", None) is not None
    assert finder.find_spec("_ext", None) is None
    assert finder.find_spec("mmcv._ext.nms", None) is None


def test_parameters_have_the_names_of_the_compiled_module():
    binding = Path(mmcv.ops.__file__).parent / "csrc" / "pytorch" / "pybind.cpp"
    if not binding.exists():
        pytest.skip("this mmcv comes without its C++ sources")
    compiled = {
        name: re.findall(r'py::arg\("(\w+)"\)', rest)
        for name, rest in re.findall(r'm\.def\("(\w+)",(.*?)\);', binding.read_text(), re.S)
    }
    here = {name: function for name, function in vars(_ext).items() if name in compiled}
    assert len(here) >= 16
    for name, function in here.items():
        code = function.__code__
        assert list(code.co_varnames[: code.co_argcount]) == compiled[name], name


def test_a_missing_operator_names_the_torch_that_a_compiled_mmcv_needs():
    with pytest.raises(NotImplementedError) as raised:
        mmcv.ops.nms_rotated(torch.rand(3, 5), torch.rand(3), 0.5)
    assert "'nms_rotated' needs a compiled mmcv" in str(raised.value)
    assert f"needs {_ext.COMPILES}, and torch {torch.__version__} is installed" in str(raised.value)
    assert not hasattr(_ext, "__wrapped__")  # introspection is not answered with an operator


def test_environment_report_finds_versions():
    assert "torchvision" in mmcv.ops.get_compiler_version()
    assert isinstance(mmcv.ops.get_compiling_cuda_version(), str)


# ---------------------------------------------------------------- non-maximum suppression


def iou(a, b, offset):
    def area(x1, y1, x2, y2):
        return max(0.0, x2 - x1 + offset) * max(0.0, y2 - y1 + offset)

    inter = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return inter / (area(*a) + area(*b) - inter)


def nms_by_definition(boxes, scores, threshold, offset):
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i].tolist(), boxes[k].tolist(), offset) <= threshold for k in kept):
            kept.append(i)
    return kept


def some_boxes(count):
    corner = torch.randint(0, 24, (count, 2))
    return torch.cat([corner, corner + torch.randint(1, 16, (count, 2))], 1).float()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.7])
def test_nms(offset, threshold):
    boxes, scores = some_boxes(60), torch.randperm(60) / 60
    expected = nms_by_definition(boxes, scores, threshold, offset)
    assert 1 < len(expected) < 60
    dets, kept = mmcv.ops.nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == expected
    assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], 1))
    best = mmcv.ops.nms(boxes, scores, threshold, offset, score_threshold=0.5, max_num=5)[1]
    assert best.tolist() == [i for i in expected if scores[i] > 0.5][:5]


def test_nms_offset_decides():
    boxes = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 1]]).float()  # they touch: IoU 0, or 2 / 6
    scores = torch.tensor([0.9, 0.8])
    assert mmcv.ops.nms(boxes, scores, 0.3, offset=0)[1].tolist() == [0, 1]
    assert mmcv.ops.nms(boxes, scores, 0.3, offset=1)[1].tolist() == [0]


def test_nms_keeps_a_box_whose_overlap_is_the_threshold():
    boxes = torch.tensor([[0, 0, 5, 1], [0, 0, 3, 1]]).float()  # IoU 3 / 5
    assert len(mmcv.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.6)[1]) == 2


@pytest.mark.parametrize("split", [10000, 10])
def test_batched_nms_is_nms_per_class(split):
    boxes, scores, classes = some_boxes(60), torch.randperm(60) / 60, torch.randint(0, 3, (60,))
    cfg = {"type": "nms", "iou_threshold": 0.3, "split_thr": split}
    dets, kept = mmcv.ops.batched_nms(boxes, scores, classes, cfg)
    expected = []
    for c in range(3):
        mine = (classes == c).nonzero()[:, 0]
        expected += mine[nms_by_definition(boxes[mine], scores[mine], 0.3, 0)].tolist()
    assert kept.tolist() == sorted(expected, key=lambda i: -scores[i])
    assert torch.equal(dets[:, 4], scores[kept])


def test_nms_of_nothing():
    dets, kept = mmcv.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert kept.shape == (0,)


# ---------------------------------------------------------------- soft and matching NMS


def soft_nms_by_definition(boxes, scores, threshold, sigma, least, method, offset):
    left = dict(enumerate(scores.tolist()))
    kept = {}
    while left:
        best = max(left, key=lambda i: left[i])
        kept[best] = left.pop(best)
        for i in list(left):
            o = iou(boxes[best].tolist(), boxes[i].tolist(), offset)
            hard, linear = float(o < threshold), 1 - o if o >= threshold else 1.0
            left[i] *= {"naive": hard, "linear": linear, "gaussian": math.exp(-(o**2) / sigma)}[
                method
            ]
            if left[i] < least:
                del left[i]
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms(method, offset):
    boxes, scores = some_boxes(60), torch.randperm(60) / 60 + 0.02
    given = {"iou_threshold": 0.31, "sigma": 0.4, "min_score": 0.1, "method": method}
    dets, kept = mmcv.ops.soft_nms(boxes, scores, **given, offset=offset)
    expected = soft_nms_by_definition(boxes, scores, 0.31, 0.4, 0.1, method, offset)
    assert 1 < len(expected) < 60
    assert kept.tolist() == list(expected)
    assert torch.equal(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4], torch.tensor(list(expected.values())))


def test_soft_nms_of_equal_scores_and_empty_boxes():
    boxes = torch.tensor([[4, 3, 5, 3], [4, 3, 5, 4], *[[3, 1, 3, 1]] * 4]).float()
    scores = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.4, 0.0])
    dets, kept = mmcv.ops.soft_nms(boxes, scores, 0.6, sigma=0.5)  # the example of its docstring
    assert kept.tolist() == [0, 1, 2, 3, 4]
    apart = torch.tensor([[8 * i, 0, 8 * i + 4, 4] for i in range(4)]).float()
    dets, kept = mmcv.ops.soft_nms(apart, torch.tensor([0.9, 0.05, 0.5, 0.5]), min_score=0.1)
    assert kept.tolist() == [0, 3, 2]  # the last box fills the place of the dropped one
    assert torch.equal(dets[:, 4], torch.tensor([0.9, 0.5, 0.5]))
    assert mmcv.ops.soft_nms(boxes[:0], scores[:0])[0].shape == (0, 5)


def test_soft_nms_in_batches_is_soft_nms_per_class():
    boxes, scores, classes = some_boxes(60), torch.randperm(60) / 60, torch.randint(0, 3, (60,))
    cfg = {"type": "soft_nms", "iou_threshold": 0.3, "min_score": 0.05}
    dets, kept = mmcv.ops.batched_nms(boxes, scores, classes, cfg)
    expected = {}
    for c in range(3):
        mine = (classes == c).nonzero()[:, 0].tolist()
        found = soft_nms_by_definition(boxes[mine], scores[mine], 0.3, 0.5, 0.05, "linear", 0)
        expected |= {mine[i]: score for i, score in found.items()}
    assert kept.tolist() == sorted(expected, key=lambda i: -expected[i])
    torch.testing.assert_close(dets[:, 4], torch.tensor([expected[i] for i in kept.tolist()]))


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_nms_match_groups_boxes_by_the_one_that_suppresses_them(threshold):
    boxes, scores = some_boxes(60), torch.randperm(60) / 60
    groups = mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], 1), threshold)
    expected = {}
    for i in scores.argsort(descending=True).tolist():
        overlaps = ((k, iou(boxes[i].tolist(), boxes[k].tolist(), 0)) for k in expected)
        first = next((k for k, o in overlaps if o >= threshold), i)
        expected.setdefault(first, []).append(i)
    assert [g.tolist() for g in groups] == list(expected.values())
    assert 1 < len(groups) < 60
    assert mmcv.ops.nms_match(torch.zeros(0, 5), threshold) == []


# ---------------------------------------------------------------- focal loss


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("class_weight", [None, torch.tensor([0.5, 1.0, 2.0]).double()])
def test_sigmoid_focal_loss(gamma, class_weight):
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 2, 1, 2, 0, 1])

    def run(logits):
        return mmcv.ops.sigmoid_focal_loss(logits, target, gamma, 0.25, class_weight, "none")

    p = logits.sigmoid()
    hit, miss = -0.25 * (1 - p) ** gamma * p.log(), -0.75 * p**gamma * (1 - p).log()
    slow = torch.where(target[:, None] == torch.arange(3), hit, miss)
    slow = slow if class_weight is None else slow * class_weight[target][:, None]
    torch.testing.assert_close(run(logits), slow)
    assert gradcheck(run, (logits,))


def test_focal_loss_as_a_gpu_calls_it_equals_mmdet_on_a_cpu():
    from mmdet.models.losses.focal_loss import FocalLoss, sigmoid_focal_loss

    logits = (torch.randn(6, 3) * 30).requires_grad_()  # saturated: no infinities
    target = torch.tensor([0, 3, 1, 2, 3, 3])  # 3 is the background
    on_cpu, on_gpu = FocalLoss()(logits, target), sigmoid_focal_loss(logits, target)
    torch.testing.assert_close(on_gpu, on_cpu)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (on_gpu, on_cpu)]
    torch.testing.assert_close(*grads)
