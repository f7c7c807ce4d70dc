"""Time and memory of reading a data set as large as COCO before training begins.

python benchmarks/data_start.py --images 118287   # fabricates it below a temporary folder
"""

import argparse
import json
import logging
import random
import resource
import shutil
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

import ldt  # noqa: F401  (before mmdet)
from ldt.data.coco import CLASSES, CocoDataModule
from ldt.data.summary import check_data

OBJECTS, CORNERS = 7.27, 24  # a mean image of COCO's: objects, and corners of a polygon


def fabricate(root: Path, split: str, count: int) -> None:
    """Write annotations with polygons, and images that are links to a few files."""
    rng = random.Random(split)
    folder = root / f"{split}2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    source = folder / f"{0:012d}.jpg"
    Image.fromarray(noise).save(source, quality=30 if split == "train" else 31)
    images, annotations = [], []
    for index in range(count):
        name = f"{index:012d}.jpg"
        if index and index % 10_000:
            (folder / name).hardlink_to(source)
        elif index:
            source = Path(shutil.copy(source, folder / name))
        images.append({"id": index, "file_name": name, "width": 640, "height": 480})
        for _ in range(rng.randint(0, int(2 * OBJECTS))):
            x, y, w, h = (round(rng.uniform(20, 200), 2) for _ in range(4))
            corners = [round(rng.uniform(20, 200), 2) for _ in range(2 * CORNERS)]
            annotations.append(
                {
                    "segmentation": [corners],
                    "area": w * h,
                    "iscrowd": 0,
                    "image_id": index,
                    "bbox": [x, y, w, h],
                    "category_id": rng.randint(1, 80),
                    "id": len(annotations),
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    doc = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(doc))


def measure(root: Path) -> None:
    """Read and check the data set as a run does."""
    begin = time.perf_counter()

    def told(what: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{what}: after {time.perf_counter() - begin:.1f} s, peak {peak:.2f} GiB", flush=True)

    data = CocoDataModule(root=str(root), scale=(640, 640), group_shapes=True)
    told("begin")
    data.setup("fit")
    told("annotations and image headers")
    check_data(data)
    told("summary and checks")
    data.fingerprint()
    told("fingerprint")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--root", type=Path, help="where it is, or is to be, fabricated")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message).160s")
    with tempfile.TemporaryDirectory() as folder:
        place = given.root or Path(folder)
        if not (place / "annotations").exists():
            for split, count in (("val", 5000), ("train", given.images)):
                # in a process of its own, whose memory does not count
                maker = get_context("spawn").Process(target=fabricate, args=(place, split, count))
                maker.start()
                maker.join()
        measure(place)
