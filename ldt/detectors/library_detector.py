"""What detectors of other libraries share once they are wrapped as mmdet detectors."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

Truth = tuple[Tensor, Tensor]  # boxes [n, 4] in pixels of the network's input, labels [n]


class LibraryDetector(BaseDetector):
    """A detector of another library as an mmdet detector: its own layers, losses and decoding.

    Subclasses hang the library's modules up as ``backbone``, ``neck`` and ``bbox_head``, so that
    ``prune.scope`` and LDT find them. Objects that are to be ignored are no objects for these
    libraries: their losses know none.

    Args:
        data_preprocessor: config of mmdet's preprocessor.
        init_cfg: ``Pretrained`` with the library's name of the weights to start from, or nothing.
        test_cfg: mmdet's; ``max_per_img`` is the number of detections of an image.

    Attributes:
        own_config: what a checkpoint needs to build it again, if it was built elsewhere; or None.
    """

    bbox_head: nn.Module
    own_config: dict[str, Any] | None = None

    def __init__(
        self,
        data_preprocessor: Mapping[str, Any],
        init_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dict(data_preprocessor), dict(init_cfg) if init_cfg else None)
        self.test_cfg = ConfigDict(test_cfg or {})

    @classmethod
    @abstractmethod
    def complete(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a user's config with all that a checkpoint needs, as plain data.

        Only here may a name be looked up beyond this machine: constructors fetch nothing.
        """

    @abstractmethod
    def pretrained_state(self, name: str) -> dict[str, Tensor]:
        """Fetch the library's weights of this name, under our names of them."""

    def init_weights(self) -> None:
        """Load the weights that ``init_cfg`` names, if any; random ones are there since building.

        Weights of another shape (of the predictors, for another number of classes) stay random.
        """
        given: Any = self.init_cfg or {}
        name = given.get("checkpoint")
        if name is not None:
            own = self.state_dict()
            found = self.pretrained_state(name)
            known = {k: v for k, v in found.items() if k in own and v.shape == own[k].shape}
            self.load_state_dict(known, strict=False)

    @abstractmethod
    def detections(
        self, batch_inputs: Tensor, batch_data_samples: Sequence[DetDataSample]
    ) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Return boxes [n, 4] in pixels of the network's input, scores and labels of each image."""

    def predict(
        self,
        batch_inputs: Tensor,
        batch_data_samples: list[DetDataSample],
        rescale: bool = True,
    ) -> list[DetDataSample]:
        """Return the samples with detections, in pixels of the original image if rescaled."""
        results = []
        found = self.detections(batch_inputs, batch_data_samples)
        for (boxes, scores, labels), sample in zip(found, batch_data_samples, strict=True):
            if rescale:
                boxes = boxes / boxes.new_tensor(sample.metainfo["scale_factor"]).repeat(2)
            results.append(InstanceData(bboxes=boxes, scores=scores, labels=labels))
        return self.add_pred_to_datasample(batch_data_samples, results)


def truths(samples: Sequence[DetDataSample]) -> list[Truth]:
    """Return the objects of each image that have an extent."""
    found = []
    for sample in samples:
        own: Any = sample.gt_instances
        boxes = get_box_tensor(own.bboxes)
        whole = (boxes[:, 2:] > boxes[:, :2]).all(1)
        found.append((boxes[whole], own.labels[whole]))
    return found


def need_text(config: Mapping[str, Any], key: str, known: Sequence[str]) -> str:
    """Return what is given for a key of a detector's config.

    Raises:
        ValueError: nothing, or something else than what is known.
    """
    given = config.get(key)
    if given not in known:
        told = "is not given" if given is None else f"{str(given)[:100]!r} is not known"
        raise ValueError(f"detector.options.{key} {told}; allowed: {', '.join(known)}")
    return str(given)


def thaw_norms(module: nn.Module) -> None:
    """Replace frozen batch norms, which have no channels to prune, by ordinary ones, in place."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("FrozenBatchNorm2d"):
            state = child.state_dict()
            norm = nn.BatchNorm2d(len(state["weight"]), eps=getattr(child, "eps", 1e-5))
            norm.load_state_dict(state, strict=False)
            norm.to(state["weight"].device).train(child.training)
            setattr(module, name, norm)
        else:
            thaw_norms(child)


def outside_inference_mode(function: Any) -> Any:
    """Let a method run outside of torch's inference mode, within which its caller may be.

    The library remembers tensors from call to call; made in that mode, training could not use them.
    """

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped
