"""The archive of emoji: which images are read, their groups, and what is refused."""

import io
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data import emoji

ARCHIVE = pathlib.Path(os.environ.get("DISTILL_JAX_EMOJI", "absent"))


def png(colour):
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), colour).save(file, "png")
    return file.getvalue()


def entry(code, category, *, has=True):
    return {
        "unified": code,
        "image": f"{code.lower()}.png",
        "category": category,
        "has_img_google": has,
    }


def test_emoji_are_read_on_white_with_their_groups():
    listed = [
        entry("1F46E-2640", "People & Body"),
        entry("1F46E-2642", "People & Body"),
        entry("1F1EA-1F1EC", "Flags"),
        entry("1F1EA-1F1F8", "Flags"),
        entry("1F3FB", "Component"),
        entry("1F600", "Smileys & Emotion", has=False),
    ]
    contents = {"emoji.json": json.dumps(listed).encode()}
    contents |= {f"img/google/64/{x['image']}": png((255, 0, 0, 0)) for x in listed[:3]}
    contents["img/google/64/1f1ea-1f1f8.png"] = png((255, 0, 0, 255))
    found = emoji.chosen(contents)
    assert found.images.shape == (4, 64, 64, 3)
    assert (found.images[0] == 255).all() and found.images[3, 0, 0].tolist() == [255, 0, 0]
    assert [list(emoji.COUNTS)[i] for i in found.labels] == ["People & Body"] * 2 + ["Flags"] * 2
    assert found.groups.tolist() == ["1F46E", "1F46E", "1F1EA-1F1EC", "1F1EA-1F1F8"]


def test_parts_share_no_group(monkeypatch, tmp_path):
    random = np.random.default_rng(0)
    groups = np.repeat([f"{i:X}" for i in range(200)], 3)
    images = random.integers(0, 256, (600, 64, 64, 3), np.uint8)
    images[:, 0, 0, 0] = np.repeat(np.arange(200), 3)
    labels = random.integers(0, 9, 600).astype(np.int32)
    monkeypatch.setattr(emoji, "read", lambda path, stamp: emoji.Emoji(images, labels, groups))
    path = tmp_path / "archive.tgz"
    path.touch()
    made = emoji.make(path=str(path), test=0.3, held_out=0.2)
    owners = [
        set(part.read(np.arange(len(part)))["input"][:, 0, 0, 0].tolist())
        for part in (made.train, made.held_out, made.test)
    ]
    assert sum(map(len, owners)) == 200 == len(set.union(*owners))
    assert sum(len(part) for part in (made.train, made.held_out, made.test)) == 600
    assert abs(len(made.test) / 600 - 0.3) < 0.1
    with pytest.raises(ArgumentError, match="held_out is 1"):
        emoji.make(path=str(path), held_out=1.0)


def test_another_archive_is_refused(tmp_path):
    (tmp_path / "x.tgz").write_bytes(b"nothing")
    with pytest.raises(DataUnavailable, match=r"sha256 is .*\n.*npm pack"):
        emoji.make(path=str(tmp_path / "x.tgz"))
    with pytest.raises(DataUnavailable, match="no such file"):
        emoji.make(path=str(tmp_path / "absent.tgz"))


@pytest.mark.slow
@pytest.mark.skipif(not ARCHIVE.exists(), reason="the variable DISTILL_JAX_EMOJI names no archive")
def test_the_archive_has_what_is_documented():
    made = emoji.make(path=str(ARCHIVE))
    parts = [part.read(np.arange(len(part))) for part in (made.train, made.held_out, made.test)]
    labels = np.concatenate([part["label"] for part in parts])
    assert dict(zip(emoji.COUNTS, np.bincount(labels).tolist(), strict=True)) == emoji.COUNTS
    assert [len(part["label"]) for part in parts] == [1309, 150, 447]
