"""Training images in TensorBoard: read back from the event file."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from distill_jax.core.errors import ConfigError
from distill_jax.evaluators._features import spread
from distill_jax.run import build, flags, pictures
from distill_jax.run.train import loop

EVENT: Any = vars(event_pb2)["Event"]


def parse(*overrides):
    return flags.parse(["main", *overrides, "--workdir=unused"]).config


def events(folder):
    """Yields step, tag and pixels of the images in the event files of a run."""
    for path in sorted((folder / "tensorboard").glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = EVENT.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                if value.HasField("image"):
                    png = Image.open(io.BytesIO(value.image.encoded_image_string))
                    assert png.format == "PNG"
                    assert png.size == (value.image.width, value.image.height)
                    yield event.step, value.tag, np.asarray(png)


def cells(sheet, rows, columns, side):
    """Returns `[rows, columns, side, side(, c)]`, each image of a sheet at its own size."""
    h, w = ((n - pictures.GAP) // m for n, m in zip(sheet.shape, (rows, columns), strict=False))
    assert sheet.shape[:2] == (rows * h + pictures.GAP, columns * w + pictures.GAP)
    large = np.stack(
        [
            np.stack(
                [sheet[i * h + 2 : (i + 1) * h, j * w + 2 : (j + 1) * w] for j in range(columns)]
            )
            for i in range(rows)
        ]
    )
    size = large.shape[2] // side
    small = large[:, :, ::size, ::size]
    assert (small.repeat(size, axis=2).repeat(size, axis=3) == large).all()
    return small


SHORT = (
    *("--config=supervised:smoke", "--config.roles.student.model=mlp"),
    *("--config.roles.student.kwargs.hidden=(4,)", "--config.total=6", "--config.eval.every=3"),
)


def test_a_run_shows_the_images_of_its_data_at_the_start_and_at_evaluations(tmp_path):
    config = parse(*SHORT, "--config.log.images=5", "--config.data.train_transforms=('normalize',)")
    made = build.build(config)
    loop.train(config, tmp_path, make_experiment=lambda _: made, log_line=lambda line: None)
    found = list(events(tmp_path))
    assert [(step, tag) for step, tag, _ in found] == [(n, "train/input") for n in (0, 3, 6)]
    source = made.dataset.train
    raw = source.read(spread(len(source), 5))["input"]
    side = raw.shape[1]
    for _, _, sheet in found:  # normalized, and back
        seen = cells(sheet, 2, 3, side).reshape(6, *raw.shape[1:3], -1)
        assert np.abs(seen[:5].astype(int) - raw).max() <= 1 and raw.max() > 200
        assert (seen[5] == 0).all()


def test_augmentations_are_those_of_the_step(tmp_path):
    config = parse(*SHORT, "--config.log.images=4", "--config.batch_size=64")
    made = build.build(config)
    show = pictures.Pictures(made, config)
    per_epoch = -(-len(made.dataset.train) // 64)
    first, same, later = (show(step)["train/input"] for step in (0, 1, 2 * per_epoch))
    assert (first == same).all() and (first != later).any()
    assert first.dtype == np.uint8 and first.std() > 20


def test_views_stand_side_by_side_and_texts_and_tables_have_no_images():
    config = parse("--config=ssl/simclr:smoke", "--config.log.images=3")
    made = build.build(config)
    sheets = pictures.Pictures(made, config)(0)
    views = made.shapes.batch["views"]
    assert views.shape[1] == 2 and "train/views" in sheets
    seen = cells(sheets["train/views"], 3, 2, views.shape[2])
    assert seen.std() > 20 and (seen[:, 0] != seen[:, 1]).any()
    for name in ("language/next_token", "ssl/scarf"):
        config = parse(f"--config={name}:smoke", "--config.log.images=3")
        assert pictures.Pictures(build.build(config), config)(0) == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.log.images=-1"], "out of range"),
        (["--config.log.images=257"], "out of range"),
        (["--config.log.images=4", "--config.log.tensorboard=false"], "TensorBoard shows them"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(more, message):
    with pytest.raises(ConfigError, match=message):
        parse(*SHORT, *more)
