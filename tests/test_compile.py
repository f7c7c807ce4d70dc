"""Compiled backbones and necks: they compute the same, and leave names, copies and cuts alone."""

import copy
from functools import partial

import pytest
import torch
from sampled import sampled
from short_runs import rows, tiny
from small import composed
from test_module import many, module_of

from ldt import experiment
from ldt.build import check_config
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.detectors.adapter import Detector
from ldt.module import DetectorModule

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def calls(monkeypatch):
    """Graphs are captured but not translated to machine code; the number of their calls."""
    found: list[str] = []

    def backend(graph, _inputs):
        def run(*arguments):
            found.append("called")
            return graph(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield found
    torch.compiler.reset()


def loss_of(module: DetectorModule) -> tuple[torch.Tensor, list[torch.Tensor]]:
    module.zero_grad()
    total = module.training_step(many(), 0)
    total.backward()
    return total.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", sampled(["gfl_tiny", "yolox_nano"]))
def test_a_compiled_step_is_a_plain_one(name, calls):
    module = module_of(name).train()
    names, modules = list(module.state_dict()), [type(m) for m in module.modules()]
    twin = copy.deepcopy(module)
    module.adapter.compile()
    loss, gradients = loss_of(module)
    assert len(calls) >= 2
    plain_loss, plain_gradients = loss_of(twin)
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(gradients, plain_gradients)
    assert list(module.state_dict()) == names
    assert [type(m) for m in module.modules()] == modules


def test_only_training_steps_are_compiled(calls):
    """Criteria hang hooks on layers within, which a compiled graph would not call."""
    module = module_of().train()
    module.adapter.compile()
    module.training_step(many(), 0)
    calls.clear()
    seen = []
    layer = module.detector.backbone.conv1
    hook = layer.register_forward_hook(lambda *_: seen.append(1))
    module.adapter.features(module.adapter.prepare(many()))
    hook.remove()
    copied = copy.deepcopy(module)
    loss_of(copied)
    assert seen
    assert not calls
    assert all("forward" not in m.__dict__ for m in (*module.modules(), *copied.modules()))


def test_a_run_is_compiled_again_after_every_cut(tmp_path, calls, monkeypatch):
    compiled = []
    plain = Detector.compile
    monkeypatch.setattr(Detector, "compile", lambda self: compiled.append(1) or plain(self))
    options = ["method=l1", "recipe.ema=0.05"]
    experiment.run(tiny(tmp_path, *options, "trainer.compile=true"), tmp_path / "compiled")
    assert len(compiled) == 3  # the base and two rounds
    assert calls
    experiment.run(tiny(tmp_path, *options), tmp_path / "plain")
    for one, other in zip(rows(tmp_path / "compiled"), rows(tmp_path / "plain"), strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-3, nan_ok=True)


def test_ldt_measures_gradients_at_a_compiled_neck(calls):
    from test_module import fit

    module = module_of(epochs=1, warmup=0)
    module._compiled = True
    terms = LDTLoss(alpha="auto", beta="auto", warmup_epochs=0)
    fit(module, [many()] * 2, terms)
    assert calls
    assert all(0 < weight < 1e4 for weight in terms.weights.known.values())


def test_masking_refuses_compiled_layers():
    config = composed("run_name=x", "method=group_fisher_gradual", "trainer.compile=true")
    with pytest.raises(ValueError, match=r"trainer.compile=true .*type trainer.compile=false"):
        check_config(config)
