"""What an exported file says of itself: classes, sizes, preparation of images, origin.

A file may come from anyone: what it says is checked before it is used, see :class:`About`.
"""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Len
from pydantic import BaseModel, StrictFloat, StrictInt, ValidationError

from ldt.detectors.untrusted import Printable, Side, checked_steps, first_error

KEY = "ldt"  # of the metadata of an ONNX file, and of the rt_info of an OpenVINO model
MOST_TEXT = 2**20  # characters
Whole = Annotated[StrictInt, Ge(0), Le(2**62)]
Pixel = Annotated[StrictFloat, Ge(-(2**16)), Le(2**16)]


class About(BaseModel):
    """The metadata of an exported file.

    Attributes:
        outputs: what the graph computes: ``detections`` (boxes [1, K, 4], scores [1, K], labels
            [1, K]) or ``raw`` maps of the head.
        classes: class names in label order.
        size: height and width of the input ``image`` [1, 3, H, W].
        resize: how an image is prepared: mmdet's transforms between loading and packing.
        pad_value: blue, green and red that what is smaller than ``size`` is filled with, to the
            right and below.
        threshold: lowest score of a detection, if the detector has one.
        max_detections: K.
        precision: of the network.
        run, round: what was exported, if it is the round of a run.
        parameters, macs: of the network, by the convention of ``ldt/evaluation/profiling.py``.
        versions: of the packages that wrote the file.
    """

    outputs: Literal["detections", "raw"]
    classes: Annotated[list[Printable], Len(0, 100_000)]
    size: Annotated[list[Side], Len(2, 2)]
    resize: list[dict[str, Any]]
    pad_value: Annotated[list[Pixel], Len(3, 3)]
    threshold: StrictFloat | None = None
    max_detections: Annotated[StrictInt, Ge(1), Le(100_000)]
    precision: Literal["f32", "int8"] = "f32"
    run: Printable | None = None
    round: Whole | None = None
    parameters: Whole
    macs: Whole
    versions: dict[Printable, Printable] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.size[0], self.size[1]

    def text(self) -> str:
        """Return the metadata as they are written."""
        return self.model_dump_json()


def read_about(text: str | None) -> About:
    """Read the metadata of a file.

    Raises:
        ValueError: in one line, what is not allowed.
    """
    if text is None:
        raise ValueError("it has no metadata of ldt: `ldt export` did not write it")
    if len(text) > MOST_TEXT:
        raise ValueError(f"its metadata have {len(text)} characters; allowed: {MOST_TEXT}")
    try:
        about = About.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(first_error(error, "the metadata")) from error
    about.resize = checked_steps(_as_tuples(about.resize))
    return about


def _as_tuples(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return transforms with tuples, which mmdet asks for, in place of JSON's lists."""

    def convert(node: object) -> Any:
        if isinstance(node, dict):
            return {key: convert(value) for key, value in node.items()}
        return tuple(map(convert, node)) if isinstance(node, list) else node

    return [convert(step) for step in steps]
