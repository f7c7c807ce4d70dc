"""The command `ldt export --format onnx` or `openvino`: one file for a runtime.

The file is written only if it computes what the detector computes.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from mmengine.dataset import Compose
from torch import Tensor

from ldt.data.datamodule import DetectionDataModule
from ldt.data.pipelines import build_transforms, test_steps
from ldt.data.roadscenes_generator import RoadScenes, render
from ldt.deployment.prediction import find_images
from ldt.detectors.adapter import Detector
from ldt.detectors.checkpoints import detector_of, read, resize_steps
from ldt.evaluation.metrics import DetectionMetrics
from ldt.evaluation.round_metrics import count_params_and_macs
from ldt.runs.files import check_folder_of, holds_run
from ldt.runs.refusal import one_line, refusing
from ldt.runs.run import checkpoint_of
from ldt.runtimes import int8
from ldt.runtimes.about import KEY, About
from ldt.runtimes.detection_graph import MOST, to_onnx
from ldt.runtimes.file_detector import FileDetector, to_canvas
from ldt.runtimes.packages import need, openvino_core
from ldt.runtimes.parity import compare
from ldt.runtimes.sessions import open_session

Runtime = Literal["onnx", "openvino"]
SUFFIX = {"onnx": ".onnx", "openvino": ".xml"}
PACKAGES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
CANNOT = "cannot be exported"
CHECKED = 8  # images
MOST_LOSS = 0.01  # of AP by int8
VALIDATED = 500  # images that AP is measured on, at most
RESIZING = ("Resize", "Pad")  # transforms whose size can be another one


@dataclass
class Images:
    """Where images come from: a folder, a data module, or neither.

    Attributes:
        folder: of image files, which come before those of the data.
        data: with training and validation images.
    """

    folder: Path | None = None
    data: DetectionDataModule | None = None


def export_file(
    checkpoint: str | Path,
    out: str | Path,
    form: Runtime,
    *,
    raw: bool = False,
    size: tuple[int, int] | None = None,
    max_detections: int | None = None,
    quantised: bool = False,
    images: Images | None = None,
    force: bool = False,
    trust: bool = False,
    tell: Callable[[str], object] = print,
) -> Path:
    """Write the detector of a checkpoint as a file of a runtime, after checking it.

    Args:
        checkpoint: see :func:`ldt.load_pruned`.
        out: ends in ``.onnx`` or ``.xml``; OpenVINO's weights lie beside it, in ``.bin``.
        form: ``onnx`` or ``openvino``.
        raw: leave out decoding and suppression.
        size: (height, width) of the input; by default the one of the training.
        max_detections: by default the detector's own limit, or 300.
        quantised: to int8.
        images: that the file is checked on and calibrated with; by default scenes are drawn.
        force: also write an int8 file that loses more than 1 AP, or whose AP is unknown.
        trust: see :func:`ldt.load_pruned`.
        tell: is called with each line of what was measured.

    Returns:
        The file.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`ldt.load_pruned`.
        ImportError: a package of the extra ``deploy`` is not installed.
        ValueError: the detector cannot be exported; the file computes something else; or int8
            loses too much. Nothing is written then.
    """
    out, images = Path(out), images or Images()
    with refusing():
        check_out(out, form)
        for package in (*PACKAGES[form], *(["nncf"] if quantised else [])):
            need(package)
        checkpoint = checkpoint_of(checkpoint)
        content = read(checkpoint, trust)
        _check_int8(quantised, raw, images, force)
        if images.folder is not None:
            find_images(images.folder)
        record = content["ldt"]
        steps = resized(resize_steps(content, checkpoint), size)
        detector = adapter_of(content, size)
        most = max_detections or own_limit(detector) or MOST
    about = _about(detector, record, steps, most, raw, checkpoint)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".ldt-export-") as folder:
        draft = Path(folder) / out.name
        export_model(detector, about, draft)
        shown = list(islice(_checked_images(images, about), CHECKED))
        _check(detector, draft, shown, tell)
        if quantised:
            draft = _quantised(detector, about, draft, images, force, tell)
        for file in (draft.with_suffix(".bin"), draft):
            if file.is_file():
                shutil.move(file, out.parent / file.name)
    return out


def check_out(out: Path, form: Runtime) -> None:
    """Check the name of an exported file, and that it can be written.

    Raises:
        ValueError, FileNotFoundError: it cannot, or its suffix is another format's.
    """
    check_folder_of(out)
    if out.suffix != SUFFIX[form]:
        raise ValueError(f"{out} is to be a file of {form}; allowed: a name with {SUFFIX[form]}")
    if form == "openvino":
        check_folder_of(out.with_suffix(".bin"))


def adapter_of(content: dict[str, Any], size: tuple[int, int] | None = None) -> Detector:
    """Return the detector of a checkpoint's content (:func:`ldt.detectors.checkpoints.read`)."""
    record = content["ldt"]
    height, width = size or record["input_size"]
    neck, predictors = record.get("neck", "auto"), record.get("predictors")
    return Detector(detector_of(content), (height, width), neck, predictors)


def resized(steps: Sequence[dict[str, Any]], size: tuple[int, int] | None) -> list[dict[str, Any]]:
    """Return the transforms that prepare images for another size (height, width).

    Raises:
        ValueError: there are others than Resize and Pad.
    """
    if size is None:
        return list(steps)
    if other := [step["type"] for step in steps if step["type"] not in RESIZING]:
        raise ValueError(f"--size: its images are prepared by {other[0]}, whose size is its own")
    key = {"Resize": "scale", "Pad": "size"}
    return [
        {**step, key[step["type"]]: (size[1], size[0])} if key[step["type"]] in step else dict(step)
        for step in steps
    ]


def own_limit(detector: Detector) -> int | None:
    """Return the number of detections that mmdet's detector returns at most; None: no limit."""
    return _settings(detector).get("max_per_img")


def _settings(detector: Detector) -> dict[str, Any]:
    """Return mmdet's settings of how boxes are chosen, of the last stage."""
    config = getattr(detector.model, "test_cfg", None) or {}
    return config.get("rcnn") or config


def _check_int8(quantised: bool, raw: bool, images: Images, force: bool) -> None:
    if not quantised:
        return
    if images.folder is None and images.data is None:
        raise ValueError(
            "--int8 needs images to calibrate with: --images FOLDER, or --data DATA, where the "
            "checkpoint is not in its run's directory"
        )
    if (raw or images.data is None) and not force:
        raise ValueError(
            "--int8 is checked by AP, for which labelled images are missing: type --data DATA, or "
            "--force to do without"
            if not raw
            else "--int8 is checked by AP, which --raw has not: type --force to do without"
        )


def _about(
    detector: Detector,
    record: dict[str, Any],
    steps: list[dict[str, Any]],
    most: int,
    raw: bool,
    checkpoint: str | Path,
) -> About:
    counted, path = count_params_and_macs(detector), Path(checkpoint).absolute()
    threshold = _settings(detector).get("score_thr")
    number = path.stem.removeprefix("round-")
    packages = ("ldt", "torch", "mmdet", "onnx", "onnxruntime", "openvino", "nncf")
    return About(
        outputs="raw" if raw else "detections",
        classes=list(record["classes"]),
        size=list(detector.input_size),
        resize=steps,
        pad_value=detector.pad_pixel(),
        threshold=None if threshold is None else float(threshold),
        max_detections=most,
        run=path.parent.name if holds_run(path.parent) else None,
        round=int(number) if number.isdecimal() else None,
        parameters=counted["params"],
        macs=counted["macs"],
        versions={name: found for name in packages if (found := _version(name))},
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def export_model(detector: Detector, about: About, file: Path) -> None:
    """Write a detector, with metadata, as a file that is not checked yet.

    Args:
        detector: to be exported.
        about: says what the graph is to compute.
        file: ``.onnx`` or ``.xml``.

    Raises:
        ValueError: in one line, why the detector cannot be exported.
    """
    plain = file.with_name("plain.onnx")
    reason = getattr(detector.model, "undecoded", None)
    if reason and about.outputs != "raw":
        raise ValueError(f"{type(detector.model).__name__} {CANNOT}: {reason}")
    try:
        to_onnx(detector, plain, about.shape, about.outputs == "raw", about.max_detections)
        _save(read_model(plain, file.suffix), about, file)
    except Exception as error:  # mmdet, torch and runtimes raise many types
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"{type(detector.model).__name__} {CANNOT}: {reason}") from error


def _save(model: Any, about: About, file: Path) -> None:
    if file.suffix == ".onnx":
        onnx = need("onnx")
        onnx.helper.set_model_props(model, {KEY: about.text()})
        onnx.save(model, file)
    else:
        model.set_rt_info(about.text(), KEY)
        need("openvino").save_model(model, file, compress_to_fp16=False)


def read_model(file: Path, suffix: str) -> Any:
    """Return a file of ours as a model of ONNX or, for ``.xml``, of OpenVINO."""
    if suffix == ".onnx":
        return need("onnx").load(file)
    return openvino_core().read_model(file)


# Checks ---------------------------------------------------------------------------------------


def _check(
    detector: Detector, file: Path, images: list[Tensor], tell: Callable[[str], object]
) -> None:
    """Compare a file with mmdet.

    Raises:
        ValueError: it computes something else, or does not run.
    """
    found = compare(detector, open_session(file), images)
    tell(f"checked on {found}")
    if not found.small:
        raise ValueError(f"the file computes something else, so it is not written: {found}")


def _quantised(
    detector: Detector,
    about: About,
    plain: Path,
    images: Images,
    force: bool,
    tell: Callable[[str], object],
) -> Path:
    """Return an int8 file of the same name, in a folder below that of the file in float.

    More and more of the backbone stays in float, until the loss of AP is small.

    Raises:
        ValueError: AP is lower by more than ``MOST_LOSS``.
    """
    shown = list(islice(_calibration(images, about), int8.IMAGES))
    file = plain.parent / "int8" / plain.name
    file.parent.mkdir()
    small = about.model_copy(update={"precision": "int8"})
    data = images.data if about.outputs == "detections" else None
    before = math.nan if data is None else measure_ap(plain, data)
    loss = math.inf
    for spared in range(1, int8.TRIALS + 1):
        model = read_model(plain, plain.suffix)
        _save(int8.quantise(model, detector, shown, spared), small, file)
        if data is None:
            return file
        after = measure_ap(file, data)
        loss = before - after
        tell(
            f"AP {before:.4f} in float, {after:.4f} in int8, {len(shown)} calibration images; "
            f"in float: decoding, last layers, first {spared} of the backbone's parts"
        )
        if loss <= MOST_LOSS:
            return file
    if not force:
        raise ValueError(
            f"int8 loses {100 * loss:.1f} AP, so it is not written; type --force to write it "
            "nevertheless"
        )
    return file


def measure_ap(file: Path, data: DetectionDataModule, most: int = VALIDATED) -> float:
    """Return the AP of an exported file on at most so many validation images, evenly spread."""
    detector, metrics = FileDetector(file), DetectionMetrics(data.classes)
    for item in spread(data.val_dataloader().dataset, most):
        batch = {key: [value] for key, value in item.items()}
        metrics.update(detector.test_step(batch))
    return metrics.compute()["AP"]


def spread(dataset: Any, most: int) -> Iterator[Any]:
    """Yield at most so many items of a data set, evenly spread."""
    count = min(most, len(dataset))
    for index in range(count):
        yield dataset[index * len(dataset) // count]


# Images ---------------------------------------------------------------------------------------


def _checked_images(images: Images, about: About) -> Iterator[Tensor]:
    """Yield images that a file is checked on, each [1, 3, H, W]."""
    if images.folder is not None:
        yield from _of_folder(images.folder, about)
    elif images.data is not None:
        for item in spread(images.data.val_dataloader().dataset, CHECKED):
            yield to_canvas(item["inputs"], about.shape, about.pad_value)[0]
    else:
        scenes, (_, *prepare) = RoadScenes(), _transforms(about)
        for index in range(CHECKED):
            pixels = render(scenes, index)[0]
            shape = pixels.shape[:2]
            loaded = {"img": pixels, "img_shape": shape, "ori_shape": shape, "img_id": index}
            item = cast(Any, Compose(prepare)({**loaded, "img_path": "", "instances": []}))
            yield to_canvas(item["inputs"], about.shape, about.pad_value)[0]


def _calibration(images: Images, about: About) -> Iterator[Any]:
    """Yield calibration images, each [1, 3, H, W]."""
    if images.folder is not None:
        yield from (image.numpy() for image in _of_folder(images.folder, about))
    elif images.data is not None:
        for batch in images.data.calibration_dataloader(int8.IMAGES, 1):
            yield to_canvas(batch["inputs"][0], about.shape, about.pad_value)[0].numpy()


def _of_folder(folder: Path, about: About) -> Iterator[Tensor]:
    pipeline = Compose(_transforms(about))
    for number, path in enumerate(find_images(folder)):
        item = cast(Any, pipeline({"img_path": str(path), "img_id": number, "instances": []}))
        yield to_canvas(item["inputs"], about.shape, about.pad_value)[0]


def _transforms(about: About) -> list[Any]:
    return build_transforms(test_steps(about.resize))
