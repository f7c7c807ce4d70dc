"""Laws of image files: sizes are those of the decoded image, and nothing large is decoded."""

import re
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from test_coco import content, module, write_coco

from ldt.cli.exit_codes import _is_explained
from ldt.data import image_files, pipelines
from ldt.data.image_files import MAX_PIXELS, ImageError, image_size, image_sizes, shared_images
from ldt.data.pipelines import ReadImage

FORMATS = {".jpg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".webp": "WEBP", ".bmp": "BMP"}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_that_of_the_decoded_image(tmp_path, suffix, orientation):
    exif, file = Image.Exif(), tmp_path / f"image{suffix}"
    exif[0x0112] = orientation
    options = {} if suffix == ".bmp" else {"exif": exif}
    Image.new("RGB", (60, 40)).save(file, FORMATS[suffix], **options)
    height, width = ReadImage()({"img_path": str(file)})["img"].shape[:2]
    assert image_size(file) == (width, height)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16", "LA", "1"])
def test_images_of_any_kind_become_three_channels_of_a_byte(tmp_path, mode):
    file = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    deep = Image.fromarray(np.full((40, 60), 40_000, np.uint16))
    (deep if mode == "I;16" else Image.new("RGB", (60, 40), (200, 0, 0)).convert(mode)).save(file)
    pixels = ReadImage()({"img_path": str(file)})["img"]
    assert (pixels.shape, pixels.dtype) == ((40, 60, 3), np.uint8)


def bomb(file, side):
    """Write a PNG of one bit a pixel."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    packer, row = zlib.compressobj(9), bytes(1 + (side + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    file = tmp_path / "bomb.png"
    bomb(file, 20_000)
    assert file.stat().st_size < 100_000
    monkeypatch.setattr(cv2, "imdecode", None)
    told = r"bomb\.png has 20000x20000 pixels, more than 64 million.*dataset\.max_pixels=400000000"
    with pytest.raises(ValueError, match=told):
        ReadImage()({"img_path": str(file)})
    with pytest.raises(ValueError, match=told):
        image_sizes([str(file)], MAX_PIXELS)
    assert image_sizes([str(file)], 400_000_000) == [(20_000, 20_000)]


def test_damaged_images_are_counted_and_the_first_is_named(tmp_path):
    files = [tmp_path / f"{index}.png" for index in range(3)]
    Image.new("RGB", (4, 4)).save(files[0])
    files[1].write_bytes(b"")
    files[2].write_bytes(files[0].read_bytes()[:20])
    with pytest.raises(ValueError, match=r"1\.png: damaged or not.*; so are 1 other images"):
        image_sizes(list(map(str, files)), 100)
    with pytest.raises(FileNotFoundError):
        image_sizes([str(tmp_path / "gone.png")], 100)


@pytest.mark.parametrize("suffix", [*FORMATS, ".ppm"])
def test_a_file_that_is_cut_off_is_damaged_and_a_longer_one_is_not(tmp_path, suffix):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(whole)
    content = whole.read_bytes()
    for more in (b"", b"\0", b"something behind the image"):
        whole.write_bytes(content + more)
        assert image_sizes([str(whole)], MAX_PIXELS) == [(60, 40)]
    for length in (len(content) // 2, len(content) * 9 // 10, len(content) - 2):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"cut\{suffix}: damaged"):
            image_sizes([str(cut)], MAX_PIXELS)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("length", "reason"), [(60, "damaged"), (None, "No such file")])
def test_an_image_lost_since_the_check_is_named_in_a_line(tmp_path, workers, length, reason):
    data = module(write_coco(tmp_path, content()), augment="none", workers=workers)
    data.setup("fit")
    file = tmp_path / "train2017/001.png"
    file.write_bytes(file.read_bytes()[:length]) if length else file.unlink()
    with pytest.raises(ImageError) as raised:
        list(data.train_dataloader())
    assert re.fullmatch(rf"cannot read the image {file}: {reason}.*; restore it", str(raised.value))
    assert _is_explained(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg"])
def test_a_tiff_of_any_compression_that_is_cut_off_is_damaged(tmp_path, compression):
    file = tmp_path / "image.tif"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(file, compression=compression)
    assert image_files.has_end(str(file))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"image\.tif: damaged"):
        image_sizes([str(file)], MAX_PIXELS)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_of_a_usual_image_nothing_is_decoded(tmp_path, monkeypatch, suffix):
    Image.new("RGB", (60, 40)).save(tmp_path / f"image{suffix}")
    monkeypatch.setattr(image_files, "decodes", None)
    assert image_sizes([str(tmp_path / f"image{suffix}")], MAX_PIXELS) == [(60, 40)]


def test_sizes_of_many_images_are_cached_until_one_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("LDT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(image_files, "MANY", 2)
    files = [str(tmp_path / f"{index}.png") for index in range(2)]
    for file in files:
        Image.new("RGB", (4, 5)).save(file)
    assert image_sizes(files, 100) == [(4, 5), (4, 5)]
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "image_size", None)
        assert image_sizes(files, 100) == [(4, 5), (4, 5)]
        with pytest.raises(ValueError, match="4x5 pixels"):
            image_sizes(files, 19)
    Image.new("RGB", (7, 5)).save(files[1])
    assert image_sizes(files, 100) == [(4, 5), (7, 5)]


def test_images_of_two_splits_are_compared_by_file_and_by_content(tmp_path):
    rng = np.random.default_rng(0)
    contents = [rng.bytes(10_000) for _ in range(3)]
    contents.append(b"x" + contents[0][1:])  # of the same size, with the same end
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for index, own in enumerate(contents):
            (tmp_path / split / f"{split}{index}").write_bytes(own)
    train = [str(tmp_path / f"train/train{index}") for index in (0, 1)]
    val = [str(tmp_path / f"val/val{index}") for index in (1, 2, 3)]
    assert shared_images(train, val) == [(train[1], val[0])]
    assert shared_images(train, val, most=1) == []
    assert shared_images(train, [*val, train[0]], most=0) == [(train[0], train[0])]


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["flip", "mosaic", "config"])
def test_every_loader_reads_with_the_configured_limit(tmp_path, monkeypatch, augment):
    limits = []
    monkeypatch.setattr(pipelines, "read_size", lambda _, most: limits.append(most))
    steps = [{"type": "ReadImage"}, {"type": "LoadAnnotations", "with_bbox": True}]
    pack = {"type": "PackDetInputs"}
    data = module(
        write_coco(tmp_path, content()), augment=augment, pipeline=[*steps, pack], max_pixels=2400
    )
    for loader in (
        data.train_dataloader(),
        data.val_dataloader(),
        data.probe_dataloader("train", 2),
        data.calibration_dataloader(2, 2),
    ):
        limits.clear()
        list(loader)
        assert set(limits) == {2400}
    with pytest.raises(ValueError, match=r"001\.png has 60x40 pixels.*dataset\.max_pixels=2400"):
        module(tmp_path, max_pixels=2399).setup()
