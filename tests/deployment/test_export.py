"""A pruned detector written for mmdet gives there what it gives here."""

import json
from pathlib import Path
from typing import Any

import cv2
import forked
import numpy as np
import own_parts
import pytest
import torch
from mmengine.config import Config
from pruned_files import data_of, pruned_checkpoint
from sampled import sampled
from short_runs import python
from small import composed

import ldt
from ldt import experiment
from ldt.cli import main
from ldt.deployment.to_mmdet import export
from ldt.detectors.models import build, model_config
from ldt.pruning import structure

MMDET = """
import sys, warnings
warnings.simplefilter("ignore")
import ldt, torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
folder, image, out = sys.argv[1:4]
files = f"{folder}/config.py", f"{folder}/weights.pth"
detector = init_detector(*files, device="cpu")
inferencer = DetInferencer(*files, device="cpu", show_progress=False)
told = inferencer(image, return_datasamples=True, out_dir="drawn")["predictions"][0]
samples = [inference_detector(detector, image), told]
network, given = ldt.load_pruned(sys.argv[4]), torch.load(sys.argv[5], weights_only=False)
with torch.no_grad():
    samples += network(**network.data_preprocessor(given, False), mode="predict")
keys, parts = ("bboxes", "scores", "labels"), [sample.pred_instances for sample in samples]
content = {"found": [{key: part[key] for key in keys} for part in parts]}
about = {"classes": detector.dataset_meta["classes"], "type": type(detector).__name__}
torch.save(content | about, out)
"""


def opened_by_mmdet(
    folder: Path, checkpoint: Path, item: dict[str, Any], cwd: Path, fresh: bool = False
) -> Any:
    """What `init_detector`, `DetInferencer` and `load_pruned` find, in a process of their own.

    The last one sees what the data module makes of the image.

    Args:
        folder: the exported detector.
        checkpoint: what it was exported from.
        item: an image of the data module.
        cwd: where it is opened.
        fresh: in a process that has imported nothing of ldt but what the script says.
    """
    batch = {"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]}
    torch.save(batch, cwd / "batch.pt")
    image, out = item["data_samples"].img_path, cwd / "found.pt"
    files = [str(file) for file in (folder, image, out, checkpoint, cwd / "batch.pt")]
    (cwd / "opened.py").write_text(MMDET)
    done = (python if fresh else forked.run)(str(cwd / "opened.py"), *files, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert len(list((cwd / "drawn/vis").iterdir())) == 1
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("scenes")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert len(one["scores"]) > 0
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("detector", "options"),
    sampled(
        [
            ("gfl_tiny", {"scale": (100, 70), "keep_ratio": False}),
            ("yolox_nano", {"scale": (128, 128), "pad": "square"}),
        ]
    ),
)
def test_mmdet_finds_what_the_checkpoint_finds(detector, options, scenes, tmp_path):
    data = data_of(scenes, **options)
    checkpoint = pruned_checkpoint(tmp_path / "round-1.ckpt", data, f"detector={detector}")
    item = data.val_dataloader().dataset[1]
    folder = export(checkpoint, tmp_path / "exported")
    content = opened_by_mmdet(folder, checkpoint, item, tmp_path)
    by_api, by_inferencer, ours = content["found"]
    assert_equal(by_api, ours)
    assert_equal(by_inferencer, ours)
    assert content["classes"] == data.classes
    assert content["type"] == type(ldt.load_pruned(checkpoint)).__name__


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_detector_of_ones_own_goes_the_whole_way(tmp_path, monkeypatch):
    """Own backbone, config, classes, data and a published file: run, loaded, exported, opened."""
    parts = Path(own_parts.__file__)
    (tmp_path / parts.name).write_text(parts.read_text())
    (tmp_path / "own_config.py").write_text(own_parts.CONFIG)
    names = write_own_data(tmp_path / "data")
    model = model_config(str(tmp_path / "own_config.py"), {}, len(names), pretrained=False)
    detector = build(model)
    state = {f"module.{key}": value for key, value in detector.state_dict().items()}
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "published.pth")
    config = composed(
        "detector=mmdet", f"detector.config={tmp_path / 'own_config.py'}", "recipe=short",
        f"detector.checkpoint={tmp_path / 'published.pth'}", "recipe.epochs=0",
        "recipe.retrain_epochs=1", "recipe.optimizer.lr=1.0e-12", "dataset=coco",
        f"dataset.root={tmp_path / 'data'}", "dataset.train_ann=mine.json",
        "dataset.val_ann=mine.json", "dataset.train_img=images", "dataset.val_img=images",
        f"dataset.classes=[{','.join(names)}]", "dataset.scale=[96,64]", "dataset.workers=0",
        "method=l1", "prune=oneshot", "prune.rate=0.3", "report.latency_runs=0",
        "report.pictures=0", "trainer=cpu", "run_name=own",
    )  # fmt: skip
    experiment.run(config, tmp_path / "run")
    base = ldt.load_pruned(tmp_path / "run/round-0.ckpt").state_dict()
    assert all(torch.equal(value, base[key]) for key, value in detector.state_dict().items())

    checkpoint = tmp_path / "run/round-1.ckpt"
    folder = export(checkpoint, tmp_path / "exported")
    data = experiment.build_data(config)
    data.setup("validate")
    item = data.val_dataloader().dataset[0]
    content = opened_by_mmdet(folder, checkpoint, item, tmp_path, fresh=True)
    by_api, by_inferencer, ours = content["found"]
    assert_equal(by_api, ours)
    assert_equal(by_inferencer, ours)
    assert content["classes"] == names

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = elsewhere / "opened.py"
    for given, told in (("", "type --trust"), (", trust=True", "PYTHONPATH")):
        script.write_text(f"import sys, ldt; ldt.load_pruned(sys.argv[1]{given})")
        done = forked.run(str(script), str(checkpoint), cwd=elsewhere)
        assert "own_parts" in done.stderr
        assert told in done.stderr


def write_own_data(root: Path) -> tuple[str, ...]:
    """Three noise images with boxes of two classes, in COCO's format; gives the classes."""
    (root / "images").mkdir(parents=True)
    rng, names = np.random.default_rng(0), ("bolt", "nut")
    images, boxes = [], []
    for index in range(3):
        pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        assert cv2.imwrite(str(root / f"images/{index}.png"), pixels)
        images.append({"id": index, "file_name": f"{index}.png", "width": 60, "height": 40})
        place = {"bbox": [5, 6, 20, 18], "area": 360, "iscrowd": 0}
        boxes.append({"id": index + 1, "image_id": index, "category_id": 1 + index % 2, **place})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (root / "mine.json").write_text(json.dumps(content))
    return names


@pytest.mark.slow
def test_the_config_holds_what_pruning_changed_and_no_more(scenes, tmp_path):
    checkpoint = pruned_checkpoint(tmp_path / "a.ckpt", data_of(scenes), "detector=gfl_tiny")
    model = Config.fromfile(export(checkpoint, tmp_path / "out") / "config.py").model
    about = torch.load(checkpoint, weights_only=True)["ldt"]
    built = structure.record(build(about["model"], initialise=False))
    same = {name for name, sizes in about["structure"].items() if sizes == built[name]}
    assert same
    assert set(model.sizes) == set(about["structure"]) - same
    assert not {name.rpartition(".")[0] for name in model.shapes} & same


@pytest.mark.slow
def test_a_checkpoint_without_its_preprocessing_is_told_what_to_add(scenes, tmp_path):
    file = pruned_checkpoint(tmp_path / "old.ckpt", data_of(scenes), "detector=gfl_tiny")
    content = torch.load(file, weights_only=True)
    del content["ldt"]["resize"]
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"128x64 pixels.*earlier version.*\"resize\"\] = "):
        export(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ldt.load_pruned(file)  # which needs none


@pytest.mark.parametrize("content", [None, {"state_dict": {}}])
def test_what_is_no_checkpoint_of_ours_ends_the_command_with_a_line(content, tmp_path, capsys):
    file = tmp_path / "file.ckpt"
    if content is not None:
        torch.save(content, file)
    reason = "no checkpoint at" if content is None else "was not written by ldt"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(file), str(tmp_path / "out")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


@pytest.mark.slow
def test_the_command_says_what_it_wrote(scenes, tmp_path, capsys):
    file = pruned_checkpoint(tmp_path / "a.ckpt", data_of(scenes), "detector=gfl_tiny")
    main(["export", str(file), str(tmp_path / "deep/out")])
    written = [tmp_path / "deep/out" / name for name in ("config.py", "weights.pth")]
    said = capsys.readouterr().out
    assert all(path.is_file() and str(path) in said for path in written)
