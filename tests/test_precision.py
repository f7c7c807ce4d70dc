"""Training in half precision, with and without a gradient scaler; the scaler runs on CPUs too."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from object_vectors import make_features, make_objects
from small import composed
from test_module import fit, many, module_of
from torch import Tensor, nn

from ldt.build import check_config
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.discriminant import discriminants_of, location_aware_discriminants
from ldt.location import object_vectors
from ldt.module import NonFiniteLossError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def mixed(precision: Any, scale: float = 2.0**16) -> MixedPrecision:
    """Mixed precision as on a GPU; Lightning itself has no float16 on CPUs."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if precision == "16-mixed" else None
    return MixedPrecision(precision, "cpu", scaler)


class Gradients(L.Callback):
    """The gradients' norm at each update, after clipping."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.norms: list[float] = []
        self.scales: list[float] = []
        self.weights = _flat(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.norms.append(_norm(pl_module))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scales.append(scaler.get_scale() if scaler else 1.0)


def _flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def _norm(module: nn.Module) -> float:
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


@pytest.mark.parametrize("name", ["gfl_tiny", "atss_tiny", "yolox_nano", "yolof_tiny"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_detectors_train_with_clipped_gradients(name, precision):
    if (name, precision) == ("yolof_tiny", "16-mixed"):
        pytest.skip("autocast keeps YOLOF's exponentials in float32 on GPUs only")
    module, seen = module_of(name, epochs=1, warmup=0), Gradients()
    terms = LDTLoss(alpha=5e-4, beta=7.5, warmup_epochs=0)
    options = {"plugins": [mixed(precision, 2.0**8)], "gradient_clip_val": 1e-2}
    logged = fit(module, [many()] * 3, terms, seen, **options).callback_metrics
    assert all(value.isfinite() for value in logged.values())
    assert logged["train/loss_ld"] != 0
    taken = [norm for norm in seen.norms if math.isfinite(norm)]  # the scaler skips the others
    assert len(taken) > 1
    assert taken == pytest.approx([1e-2] * len(taken), rel=1e-3)
    assert not torch.equal(seen.weights, _flat(module))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_the_weights_of_ldt_are_those_of_full_precision(precision):
    known = []
    for plugins in ([], [mixed(precision, 2.0**8)]):
        terms = LDTLoss(alpha="auto", beta="auto", warmup_epochs=0)
        fit(module_of(epochs=1, warmup=0), [many()] * 2, terms, plugins=plugins)
        known.append(terms.weights.known)
    assert known[1] == pytest.approx(known[0], rel=0.2)


def test_a_scale_that_is_too_high_skips_the_step_and_decreases():
    module, seen = module_of(epochs=1, warmup=0), Gradients()
    terms = LDTLoss(alpha="auto", beta="auto", warmup_epochs=0)
    fit(module, [many()] * 2, terms, seen, plugins=[mixed("16-mixed", 2.0**60)])
    assert seen.scales == [2.0**59, 2.0**58]
    assert torch.equal(seen.weights, _flat(module))
    assert terms.weights.known == {}  # overflowing gradients tell nothing


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_a_loss_that_is_not_finite_ends_the_training_and_names_the_precision(precision):
    module = module_of(epochs=1)
    module.loss_terms["x"] = lambda maps, *_: {"loss_x": maps[0].sum() * torch.inf}
    with pytest.raises(NonFiniteLossError, match=r"^loss_x is not finite .*trainer.precision=32"):
        fit(module, [many()], plugins=[mixed(precision)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_discriminants_are_in_full_precision(dtype):
    maps, objects = [f.to(dtype) for f in make_features()], make_objects()
    plain = location_aware_discriminants(maps, objects)
    vectors = [object_vectors(f, objects).detach().requires_grad_() for f in maps]
    with torch.autocast("cpu", dtype):
        mixed = location_aware_discriminants(maps, objects)
        loss = discriminants_of([v * 1.0 for v in vectors], objects.labels).loss_ld
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
    loss.backward()
    assert all(v.dtype == v.grad.dtype == torch.float32 for v in vectors)


def test_masking_refuses_scaled_gradients():
    config = composed("run_name=x", "method=group_fisher_gradual", "trainer.precision=16-mixed")
    with pytest.raises(ValueError, match=r"trainer.precision=16-mixed .*type trainer.precision="):
        check_config(config)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_an_average_whose_steps_are_rounded_off_is_refused(precision):
    options = ["run_name=x", f"trainer.precision={precision}"]
    with pytest.raises(ValueError, match=r"recipe\.ema=0\.0001: type trainer\.precision="):
        check_config(composed("detector=yolox_s", "recipe=paper_yolox", *options))
    check_config(composed(*options))
