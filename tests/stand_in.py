"""A stand-in for a GPU: tensors of another device whose numbers are on the CPU.

Within ``StandIn()``, ``tensor.to(DEVICE)``, ``torch.zeros(3, device=DEVICE)`` and the like give
tensors that report ``DEVICE``. They refuse to meet tensors of the CPU, except where CUDA's do not:
scalars, copies, and CPU indices. Whatever makes the host wait for a GPU is noted, with the library
and the line that asked for it.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision  # noqa: F401  (its operators)
from lightning import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from mmengine.structures import instance_data
from small import Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import ldt
from ldt.detectors.adapter import PreparedBatch

DEVICE = torch.device("lazy", 0)  # torch knows this device and lacks its kernels, as CUDA's here
CPU = torch.device("cpu")
OWNERS = {  # folder of a library -> its name
    str(Path(ldt.__file__).parent): "ldt",
    **{f"/site-packages/{name}/": name for name in ("mmdet", "mmengine", "mmcv", "lightning")},
}
aten = torch.ops.aten
WAITS = {  # the host needs the values, or the size of the result
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select),
    *(aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount),
    *(aten.repeat_interleave, aten._linalg_eigh, aten._linalg_svd, torch.ops.torchvision.nms),
}
COPIES = {aten._to_copy, aten.copy_, aten._copy_from_and_resize}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Wait(NamedTuple):
    """Something that makes the host wait for the device."""

    owner: str
    what: str
    where: str


class OnDevice(Tensor):
    """A tensor of the stand-in's device."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnDevice":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=DEVICE,
        )

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.numbers})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a file it is a tensor of the CPU."""
        return self.numbers.__reduce_ex__(protocol)

    @property
    def data(self) -> Tensor:
        """As of any tensor; torch itself exchanges the shape and the type only."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        assert isinstance(other, OnDevice)
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.numbers = other.numbers

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, [])


class StandIn(TorchDispatchMode):
    """Offers the device within the context.

    Attributes:
        waits: whatever made the host wait so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    def __enter__(self) -> "StandIn":
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE): from the CPU
        self._known = instance_data.IndexType  # mmengine asks what indexes its instances
        instance_data.IndexType = self._known | OnDevice
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        instance_data.IndexType = self._known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.waits)

    def of(self, owner: str) -> list[Wait]:
        return [wait for wait in self.waits if wait.owner == owner]


def run(func: Any, args: Any, kwargs: Any, waits: list[Wait]) -> Any:
    """Run an operator on the numbers, and note what waits.

    Raises:
        RuntimeError: tensors of both devices meet.
    """
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, OnDevice)]
    target = kwargs.get("device")
    if not ours and (target is None or target.type != DEVICE.type):
        return func(*args, **kwargs)
    if reason := _check(func, tensors, args, kwargs):
        waits.append(_wait(reason))
    (plain_args, plain) = tree_map_only(OnDevice, lambda t: t.numbers, (args, kwargs))
    if target is not None:
        plain["device"] = CPU
    found = func(*plain_args, **plain)
    if (tensors[0].device if target is None else target).type != DEVICE.type:
        return found  # copied to the CPU, or into a tensor there
    found = tree_map_only(Tensor, OnDevice, found)
    return return_and_correct_aliasing(func, args, kwargs, found)


def _check(func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> str:
    """Return why the host waits, or nothing; refuse what CUDA refuses."""
    op = func.overloadpacket
    if op in COPIES:
        return _copied(args, kwargs)
    if op in INDEXING:
        return _indexed(args)
    if any(isinstance(t, OnDevice) for t in tensors):
        here = [tuple(t.shape) for t in tensors if not isinstance(t, OnDevice) and t.dim()]
        if here:
            shapes = ", ".join(map(str, here))
            raise RuntimeError(f"{func}: expected all tensors on {DEVICE}, but {shapes} is not")
    elif isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{func}: a generator of the CPU for a tensor of {DEVICE}")
    return str(op) if op in WAITS else ""


def _copied(args: Any, kwargs: Any) -> str:
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    to = kwargs.get("device") or args[0].device
    if to.type == source.device.type:
        return ""
    if to.type == CPU.type:
        return "a copy to the host"
    patient = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
    return "" if patient else "a copy to the device that waits"


def _indexed(args: Any) -> str:
    whole, indices = args[0], [i for i in args[1] if i is not None]
    if not isinstance(whole, OnDevice):
        raise RuntimeError(f"a tensor of the CPU is indexed by one of {DEVICE}")
    values = [v for v in args[2:3] if v.dim() and not isinstance(v, OnDevice)]
    if values:
        raise RuntimeError(f"values of the CPU are put into a tensor of {DEVICE}")
    if any(not isinstance(i, OnDevice) for i in indices):
        return "indices of the CPU"
    masks = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
    fills = len(args) > 2 and args[2].numel() == 1  # one value: CUDA fills where the mask is set
    return "a mask as index" if masks and not fills else ""


def _wait(reason: str) -> Wait:
    """Note who asked: the innermost frame of one of the libraries, or a backward pass."""
    if torch._C._current_graph_task_id() >= 0:
        return Wait("autograd", reason, "")
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        for folder, owner in OWNERS.items():
            if folder in file:
                return Wait(owner, reason, f"{Path(file).name}:{frame.f_lineno}")
        frame = frame.f_back
    return Wait("test", reason, "")


class StandInAccelerator(CPUAccelerator):
    """Lightning's view of the device: see :func:`on_stand_in`."""

    def setup_device(self, device: torch.device) -> None:
        """Accept the device, which is not the CPU."""

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def name() -> str:
        return "stand_in"


def on_stand_in(**options: Any) -> Trainer:
    """A trainer on the device, with all other options; use it within ``StandIn()``."""
    options |= {"accelerator": StandInAccelerator(), "devices": 1}
    return Trainer(**options | {"strategy": SingleDeviceStrategy(DEVICE)})


def moved(subject: Case) -> Case:
    """The case on the stand-in; labels and images of the objects stay on the CPU."""
    subject.model.to(DEVICE)
    subject.example = subject.example.to(DEVICE)
    for batch in subject.batches:
        batch.images = batch.images.to(DEVICE)
        batch.objects = batch.objects._replace(boxes=batch.objects.boxes.to(DEVICE))
        if isinstance(batch, PreparedBatch):
            batch.samples = [sample.to(DEVICE) for sample in batch.samples]
    return subject
