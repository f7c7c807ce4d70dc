"""`ldt export --format onnx` and `openvino`; `ldt predict` with such files, also strangers'."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pruned_files import data_of, pruned_checkpoint

import ldt
from ldt.cli.commands import ldt as command
from ldt.deployment import to_runtime
from ldt.deployment.prediction import Predictor, predict
from ldt.deployment.to_runtime import Images, export_file
from ldt.detectors.fixed_shapes import fixed_shapes
from ldt.runs.refusal import is_refusal
from ldt.runtimes import int8
from ldt.runtimes.about import KEY, read_about
from ldt.runtimes.detection_graph import check_exportable
from ldt.runtimes.file_detector import FileDetector, to_canvas
from ldt.runtimes.packages import need
from ldt.runtimes.sessions import checked_onnx, open_session

onnx: Any = pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Any:
    return data_of(tmp_path_factory.mktemp("scenes"), scale=(128, 64), pad="square")


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("run") / "round-1.ckpt"
    content = torch.load(pruned_checkpoint(file, data, "detector=gfl_tiny"), weights_only=True)
    # without a threshold, fewer candidates than a graph looks at
    content["ldt"]["model"]["test_cfg"]["nms_pre"] = 100
    torch.save(content, file)
    return file


@pytest.fixture(scope="module")
def exported(checkpoint, data, tmp_path_factory) -> dict[str, Path]:
    """The files of both runtimes."""
    folder = tmp_path_factory.mktemp("exported")
    files = {"onnx": folder / "detector.onnx", "openvino": folder / "detector.xml"}
    told: list[str] = []
    for form, file in files.items():
        export_file(checkpoint, file, form, images=Images(data=data), tell=told.append)  # type: ignore[arg-type]
    assert len(told) == 2
    assert all("3 images" in line and "boxes" in line for line in told)
    assert {file.name for file in folder.iterdir()} == {
        *("detector.onnx", "detector.xml", "detector.bin")
    }  # no draft
    return files


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images that fit into the input; one has nothing in it."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, size in {"a.png": (64, 150), "b.png": (60, 90)}.items():
        assert cv2.imwrite(str(folder / name), rng.integers(0, 255, (*size, 3), np.uint8))
    assert cv2.imwrite(str(folder / "empty.png"), np.full((64, 128, 3), 114, np.uint8))
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(command, [*map(str, arguments)])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_a_file_predicts_what_its_checkpoint_predicts(form, exported, checkpoint, photos, tmp_path):
    found = {}
    for name, file in {"checkpoint": checkpoint, "file": exported[form]}.items():
        predict(file, photos, tmp_path / name)
        found[name] = json.loads((tmp_path / name / "predictions.json").read_text())
        assert len(list((tmp_path / name / "pictures").iterdir())) == 3
    mine, theirs = (
        sorted(each, key=lambda row: (row["image_id"], -round(row["score"], 4), row["bbox"]))
        for each in found.values()
    )
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs, strict=True):
        assert one["image_id"] == other["image_id"]
        assert one["category_id"] == other["category_id"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.02)


@pytest.mark.slow
def test_metadata_survive(exported, checkpoint):
    record = torch.load(checkpoint, weights_only=True)["ldt"]
    abouts = [open_session(file).about for file in exported.values()]
    assert abouts[0] == abouts[1]
    about = abouts[0]
    assert about.classes == ["Car", "Pedestrian", "Cyclist"]
    assert about.shape == tuple(record["input_size"]) == (64, 128)
    assert about.resize == record["resize"]
    assert (about.round, about.run, about.precision) == (1, None, "f32")
    assert about.max_detections == 100  # GFL's own limit
    detector = ldt.load_pruned(checkpoint)
    assert about.parameters == sum(each.numel() for each in detector.parameters())
    assert about.macs > 0
    assert {"torch", "mmdet", "onnx"} <= about.versions.keys()


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_written(checkpoint, tmp_path, monkeypatch):
    def spoilt(detector: Any, path: Path, *given: Any) -> Path:
        weight = next(p for n, p in detector.model.named_parameters() if "gfl_reg" in n)
        with torch.no_grad():
            weight.mul_(1.5)
            try:
                return to_onnx(detector, path, *given)
            finally:
                weight.div_(1.5)

    to_onnx = to_runtime.to_onnx
    monkeypatch.setattr(to_runtime, "to_onnx", spoilt)
    done = run("export", checkpoint, tmp_path / "a.onnx", "--format", "onnx")
    assert done.exit_code == 1
    assert "the file computes something else" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a.xml", "--format", "onnx"], "a name with .onnx"),
        (["a.onnx", "--format", "onnx", "--size", "64"], "height x width"),
        (["a.onnx", "--format", "onnx", "--size", "0x64"], "height x width"),
        (["no/a.onnx", "--format", "onnx"], "no folder"),
        (["a", "--int8"], "add --format onnx or openvino"),
        (["a", "--max-detections", "5"], "--max-detections is for a file of a runtime"),
        (["a.onnx", "--format", "onnx", "--int8"], "--images FOLDER, or --data DATA"),
        (["a.onnx", "--format", "onnx", "--int8", "--images", "."], "--force"),
        (["a.onnx", "--format", "onnx", "--images", "."], "no image in the folder '.'"),
        (["a.onnx", "--format", "onnx", "--images", "gone"], "no image or folder at 'gone'"),
        (
            ["a.onnx", "--format", "onnx", "--data", "gone"],
            "no folder in COCO's or KITTI's layout at",
        ),
    ],
)
def test_what_is_refused_before_any_work(arguments, told, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("export", checkpoint, *arguments)
    assert is_refusal(done.exception)
    assert told in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_told_in_one_line(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = run("export", checkpoint, tmp_path / "a.onnx", "--format", "onnx")
    assert is_refusal(done.exception)
    assert "pip install 'ldt[deploy]'" in str(done.exception)


@pytest.mark.slow
def test_nothing_is_reported_over_the_network():
    for name in ("openvino", "nncf"):
        need(name)
    import nncf.telemetry
    import openvino.tools.ovc as ovc

    assert sys.modules["openvino_telemetry"] is None
    assert "Mock" in type(nncf.telemetry.telemetry).__name__ + str(nncf.telemetry.telemetry)
    assert ovc is not None


def test_an_image_is_padded_and_shrunk_where_it_does_not_fit():
    canvas, shrunk = to_canvas(torch.full((3, 10, 40), 9), (20, 50), (1.0, 2.0, 3.0))
    assert shrunk == 1
    assert canvas.shape == (1, 3, 20, 50)
    assert (canvas[0, :, :10, :40] == 9).all()
    assert canvas[0, :, 15, 45].tolist() == [1, 2, 3]
    canvas, shrunk = to_canvas(torch.full((3, 80, 40), 9), (20, 50), (0.0, 0.0, 0.0))
    assert shrunk == 0.25
    assert (canvas[0, :, :, :10] == 9).all()
    assert not canvas[0, :, :, 10:].any()


def test_images_that_are_given_come_before_those_of_the_data(exported, data, tmp_path):
    assert cv2.imwrite(str(tmp_path / "grey.png"), np.full((64, 128, 3), 77, np.uint8))
    about, images = open_session(exported["onnx"]).about, Images(tmp_path, data)
    for found in (to_runtime._checked_images, to_runtime._calibration):
        (image,) = found(images, about)
        assert (np.asarray(image) == 77).any()


# int8 -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_int8_leaves_the_last_layers_in_float_and_needs_ap(
    exported, checkpoint, data, tmp_path, monkeypatch
):
    content = to_runtime.read(checkpoint)
    detector, plain = to_runtime.adapter_of(content), exported["openvino"]
    about = open_session(plain).about
    images = [each for each, _ in zip(to_runtime._calibration(Images(data=data), about), range(2))]  # noqa: B905
    model = int8.quantise(to_runtime.read_model(plain, ".xml"), detector, images)
    quantised = [n for n in model.get_ops() if n.get_type_name() == "FakeQuantize"]
    assert len(quantised) > 20
    edges = int8._openvino_edges(model)
    after = int8._after(edges, detector.predictors)
    assert after
    assert not after & {node.get_friendly_name() for node in quantised}

    monkeypatch.setattr(int8, "quantise", lambda *_: model)
    for after_ap, force, fails in ((0.45, False, True), (0.495, False, False), (0.1, True, False)):
        values, told = iter([0.5, *[after_ap] * int8.TRIALS]), []
        monkeypatch.setattr(to_runtime, "measure_ap", lambda *_, values=values: next(values))
        folder = tmp_path / f"{after_ap}"
        folder.mkdir()
        draft = Path(shutil.copy(plain, folder))
        shutil.copy(plain.with_suffix(".bin"), folder)
        given = (detector, about, draft, Images(data=data), force, told.append)
        if fails:
            with pytest.raises(ValueError, match=r"loses 5\.0 AP"):
                to_runtime._quantised(*given)
        else:
            file = to_runtime._quantised(*given)
            assert FileDetector(file).session.about.precision == "int8"
        assert f"AP 0.5000 in float, {after_ap:.4f} in int8" in told[0]


# Files of strangers ---------------------------------------------------------------------------


def changed(file: Path, change: Any) -> bytes:
    model = onnx.load(file)
    change(model)
    return model.SerializeToString()


def external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def loop(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("Loop", [], ["x"], body=model.graph))


def foreign(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("Evil", [], ["x"], domain="com.evil"))
    model.opset_import.append(onnx.helper.make_opsetid("com.evil", 1))


def bomb(model: Any) -> None:
    shape = onnx.numpy_helper.from_array(np.array([2**20, 2**20]), "size")
    model.graph.initializer.append(shape)
    model.graph.node.append(onnx.helper.make_node("ConstantOfShape", ["size"], ["huge"]))


def other_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 4096


def said(**values: Any) -> Any:
    def change(model: Any) -> None:
        (entry,) = model.metadata_props
        entry.value = json.dumps({**json.loads(entry.value), **values})

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (external, "another file"),
        (loop, "'Loop', which is not allowed"),
        (foreign, "operators than ONNX's own"),
        (bomb, "more than is allowed"),
        (other_input, "its inputs are"),
        (lambda model: model.ClearField("metadata_props"), "`ldt export` did not write it"),
        (said(size=[64, 1_000_000]), "size.1"),
        (said(classes=["\x1b[2J"]), "cannot be printed"),
        (said(resize=[{"type": "LoadImageFromFile"}]), "allowed: Resize"),
        (said(resize=[{"type": "Resize", "scale": [10**9, 4]}]), "resize.scale"),
        (said(max_detections=-1), "max_detections"),
        (said(outputs="anything"), "outputs"),
    ],
)
def test_a_strangers_file_is_refused_in_one_line(change, told, exported, tmp_path):
    content = changed(exported["onnx"], change)
    with pytest.raises(ValueError, match=told.replace("[", r"\[")):
        checked_onnx(content)
    file = tmp_path / "stranger.onnx"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"stranger\.onnx") as error:
        Predictor(file)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_damaged_file_is_refused_in_one_line(exported, tmp_path):
    content, file = exported["onnx"].read_bytes(), tmp_path / "damaged.onnx"
    for part in (b"", b"no protobuf", content[: len(content) // 2]):
        file.write_bytes(part)
        with pytest.raises(ValueError, match=r"damaged\.onnx"):
            open_session(file)
    xml, weights = tmp_path / "damaged.xml", tmp_path / "damaged.bin"
    text = exported["openvino"].read_bytes()
    xml.write_bytes(text)
    with pytest.raises(ValueError, match="not beside it"):
        open_session(xml)
    os.symlink(exported["openvino"].with_suffix(".bin"), weights)
    with pytest.raises(ValueError, match="not beside it"):
        open_session(xml)
    weights.unlink()
    whole = exported["openvino"].with_suffix(".bin").read_bytes()
    for part, binary in ((b"<net", whole), (text, whole[:100]), (text[:-100], whole)):
        xml.write_bytes(part)
        weights.write_bytes(binary)
        with pytest.raises(ValueError, match=r"damaged\.xml"):
            open_session(xml)


def test_metadata_are_checked_before_they_are_used():
    for text in (None, "", "[]", "{}", '{"size": ' * 2000):
        with pytest.raises(ValueError, match=r".+"):
            read_about(text)
    assert KEY == "ldt"


def test_reasons_are_told():
    class Masks(torch.nn.Module):
        mask_head = None

        def __init__(self) -> None:
            super().__init__()
            self.mask_head = torch.nn.Identity()

    with pytest.raises(ValueError, match="detects masks"):
        check_exportable(Masks())
    from mmdet.models.layers import bbox_nms

    with fixed_shapes(5), pytest.raises(ValueError, match="soft_nms"):
        bbox_nms.batched_nms(torch.zeros(1, 4), torch.ones(1), torch.zeros(1), {"type": "soft_nms"})
