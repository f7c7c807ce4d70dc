"""The DETRs with a hybrid encoder of Hugging Face's transformers: RT-DETR, RT-DETRv2, D-FINE.

transformers takes seconds to import, so that this happens where it is used. All that is used of it
is here.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh
from torch import Tensor, nn

from ldt.detectors.library_detector import (
    LibraryDetector,
    outside_inference_mode,
    thaw_norms,
    truths,
)
from ldt.runs.refusal import one_line

log = logging.getLogger(__name__)
Plain = dict[str, Any]

DETECTORS = {  # model_type: classes of the config and of the model
    "rt_detr": ("RTDetrConfig", "RTDetrForObjectDetection"),
    "rt_detr_v2": ("RTDetrV2Config", "RTDetrV2ForObjectDetection"),
    "d_fine": ("DFineConfig", "DFineForObjectDetection"),
}
BACKBONES = {"rt_detr_resnet": "RTDetrResNetConfig", "hgnet_v2": "HGNetV2Config"}
PREPROCESSOR = {
    "type": "DetDataPreprocessor",
    "mean": [0.0, 0.0, 0.0],
    "std": [255.0, 255.0, 255.0],
    "bgr_to_rgb": True,
    "pad_size_divisor": 32,
}
LEFT_OUT = (  # anchors for one size of images, which are otherwise made as needed; and kernels
    *("anchor_image_size", "disable_custom_kernels"),
)
OUTPUTS = ("out_features", "out_indices")  # of a backbone; not among the fields of its config
EXAMPLE = "detector.options.name=PekingU/rtdetr_r50vd, or detector.options.config={model_type: ...}"


def _library() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"detector=transformers needs the package transformers ({error}): pip install "
            "'ldt[transformers]'"
        ) from error
    return transformers


class HybridNeck(nn.Module):
    """The projections of the backbone's maps to one width, and the hybrid encoder behind them."""

    def __init__(self, projections: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.projections, self.encoder = projections, encoder

    @outside_inference_mode
    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return as many maps, of one width."""
        projected = [p(x) for p, x in zip(self.projections, maps, strict=True)]  # type: ignore[arg-type]
        return tuple(self.encoder(projected).last_hidden_state)


@MODELS.register_module()
class TransformersDetector(LibraryDetector):
    """RT-DETR, RT-DETRv2 or D-FINE, built from its config alone.

    Args:
        config: of the model as plain data: ``model_type`` and the fields that this type has. None
            of them can name files, code or anything to fetch.
        num_classes: number of classes.
        data_preprocessor: config of mmdet's preprocessor; by default pixels from 0 to 1.
        init_cfg: see :class:`LibraryDetector`.
        test_cfg: ``max_per_img`` as there, at most one detection per query.
        model: a model that is built already, whose modules are taken; ``config`` is its own.

    Raises:
        ValueError: the config has an unknown key or a value that is not allowed.
        ImportError: transformers is not installed.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        num_classes: int,
        data_preprocessor: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(data_preprocessor or PREPROCESSOR, init_cfg, test_cfg)
        whole: Any = _built(config, num_classes) if model is None else model
        self._frozen_norms = config["freeze_backbone_batch_norms"]
        inner, self.bbox_head = whole.model, whole
        self.backbone = inner.backbone.model
        self.neck = HybridNeck(inner.encoder_input_proj, inner.encoder)
        del inner.backbone, inner.encoder_input_proj, inner.encoder  # given as maps instead
        self.bbox_head.num_classes = num_classes  # type: ignore[assignment]
        for norm in self._fixed_norms():
            norm.requires_grad_(False)

    @classmethod
    def complete(cls, config: Plain) -> Plain:
        """See :meth:`LibraryDetector.complete`; a ``name`` is one of the hub, or a folder.

        Raises:
            ValueError: it is not found, or not one of these detectors.
        """
        config = dict(config)
        name, own = config.pop("name", None), dict(config["config"] or {})
        if name is not None:
            # keys that change with the version of the library that wrote the file are no option
            own = _known(_fetched(name)) | own
            config["init_cfg"] = {"type": "Pretrained", "checkpoint": name}
        own = {"freeze_backbone_batch_norms": False} | own if name is None else own
        return config | {"config": _plain(_config(own, config["num_classes"]))}

    @classmethod
    def around(cls, model: nn.Module) -> "TransformersDetector":
        """Wrap a model of transformers that is built already; it is taken apart.

        Raises:
            ValueError: it is of another kind.
        """
        own: Any = model
        if type(model).__name__ not in {names[1] for names in DETECTORS.values()}:
            known = ", ".join(names[1] for names in DETECTORS.values())
            raise ValueError(
                f"detector is a {type(model).__name__}; allowed of transformers: {known}"
            )
        thaw_norms(own.model.backbone)
        config, count, mode = _plain(own.config), own.config.num_labels, model.training
        detector = cls(config, count, model=model).train(mode)
        detector.own_config = {"type": cls.__name__, "config": config, "num_classes": count}
        detector.own_config["custom_imports"] = {"imports": [__name__]}
        names = own.config.id2label
        setattr(detector, "dataset_meta", {"classes": tuple(names[i] for i in range(count))})  # noqa: B010
        return detector

    def pretrained_state(self, name: str) -> dict[str, Tensor]:
        """Fetch the weights of a model of the hub, or take those of a folder, under our names."""
        log.warning("detector.options.name=%s: its weights are taken from there", name)
        config: Any = self.bbox_head.config
        kind = getattr(_library(), DETECTORS[config.model_type][1])
        model = kind.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, use_safetensors=True
        )
        return type(self).around(model).state_dict()

    def train(self, mode: bool = True) -> "TransformersDetector":
        """Switch the mode; norms of the backbone that the config freezes stay in eval mode."""
        super().train(mode)
        for norm in self._fixed_norms():
            norm.eval()
        return self

    def _fixed_norms(self) -> list[nn.Module]:
        norms: list[nn.Module] = [
            m for m in self.backbone.modules() if isinstance(m, nn.BatchNorm2d)
        ]
        return norms if self._frozen_norms else []

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of the hybrid encoder."""
        return self.neck(self.backbone(batch_inputs).feature_maps)

    @outside_inference_mode
    def _outputs(self, maps: Sequence[Tensor], labels: list[Plain] | None = None) -> Any:
        """Return the library's output for the encoder's maps."""
        from transformers.modeling_outputs import BaseModelOutput

        given = BaseModelOutput(last_hidden_state=list(maps))  # type: ignore[arg-type]
        # the images are represented by a map, which tells their number and device
        return self.bbox_head(None, inputs_embeds=maps[0], encoder_outputs=given, labels=labels)

    def forward_for_tracing(self, images: Tensor) -> list[Tensor]:
        """Return the maps that the transformer reads: those of the neck, projected."""
        inner: Any = self.bbox_head.model
        maps = self.extract_feat(images)
        extra = [maps[-1]] * (len(inner.decoder_input_proj) - len(maps))
        return [p(x) for p, x in zip(inner.decoder_input_proj, [*maps, *extra], strict=True)]

    def loss(
        self, batch_inputs: Tensor, batch_data_samples: Sequence[DetDataSample]
    ) -> dict[str, Tensor]:
        """Return the library's losses, weighted, by name."""
        height, width = batch_inputs.shape[2:]
        sides = batch_inputs.new_tensor([width, height, width, height])
        labels = [
            {"class_labels": classes, "boxes": bbox_xyxy_to_cxcywh(boxes) / sides}
            for boxes, classes in truths(batch_data_samples)
        ]
        return self._outputs(self.extract_feat(batch_inputs), labels).loss_dict

    def detections(
        self, batch_inputs: Tensor, batch_data_samples: Sequence[DetDataSample]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Return the highest scores of all queries and classes of each image.

        See :meth:`LibraryDetector.detections`.
        """
        found = self._outputs(self.extract_feat(batch_inputs))
        height, width = batch_inputs.shape[2:]
        sides = batch_inputs.new_tensor([width, height, width, height])
        boxes = bbox_cxcywh_to_xyxy(found.pred_boxes) * sides
        classes = found.logits.shape[-1]
        most = min(self.test_cfg.get("max_per_img", boxes.shape[1]), boxes.shape[1])
        scores, indices = found.logits.sigmoid().flatten(1).topk(most)
        for own, score, index in zip(boxes, scores, indices, strict=True):
            yield own[index // classes], score, index % classes

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: object = None
    ) -> tuple[Tensor, Tensor]:
        """Return the logits [N, queries, classes] and the relative boxes [N, queries, 4]."""
        found = self._outputs(self.extract_feat(batch_inputs))
        return found.logits, found.pred_boxes


# Configs of transformers ------------------------------------------------------------------------


def _built(plain: Mapping[str, Any], num_classes: int) -> nn.Module:
    """Build a model with random weights; norms that it would freeze are ordinary ones."""
    config = _config({**plain, "freeze_backbone_batch_norms": False}, num_classes)
    return getattr(_library(), DETECTORS[config.model_type][1])(config)


def _config(plain: Mapping[str, Any], num_classes: int) -> Any:
    """Return a config of transformers; no key of it can name a file, code or something to fetch.

    Raises:
        ValueError: it has an unknown key, or a value that is not allowed.
    """
    own = _checked(plain, {kind: names[0] for kind, names in DETECTORS.items()}, "config")
    if own.get("backbone_config") is not None:
        inner = _checked(own["backbone_config"], BACKBONES, "config.backbone_config")
        kind = BACKBONES[inner.pop("model_type")]
        own["backbone_config"] = _made(kind, inner)
    return _made(DETECTORS[own.pop("model_type")][0], own, num_labels=num_classes)


def _made(kind: str, fields: Plain, **more: Any) -> Any:
    try:
        return getattr(_library(), kind)(**fields, **more)
    except Exception as error:  # its checks of types have exceptions of their own
        raise ValueError(f"detector.options.config: {one_line(str(error), 300)}") from error


def _checked(given: object, kinds: Mapping[str, str], where: str) -> Plain:
    """Return a config's fields, all of which its class declares itself."""
    if not isinstance(given, Mapping):
        raise ValueError(
            f"detector.options.{where} is {str(given)[:100]}; allowed: keys and values"
        )
    kind: Any = given.get("model_type")
    if kind not in kinds:
        told = "is not given" if kind is None else f"is {str(kind)[:100]!r}"
        raise ValueError(
            f"detector.options.{where}.model_type {told}; allowed: {', '.join(kinds)}. Type "
            f"{EXAMPLE}"
        )
    allowed = _fields(kinds[kind])
    if strange := [key for key in given if key not in allowed]:
        raise ValueError(
            f"detector.options.{where}.{str(strange[0])[:100]}: no key of {kinds[kind]} that "
            f"describes the network; these are {', '.join(sorted(allowed))}"
        )
    return dict(given)


def _fields(kind: str) -> set[str]:
    """Return the fields that a config's class declares beyond those of every config."""
    library = _library()
    every = {field.name for field in dataclasses.fields(library.PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(getattr(library, kind))}
    left = own - every - set(LEFT_OUT)
    fields = {name for name in left if not name.startswith("_")} | {"model_type"}
    return fields | set(OUTPUTS) if kind in BACKBONES.values() else fields


def _known(given: Mapping[str, Any]) -> Plain:
    """Return the keys of a published config that describe the network.

    Raises:
        ValueError: it is of another kind.
    """
    own = dict(given)
    inner = own.get("backbone_config")
    if isinstance(inner, Mapping) and inner.get("model_type") in BACKBONES:
        fields = _fields(BACKBONES[inner["model_type"]])
        own["backbone_config"] = {k: v for k, v in inner.items() if k in fields}
    if own.get("model_type") in DETECTORS:
        fields = _fields(DETECTORS[own["model_type"]][0])
        own = {key: value for key, value in own.items() if key in fields}
    return own


def _plain(config: Any) -> Plain:
    """Return all fields of a config that describe the network, as plain data."""
    found = _known(config.to_dict())
    found["backbone_config"]["out_features"] = None  # the other one says the same
    return json.loads(json.dumps(found))


def _fetched(name: str) -> Plain:
    """Return the config file of a model of the hub, or of a folder.

    Raises:
        ValueError: it is not found.
    """
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _library().PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"detector.options.name={name}: no folder with a config.json, and Hugging Face's hub "
            f"does not give it ({one_line(str(error), 200)}). Without a network, name a folder, or "
            "describe the network with detector.options.config={model_type: rt_detr}"
        ) from error
