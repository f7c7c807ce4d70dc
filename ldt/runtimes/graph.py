"""A detector as one graph: an image of fixed size goes in, detections or raw maps come out.

Normalisation, channel order and padding of mmdet's preprocessor are part of the graph.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ldt.detectors.adapter import Detector
from ldt.detectors.forward import one_image

OPSET = 17
INPUT = "image"


class RawGraph(nn.Module):
    """Compute the raw output maps of one image.

    Args:
        detector: the detector, which the graph shares.
        size: (height, width) of the image.
    """

    def __init__(self, detector: Detector, size: tuple[int, int]) -> None:
        super().__init__()
        self.detector, self.size = detector, size
        self.model = detector.model  # a part of this module, so that its layers keep their names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the raw maps of an image [1, 3, H, W]: float, pixel values as mmdet loads them."""
        inputs = self.detector.network_input(one_image(image[0], self.size))
        return tuple(self.detector.raw_maps(inputs))

    def output_names(self, outputs: tuple[Tensor, ...]) -> list[str]:
        """Return a name for each output."""
        return [f"map_{index}" for index in range(len(outputs))]


def to_onnx(detector: Detector, path: str | Path, size: tuple[int, int], raw: bool = True) -> Path:
    """Write a detector as an ONNX file for images of a fixed size, one at a time.

    The file's input ``image`` is [1, 3, H, W], float32, pixel values from 0 to 255 in the channel
    order in which mmdet loads images (BGR); nodes are named after the detector's modules
    (``/model/backbone/.../Conv``). The detector is as before afterwards, also after an error.

    Args:
        detector: pruned or not, in any mode; it is exported as in eval mode.
        path: of the file.
        size: (height, width) of the image.
        raw: outputs are the raw maps of the head, ``map_0``, ``map_1``...

    Returns:
        The path.
    """
    if not raw:
        raise NotImplementedError("detections in the graph")
    graph = RawGraph(detector, size)
    image = detector.example().new_zeros(1, 3, *size)
    with evaluating(detector.model), torch.no_grad(), _quiet():
        names = graph.output_names(graph.eval()(image))
        torch.onnx.export(
            graph,
            (image,),
            str(path),
            input_names=[INPUT],
            output_names=names,
            opset_version=OPSET,
            dynamo=False,
        )
    return Path(path)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode; every module has its own mode again on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what tracing says of sizes, which are fixed here, and of its age."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", message=".*legacy TorchScript-based ONNX export")
        warnings.filterwarnings("ignore", message=".*Constant folding")
        yield
