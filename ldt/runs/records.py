"""The files that tell what a run is: their schemas, and configurations of earlier versions.

A file of another shape is damaged. Numbers may be NaN, as metrics of data without objects are, but
neither infinite nor huge.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Len
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from ldt.config.values import NaturalNumber, Seed
from ldt.runs import files
from ldt.runs.formatting import check_printable

MOVED = {  # class paths in configurations of earlier versions
    "ldt.data.kitti.RoadScenesDataModule": "ldt.data.roadscenes.RoadScenesDataModule",
    "ldt.wandb_log.WandbRun": "ldt.callbacks.wandb_logger.WandbRun",
}
NUMBERS = (int, float)  # but not bool
LARGEST = 1e18  # of a measurement
MEASURED = ("params", "multiply_adds", "rate", "threads")
METRICS = ("AP", "mAP", "kitti_")  # how the names of metrics begin
TIMES_END = "_ms"  # how the names of latencies end
LONGEST_NAME = 255  # characters: names are those of folders


def stored_config(folder: Path) -> dict[str, Any]:
    """Return the stored configuration of a run, with class paths updated; empty if there is none.

    Raises:
        DamagedError: the file is damaged.
    """
    with files.reading(folder / files.CONFIG, "remove the run to repeat it"):
        return _moved(files.read_config(folder))


def _moved(node: object) -> Any:
    """Replace the paths of classes that have moved."""
    if isinstance(node, dict):
        found = {key: _moved(value) for key, value in node.items()}
        if isinstance(target := found.get("_target_"), str):
            found["_target_"] = MOVED.get(target, target)
        return found
    return [_moved(value) for value in node] if isinstance(node, list) else node


# Schemas --------------------------------------------------------------------------------------


def _bounded(value: float) -> float:
    if abs(value) > LARGEST:
        raise ValueError(f"more than {LARGEST:g}")
    return value


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    """Check a round; its other keys may hold anything, but no huge number."""
    if missing := {"round", "params"} - row.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    starts, ends = (*METRICS, "cut/"), TIMES_END
    shown = (k for k in row if k in MEASURED or k.startswith(starts) or k.endswith(ends))
    if wrong := [key for key in shown if type(row[key]) not in NUMBERS]:
        raise ValueError(f"{', '.join(wrong)}: no number")
    numbers = ((key, value) for key, value in row.items() if type(value) in NUMBERS)
    if huge := [key for key, value in numbers if abs(value) > LARGEST]:
        raise ValueError(f"{', '.join(huge)}: more than {LARGEST:g}")
    if not row["params"] > 0:  # nor NaN
        raise ValueError("params: none")
    if not isinstance(row["round"], int) or row["round"] < 0:
        raise ValueError("round: no whole number")
    device = row.get("device", "")
    if not isinstance(device, str) or ("device" in row) > ("threads" in row):
        raise ValueError("device: no text, or without threads")
    if len(device) > LONGEST_NAME or not device.isprintable():
        raise ValueError(f"device: more than {LONGEST_NAME} characters, or not printable")
    return row


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check that no round is told twice: each has a checkpoint of its own."""
    if any(one["round"] >= other["round"] for one, other in pairwise(rows)):
        raise ValueError("the rounds are not in order")
    return rows


def _has_metric(summary: "Finished") -> "Finished":
    if not summary.metric.startswith(METRICS):
        raise ValueError(f"metric: {summary.metric!r} is none")
    if any(type(row.get(summary.metric)) not in NUMBERS for row in summary.rounds):
        raise ValueError(f"a round lacks the metric {summary.metric}")
    return summary


Number = Annotated[int | float, AfterValidator(_bounded)]
Pixels = Annotated[int, Ge(1), Le(10**6)]
Round = Annotated[dict[str, Any], AfterValidator(_measured)]
Rounds = Annotated[list[Round], AfterValidator(_in_order)]
Name = Annotated[str, Len(0, LONGEST_NAME), AfterValidator(check_printable)]
RoundNumber = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
LayerNumber = Literal["in", "out", "params", "multiply_adds", "latency_ms"]
LayerSizes = dict[LayerNumber, Annotated[Number, Ge(0)]]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")  # strict: texts are no numbers


class Git(_Record):
    """The commit of a start, and whether files had changed since."""

    commit: Name = "unknown"
    dirty: bool = False


class Plan(_Record):
    """What a run was asked to remove."""

    rate: Number
    rounds: NaturalNumber
    budget: Literal["params", "macs", "flops", "latency"]


class Finished(_Record):
    """``summary.json`` of a finished run."""

    study: Name
    detector: Name
    dataset: Name
    method: Name
    metric: Name
    seed: Seed
    input_size: Annotated[list[Pixels], Len(2, 2)]
    plan: Plan
    rounds: Annotated[Rounds, Len(1)]
    ldt: bool = False
    git: Git | None = None


class Inputs(_Record):
    """``inputs.json``."""

    data: dict[str, Any]
    model: dict[str, Any]
    weights: dict[str, Any]
    code: dict[str, Any]
    places: list[str] = []


class Times(_Record):
    """``latency_table.json``: where the times were measured, and the times in ms."""

    place: dict[str, str | int]
    times: dict[str, Number]


class Structure(_Record):
    """``structure.json``: sizes of the layers by round, and the layers of each group."""

    rounds: dict[RoundNumber, dict[str, LayerSizes]]
    groups: dict[str, list[str]]


class Start(_Record):
    """Software and hardware of a start, in ``environment.json``."""

    environment: dict[str, str]
    git: Git | None = None


FINISHED = TypeAdapter(Annotated[Finished, AfterValidator(_has_metric)])
ROUNDS = TypeAdapter(Rounds)  # rounds.csv
INPUTS = TypeAdapter(Inputs)
TIMES = TypeAdapter(Times)
STRUCTURE = TypeAdapter(Structure)
STARTS = TypeAdapter(list[Start])
LATENCIES = TypeAdapter(dict[str, Number])  # latency.json


def check(
    file: Path, schema: TypeAdapter[Any], content: object, remedy: str = "remove it to run again"
) -> None:
    """Check that the content of a file has the shape of its kind.

    Args:
        file: the file, for the message.
        schema: one of those of this module.
        content: what was read from the file.
        remedy: what to do about a damaged one.

    Raises:
        DamagedError: it has another shape.
    """
    with files.reading(file, remedy):
        try:
            schema.validate_python(content, strict=True)
        except ValidationError as error:
            raise ValueError(_told(error)) from None


def _told(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False, include_context=False)
    places = [".".join(_keys(each["loc"])) for each in found]
    pairs = zip(places, found, strict=True)
    if missing := [place for place, each in pairs if each["type"] == "missing"]:
        return f"it lacks {', '.join(missing)}"
    reason = found[0]["msg"].removeprefix("Value error, ")
    return f"{places[0]}: {reason}" if places[0] else reason


def _keys(places: Iterable[str | int]) -> Iterator[str]:
    """Keys and indices of an error, without pydantic's names of the types that follow them."""
    return takewhile(lambda text: "[" not in text, map(str, places))
