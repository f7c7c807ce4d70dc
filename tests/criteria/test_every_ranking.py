"""Every method prunes with every ranking: the comparison lets each method choose its ranking."""

from functools import cache
from pathlib import Path

from sampled import sampled

import ldt  # first: before mmdet

# isort: split
import pytest
from short_runs import tiny
from small import CONF, case, composed
from test_every_criterion import METHODS
from torch import nn

from ldt.build import build_data
from ldt.criteria.methods import find_method
from ldt.evaluation.profiling import count_parameters
from ldt.loop.gradual_masking import GradualPruning
from ldt.pruning.budget import RANKINGS, TOLERANCE, Limits
from ldt.pruning.costs import CostModel

GRADUAL = [n for n in METHODS if "\ngradual:\n" in Path(CONF, f"method/{n}.yaml").read_text()]
AT_ONCE = [name for name in METHODS if name not in GRADUAL]
RATE = 0.3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    module = build_data(tiny(tmp_path_factory.mktemp("scenes"), "dataset.train=4"))
    module.prepare_data()
    return module


@cache
def detector() -> nn.Module:
    return case("gfl_tiny").model


@pytest.mark.slow
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("name", sampled(AT_ONCE, 4))
def test_a_method_meets_the_rate(name: str, ranking: str, data) -> None:
    criterion = find_method(name).criterion  # an instance: scored once, whatever the method says
    images = 4 if name == "ldt" else 2
    result = ldt.prune(
        detector(), data, rate=RATE, criterion=criterion, ranking=ranking, calibration_images=images
    )
    removed = 1 - count_parameters(result.detector) / count_parameters(detector())
    assert removed == pytest.approx(RATE, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("name", GRADUAL)
def test_a_gradual_method_meets_the_rate(name: str, ranking: str) -> None:
    subject = case("shared")
    graph = subject.graph()
    total = count_parameters(subject.model)
    gradual = GradualPruning(**{**composed(f"method={name}").method.gradual, "interval": 1})
    gradual.begin(
        graph,
        CostModel(graph, "params"),
        save=RATE * total,
        tolerance=0.02 * total,
        ranking=ranking,
        limits=Limits(min_channels=2),
        original={},
    )
    while not gradual.done:
        subject.target.detection_loss(subject.batches[0]).backward()
        gradual.after_batch()
    assert gradual.events > 1
    graph.remove(gradual.end())
    assert 1 - count_parameters(subject.model) / total == pytest.approx(RATE, abs=0.02)
