"""Laws of building mmdet detectors, of finding where to tap them, and of their weights."""

import sys
from pathlib import Path

import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import utils
from mmengine.structures import InstanceData
from omegaconf import OmegaConf
from real_data import NANODET_G, YOLOX_NANO, needs
from sampled import sampled
from small import composed, prepared
from torch import nn
from torch_pruning.pruner.importance import GroupMagnitudeImportance

from ldt.criteria.base import score_groups
from ldt.detectors import mmengine_internals
from ldt.detectors.forward import (
    as_maps,
    eval_with_gradients,
    find_neck,
    find_predictors,
    raw_forward,
)
from ldt.detectors.models import build, model_config, raise_max_per_img
from ldt.detectors.weights import load_weights
from ldt.evaluation.profiling import count_macs, count_parameters
from ldt.module import DetectorModule
from ldt.objects import labelled_objects
from ldt.pruning.budget import TOLERANCE, select_channels
from ldt.pruning.costs import CostModel

GFL = ("gfl_cls", "gfl_reg")
ATSS = ("atss_centerness", "atss_cls", "atss_reg")
RECIPE = {"epochs": 1, "schedule": "constant"}
YOLOF = ("bbox_pred", "cls_score", "object_pred")
YOLOX = tuple(f"multi_level_conv_{kind}.{i}" for kind in ("cls", "obj", "reg") for i in range(3))


def config_of(name, n_classes=3, **options):
    chosen = OmegaConf.to_container(composed(f"detector={name}").detector, resolve=True)
    return model_config(chosen["config"], chosen["options"] | options, n_classes, pretrained=False)


def on_meta(name, n_classes=3):
    """The detector without memory or computation."""
    with torch.device("meta"):
        return build(config_of(name, n_classes), initialise=False)


def fresh(name, n_classes=3, seed=0):
    torch.manual_seed(seed)
    return build(config_of(name, n_classes))


def predictors_of(detector):
    return find_predictors(detector, torch.zeros(1, 3, 64, 128))


# Costs ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_classes", "millions"),
    [
        ("atss", 3, 32.12),
        ("gfl", 3, 32.26),
        ("yolox_s", 3, 8.94),
        ("atss", 80, 32.295),
        ("gfl", 80, 32.441),
        ("yolox_s", 80, 8.968),
        ("yolof", 80, 44.16),
    ],
)
def test_full_size_detectors_have_the_papers_parameters(name, n_classes, millions):
    assert count_parameters(on_meta(name, n_classes)) / 1e6 == pytest.approx(millions, rel=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "giga"),
    [("atss", (832, 1344), 219.7), ("gfl", (832, 1344), 223.1), ("yolox_s", (640, 640), 13.32)],
)
def test_full_size_detectors_have_the_papers_multiply_adds(name, size, giga):
    detector = on_meta(name)
    found = count_macs(detector, lambda x: raw_forward(detector, x), (1, 3, *size))
    assert found / 1e9 == pytest.approx(giga, rel=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "rate", "left"),
    sampled(
        [  # what Table 4 leaves of the multiply-adds; it has no YOLOF
            ("yolox_s", (640, 640), 0.75, 10.10 / 26.65),
            ("atss", (832, 1344), 0.70, 128.28 / 219.56),
            ("gfl", (832, 1344), 0.70, 113.25 / 222.94),
            ("yolof", (832, 1344), 0.70, 1.0),
        ]
    ),
)
def test_full_size_detectors_pruned_as_in_the_paper_run_and_save_as_much(name, size, rate, left):
    recipe = OmegaConf.to_container(composed(f"detector={name}").recipe, resolve=True)
    module = DetectorModule(config_of(name), ("a", "b", "c"), recipe, (128, 128))
    detector, whole = module.detector, count_parameters(module.detector)
    with eval_with_gradients(detector):
        graph = module.adapter.trace(["backbone", "neck", "bbox_head"])
        scores = score_groups(GroupMagnitudeImportance(p=1), module.adapter, graph, [])
        rule = {"costs": CostModel(graph, "params"), "tolerance": TOLERANCE * whole}
        graph.remove(select_channels(graph, scores, save=rate * whole, ranking="uniform", **rule))
    assert 1 - count_parameters(detector) / whole == pytest.approx(rate, abs=TOLERANCE)

    module.train()
    batch = prepared(2, (128, 128), torch.Generator().manual_seed(0))
    module.adapter.detection_loss(batch).backward()
    gradients = [p.grad for p in detector.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert any(bool(g.any()) for g in gradients)

    def cost(network):
        return count_macs(network, lambda x: raw_forward(network, x), (1, 3, *size))

    assert cost(detector.to("meta")) <= left * cost(on_meta(name))


# Configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    ["no/such/file.py", "mmdet::gfl/no_such.py", "nopackage::a/b.py", "notes.txt", "broken.py"],
)
def test_an_unknown_config_is_named_with_an_example(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("model = 1")
    Path("broken.py").write_text("model = (")
    with pytest.raises(ValueError, match=rf"detector.config='{config}' cannot be read.*mmdet::gfl"):
        model_config(config, {}, 3, pretrained=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 1", "defines no `model`"),
        ("model = dict(type='GFL', coder=int)", "cannot be stored in a checkpoint"),
    ],
)
def test_a_config_without_a_plain_model_is_refused(text, message, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        model_config(str(file), {}, 3, pretrained=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gfl", "atss", "yolox_s", "yolof"])
def test_the_config_survives_a_checkpoint(name, tmp_path):
    config = config_of(name)
    torch.save(config, tmp_path / "config.pt")
    assert torch.load(tmp_path / "config.pt", weights_only=True) == config


def test_modules_that_a_config_imports_are_imported_where_it_is_built(tmp_path, monkeypatch):
    part = (
        "import torch\nfrom mmdet.registry import MODELS\n"
        "@MODELS.register_module()\ndef Ours(a): return torch.nn.Linear(1, a)"
    )
    (tmp_path / "ours_alone.py").write_text(part)
    file = tmp_path / "config.py"
    file.write_text("custom_imports = dict(imports=['ours_alone'])\nmodel = dict(type='Ours', a=3)")
    with monkeypatch.context() as path:
        path.syspath_prepend(tmp_path)
        model = model_config(str(file), {}, 3, pretrained=False)
        assert build(model, initialise=False).out_features == 3
    del sys.modules["ours_alone"]
    with pytest.raises(ImportError, match=r"imports \['ours_alone'\].*PYTHONPATH"):
        build(model)
    with pytest.raises(ValueError, match=r"cannot be read .*ours_alone"):
        model_config(str(file), {}, 3, pretrained=False)


@pytest.mark.slow
def test_the_base_of_a_config_may_be_a_packaged_one(tmp_path):
    packaged = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"
    (tmp_path / "own.py").write_text(f"_base_ = '{packaged}'\nmodel = dict(neck=dict(num_outs=4))")
    own = model_config(str(tmp_path / "own.py"), {}, 3, pretrained=False)
    assert own.pop("_scope_") == "mmdet"
    assert own == model_config(packaged, {"neck": {"num_outs": 4}}, 3, pretrained=False)
    lazy = "from mmengine.config import read_base\nwith read_base():\n    from mmdet.configs."
    (tmp_path / "lazy.py").write_text(f"{lazy}retinanet.retinanet_r50_fpn_1x_coco import *\n")
    with pytest.raises(ValueError, match=r"lazy.py' cannot be read .*retinanet_r50"):
        model_config(str(tmp_path / "lazy.py"), {}, 3, pretrained=False)
    (tmp_path / "away.py").write_text("_base_ = 'mmnothing::gfl/x.py'")
    with pytest.raises(ValueError, match=r"away.py' cannot be read .*mmnothing"):
        model_config(str(tmp_path / "away.py"), {}, 3, pretrained=False)


def test_options_change_the_model_and_classes_every_head():
    config = config_of("gfl", 7, neck={"out_channels": 64}, bbox_head={"in_channels": 64})
    assert (config["neck"]["out_channels"], config["neck"]["type"]) == (64, "FPN")
    assert config["bbox_head"]["num_classes"] == 7


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [  # of 300 detections at least
        ("gfl/gfl_r50_fpn_1x_coco", {100}, {300}),
        ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco", {1000, 100}, {1000, 300}),
        ("ssd/ssd300_coco", {200}, {300}),
        ("dino/dino-4scale_r50_8xb2-12e_coco", {300}, {300}),
        ("detr/detr_r50_8xb2-150e_coco", {100}, {100}),  # it has 100 queries
        ("sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco", {100}, {100}),
        ("centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco", {100}, {300}),
        ("yolox/yolox_nano_8xb8-300e_coco", set(), set()),  # without limit
    ],
)
def test_a_limit_of_boxes_is_raised_as_far_as_there_are_queries(name, before, after):
    model = model_config(f"mmdet::{name}.py", {}, 3, pretrained=False)
    for least, expected in ((1, before), (300, after)):
        raise_max_per_img(model, least)
        assert set(limits(model["test_cfg"])) == expected


def limits(node):
    """Every limit of boxes of a test_cfg."""
    for key, value in (node or {}).items():
        if isinstance(value, dict):
            yield from limits(value)
        elif key in ("max_per_img", "topk"):
            yield value


@pytest.mark.slow
def test_without_a_network_a_pretrained_backbone_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    away = {"type": "Pretrained", "checkpoint": "http://127.0.0.1:9/resnet.pth"}
    options = {"backbone": {"depth": 18, "base_channels": 8, "init_cfg": away}}
    options["neck"] = {"in_channels": [8, 16, 32, 64]}
    config = model_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py", options, 3, pretrained=True)
    with pytest.raises(
        RuntimeError, match=r"init_cfg.checkpoint=<file>.*detector.pretrained=false"
    ):
        build(config)
    assert (
        model_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py", options, 3, pretrained=False)["backbone"][
            "init_cfg"
        ]
        is None
    )


# Where to tap ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gfl", GFL),
        ("gfl_tiny", GFL),
        ("atss", ATSS),
        ("atss_tiny", ATSS),
        ("yolof", YOLOF),
        ("yolof_tiny", YOLOF),
        ("yolox_s", YOLOX),
        ("yolox_nano", YOLOX),
        ("nanodet_g", [f"{layer}.{i}" for layer in GFL for i in range(3)]),
    ],
)
def test_predictors_are_what_one_finds_by_hand(name, expected):
    found = find_predictors(on_meta(name), torch.zeros(1, 3, 128, 256, device="meta"))
    assert found == [f"bbox_head.{layer}" for layer in expected]


@pytest.mark.slow
def test_finding_predictors_leaves_no_trace():
    detector = fresh("gfl_tiny")
    detector.backbone.requires_grad_(False)
    detector.neck.eval()
    wanted = [parameter.requires_grad for parameter in detector.parameters()]
    modes = [module.training for module in detector.modules()]
    predictors_of(detector)
    assert [parameter.requires_grad for parameter in detector.parameters()] == wanted
    assert [module.training for module in detector.modules()] == modes
    assert not any(module._forward_hooks for module in detector.modules())


def test_evaluating_is_undone_after_an_error():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1).eval())
    model[0].weight.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), eval_with_gradients(model):
        1 / (model.training or not model[0].weight.requires_grad)  # both are as they should be
    assert [module.training for module in model.modules()] == [True, True, False]
    assert not model[0].weight.requires_grad


class Bare(nn.Module):
    """A detector by another layout."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_the_neck_is_the_neck_else_the_backbone_else_what_is_named():
    backbone, neck = nn.Sequential(nn.Identity()), nn.Identity()
    assert find_neck(Bare(backbone=backbone, neck=neck)) is neck
    assert find_neck(Bare(backbone=backbone, head=neck)) is backbone
    assert find_neck(Bare(backbone=backbone, neck=neck), "backbone.0") is backbone[0]


@pytest.mark.parametrize(("name", "parts"), [("auto", ("body", "top")), ("bottle", ("neck",))])
def test_a_missing_neck_is_told_with_the_parts_there_are(name, parts):
    detector = Bare(**{part: nn.Identity() for part in parts})
    listed = ", ".join(parts)
    with pytest.raises(
        ValueError, match=rf"detector.neck='{name}': Bare .*parts are: {listed}\..*detector.neck="
    ):
        find_neck(detector, name)


@pytest.mark.parametrize("output", [{"p3": torch.zeros(1, 1, 2, 2)}, torch.zeros(3, 4), [None]])
def test_only_maps_come_out_of_a_neck(output):
    with pytest.raises(
        ValueError, match=rf"returns {type(output).__name__}, not feature maps.*detector.neck"
    ):
        as_maps(output)


def test_maps_come_out_as_they_went_in():
    maps = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 2, 2)]
    assert all(a is b for a, b in zip(as_maps(maps), maps, strict=True))
    assert as_maps(maps[0])[0] is maps[0]


# Objects --------------------------------------------------------------------------------------


def sample(boxes, labels, ignored=(), wrap=torch.Tensor):
    found = DetDataSample()
    found.gt_instances = InstanceData(
        bboxes=wrap(torch.tensor(boxes).reshape(-1, 4)), labels=torch.tensor(labels).long()
    )
    found.ignored_instances = InstanceData(
        bboxes=torch.tensor(ignored).reshape(-1, 4), labels=torch.zeros(len(ignored)).long()
    )
    return found


@pytest.mark.parametrize("wrap", [torch.Tensor, HorizontalBoxes])
def test_objects_know_their_image_and_ignored_boxes_are_none(wrap):
    one, two, three = [1.0, 2.0, 8.0, 9.0], [3.0, 3.0, 6.0, 6.0], [0.0, 0.0, 5.0, 5.0]
    batch = [
        sample([one, two], [2, 0], ignored=[three], wrap=wrap),
        sample([], [], ignored=[one], wrap=wrap),
        sample([three], [1], wrap=wrap),
    ]
    found = labelled_objects(batch, (16, 32))
    assert found.boxes.tolist() == [one, two, three]
    assert found.labels.tolist() == [2, 0, 1]
    assert found.image.tolist() == [0, 0, 2]
    assert found.shape == (16, 32)


def test_a_batch_without_objects_has_empty_tensors():
    found = labelled_objects(
        [sample([], [], ignored=[[0.0, 0.0, 5.0, 5.0]]), sample([], [])], (16, 32)
    )
    assert found.boxes.shape == (0, 4)
    assert found.labels.shape == found.image.shape == (0,)


# Weights --------------------------------------------------------------------------------------


def same(one, two, skip=()):
    return all(
        torch.equal(value, two[key])
        for key, value in one.items()
        if not key.startswith(tuple(skip)) or not skip
    )


PREFIXES = ("", "module.", "detector.", "model.", "architecture.", "_orig_mod.", "module.a.b.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_is_removed(prefix, tmp_path):
    parts = {"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 3)}
    source, target = nn.ModuleDict(parts), nn.ModuleDict({k: nn.Linear(2, 2) for k in parts})
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    _, new = load_weights(target, tmp_path / "w.pth", ["head"])
    assert new == ["head.bias", "head.weight"]
    assert same(source.state_dict(), target.state_dict(), ["head"])


def test_names_within_a_compiled_part_are_those_of_the_part(tmp_path):
    source, target = (nn.ModuleDict({"backbone": nn.Linear(2, 2)}) for _ in range(2))
    keys = ("model.backbone._orig_mod.weight", "model.backbone._orig_mod.bias")
    torch.save(dict(zip(keys, source.parameters(), strict=True)), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth", [])
    assert same(source.state_dict(), target.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "module.", "detector."])
@pytest.mark.parametrize("bare", [True, False])
def test_own_and_mmdets_files_load_whole(prefix, bare, tmp_path):
    source, target = fresh("gfl_tiny"), fresh("gfl_tiny", seed=1)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save(state if bare else {"state_dict": state, "meta": {}}, tmp_path / "w.pth")
    assert not same(source.state_dict(), target.state_dict())
    load_weights(target, tmp_path / "w.pth", predictors_of(target))
    assert same(source.state_dict(), target.state_dict())


@pytest.mark.slow
def test_another_number_of_classes_gets_new_predictors_and_a_warning(tmp_path, caplog):
    source, target = fresh("atss_tiny", 80), fresh("atss_tiny", 3, seed=1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth", predictors_of(target))
    after, new = target.state_dict(), ["bbox_head.atss_cls.weight", "bbox_head.atss_cls.bias"]
    assert all(torch.equal(after[key], before[key]) for key in new)
    rest = {key: value for key, value in source.state_dict().items() if key not in new}
    assert same(rest, after)
    assert all(key in caplog.text for key in new)


@pytest.mark.slow
def test_another_detectors_file_is_refused_with_counts_and_keys(tmp_path):
    source, target = fresh("atss_tiny"), fresh("gfl_tiny")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    own, other = target.state_dict(), source.state_dict()
    missing, unknown = sorted(set(own) - set(other)), sorted(set(other) - set(own))
    with pytest.raises(
        ValueError,
        match=rf"{len(missing)} of {len(own)} tensors.*{missing[0]}.*"
        rf"{len(unknown)} are unknown.*{unknown[0]}.*Choose the `detector`",
    ):
        load_weights(target, tmp_path / "w.pth", predictors_of(target))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"detector.checkpoint='.*gone.pth'"):
        load_weights(nn.Identity(), tmp_path / "gone.pth", [])


@pytest.mark.parametrize("content", ["cut", "objects"])
def test_a_damaged_or_unsafe_file_is_refused(content, tmp_path):
    file = tmp_path / "w.pth"
    torch.save({"state_dict": {}, "hub": Path("x")}, file)  # a path is more than plain data
    if content == "cut":
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"detector.checkpoint='.*' is damaged or contains more"):
        load_weights(nn.Identity(), file, [])


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, {"state_dict": {}}])
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth' contains .*state dict"):
        load_weights(nn.Identity(), tmp_path / "w.pth", [])


@pytest.mark.slow
def test_averages_beside_the_model_and_prefixes_are_dropped(tmp_path):
    source, target = fresh("gfl_tiny"), fresh("gfl_tiny", seed=1)
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "ema_neck_weight": torch.zeros(2)}}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth", predictors_of(target))
    assert same(source.state_dict(), target.state_dict())


@pytest.mark.slow
def test_a_pruned_checkpoint_is_told_from_a_foreign_one(tmp_path):
    source, target = fresh("gfl_tiny"), fresh("gfl_tiny")
    state = {key: value[:1] for key, value in source.state_dict().items() if value.ndim}
    torch.save({"state_dict": state, "ldt": {}}, tmp_path / "w.pth")
    told = r"a pruned one: .* is pruned further by ldt prune .*w.pth DATA"
    with pytest.raises(ValueError, match=told):
        load_weights(target, tmp_path / "w.pth", predictors_of(target))


@pytest.mark.slow
def test_a_predictor_that_the_detector_lacks_is_refused():
    with pytest.raises(ValueError, match=r"head.gone, which GFL does not have.*bbox_head.gfl_cls"):
        DetectorModule(config_of("gfl_tiny"), "abc", RECIPE, (64, 128), predictors=["head.gone"])


@pytest.mark.slow
@needs(NANODET_G)
def test_published_weights_give_the_outputs_of_the_module_that_came_with_them(monkeypatch):
    own = fresh("nanodet_g", 80).eval()
    weights = NANODET_G / "nanodet_g_coco_mmdet.pth"
    load_weights(own, weights, predictors_of(own))
    monkeypatch.syspath_prepend(NANODET_G)
    given = build(model_config(str(NANODET_G / "nanodet_g_coco.py"), {}, 80, pretrained=False))
    load_weights(given, weights, predictors_of(given))
    images = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        pairs = zip(raw_forward(own, images), raw_forward(given.eval(), images), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    for part in ("data_preprocessor", "train_cfg", "test_cfg"):
        assert str(getattr(own, part)) == str(getattr(given, part))
    means = [(d.data_preprocessor.mean, d.data_preprocessor.std) for d in (own, given)]
    assert all(torch.equal(one, other) for one, other in zip(*means, strict=True))


@pytest.mark.slow
@needs(YOLOX_NANO)
@pytest.mark.parametrize("n_classes", [80, 3])
def test_a_published_file_loads(n_classes):
    detector = fresh("yolox_nano", n_classes)
    load_weights(detector, YOLOX_NANO, predictors_of(detector))
    published = torch.load(YOLOX_NANO, weights_only=True)["state_dict"]
    skip = ["bbox_head.multi_level_conv_cls"] if n_classes == 3 else []
    assert set(published) == set(detector.state_dict())
    assert same(published, detector.state_dict(), skip)


def test_a_packaged_config_is_where_mmengine_finds_it(tmp_path):
    """Once for every file: mmengine reads all metafiles of the package each time."""
    meta = {"model-index.yml": "Import: [metafile.yml]"}
    meta["metafile.yml"] = "Models: [{Name: a, Config: configs/a/named}]"
    (tmp_path / ".mim").mkdir()
    for name, text in meta.items():
        (tmp_path / ".mim" / name).write_text(text)
    (tmp_path / "configs/a").mkdir(parents=True)
    (tmp_path / "configs/a/named").touch()
    for _ in range(2):
        for find in (mmengine_internals._path_in_metafile, utils._get_external_cfg_path):
            assert find(str(tmp_path), "a/named.py") == str(tmp_path / "configs/a/named")
            with pytest.raises(ValueError, match="a/other"):
                find(str(tmp_path), "a/other.py")
