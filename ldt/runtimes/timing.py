"""Time a network where it runs: eager PyTorch, ONNX Runtime or OpenVINO.

With one thread a time is the CPU time of this process, which other processes on the machine hardly
change, while wall time may be many times larger. With several threads it is wall
time, and on a GPU it is taken by CUDA events. Several networks are timed in turns, so that a change
of the processor's clock concerns all of them.
"""

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from ldt.config.kinds import Precision, RuntimeName
from ldt.config.values import Count, check_fields
from ldt.detectors.adapter import Detector
from ldt.detectors.forward import evaluating
from ldt.runs.provenance import cpu_name
from ldt.runtimes.detection_graph import to_onnx
from ldt.runtimes.packages import need, openvino_core
from ldt.runtimes.sessions import F32

RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
WARMUP = 3  # calls before the first one that is timed
Key = TypeVar("Key")
Call = Callable[[], object]


@dataclass(frozen=True)
class Network:
    """A network that is ready to run.

    Attributes:
        call: runs it on an image.
        file_bytes: size of the file that the runtime has read; 0: it has read none.
        gpu: the GPU that it computes on; None: the processor.
    """

    call: Call
    file_bytes: int = 0
    gpu: torch.device | None = None

    def __call__(self) -> object:
        """Run the network on an image."""
        return self.call()


@dataclass(frozen=True)
class Runtime:
    """What executes a network, and how.

    Attributes:
        runtime: one of :data:`RUNTIMES`.
        precision: of the computation.
        threads: of the processor.

    Raises:
        ValueError: a value is not allowed; the message names its key.
    """

    runtime: RuntimeName = "onnxruntime"
    precision: Precision = "f32"
    threads: Count = 1

    def __post_init__(self) -> None:
        check_fields(self, {each.name: f"prune.latency.{each.name}" for each in fields(self)}, {})
        if self.precision == "int8":
            raise ValueError(
                "prune.latency.precision=int8: no runtime times quantised layers here yet; type "
                "prune.latency.precision=f32"
            )

    def version(self) -> str:
        """Return the version of the runtime.

        Raises:
            ImportError: it is not installed.
        """
        package = "torch" if self.runtime == "eager" else self.runtime
        need(package)
        return metadata.version(package)

    def place(self, device: torch.device) -> dict[str, Any]:
        """Return what times depend on besides the network, as plain data.

        Args:
            device: of the detector; the other runtimes compute on the processor.
        """
        on_gpu = self.runtime == "eager" and device.type == "cuda"
        return {
            "runtime": self.runtime,
            "version": self.version(),
            "precision": self.precision,
            "threads": self.threads,
            "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        }

    def opened_network(self, network: nn.Module, image: Tensor) -> Network:
        """Return what runs a network, which is in eval mode, on an image."""
        if self.runtime == "eager":
            return self._eagerly(network, image)
        with tempfile.TemporaryDirectory(prefix="ldt-") as folder:
            file = Path(folder) / "network.onnx"
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of the exporter's age
                torch.onnx.export(network, (image,), str(file), dynamo=False)
            return self.opened_file(file)

    @contextmanager
    def opened(
        self, detector: Detector, device: torch.device | None = None, file: Path | None = None
    ) -> Iterator[Network]:
        """Yield what computes the detector's raw maps of one image.

        The detector must not change within the context; it is in eval mode there.

        Args:
            detector: the detector.
            device: where it is to be executed eagerly; None: where it is.
            file: the detector, for the other runtimes, see :func:`exported`; None: it is exported.
        """
        if self.runtime == "eager":
            if device is not None and device != detector.example().device:
                detector = deepcopy(detector)
                detector.model.to(device)
            with evaluating(detector.model):
                yield self._eagerly(detector.raw_maps, detector.example())
            return
        with exported(detector) if file is None else nullcontext(file) as written:
            network = self.opened_file(written)
        yield network

    def kept(self, detector: Detector, device: torch.device | None = None) -> Network:
        """Return what computes the raw maps of a detector as it is now, whatever becomes of it."""
        if self.runtime == "eager":
            detector = deepcopy(detector)
            detector.model.to(device or detector.example().device).eval()
            return self._eagerly(detector.raw_maps, detector.example())
        with self.opened(detector) as network:
            return network

    def _eagerly(self, forward: Callable[[Tensor], object], image: Tensor) -> Network:
        gpu = image.device if image.device.type == "cuda" else None
        return Network(partial(self._eager, forward, image), gpu=gpu)

    @torch.inference_mode()
    def _eager(self, forward: Callable[[Tensor], object], image: Tensor) -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return forward(image)
        finally:
            torch.set_num_threads(before)

    def opened_file(self, file: Path) -> Network:
        """Return what runs an ONNX file of our own on zeros.

        Raises:
            ImportError: the runtime is not installed.
        """
        opened = _openvino if self.runtime == "openvino" else _onnxruntime
        return Network(opened(file, self.threads), file.stat().st_size)


@contextmanager
def exported(detector: Detector) -> Iterator[Path]:
    """Yield an ONNX file of the detector's raw maps, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ldt-") as folder:
        yield to_onnx(detector, Path(folder) / "raw.onnx", detector.input_size)


def _onnxruntime(file: Path, threads: int) -> Call:
    onnxruntime = need("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    inputs = {each.name: torch.zeros(each.shape).numpy() for each in session.get_inputs()}
    return partial(session.run, None, inputs)


def _openvino(file: Path, threads: int) -> Call:
    settings = {**F32, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino_core().compile_model(str(file), "CPU", settings)
    inputs = [torch.zeros(tuple(each.shape)).numpy() for each in compiled.inputs]
    return partial(compiled.create_infer_request().infer, inputs)


@dataclass(frozen=True)
class Timing:
    """Medians of the time of a call, in ms, and the deciles of its CPU time.

    Attributes:
        cpu_ms: CPU time of the process; on a GPU the time between two CUDA events.
        wall_ms: wall time.
        p10_ms, p90_ms: first and last decile of ``cpu_ms``.
    """

    cpu_ms: float
    wall_ms: float
    p10_ms: float
    p90_ms: float

    def latency_ms(self, threads: int) -> float:
        """Return the time that counts: CPU time of one thread, wall time of several."""
        return self.cpu_ms if threads == 1 else self.wall_ms


def time_in_turns(
    networks: Mapping[Key, Network], runs: int, warmup: int = WARMUP
) -> dict[Key, Timing]:
    """Time several networks, one call of each after the other, ``runs`` times.

    Args:
        networks: the networks.
        runs: timed calls of each.
        warmup: calls of each before those that are timed.
    """
    for network in networks.values():
        for _ in range(warmup):
            network()
    times = {key: [] for key in networks}
    for _ in range(runs):
        for key, network in networks.items():
            times[key].append(_milliseconds(network))
    return {key: _timing(found) for key, found in times.items()}


def _timing(times: list[tuple[float, float]]) -> Timing:
    cpu, wall = (list(each) for each in zip(*times, strict=True))
    deciles = statistics.quantiles(cpu, n=10, method="inclusive") if len(cpu) > 1 else cpu
    return Timing(statistics.median(cpu), statistics.median(wall), deciles[0], deciles[-1])


def _milliseconds(network: Network) -> tuple[float, float]:
    """Return CPU time (on a GPU: that between CUDA events) and wall time of a call."""
    if network.gpu is not None:
        with torch.cuda.device(network.gpu):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            network()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end), begin.elapsed_time(end)
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    network()
    cpu_ms, wall_ms = time.process_time_ns() - cpu, time.perf_counter_ns() - wall
    return cpu_ms / 1e6, wall_ms / 1e6


def measure_runtimes(
    detector: Detector, runtimes: Sequence[RuntimeName], runs: int
) -> dict[str, float]:
    """Time a detector's raw maps of one image in several runtimes, in turns.

    Args:
        detector: the detector; it is timed where it is, in other runtimes on the processor.
        runtimes: some of :data:`RUNTIMES`.
        runs: timed calls of each.

    Returns:
        By ``<runtime>/<what>``: ``cpu_ms`` and ``wall_ms`` of one thread, ``threaded_cpu_ms`` and
        ``threaded_wall_ms`` of ``threads``, all medians, and ``file_bytes`` where there is a file.
    """
    found: dict[str, float] = {}
    many = available_cpus()
    with ExitStack() as stack:
        settings = [
            Runtime(name, threads=count) for name in runtimes for count in sorted({1, many})
        ]
        opened = open_all(settings, detector, stack)
        networks = {(s.runtime, s.threads): network for s, network in opened.items()}
        timings = time_in_turns(networks, runs)
    for name in runtimes:
        for what, count in (("", 1), ("threaded_", many)):
            found[f"{name}/{what}cpu_ms"] = round(timings[name, count].cpu_ms, 3)
            found[f"{name}/{what}wall_ms"] = round(timings[name, count].wall_ms, 3)
        found[f"{name}/threads"] = many
        if size := networks[name, 1].file_bytes:
            found[f"{name}/file_bytes"] = size
    return found


def open_all(
    settings: Sequence[Runtime], detector: Detector, stack: ExitStack
) -> dict[Runtime, Network]:
    """Return a detector in several runtimes, exported once; the stack ends them."""
    files = any(setting.runtime != "eager" for setting in settings)
    file = stack.enter_context(exported(detector)) if files else None
    return {s: stack.enter_context(s.opened(detector, file=file)) for s in settings}


def available_cpus() -> int:
    """Return the number of processors that this process may use."""
    found = getattr(os, "sched_getaffinity", None)
    return len(found(0)) if found else os.cpu_count() or 1
