"""Images in folders: layouts, decoding, splits, provenance."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data import _images, checks, image_folder, source
from tests.data import files

PARTS = ("train", "held_out", "test")


def contents(part):
    return {x.tobytes() for x in part.read(np.arange(len(part)))["input"]}


def decode(image, *, channels=3, size=None, fit="crop", format="PNG", **kwargs):
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    decoder = _images.Decoder(channels=channels, size=size, fit=fit, most_pixels=10**6)
    return decoder(file.getvalue())


def test_folders_are_classes_and_pixels_are_kept(tmp_path):
    files.image_folders(tmp_path, classes=("dog", "cat", ".hidden"))
    dataset, report = checks.open_dataset(image_folder.make(path=str(tmp_path)))
    assert dataset.classes == ("cat", "dog") and report.warnings == ()
    assert sum(len(getattr(dataset, part)) for part in PARTS) == 24
    for part in PARTS:
        rows = getattr(dataset, part).read(np.arange(len(getattr(dataset, part))))
        for pixels, label in zip(rows["input"], rows["label"], strict=True):
            of_class = [files.picture(100 * (1 - label) + i) for i in range(12)]
            assert any((pixels == x).all() for x in of_class)


def test_numbers_as_names_are_sorted_by_value(tmp_path):
    files.image_folders(tmp_path, classes=("10", "9", "1"))
    assert image_folder.make(path=str(tmp_path)).classes == ("1", "9", "10")


def test_images_that_are_added_move_no_others(tmp_path):
    files.image_folders(tmp_path, n=30)
    before = image_folder.make(path=str(tmp_path))
    for i in range(30, 60):
        files.save(tmp_path / "cat" / f"{i}.png", files.picture(1000 + i))
    after = image_folder.make(path=str(tmp_path))
    for part in PARTS:
        assert contents(getattr(before, part)) < contents(getattr(after, part))
    other = image_folder.make(path=str(tmp_path), split_seed=1)
    assert contents(other.test) != contents(after.test)
    assert before.train.provenance.sha256 != after.train.provenance.sha256
    larger = image_folder.make(path=str(tmp_path), held_out=0.5)
    assert contents(larger.test) == contents(after.test)


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        (("train", "val", "test"), {"train": 24, "held_out": 24, "test": 24}),
        (("train", "test"), {"train": 22, "held_out": 2, "test": 24}),
        (("train", "val"), {"train": 22, "held_out": 2, "test": 24}),
        (("Training", "validation", "testing"), {"train": 24, "held_out": 24, "test": 24}),
    ],
)
def test_folders_of_splits(tmp_path, splits, sizes):
    for split in splits:
        files.image_folders(tmp_path / split)
    dataset = image_folder.make(path=str(tmp_path))
    assert {part: len(getattr(dataset, part)) for part in PARTS} == sizes


def test_a_table_of_labels(tmp_path):
    for i in range(20):
        files.save(tmp_path / f"{i}.png", files.picture(i))
    rows = [
        f'{i}.png,"{"a, b" if i % 2 else "c"}",{"test" if i > 14 else "train"}' for i in range(20)
    ]
    (tmp_path / "labels.csv").write_text("\ufefffile,label,split\n" + "\n".join(rows))
    dataset = image_folder.make(path=str(tmp_path), held_out=0.0)
    assert dataset.classes == ("a, b", "c") and len(dataset.train) == 15 and len(dataset.test) == 5
    elsewhere = (tmp_path / "labels.csv").rename(tmp_path.parent / f"{tmp_path.name}.csv")
    moved = image_folder.make(path=str(tmp_path), labels_file=str(elsewhere), held_out=0.0)
    assert contents(moved.test) == contents(dataset.test)


@pytest.mark.parametrize("resident_bytes", [0, 2**20])
def test_several_labels_and_targets_of_images(tmp_path, resident_bytes):
    for i in range(30):
        files.save(tmp_path / f"{i}.png", files.picture(i))
    rows = [f"{i}.png,{i % 2},{'' if i == 3 else i / 4}" for i in range(30)]
    (tmp_path / "labels.csv").write_text("file,wet,depth\n" + "\n".join(rows))
    make = lambda **kwargs: image_folder.make(  # noqa: E731
        path=str(tmp_path), resident_bytes=resident_bytes, test_fraction=0.3, **kwargs
    )
    with pytest.raises(DataUnavailable, match="no label in 'depth'"):
        make(task="regression", label_column="depth")
    one = make(task="multilabel", label_column=("wet",))
    assert one.task == "multilabel" and one.classes == ("wet",)
    dataset = make(task="regression", label_column="wet,depth", unknown_labels=True)
    rows = dataset.train.read(np.arange(len(dataset.train)))
    assert rows["label"].shape == rows["labelled"].shape == (len(dataset.train), 2)
    assert dataset.classes == ("wet", "depth")
    unknown = sum(int((p.read(np.arange(len(p)))["labelled"] == 0).sum()) for p in dataset[:3])
    assert unknown == 1


@pytest.mark.parametrize("resident_bytes", [1 << 30, 0])
def test_soft_labels_of_images(tmp_path, resident_bytes):
    """Columns of the table are the probabilities of classes, by the name of each image."""
    for i in range(40):
        files.save(tmp_path / f"{i}.png", files.picture(i))
    rows = [f"{i}.png,{i / 40},{1 - i / 40}" for i in range(40)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,cat,dog", *rows]))
    dataset = image_folder.make(
        path=str(tmp_path), label_column=("cat", "dog"), resident_bytes=resident_bytes
    )
    assert dataset.classes == ("cat", "dog")
    found = dataset.train.read(np.arange(len(dataset.train)))
    for image, label, probs in zip(
        *(found[n] for n in ("input", "label", "label_probs")), strict=True
    ):
        i = next(i for i in range(40) if (files.picture(i) == image).all())
        np.testing.assert_allclose(probs, [i / 40, 1 - i / 40], rtol=1e-6)
        assert label == probs.argmax()


def test_lazy_and_resident_images_are_equal(tmp_path):
    files.image_folders(tmp_path, height=20, width=30)
    kept = image_folder.make(path=str(tmp_path), size=8)
    lazy = image_folder.make(path=str(tmp_path), size=(8, 8), resident_bytes=0)
    assert isinstance(checks.root(kept.train), source.ArraySource)
    assert isinstance(checks.root(lazy.train), _images.EncodedImages)
    for part in PARTS:
        a, b = getattr(kept, part), getattr(lazy, part)
        rows = [x.read(np.arange(len(a)))["input"] for x in (a, b)]
        np.testing.assert_array_equal(*rows)
        assert a.provenance == b.provenance
    assert rows[0].shape[1:] == (8, 8, 3)


def test_a_file_that_breaks_while_training_is_named(tmp_path):
    files.image_folders(tmp_path)
    dataset = image_folder.make(path=str(tmp_path), resident_bytes=0)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataUnavailable, match=r"'(cat|dog)/\d+.png' is damaged"):
        dataset.test.read(np.array([0]))


def damage(root):
    png = (root / "cat/0.png").read_bytes()
    (root / "cat/0.png").write_bytes(png[: len(png) // 2])
    (root / "cat/1.png").write_bytes(b"")
    (root / "cat/2.png").write_text("<!DOCTYPE html><html>404</html>")
    (root / "cat/3.png").write_text("not an image")
    Image.new("1", (4000, 4000)).save(root / "cat/4.png")
    files.save(root / "cat/5.png", files.picture(5, height=7))
    (root / "cat/6.png").unlink()
    (root / "cat/6.png").symlink_to(root / "gone.png")


WRONG = (
    "is damaged",
    "is empty",
    "is a web page",
    "is not a PNG",
    "4000 x 4000 pixels",
    "is 7 x 5",
)


@pytest.mark.parametrize("resident_bytes", [0, 2**30])
def test_broken_images_are_listed_or_left_out(tmp_path, resident_bytes):
    files.image_folders(tmp_path, n=20)
    damage(tmp_path)
    more = {"most_pixels": 10**6, "resident_bytes": resident_bytes, "path": str(tmp_path)}
    dataset = image_folder.make(**more, on_error="skip")
    _, report = checks.open_dataset(dataset)
    assert sum(len(getattr(dataset, part)) for part in PARTS) == 33
    assert "7 of 40 images cannot be read" in report.warnings[0]
    if resident_bytes:
        with pytest.raises(DataUnavailable, match="7 of 40 images cannot be read") as error:
            image_folder.make(**more)
        listed = str(error.value)
        assert sum(what in listed for what in WRONG) >= 5 and "on_error=skip" in listed


def test_links_out_of_the_folder_are_refused(tmp_path):
    root, outside = files.image_folders(tmp_path / "in"), tmp_path / "out.png"
    files.save(outside, files.picture(9))
    (root / "cat" / "x.png").symlink_to(outside)
    with pytest.raises(DataUnavailable, match="link out of the folder"):
        image_folder.make(path=str(root))
    assert len(image_folder.make(path=str(root), follow_links=True).classes) == 2
    (root / "cat" / "x.png").unlink()
    (root / "cat" / "again").symlink_to(root / "cat")  # a loop
    (root / "cat" / "copy.png").symlink_to(root / "cat" / "0.png")
    dataset = image_folder.make(path=str(root))
    assert sum(len(getattr(dataset, part)) for part in PARTS) == 25
    files.image_folders(tmp_path / "elsewhere", classes=("bird",))
    (root / "bird").symlink_to(tmp_path / "elsewhere" / "bird")
    with pytest.raises(DataUnavailable, match="link out of the folder"):
        image_folder.make(path=str(root))


# Decoding.


def test_sixteen_bits_become_eight():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    image = Image.fromarray(values)
    assert decode(image, channels=1)[..., 0].tolist() == [[0, 1, 128, 255]]
    assert decode(image)[0, 2].tolist() == [128] * 3


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
def test_the_orientation_of_exif_is_applied(format):
    image = Image.new("L", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(image, channels=1, format=format, exif=exif).shape == (20, 10, 1)


def test_transparency_is_black_and_palettes_are_colours():
    clear = np.full((2, 2, 4), 200, np.uint8)
    clear[0, :, 3] = 0
    pixels = decode(Image.fromarray(clear))
    assert pixels[0].max() == 0 and pixels[1].min() > 100
    assert decode(Image.fromarray(clear), channels=4)[0, 0].tolist() == [200, 200, 200, 0]
    palette = Image.fromarray(files.picture(channels=3)).quantize(4)
    np.testing.assert_array_equal(decode(palette), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(np.eye(4) > 0)
    assert sorted({*decode(bits, channels=1).ravel().tolist()}) == [0, 255]


@pytest.mark.parametrize(
    ("fit", "columns"),
    [("crop", [100, 100]), ("stretch", [50, 150]), ("pad", [0, 100])],
)
def test_fits_of_another_aspect(fit, columns):
    """An image 4 x 8 whose quarters from left to right are 0, 100, 100 and 200."""
    strip = np.repeat(np.array([[0, 100, 100, 200]], np.uint8).repeat(4, 0), 2, 1)
    pixels = decode(Image.fromarray(strip), channels=1, size=(2, 2), fit=fit)[..., 0]
    if fit == "pad":  # one row of the two is the strip, the other black
        assert decode(Image.fromarray(strip), channels=1, size=(4, 4), fit=fit)[[0, 3]].max() == 0
    else:
        assert abs(pixels[0].astype(int) - columns).max() <= 25


def test_extreme_aspects_are_scaled_within_bounds():
    line = Image.new("L", (900_000, 1))
    assert decode(line, channels=1, size=(32, 32)).shape == (32, 32, 1)


@pytest.mark.parametrize(
    ("channels", "mode", "wanted"),
    [(1, "auto", 1), (3, "auto", 3), (1, "rgb", 3), (3, "grey", 1), (4, "rgba", 4)],
)
def test_channels(tmp_path, channels, mode, wanted):
    files.image_folders(tmp_path, channels=channels)
    rows = image_folder.make(path=str(tmp_path), mode=mode).train.read(np.arange(1))
    assert rows["input"].shape == (1, 6, 5, wanted)


@pytest.mark.parametrize("ending", [".jpg", ".jpeg", ".webp", ".bmp", ".PNG"])
def test_formats(tmp_path, ending):
    for name in ("a", "b"):
        for i in range(12):
            files.save(tmp_path / name / f"{i}{ending}", files.picture(i))
    dataset = image_folder.make(path=str(tmp_path))
    assert dataset.train.read(np.arange(2))["input"].shape == (2, 6, 5, 3)


def test_names_of_files_may_be_anything(tmp_path):
    files.image_folders(tmp_path)
    for name in ("a b.png", "a\nb.png", "ä.png", "'.png", "日本.png"):
        files.save(tmp_path / "cat" / name, files.picture(7))
    os.rename(tmp_path / "cat", tmp_path / "große Katze, weiß")
    dataset = image_folder.make(path=str(tmp_path))
    assert dataset.classes == ("dog", "große Katze, weiß")
    assert sum(len(getattr(dataset, part)) for part in PARTS) == 29


@pytest.mark.parametrize(
    "kwargs",
    [
        {"size": -1},
        {"size": (1, 2, 3)},
        {"mode": "bgr"},
        {"fit": "zoom"},
        {"on_error": "ignore"},
        {"test_fraction": 1.5},
        {"held_out": 1.0},
        {"most_pixels": 0},
        {"classes": "cat,bird"},
        {"task": "regression"},
        {"task": "ranking"},
    ],
)
def test_arguments_are_checked(tmp_path, kwargs):
    files.image_folders(tmp_path)
    with pytest.raises(ArgumentError) as error:
        image_folder.make(path=str(tmp_path), **kwargs)
    assert error.value.where == next(iter(kwargs))


def test_a_large_jpeg_is_decoded_in_part_and_looks_the_same(tmp_path):
    y, x = np.mgrid[:900, :1200] / 60
    pixels = 127 + 100 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)
    image = Image.fromarray(pixels.astype(np.uint8))
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    for fit in ("crop", "stretch", "pad"):
        decoder = _images.Decoder(channels=3, size=(64, 48), fit=fit, most_pixels=2**26)
        part, whole = (decoder(tmp_path / name).astype(int) for name in ("a.jpg", "a.png"))
        assert part.shape == whole.shape == (64, 48, 3)
        assert abs(part - whole).mean() < 1.5 and abs(part - whole).max() < 24
    with Image.open(tmp_path / "a.jpg") as opened:
        opened.draft(opened.mode, (128, 128))
        assert opened.size == (300, 225)  # a sixteenth of the pixels
