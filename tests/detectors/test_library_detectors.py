"""Laws of the detectors of transformers and torchvision that are wrapped as mmdet detectors."""

import re
import socket
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import small_libraries as libraries
import torch
from hydra.utils import instantiate
from mmdet.models.detectors import BaseDetector
from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
from omegaconf import OmegaConf
from short_runs import python, summary, tiny
from small import METHODS, composed, random_channels
from stand_in import DEVICE, StandIn
from summaries import configured
from torch.utils.flop_counter import FlopCounterMode

import ldt
from ldt.cli import repetition
from ldt.criteria.base import score_groups
from ldt.deployment.to_runtime import export_model
from ldt.detectors.adapter import Detector
from ldt.detectors.checkpoints import detector_of
from ldt.detectors.forward import eval_with_gradients, find_neck, one_image, raw_forward
from ldt.detectors.library_detector import thaw_norms
from ldt.detectors.models import build, model_config
from ldt.detectors.untrusted import checked
from ldt.evaluation.profiling import count_macs, count_parameters
from ldt.experiment import run
from ldt.pruning.budget import TOLERANCE
from ldt.pruning.layer_types import CONVOLUTIONS, NORMS
from ldt.runtimes.about import About
from ldt.runtimes.detection_graph import MOST
from ldt.runtimes.parity import BOX, SCORE, compare
from ldt.runtimes.sessions import open_session

EVERY = pytest.mark.parametrize("name", libraries.ALL)
ONE_OF_EACH = pytest.mark.parametrize("name", ["d_fine", "faster_rcnn"])
SCOPE = ("backbone", "neck")


def adapter_of(detector: Any) -> Detector:
    return Detector(detector, libraries.SIZE)


# Structure ------------------------------------------------------------------------------------


@EVERY
def test_parts_are_found_and_no_weight_has_two_names(name):
    before, detector = libraries.whole(name), libraries.wrapped(name)
    assert isinstance(detector, BaseDetector)
    assert count_parameters(detector) == count_parameters(before)
    assert find_neck(detector) is detector.neck
    names = {key.partition(".")[0] for key in detector.state_dict()}
    assert names <= {"backbone", "neck", "bbox_head"}
    places = [p.data_ptr() for p in before.parameters()]
    own = [p.data_ptr() for _, p in detector.named_parameters()]
    assert len(own) == len(set(own)) == len(set(places))
    maps = detector.extract_feat(libraries.batch().images)
    assert all(m.ndim == 4 for m in maps)


@pytest.mark.slow
@EVERY
def test_masked_equals_cut(name):
    detector = libraries.wrapped(name)
    images = libraries.batch(seed=3).images
    with eval_with_gradients(detector):
        graph = adapter_of(detector).trace(SCOPE)
    chosen = random_channels(graph, seed=0)
    before = raw_forward(detector, images)
    for group_name, channels in chosen.items():
        for member in graph.groups[group_name].members:
            if member.side == "in" and isinstance(member.layer, CONVOLUTIONS):
                gone = [
                    c for c, r in zip(member.channels, member.roots, strict=True) if r in channels
                ]
                member.layer.weight.data[:, gone] = 0
            # a depthwise convolution passes its channels on
    masked = raw_forward(detector, images)
    graph.remove(chosen)
    cut = raw_forward(detector, images)
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(before, masked, strict=True))
    for one, other in zip(masked, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rt_detr", "d_fine", "retinanet"])
def test_as_much_is_removed_as_is_asked(name):
    detector = libraries.wrapped(name)
    whole = count_parameters(detector)
    options: Any = {"input_size": libraries.SIZE, "repair": "none", "inplace": True}
    ldt.prune(detector, [libraries.raw_batch()], rate=0.1, criterion="l1", **options)
    assert 1 - count_parameters(detector) / whole == pytest.approx(0.1, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["rt_detr", "fcos"])
def test_every_criterion_scores_or_abstains(name, method):
    detector = libraries.wrapped(name)
    adapter = adapter_of(detector)
    with eval_with_gradients(detector):
        graph = adapter.trace(SCOPE)
        found = len(graph.groups)
        criterion = instantiate(composed(f"method={method}").method.criterion)
        scores = score_groups(criterion, adapter, graph, [libraries.batch(images=6)])
    assert set(scores) == set(graph.groups)
    assert len(scores) > found / 2
    assert all(bool(score.isfinite().all()) for score in scores.values())


# Losses and boxes -----------------------------------------------------------------------------


def boxes_of(sample: Any) -> Any:
    return sample.gt_instances.bboxes


def library_losses(name: str, model: Any, batch: Any) -> dict[str, torch.Tensor]:
    """What the library says, whole and by itself."""
    height, width = batch.images.shape[2:]
    if name in libraries.CONFIGS:
        sides = torch.tensor([width, height, width, height])
        labels = [
            {
                "class_labels": s.gt_instances.labels,
                "boxes": bbox_xyxy_to_cxcywh(boxes_of(s)) / sides,
            }
            for s in batch.samples
        ]
        return model(batch.images, labels=labels).loss_dict
    first = int(name in ("faster_rcnn", "ssd"))
    targets = [
        {"boxes": boxes_of(s), "labels": s.gt_instances.labels + first} for s in batch.samples
    ]
    model.transform.normalize = lambda image: image
    model.transform.resize = lambda image, target: (image, target)
    return model(list(batch.images), targets)


@EVERY
def test_losses_are_those_of_the_library(name):
    model, batch = (
        libraries.whole(name),
        libraries.batch(images=3),
    )  # the second image has no object
    detector = libraries.wrapped(name, model)
    torch.manual_seed(1)
    expected = library_losses(name, model.train(), batch)
    torch.manual_seed(1)
    found = detector.train().loss(batch.images, batch.samples)
    assert all("loss" in key for key in found)
    for key, value in expected.items():
        torch.testing.assert_close(found[key if "loss" in key else f"loss_{key}"], value)


@EVERY
def test_boxes_are_those_of_the_library(name):
    model, data = libraries.whole(name), libraries.raw_batch()
    detector = libraries.wrapped(name, model)
    for sample in data["data_samples"]:  # the network's input is half as wide as the image
        sample.set_metainfo({"scale_factor": (0.5, 0.5)})
    found = adapter_of(detector).predict(data)
    images = torch.stack(data["inputs"]).flip(1) / 255  # mmdet's are BGR
    height, width = libraries.SIZE
    if name in libraries.CONFIGS:
        from transformers import RTDetrImageProcessor

        decode = RTDetrImageProcessor().post_process_object_detection
        expected = decode(model(images), threshold=0.0, target_sizes=[(2 * height, 2 * width)] * 2)
    else:
        expected = model(list(images))
        for each in expected:
            each["boxes"] = 2 * each["boxes"]
            each["labels"] = each["labels"] - int(name in ("faster_rcnn", "ssd"))
    for sample, each in zip(found, expected, strict=True):
        assert len(sample.pred_instances) > 5
        torch.testing.assert_close(
            sample.pred_instances.bboxes, each["boxes"], rtol=1e-4, atol=1e-3
        )
        torch.testing.assert_close(sample.pred_instances.scores, each["scores"])
        assert torch.equal(sample.pred_instances.labels, each["labels"])


@pytest.mark.slow
@EVERY
def test_a_gradient_reaches_every_parameter(name):
    detector = libraries.wrapped(name).train()
    batch = libraries.batch(images=12)
    detector.parse_losses(detector.loss(batch.images, batch.samples))[0].backward()
    lack = [
        key
        for key, parameter in detector.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    if name == "ssd":  # learns boxes where an anchor fits an object only
        lack = [key for key in lack if "regression_head" not in key]
    assert lack == []


@ONE_OF_EACH
def test_images_without_objects_have_a_loss(name):
    detector, batch = libraries.wrapped(name).train(), libraries.batch(images=2)
    detector.loss(batch.images[1:], batch.samples[1:])  # has none
    samples = deepcopy(batch.samples[:1])
    boxes_of(samples[0])[0, 2] = boxes_of(samples[0])[0, 0]  # a box without a width
    losses = detector.loss(batch.images[:1], samples)
    assert all(bool(value.isfinite()) for value in losses.values())


@EVERY
def test_training_follows_a_validation_in_inference_mode(name):
    detector = libraries.wrapped(name)
    with torch.inference_mode():
        adapter_of(detector).predict(libraries.raw_batch())
    batch = libraries.batch()
    detector.train().parse_losses(detector.loss(batch.images, batch.samples))[0].backward()


@pytest.mark.slow
@EVERY
def test_operations_are_those_of_torchs_counter(name):
    whole = model = libraries.whole(name)
    detector = libraries.wrapped(name, model)
    norms = []

    def count(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        norms.append(2 * output.numel())

    if name == "faster_rcnn":  # its second stage sees as many regions as it proposes itself
        model = deepcopy(detector)
    for module in model.modules():
        if isinstance(module, NORMS):
            module.register_forward_hook(count)
    images = torch.zeros(1, 3, *libraries.SIZE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        raw_forward(model, images) if model is not whole else model(images)
    expected = counter.get_total_flops() / 2 + sum(norms)
    found = count_macs(detector, lambda x: raw_forward(detector, x), (1, 3, *libraries.SIZE))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@EVERY
def test_a_step_on_a_device_is_that_of_the_cpu(name):
    batch, whole = libraries.batch(), libraries.whole(name)
    if name in libraries.CONFIGS:
        whole.config.num_denoising = 0  # whose random numbers depend on the device
    torch.manual_seed(0)
    expected = libraries.wrapped(name, whole).train().loss(batch.images, batch.samples)
    detector = libraries.wrapped(name, whole).train()
    with StandIn():
        detector.to(DEVICE)
        samples = [sample.to(DEVICE) for sample in batch.samples]
        torch.manual_seed(0)
        found = detector.loss(batch.images.to(DEVICE), samples)
        sum(found.values()).backward()
        found = {key: value.detach().to("cpu") for key, value in found.items()}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(libraries.CONFIGS))
def test_denoising_runs_on_a_device(name):
    batch, detector = libraries.batch(), libraries.wrapped(name).train()
    with StandIn():
        detector.to(DEVICE)
        samples = [sample.to(DEVICE) for sample in batch.samples]
        losses = detector.loss(batch.images.to(DEVICE), samples)
        assert any("_dn_" in key for key in losses)
        sum(losses.values()).backward()


def test_frozen_norms_stay_frozen_and_compute_the_same():
    from transformers import RTDetrForObjectDetection

    frozen = RTDetrForObjectDetection(
        type(libraries.whole("rt_detr").config)(
            **{k: v for k, v in deepcopy(libraries.DETR).items() if k != "model_type"},
            num_labels=3,
            freeze_backbone_batch_norms=True,
        )
    ).eval()
    images = libraries.batch().images
    detector = libraries.wrapped("rt_detr", frozen)
    torch.testing.assert_close(raw_forward(detector, images)[0], frozen(images).logits)
    detector.train()
    norms = [m for m in detector.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(m.training or m.weight.requires_grad for m in norms)
    thaw_norms(frozen)
    torch.testing.assert_close(raw_forward(detector.eval(), images)[0], frozen(images).logits)


# Configurations and files ---------------------------------------------------------------------

RT_DETR = ("detector=transformers", f"detector.options.config={libraries.DETR}".replace("'", ""))
SSDLITE = ("detector=torchvision", "detector.options.name=ssdlite320_mobilenet_v3_large")
LOAD = """
import sys, torch, ldt
from ldt.deployment.prediction import Predictor
sys.path.insert(0, sys.argv[1])
import small_libraries as libraries
from ldt.deployment.to_runtime import export_model
from ldt.detectors.adapter import Detector
detector = ldt.load_pruned(sys.argv[2])
found = Detector(detector, tuple(map(int, sys.argv[4:]))).predict(libraries.raw_batch())
torch.save([dict(s.pred_instances.items()) for s in found], sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("given", [RT_DETR, SSDLITE], ids=["transformers", "torchvision"])
def test_a_run_from_the_configuration_to_a_file_that_predicts_the_same(
    given, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = tiny(tmp_path, "method=ldt", *given)
    run(config, tmp_path / "run")
    rounds = summary(tmp_path / "run")["rounds"]
    kept = rounds[-1]["params"] / rounds[0]["params"]
    assert kept == pytest.approx(0.5, abs=0.02)
    file = tmp_path / "run" / f"round-{len(rounds) - 1}.ckpt"
    detector = ldt.load_pruned(file)
    expected = adapter_of(detector).predict(libraries.raw_batch())
    out = tmp_path / "found.pt"
    tests = str(Path(__file__).parents[1])
    done = python("-c", LOAD, tests, str(file), str(out), *map(str, libraries.SIZE), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for sample, found in zip(expected, torch.load(out, weights_only=True), strict=True):
        for key, value in sample.pred_instances.items():
            assert torch.equal(value, found[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(libraries.CONFIGS))
def test_a_model_that_is_built_can_be_cut_and_saved(name, tmp_path):
    options: Any = {"input_size": libraries.SIZE, "repair": "none", "criterion": "l1"}
    steps = [
        {"type": "Resize", "scale": (libraries.SIZE[1], libraries.SIZE[0]), "keep_ratio": False}
    ]
    model = libraries.whole(name)
    result = ldt.prune(model, [libraries.raw_batch()], rate=0.1, resize=steps, **options)
    assert len(model(libraries.batch().images).logits) == 2  # it is still whole
    loaded = ldt.load_pruned(result.save(tmp_path / "pruned.ckpt"))
    images = libraries.batch().images
    pairs = (raw_forward(loaded, images), raw_forward(result.detector.eval(), images))
    for one, other in zip(*pairs, strict=True):
        assert torch.equal(one, other)


def library_config(**options: Any) -> dict[str, Any]:
    return model_config("ldt::transformers.py", options, 3, pretrained=True)


@pytest.mark.slow
def test_a_folder_gives_config_and_weights(tmp_path):
    model: Any = libraries.whole("rt_detr")
    model.save_pretrained(tmp_path)
    plain = library_config(name=str(tmp_path))
    assert plain["init_cfg"] == {"type": "Pretrained", "checkpoint": str(tmp_path)}
    images = libraries.batch().images
    torch.testing.assert_close(
        raw_forward(build(plain).eval(), images)[0], model(images).logits, rtol=1e-4, atol=1e-4
    )
    other = model_config("ldt::transformers.py", {"name": str(tmp_path)}, 5, pretrained=True)
    assert raw_forward(build(other).eval(), images)[0].shape[-1] == 5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "model_type is not given.*Type detector.options.name=PekingU/rtdetr_r50vd"),
        ({"config": {"model_type": "bert"}}, "is 'bert'; allowed: rt_detr, rt_detr_v2, d_fine"),
        ({"config": {"model_type": "rt_detr", "d_modle": 3}}, "d_modle: no key of RTDetrConfig"),
        ({"config": {"model_type": "rt_detr", "d_model": "x"}}, "d_model"),
        ({"config": {"model_type": "rt_detr", "backbone_config": {"model_type": "timm_backbone"}}},
         "'timm_backbone'; allowed: rt_detr_resnet, hgnet_v2"),
    ],
)  # fmt: skip
def test_a_config_that_is_none_is_refused_in_a_line(options, told):
    with pytest.raises(ValueError, match=told) as refused:
        library_config(**options)
    assert "\n" not in str(refused.value)


def test_a_name_that_cannot_be_fetched_is_told_in_a_line(monkeypatch):
    import transformers

    def offline(*_: object) -> Any:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", offline)
    with pytest.raises(ValueError, match=r"hub does not give it.*Without a network") as refused:
        library_config(name="PekingU/rtdetr_r50vd")
    assert "\n" not in str(refused.value)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'ldt\[transformers\]'"):
        library_config(config={"model_type": "rt_detr"})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "detector.options.name is not given; allowed: fcos_resnet50_fpn"),
        ({"name": "maskrcnn_resnet50_fpn"}, "'maskrcnn_resnet50_fpn' is not known"),
    ],
)
def test_a_builder_that_is_not_known_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        model_config("ldt::torchvision.py", options, 3, pretrained=False)


def test_models_of_other_kinds_are_refused():
    import torchvision
    import transformers

    bert: Any = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    )
    for model in (bert, torchvision.models.squeezenet1_0()):
        with pytest.raises(ValueError, match=f"detector is a {type(model).__name__}; allowed"):
            ldt.prune(model, [libraries.raw_batch()], rate=0.1)


@pytest.mark.slow
def test_mmdet_does_not_import_transformers_and_others_can():
    code = (
        "import sys, ldt; from ldt.detectors.models import use_mmdet; use_mmdet(); "
        "assert 'transformers' not in sys.modules; import transformers; transformers.RTDetrConfig"
    )
    done = python("-c", code, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]


def exported(detector: Detector, outputs: str, file: Path) -> Any:
    about: Any = {"outputs": outputs, "classes": [], "size": list(libraries.SIZE), "resize": []}
    numbers = {"max_detections": MOST, "parameters": 0, "macs": 0}
    export_model(detector, About(**about, **numbers, pad_value=detector.pad_pixel()), file)
    return open_session(file, threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(libraries.CONFIGS))
def test_detrs_are_exported_with_their_boxes(name, tmp_path):
    detector = adapter_of(libraries.wrapped(name))
    session = exported(detector, "detections", tmp_path / "a.onnx")
    images = [image[None].float() for image in libraries.raw_batch(seed=5)["inputs"]]
    differences = compare(detector, session, images)
    assert differences.boxes == 2 * 20
    assert differences.missing == 0
    assert differences.score <= SCORE
    assert differences.box <= BOX


@pytest.mark.slow
def test_torchvisions_detectors_are_exported_as_raw_maps_only(tmp_path):
    detector = adapter_of(libraries.wrapped("fcos"))
    with pytest.raises(ValueError, match=r"TorchvisionDetector cannot be exported: .*\(--raw\)"):
        exported(detector, "detections", tmp_path / "a.onnx")
    session = exported(detector, "raw", tmp_path / "b.onnx")
    image = libraries.raw_batch()["inputs"][0].float()
    expected = detector.raw_maps(detector.network_input(one_image(image, libraries.SIZE)))
    for one, other in zip(expected, session(image[None].numpy()), strict=True):
        torch.testing.assert_close(one, torch.as_tensor(other), rtol=1e-3, atol=1e-4)


# Files of others ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benign(tmp_path_factory) -> Path:
    options: Any = {"input_size": libraries.SIZE, "repair": "none", "criterion": "l1"}
    steps = [{"type": "Resize", "scale": (96, 64), "keep_ratio": False}]
    model, data = libraries.whole("rt_detr"), [libraries.raw_batch()]
    result = ldt.prune(model, data, rate=0.1, resize=steps, **options)
    return result.save(tmp_path_factory.mktemp("benign") / "a.ckpt")


@pytest.fixture
def no_network(monkeypatch):
    """Whatever would leave this machine, or run code of a repository, raises what is no refusal."""
    import huggingface_hub
    import transformers
    from transformers import dynamic_module_utils

    def forbidden(*_: object, **__: object) -> Any:
        raise AssertionError("this would fetch or execute something")

    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", forbidden)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", forbidden)
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", forbidden)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", forbidden)
    monkeypatch.setattr(dynamic_module_utils, "get_class_from_dynamic_module", forbidden)


EVIL = "evil/model"
ATTACKS = {
    "a name of the hub": (("name",), EVIL, "short text"),
    "a name without a slash": (("name",), "evil", "unexpected keyword"),
    "code of a repository": (("config", "auto_map"), {"AutoConfig": "a.B"}, "no key of"),
    "code of another one": (("config", "auto_map"), {"AutoConfig": "e/v--a.B"}, "short text"),
    "trust": (("config", "trust_remote_code"), True, "no key of RTDetrConfig"),
    "a backbone of timm": (("config", "backbone"), "resnet50", "no key of RTDetrConfig"),
    "its weights": (("config", "use_pretrained_backbone"), True, "no key of RTDetrConfig"),
    "a config of timm": (("config", "backbone_config"), {"model_type": "timm_backbone"},
                         "allowed: rt_detr_resnet, hgnet_v2"),
    "a backbone of the hub": (("config", "backbone_config", "_name_or_path"), EVIL, "letters"),
    "a kernel of the hub": (("config", "attn_implementation"), EVIL, "short text"),
    "another kernel": (("config", "attn_implementation"), "flash_attention_2", "no key of"),
    "quantisation": (("config", "quantization_config"), {"a": 1}, "no key of RTDetrConfig"),
    "another model": (("config", "model_type"), "bert", "allowed: rt_detr, rt_detr_v2, d_fine"),
    "a config that is a name": (("config",), "evil", "is not a mapping"),
    "a call as activation": (("config", "activation_function"), "torch.load", "cannot build"),
    "anchors without end": (("config", "anchor_image_size"), [2**16, 2**16], "no key of"),
    "a wide network": (("config", "d_model"), 2**15, "far larger than its weights"),
    "a deep network": (("config", "decoder_layers"), 2**16, "far larger than its weights"),
    "a network of nothing": (("config", "encoder_attention_heads"), 0, "cannot be built"),
    "an own model": (("model",), "evil", "cannot be built"),
    "another builder": (("type",), "TorchvisionDetector", "unexpected keyword"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "value", "told"), ATTACKS.values(), ids=ATTACKS)
def test_a_file_can_say_only_what_describes_a_network(
    benign, tmp_path, no_network, keys, value, told
):
    content = torch.load(benign, weights_only=True)
    record = content["ldt"]["model"]
    for key in keys[:-1]:
        record = record[key]
    record[keys[-1]] = value
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=re.escape(told)) as refused:
        ldt.load_pruned(tmp_path / "evil.ckpt")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_weights_that_a_file_names_are_not_fetched(benign, tmp_path, no_network):
    content = torch.load(benign, weights_only=True)
    content["ldt"]["model"]["init_cfg"] = {"type": "Pretrained", "checkpoint": EVIL}
    torch.save(content, tmp_path / "a.ckpt")
    own, theirs = ldt.load_pruned(benign), ldt.load_pruned(tmp_path / "a.ckpt")
    assert theirs.init_cfg is None
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, own.state_dict()[key])


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"name": "maskrcnn_resnet50_fpn"}, "is not known"),
        ({"name": "torch.load"}, "is not known"),
        ({"weights": "DEFAULT"}, "unexpected keyword"),
        ({"builder": {"weights": "DEFAULT"}}, "allowed: thresholds"),
        ({"builder": {"weights_backbone": "DEFAULT"}}, "allowed: thresholds"),
        ({"builder": {"box_roi_pool": {"type": "nms"}}}, "allowed: thresholds"),
        ({"builder": {"score_thresh": "a"}}, "allowed: thresholds"),
    ],
)
def test_a_file_of_torchvision_builds_what_is_known_without_weights(record, told, no_network):
    model = {"type": "TorchvisionDetector", "name": "ssdlite320_mobilenet_v3_large"}
    model |= {
        "num_classes": 3,
        "custom_imports": {"imports": ["ldt.detectors.torchvision_detector"]},
    }
    about = {"classes": ["a", "b", "c"], "structure": {}, "predictors": [], "neck": "neck"}
    content = {"state_dict": {}, "ldt": {"model": model | record, **about, "input_size": [64, 64]}}
    with pytest.raises(ValueError, match=told):
        detector_of(checked(content))


def test_repeating_a_run_fetches_nothing_that_it_names(tmp_path, no_network):
    named = ("detector=transformers", "detector.options.name=evil")
    configured(tmp_path, "a", OmegaConf.to_container(tiny(tmp_path, *named), resolve=True))
    with pytest.raises(ValueError, match=r"it fetches detector.options.name='evil'.*--trust"):
        repetition.repeat(tmp_path / "a", tmp_path / "b")
