"""Accuracy and latency of a detector in eager mode and as exported files.

    python benchmarks/deployment.py <checkpoint> --data DATA [--int8] [--runs 30]
    python benchmarks/deployment.py <checkpoint of a run>

AP is measured on the validation images. Latency is that of a whole detection in one image of the
input size, decoding and suppression included: process CPU time with one thread (other work on the
machine does not count), the median of interleaved calls.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldt.api import evaluate
from ldt.cli.exporting import find_data
from ldt.deployment.to_runtime import (
    SUFFIX,
    VALIDATED,
    Images,
    Runtime,
    adapter_of,
    export_file,
    measure_ap,
    spread,
)
from ldt.detectors.checkpoints import read
from ldt.detectors.forward import one_image
from ldt.detectors.models import quiet
from ldt.runs.provenance import environment
from ldt.runtimes.sessions import open_session
from ldt.runtimes.timing import Network, time_in_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, help="default: the run's")
    parser.add_argument("--int8", action="store_true", help="OpenVINO in int8 too")
    parser.add_argument("--runs", type=int, default=30)
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    data: Any = find_data(given.checkpoint, given.data)
    detector = adapter_of(read(given.checkpoint))
    dataset = data.val_dataloader().dataset
    batches = [{k: [v] for k, v in item.items()} for item in spread(dataset, VALIDATED)]
    with torch.no_grad():
        found = {"eager": evaluate(detector.model, batches, data.classes)["AP"]}
    image = detector.example()
    image[:] = torch.randint(0, 256, image.shape)
    pixels: np.ndarray = image.numpy()
    size, calls = detector.input_size, {}

    def eager() -> object:
        with torch.inference_mode():
            return detector.predict(one_image(image[0], size))

    calls["eager"] = eager
    forms: list[Runtime] = ["onnx", "openvino", "openvino"]
    forms = forms if given.int8 else forms[:2]
    with tempfile.TemporaryDirectory() as folder:
        for number, form in enumerate(forms):
            quantised = number == 2
            name = f"{form} int8" if quantised else form
            file = Path(folder) / f"{number}{SUFFIX[form]}"
            images = Images(data=data)
            export_file(
                given.checkpoint, file, form, quantised=quantised, images=images, force=True
            )
            found[name] = measure_ap(file, data)
            session = open_session(file, threads=1)
            calls[name] = lambda session=session: session(pixels)
        networks = {name: Network(call) for name, call in calls.items()}
        timings = time_in_turns(networks, given.runs, warmup=1)
        times = {name: timing.cpu_ms for name, timing in timings.items()}
    for name, ap in found.items():
        speed = times["eager"] / times[name]
        print(f"{name:14} AP {ap:.4f}  {times[name]:7.2f} ms  {speed:.2f}x")
    print(environment())


if __name__ == "__main__":
    main()
