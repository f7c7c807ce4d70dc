"""The detectors of torchvision: FCOS, RetinaNet, Faster R-CNN, SSD, SSDLite.

All that is used of ``torchvision.models`` is here.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from ldt.detectors.library_detector import LibraryDetector, need_text, thaw_norms, truths

log = logging.getLogger(__name__)
KINDS = (FCOS, RetinaNet, FasterRCNN, SSD)
WITH_BACKGROUND = (FasterRCNN, SSD)  # their class 0
BUILDERS = (
    *("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"),
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"),
    *("fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"),
    *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
)
OPTIONS = re.compile(  # of builders: thresholds, numbers of boxes and of samples
    r"(box_|rpn_|)(score|nms|fg_iou|bg_iou)_thresh|(box_|)detections_per_img|topk_candidates|"
    r"(box_|rpn_)(batch_size_per_image|positive_fraction)|rpn_(pre|post)_nms_top_n_(train|test)|"
    r"center_sampling_radius|iou_thresh|positive_fraction"
)


class FeatureMaps(nn.Module):
    """A neck that takes and returns a dict of maps, as one that returns them in a tuple."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, given: Any) -> tuple[Tensor, ...]:
        """Return the maps."""
        return tuple(self.part(given).values())


class _Prepared(nn.Module):
    """In place of the library's transform: mmdet's preprocessor has normalised and padded."""

    def __init__(self, sizes: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__()
        self.sizes = list(sizes)

    def forward(self, images: Tensor, targets: Any) -> tuple[ImageList, Any]:
        """Return the images with their sizes without padding, within which boxes end."""
        return ImageList(images, self.sizes), targets

    def postprocess(self, result: Any, *_: object) -> Any:
        """Return detections as they are, in pixels of the network's input."""
        return result


@MODELS.register_module()
class TorchvisionDetector(LibraryDetector):
    """A detector of torchvision, built by the name of its builder, without any weights.

    Args:
        name: of the builder, one of ``BUILDERS``.
        num_classes: number of classes, without a background.
        builder: numbers for the builder, those that match ``OPTIONS``.
        data_preprocessor: config of mmdet's preprocessor; by default the library's normalisation.
        init_cfg: see :class:`LibraryDetector`.
        model: a model that is built already, whose modules are taken.

    Attributes:
        undecoded: why a file for a runtime cannot contain the decoding of boxes.

    Raises:
        ValueError: there is no such builder, or an option is not allowed.
    """

    undecoded = "torchvision's decoding of boxes has no fixed shapes; its raw maps can be (--raw)"

    def __init__(
        self,
        name: str,
        num_classes: int,
        builder: Mapping[str, float] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        whole: Any = _built(name, num_classes, builder or {}) if model is None else model
        super().__init__(data_preprocessor or _preprocessor(whole.transform), init_cfg)
        self.name, self.bbox_head = name, whole
        self.first_class = int(isinstance(whole, WITH_BACKGROUND))
        backbone = whole.backbone
        del whole.backbone  # given as maps instead
        pyramid = isinstance(backbone, BackboneWithFPN)
        self.backbone = backbone.body if pyramid else backbone
        self.neck = FeatureMaps(backbone.fpn if pyramid else nn.Identity())
        whole.transform, whole.num_classes = _Prepared(), num_classes
        self.two_stages = isinstance(whole, FasterRCNN)
        if self.two_stages:
            self.test_cfg.rpn = {"max_per_img": whole.rpn.post_nms_top_n()}

    @classmethod
    def complete(cls, config: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`LibraryDetector.complete`; there is nothing to look up.

        Raises:
            ValueError: no builder is named, or one that is not known.
        """
        need_text(config, "name", BUILDERS)
        return config

    @classmethod
    def around(cls, model: nn.Module) -> "TorchvisionDetector":
        """Wrap a model of torchvision that is built already; it is taken apart.

        Raises:
            ValueError: it is of another kind.
        """
        if not isinstance(model, KINDS):
            known = ", ".join(kind.__name__ for kind in KINDS)
            raise ValueError(
                f"detector is a {type(model).__name__}; allowed of torchvision: {known}"
            )
        thaw_norms(model)
        classes = _class_count(model) - int(isinstance(model, WITH_BACKGROUND))
        return cls("", classes, model=model).train(model.training)

    def pretrained_state(self, name: str) -> dict[str, Tensor]:
        """Fetch the library's weights, under our names."""
        weights = getattr(get_model_weights(self.name), name)
        log.warning("detector.pretrained=true: the weights %s are fetched", weights)
        model = get_model(self.name, weights=None, weights_backbone=None)
        model.load_state_dict(weights.get_state_dict(check_hash=True), strict=False)
        return type(self)(self.name, 0, model=model).state_dict()

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of the feature pyramid, or of a backbone without one."""
        return self.neck(self.backbone(batch_inputs))

    @contextmanager
    def _given(self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Iterator[Any]:
        """Let the library's model work with these maps within the context."""
        head: Any = self.bbox_head
        head.transform.sizes = list(sizes)
        head.__dict__["backbone"] = lambda _: _by_name(maps)
        try:
            yield head
        finally:
            del head.__dict__["backbone"]

    def loss(
        self, batch_inputs: Tensor, batch_data_samples: Sequence[DetDataSample]
    ) -> dict[str, Tensor]:
        """Return the library's losses by name."""
        targets = [
            {"boxes": boxes, "labels": labels + self.first_class}
            for boxes, labels in truths(batch_data_samples)
        ]
        with self._given(self.extract_feat(batch_inputs), _sizes(batch_data_samples)) as head:
            found = head(batch_inputs, targets)
        return {key if "loss" in key else f"loss_{key}": value for key, value in found.items()}

    def detections(
        self, batch_inputs: Tensor, batch_data_samples: Sequence[DetDataSample]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Return the library's detections; see :meth:`LibraryDetector.detections`."""
        with self._given(self.extract_feat(batch_inputs), _sizes(batch_data_samples)) as head:
            found = head(batch_inputs)
        for each in found:
            yield each["boxes"], each["scores"], each["labels"] - self.first_class

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: Sequence[DetDataSample] | None = None
    ) -> tuple[Any, ...]:
        """Return the outputs of the head; of Faster R-CNN's second stage for given regions."""
        maps = list(self.extract_feat(batch_inputs))
        head: Any = self.bbox_head
        if not self.two_stages:
            return tuple(head.head(maps).values())
        given: Any = batch_data_samples or ()
        size = cast(tuple[int, int], tuple(batch_inputs.shape[2:]))
        whole = batch_inputs.new_tensor([[0, 0, size[1], size[0]]])
        regions = [sample.proposals.bboxes for sample in given] or [whole] * len(batch_inputs)
        stage = head.roi_heads
        pooled = stage.box_roi_pool(_by_name(maps), regions, [size] * len(regions))
        return *head.rpn.head(maps), *stage.box_predictor(stage.box_head(pooled))


def _built(name: str, num_classes: int, options: Mapping[str, float]) -> nn.Module:
    need_text({"name": name}, "name", BUILDERS)
    for key, value in options.items():
        if not OPTIONS.fullmatch(key) or not isinstance(value, (int, float)):
            raise ValueError(
                f"detector.options.builder.{key[:100]}={str(value)[:100]}; allowed: thresholds and "
                "numbers of boxes, e.g. detections_per_img=300"
            )
    classes = num_classes + int(name.startswith(("fasterrcnn", "ssd")))
    nothing: dict[str, Any] = {"weights": None, "weights_backbone": None}
    return get_model(name, num_classes=classes, **nothing, **options)


def _class_count(model: nn.Module) -> int:
    """Return the number of classes of a model, with a background if it has one."""
    whole: Any = model
    if isinstance(model, FasterRCNN):
        return whole.roi_heads.box_predictor.cls_score.out_features
    if isinstance(model, SSD):
        return whole.head.classification_head.num_columns
    return whole.head.classification_head.num_classes


def _preprocessor(transform: Any) -> dict[str, Any]:
    """Return mmdet's preprocessor for the normalisation of a model."""
    return {
        "type": "DetDataPreprocessor",
        "mean": [255 * value for value in transform.image_mean],
        "std": [255 * value for value in transform.image_std],
        "bgr_to_rgb": True,
        "pad_size_divisor": 32,
    }


def _by_name(maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
    """Return maps under the names that region pooling knows."""
    return OrderedDict((str(index), each) for index, each in enumerate(maps))


def _sizes(samples: Sequence[DetDataSample]) -> list[tuple[int, int]]:
    return [tuple(sample.metainfo["img_shape"][:2]) for sample in samples]
