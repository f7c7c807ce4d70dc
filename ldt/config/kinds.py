"""Allowed values of configuration keys: types with ranges and choices.

They annotate the schema (:mod:`ldt.config`) and the classes that take the same values, are checked
by :mod:`ldt.config.values` and shown by :mod:`ldt.config.reference`.
"""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AllowInfNan

Share = Annotated[float, Gt(0), Lt(1)]
Ratio = Annotated[float, Ge(0), Le(1)]
LayerShare = Annotated[float, Gt(0), Le(1)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
NotNegative = Annotated[float, Ge(0), AllowInfNan(False)]
Count = Annotated[int, Ge(1)]
NaturalNumber = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
SceneCount = Annotated[int, Ge(1), Le(100_000)]
SceneHeight = Annotated[int, Ge(64), Le(1024)]
SceneWidth = Annotated[int, Ge(64), Le(2048)]
Workers = Annotated[int, Ge(0), Le(512)] | Literal["auto"]  # each is a process
LARGEST_SIDE = 8192  # pixels: an image of this size takes 800 MB as floats
Side = Annotated[int, Ge(1), Le(LARGEST_SIDE)]  # of the input
Difficulty = Annotated[float, Ge(0), Le(2), AllowInfNan(False)]
Weight = NotNegative | Literal["auto"]
Cosine = Annotated[list[Ratio], MinLen(3), MaxLen(3)] | Annotated[list, MaxLen(0)]

Augment = Literal["none", "flip", "shift", "mosaic", "config"]
Budget = Literal["params", "macs", "latency"]
Counted = Literal["params", "macs"]
BudgetName = Literal["params", "macs", "flops", "latency"]
RuntimeName = Literal["eager", "onnxruntime", "openvino"]
Precision = Literal["f32", "int8"]
RoundTo = Annotated[Any, NaturalNumber | Literal["auto"]]
Cost = Literal["memory", "flops", "none"]
Covariance = Literal["mean", "sum", "correlation"]
Estimation = Literal["once", "epoch"]
Grouping = Literal["merged", "strict"]
ClipAlgorithm = Annotated[str, Literal["norm", "value"]]
Profiler = Annotated[str, Literal["simple", "advanced", "pytorch"]]
Pad = Literal["none", "square"]
Ranking = Literal["global", "global_per_cost", "global_normalised", "uniform"]
Repair = Literal["none", "bn", "lstsq"]
Channels = Literal["scored", "random"]
Weights = Literal["kept", "fresh"]
Limit = Annotated[int | float | None, Positive | None]
# fmt: off
Metric = Annotated[str, Literal[
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "mAP",
    "kitti_easy", "kitti_moderate", "kitti_hard",
]]
# fmt: on
Objective = Literal[
    "AP",
    "AP50",
    "AP75",
    "mAP",
    "kitti_easy",
    "kitti_moderate",
    "kitti_hard",
    "params",
    "multiply_adds",
    "latency_ms",
]
