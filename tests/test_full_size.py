"""Laws of the paper's detectors at full size, on small images: retraining and parts of a batch."""

import os
import socket
from contextlib import contextmanager

import forked
import lightning as L
import pytest
import torch
import torch.distributed as dist
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from omegaconf import OmegaConf
from sampled import sampled
from short_runs import tiny
from small import SCOPE, composed, randomise_norms
from test_module import fit
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import batch_norm

from ldt import experiment
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.detectors.batch_norm import settle_batch_norms
from ldt.detectors.forward import eval_with_gradients
from ldt.detectors.models import model_config
from ldt.module import DetectorModule

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SIZE = (64, 128)
DETECTORS = ("yolox_s", "gfl", "atss", "yolof")


@pytest.mark.parametrize("detector", sampled(DETECTORS))
def test_after_a_cut_every_parameter_of_the_scope_has_a_gradient(detector, tmp_path, monkeypatch):
    held, whole = [], []

    def note(module, _):
        parts = {n: p for n, p in module.detector.named_parameters() if n.startswith(SCOPE)}
        held.append({name for name, part in parts.items() if part.grad is None})
        whole.append(sum(part.numel() for part in parts.values()))

    monkeypatch.setattr(DetectorModule, "on_before_optimizer_step", note)
    options = [f"detector={detector}", "detector.pretrained=false", "method=l1", "prune=oneshot"]
    small = ["recipe.batch_size=2", "dataset.train=2", "dataset.val=1", "prune.images=2"]
    experiment.run(tiny(tmp_path, *options, *small), tmp_path / "run")
    assert len(held) == 2  # a step before the cut and a step after it
    assert bool(held[0]) is (detector != "yolox_s")  # which has no frozen stages
    assert held[1] == set()
    assert whole[1] < whole[0]


# Parts of a batch -------------------------------------------------------------------------------


def batch(counts, seed):
    """A loader's batch: noise, and so many boxes of three classes on each image."""
    generator = torch.Generator().manual_seed(seed)
    images, samples = [], []
    for number, count in enumerate(counts):
        places = torch.Generator().manual_seed(number)
        corner = torch.rand(count, 2, generator=places) * torch.tensor([80.0, 30.0])
        extent = 10 + torch.rand(count, 2, generator=places) * torch.tensor([38.0, 24.0])
        sample = DetDataSample(metainfo={"img_shape": SIZE, "ori_shape": SIZE})
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([corner, corner + extent], 1), labels=torch.arange(count) % 3
        )
        sample.ignored_instances = sample.gt_instances[:0]
        images.append(torch.randint(256, (3, *SIZE), generator=generator).byte())
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}


def joined(parts):
    return {key: [one for part in parts for one in part[key]] for key in parts[0]}


class GatheredBatchNorm(nn.BatchNorm2d):
    """SyncBatchNorm, which refuses tensors on the CPU: statistics of the images of all ranks."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        whole = torch.cat(all_gather(x.contiguous()))
        out = batch_norm(whole, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return out.chunk(dist.get_world_size())[dist.get_rank()]


def module_of(name):
    config = composed(f"detector={name}", "run_name=step")
    plain = OmegaConf.to_container(config, resolve=True)
    options = {"data_preprocessor": {"batch_augments": None}} if name == "yolox_s" else {}
    model = model_config(plain["detector"]["config"], options, 3, pretrained=False)
    torch.manual_seed(0)
    module = DetectorModule(model, ("Car", "Pedestrian", "Cyclist"), plain["recipe"], SIZE)
    randomise_norms(module.detector, torch.Generator().manual_seed(0))
    if name == "gfl":  # boxes weigh by their scores; a process divides by their sum, or by one
        nn.init.zeros_(module.detector.bbox_head.gfl_cls.bias)
    for layer in module.modules():
        if name == "yolox_s" and isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = GatheredBatchNorm
    return module


class Gradients(L.Callback):
    """Keeps those of the first optimizer step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parts = pl_module.detector.named_parameters()
        self.found = {n: p.grad.clone() for n, p in parts if p.grad is not None}


def gradients(name, batches, ldt, **options):
    """The gradients of a step over these batches."""
    seen = Gradients()
    terms = [LDTLoss(alpha=5e-4, beta=7.5, warmup_epochs=0)] if ldt else []
    precision = "32-true" if name == "yolox_s" else "64-true"  # its assigner knows no other
    fit(module_of(name), batches, seen, *terms, precision=precision, **options)
    return seen.found


def same(found, expected):
    """Check that gradients are equal to 1e-5 of each parameter's, or of a small share of all."""
    assert list(found) == list(expected)
    share = 1e-6 if next(iter(found.values())).dtype == torch.float64 else 1e-3
    floor = share * float(torch.stack([part.norm() for part in expected.values()]).norm())
    for name, part in expected.items():
        error = float((found[name] - part).norm()) / max(float(part.norm()), floor)
        assert error < 1e-5, (name, error)


PARTS = [batch((5, 2), 1), batch((3, 0), 2)]
TOGETHER = ("yolox_s", "gfl", "atss")


@contextmanager
def one_of_two(rank, port):
    """Lightning's variables for a process of two."""
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank}.items():
        os.environ[key] = str(value)
    yield
    dist.destroy_process_group()


def child(rank, port, name, file):
    """One of two processes, with its part of the batch."""
    torch.set_num_threads(1)
    with one_of_two(rank, port):
        strategy = "ddp_find_unused_parameters_true"
        torch.save(gradients(name, PARTS, True, strategy=strategy, devices=2), f"{file}-{rank}")


@pytest.mark.parametrize("name", sampled(TOGETHER))
def test_two_processes_take_the_step_of_one(name, tmp_path):
    forked.start_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (port, name, str(tmp_path / "gradients"))
    processes = [forked.CONTEXT.Process(target=child, args=(rank, *given)) for rank in (0, 1)]
    for process in processes:
        process.start()
    expected = gradients(name, [joined(PARTS)], True)
    for process in processes:
        process.join(forked.PATIENCE)
        assert process.exitcode == 0
    for rank in (0, 1):
        same(torch.load(tmp_path / f"gradients-{rank}", weights_only=True), expected)
    without = gradients(name, [joined(PARTS)], False)
    with pytest.raises(AssertionError):  # LDT has a say in it
        same(without, expected)


@pytest.mark.long
def test_parts_of_a_step_accumulate_to_it():
    """ATSS divides by the positives of a part, which follow from its boxes; here they are alike."""
    parts = [batch((5, 2), seed) for seed in (1, 2)]
    expected = gradients("atss", [joined(parts)], False)
    same(gradients("atss", parts, False, accumulate_grad_batches=2), expected)
    with pytest.raises(AssertionError):  # with LDT, each part sees its own objects only
        same(gradients("atss", parts, True, accumulate_grad_batches=2), expected)


# Batch norms of a short training ----------------------------------------------------------------


def gradient_is_finite(adapter, ready):
    with eval_with_gradients(adapter.model):
        weights = list(adapter.model.parameters())
        found = torch.autograd.grad(adapter.detection_loss(ready), weights, allow_unused=True)
        return all(bool(part.isfinite().all()) for part in found if part is not None)


def test_batch_norms_are_settled_only_where_the_loss_has_no_gradient_else():
    module = module_of("yolox_s")
    adapter = module.adapter
    ready = [adapter.prepare(batch((5, 2), 1)), adapter.prepare(batch((3, 1), 2))]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert not settle_batch_norms(adapter, ready)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.mul_(1e-2)  # the maps grow tenfold from layer to layer
    assert not gradient_is_finite(adapter, ready[0])
    assert settle_batch_norms(adapter, ready)
    assert all(gradient_is_finite(adapter, each) for each in ready)
