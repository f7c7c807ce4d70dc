"""The built-in data set: generated road scenes in KITTI's layout."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from ldt.data import roadscenes_generator
from ldt.data.kitti import KittiDataModule
from ldt.data.roadscenes_generator import RoadScenes
from ldt.runs.inputs import cache_folder


@dataclass(kw_only=True, eq=False)
class RoadScenesDataModule(KittiDataModule):
    """The built-in data set: synthetic road scenes, generated once and read like KITTI.

    Args:
        cache: folder to write to; if None, $LDT_CACHE, else ~/.cache/ldt.
        train, val, height, width, scene_seed, difficulty: see `RoadScenes`.

    Raises:
        ValueError: `root` is given; the scenes are stored in a folder below `cache`.
    """

    official: ClassVar[bool] = False  # its limits in pixels are for larger images

    cache: str | None = None
    train: int = RoadScenes.train
    val: int = RoadScenes.val
    height: int = RoadScenes.height
    width: int = RoadScenes.width
    scene_seed: int = RoadScenes.seed
    difficulty: float = RoadScenes.difficulty

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root is not None:
            raise ValueError(
                f"dataset.root={self.root} does not apply to generated scenes; type "
                f"dataset.cache={self.root} to write them there"
            )
        self.scenes = RoadScenes(
            train=self.train,
            val=self.val,
            height=self.height,
            width=self.width,
            seed=self.scene_seed,
            difficulty=self.difficulty,
        )

    def prepare_data(self) -> None:
        """Generate the scenes unless they exist; Lightning calls it in one process."""
        self.folder()

    def folder(self) -> Path:
        """Return the folder of the scenes, which are generated on first access."""
        return roadscenes_generator.write(self.scenes, cache_folder(self.cache))

    def fingerprint(self) -> dict[str, Any]:
        """Return version and options of the generator; the files are not read."""
        about = {"generator": "roadscenes", "version": roadscenes_generator.VERSION}
        return about | {"options": asdict(self.scenes)}
