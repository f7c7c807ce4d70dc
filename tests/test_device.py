"""Every tensor is made on the device of those it meets, and a step hardly waits for the device.

The device is a stand-in for a GPU (``tests/stand_in.py``), so these laws hold without one.
"""

import copy
import itertools
import math
from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch
from detections import random_samples
from hydra.utils import instantiate
from lightning.pytorch.accelerators import MPSAccelerator
from sampled import sampled
from short_runs import rows, tiny
from small import Batch, case, composed
from stand_in import DEVICE, OnDevice, StandIn, moved, on_stand_in
from test_module import collated, many, module_of
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from ldt import discriminant, experiment, location
from ldt.build import _accelerator
from ldt.callbacks.ema import Average, ExponentialMovingAverage
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.criteria import measures
from ldt.evaluation.metrics import DetectionMetrics
from ldt.loop.pruning_round import Unpruned, prune_round
from ldt.loop.schedule import PruningSchedule

SOLVER, FINITE = "aten._linalg_eigh", "aten._local_scalar_dense"
SILENT = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
SILENT |= {"enable_model_summary": False}
CLASSES = ("Car", "Pedestrian", "Cyclist", "Van")


class WaitsPerStep(L.Callback):
    """What each training step waits for, from its batch on until after its update."""

    def __init__(self, gpu: StandIn) -> None:
        self.gpu, self.steps = gpu, []

    def on_train_batch_start(self, *_: object) -> None:
        self.start = len(self.gpu.waits)

    def on_train_batch_end(self, *_: object) -> None:
        self.steps.append([w for w in self.gpu.waits[self.start :] if w.owner == "ldt"])


def waits_of_steps(name: str, **options: Any) -> list[list[str]]:
    """What our code waits for in the steps of a short training with LDT and an average."""
    terms = LDTLoss(alpha=5e-4, beta=7.5, **options)
    module = module_of(name, epochs=1)
    with StandIn() as gpu:
        watch = WaitsPerStep(gpu)
        plugins = [terms, ExponentialMovingAverage(), watch]
        trainer = on_stand_in(max_epochs=1, callbacks=plugins, gradient_clip_val=35.0, **SILENT)
        trainer.fit(module, DataLoader([many()] * 3, batch_size=None))
    return [[wait.what for wait in step] for step in watch.steps]


# The stand-in ---------------------------------------------------------------------------------


def test_the_stand_in_refuses_what_a_gpu_refuses():
    with StandIn():
        x, i = torch.randn(3, 4).to(DEVICE), torch.arange(3, device=DEVICE)
        assert {x.device, i.device, x.new_zeros(2).device, (x * 2).device} == {DEVICE}
        for wrong in (
            lambda: x + torch.ones(3, 4),
            lambda: torch.cat([x, torch.ones(1, 4)]),
            lambda: x.index_select(0, torch.arange(2)),
            lambda: torch.ones(3)[i],
            lambda: x @ torch.ones(4),
            lambda: torch.rand(3, generator=torch.Generator(), device=DEVICE),
            lambda: x.numpy(),
            lambda: nn.Linear(4, 2)(x),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()


def test_the_stand_in_computes_what_the_cpu_does_and_allows_what_a_gpu_allows():
    weight = torch.randn(4, 2, requires_grad=True)
    x = torch.randn(3, 4)
    (x @ weight).relu().sum().backward()
    with StandIn():
        there = weight.detach().to(DEVICE).requires_grad_()
        (x.to(DEVICE) @ there * torch.tensor(1.0)).relu()[torch.arange(3)].sum().backward()
        assert isinstance(there.grad, OnDevice)
        assert torch.equal(there.grad.cpu(), weight.grad)


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x.unique(), 1),
        (lambda x: x[[0, 1]], 1),
        (lambda x: x.new_tensor([1.0, 2.0]), 1),
        (lambda x: torch.ones(3).to(x), 1),
        (lambda x: torch.ones(3).to(x, non_blocking=True), 0),
        (lambda x: x.new_full((2,), 3.0), 0),
        (lambda x: x.where(x > 0, 0.0).clamp(max=1).sum() + torch.tensor(1.0), 0),
        (lambda x: x.masked_fill_(x > 1, 1.0), 0),
    ],
)
def test_the_stand_in_notes_what_waits(work, waits):
    with StandIn() as gpu:
        x = torch.randn(5).to(DEVICE, non_blocking=True)
        work(x)
    assert len(gpu.waits) == waits


# Waiting --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "memory"),
    sampled([("gfl_tiny", 1), ("yolox_nano", 0), ("atss_tiny", 0), ("yolof_tiny", 0)], 2),
)
def test_a_step_waits_for_the_solver_and_for_the_finite_losses(name, memory):
    steps = waits_of_steps(name, memory=memory, warmup_epochs=1.0)
    # the first steps of an epoch measure the shares of the losses, which takes a copy to the host
    for step in steps:
        assert Counter(step) - Counter(["a copy to the host"]) == Counter([SOLVER, FINITE])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_step_without_a_measurement_copies_nothing_to_the_host(monkeypatch):
    monkeypatch.setattr(LDTLoss, "_representative", lambda _: False)
    assert waits_of_steps("gfl_tiny") == [[SOLVER, FINITE]] * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_planted_wait_is_counted(monkeypatch):
    plain = location.cell_boxes

    def waiting(boxes, shape, map_hw):
        limit = torch.tensor(map_hw, device=boxes.device)
        return plain(boxes, shape, map_hw).clamp(max=int(limit.max()))

    waiting.__code__ = waiting.__code__.replace(co_filename=location.__file__)
    monkeypatch.setattr(location, "cell_boxes", waiting)
    monkeypatch.setattr(LDTLoss, "_representative", lambda _: False)
    (first, *_) = waits_of_steps("gfl_tiny")
    assert Counter(first)[FINITE] == 1 + 4  # scales


# Devices --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_planted_tensor_of_the_cpu_fails(monkeypatch):
    monkeypatch.setattr(discriminant, "total_root", lambda x: x - torch.zeros(x.shape[-1]))
    with pytest.raises(RuntimeError, match="expected all tensors on lazy:0"):
        waits_of_steps("gfl_tiny")


def test_a_planted_tensor_of_the_cpu_fails_in_an_average(monkeypatch):
    with StandIn():
        module = nn.Linear(3, 2).to(DEVICE)
        average = Average(module, 1e-4, 2000)
        average.module.to("cpu")
        average.update_parameters(module)  # the first one copies
        with pytest.raises(RuntimeError, match="expected all tensors on"):
            average.update_parameters(module)


def test_measures_of_object_vectors():
    with StandIn():
        subject = moved(case("pyramid"))
        batch: Batch = subject.batches[0]
        maps = subject.target.features(batch)
        shape = (int(maps[0].shape[2]), int(maps[0].shape[3]))
        assert location.attention(batch.objects, shape, 3).device == DEVICE
        x = location.object_vectors(maps[0], batch.objects)
        labels = batch.objects.labels
        for measure in (measures.eigenvalues, measures.discriminant_directions):
            assert measure(x, labels).device == DEVICE
        ratio = measures.channel_ratio(x, labels)
        assert measures.discriminative_channels(ratio, 5e-3, 2).device == DEVICE
        for covariance in discriminant.COVARIANCES:
            found = discriminant.location_aware_discriminants(
                maps, batch.objects, covariance=covariance
            )
            assert {part.device for part in found} == {DEVICE}


def test_metrics_of_detections_on_the_device():
    def metrics(device: torch.device | str) -> dict[str, float]:
        metric = DetectionMetrics(CLASSES).to(device)
        metric.update([sample.to(device) for sample in random_samples(0)])
        return metric.compute()

    with StandIn():
        there = metrics(DEVICE)
    assert there == pytest.approx(metrics("cpu"), nan_ok=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("repair", ["bn", "lstsq"])
def test_a_round_of_pruning(repair):
    detector = case("gfl_tiny").target
    plan: Any = {"rate": 0.3, "rounds": 1, "base_epochs": 1, "retrain_epochs": 1}
    schedule = PruningSchedule(**plan, repair=repair)
    with StandIn():
        subject = moved(case("gfl_tiny"))
        detector = subject.target
        criterion = instantiate(composed("method=ldt").method.criterion)
        size = Unpruned.of(detector)
        prune_round(detector, criterion, subject.batches, schedule, 1, size)
        assert all(p.device == DEVICE for p in detector.model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_whole_run_on_the_device_is_one_on_the_cpu(tmp_path, monkeypatch):
    options = ["method=ldt", "recipe.ema=0.05", "ldt.memory=1", "recipe.channels_last=false"]
    options += ["prune=oneshot"]  # in software, each call of the device takes long
    experiment.run(tiny(tmp_path, *options), tmp_path / "cpu")
    monkeypatch.setattr(L, "Trainer", on_stand_in)
    with StandIn():
        experiment.run(tiny(tmp_path, *options), tmp_path / "gpu")
    for here, there in itertools.zip_longest(rows(tmp_path / "cpu"), rows(tmp_path / "gpu")):
        assert here == pytest.approx(there, rel=1e-3, abs=1e-4, nan_ok=True)


def test_weights_are_ordered_as_the_maps_on_the_device_and_stay_as_they_are_on_the_cpu():
    def in_order(module: nn.Module) -> bool:
        convs = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
        return all(w.is_contiguous(memory_format=torch.channels_last) for w in convs)

    adapter = module_of("gfl_tiny", channels_last=True).adapter
    adapter.arrange()
    assert not in_order(adapter.model)
    with StandIn():
        adapter.model.to(DEVICE)
        adapter.arrange()
        assert in_order(adapter.model)
        images = adapter.prepare(many()).images
        assert images.is_contiguous(memory_format=torch.channels_last)
        maps = adapter.raw_maps(images)
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


@pytest.mark.parametrize(
    ("asked", "taken"), [("auto", "cpu"), ("cpu", "cpu"), ("gpu", None), ("mps", None)]
)
def test_apples_gpus_are_refused_before_anything_is_built(monkeypatch, asked, taken):
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    if taken is None:
        with pytest.raises(ValueError, match=f"trainer.accelerator={asked}: .*type trainer=cpu"):
            _accelerator(asked)
    else:
        assert _accelerator(asked) == taken
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: False)
    assert _accelerator(asked) == asked


# The average ----------------------------------------------------------------------------------


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).cpu()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_average_lives_on_the_device_and_its_counter_on_the_cpu():
    module, average = module_of("gfl_tiny", epochs=1), ExponentialMovingAverage(0.1, 2)
    twin = copy.deepcopy(module)
    with StandIn():
        trainer = on_stand_in(max_epochs=1, callbacks=[average, Devices(average)], **SILENT)
        trainer.fit(module, DataLoader([many(), collated([], [])], batch_size=None))
    own = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[ExponentialMovingAverage(0.1, 2)], **SILENT
    )
    own.fit(twin, DataLoader([many(), collated([], [])], batch_size=None))
    torch.testing.assert_close(weights(module), weights(twin))


class Devices(L.Callback):
    def __init__(self, average: ExponentialMovingAverage) -> None:
        self.average = average

    def on_train_batch_end(self, *_: object) -> None:
        average = self.average._average_model
        assert average is not None
        assert {p.device for p in average.module.parameters()} == {DEVICE}
        assert average.n_averaged.device.type == "cpu"


def test_the_average_moves_by_mmdets_factor_and_loads_what_torchs_wrote():
    """An average by torch alone, as earlier versions wrote it to checkpoints."""

    def move(average: torch.Tensor, current: torch.Tensor, updates: Any) -> torch.Tensor:
        step = (1 - 0.01) * math.exp(-(1 + int(updates)) / 5) + 0.01
        return average + step * (current - average) if average.is_floating_point() else current

    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ours, torchs = Average(module, 0.01, 5), AveragedModel(module, avg_fn=move, use_buffers=True)
    for step in range(4):
        if step == 2:
            ours = Average(module, 0.01, 5)
            ours.load_state_dict(torchs.state_dict())
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.add_(torch.randn(tensor.shape).to(tensor))
        ours.update_parameters(module)
        torchs.update_parameters(module)
        own, reference = ours.state_dict(), torchs.state_dict()
        assert own.keys() == reference.keys()
        assert all(torch.equal(own[key], reference[key]) for key in own)
