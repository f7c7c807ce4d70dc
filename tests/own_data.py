"""A data set of a user's own, with a key of its own."""

from dataclasses import dataclass

from ldt.data.datamodule import DetectionDataModule


@dataclass(kw_only=True, eq=False)
class Photos(DetectionDataModule):
    """Photos below a folder."""

    photos: str = ""

    def load(self, split):
        raise NotImplementedError

    def split_ids(self):
        raise NotImplementedError
