"""Weights that would take long to read are refused, and links out of a folder; a cache is read."""

import struct

import pytest

from distill_jax import weights
from distill_jax.weights import archives, common, gguf, pickles
from tests.weights import files, test_gguf
from tests.weights.files import refused

MANY = {"a": files.tensor(0, 4), "b": files.tensor(4, 8), "c": files.tensor(8, 12)}
STRINGS = test_gguf.entry("s", test_gguf.ARRAY, struct.pack("<IQ", test_gguf.STRING, 3) + bytes(24))
LIMITS = {
    "operations": (
        pickles, "MAX_OPERATIONS", 40, files.pth(files.state(a=files.rebuilt(), b=files.rebuilt())),
        "more than 40 operations"),
    "tensors": (
        common, "MAX_TENSORS", 2, files.safetensors(MANY, b"\0" * 12), "more lists and objects"),
    "gguf tensors": (
        common, "MAX_TENSORS", 0, test_gguf.one("a", 0, b"\0" * 4, 1), "claims 1 tensors"),
    "strings": (gguf, "MAX_STRINGS", 2, test_gguf.gguf([STRINGS]), "more than 2 strings"),
    "directory": (
        archives, "_MAX_DIRECTORY", 100, files.pth(files.state(a=files.rebuilt())),
        "its directory claims"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMITS)
def test_a_limit(case, tmp_path, monkeypatch):
    module, name, value, content, match = LIMITS[case]
    (tmp_path / "w").write_bytes(content)
    monkeypatch.setattr(module, name, value)
    refused(tmp_path / "w", match)


def test_shards_together_have_no_more_tensors_than_one(tmp_path, monkeypatch):
    for name in "abc":
        content = files.safetensors({name: files.tensor()}, b"\0" * 4)
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    assert len(weights.read(tmp_path)) == 3
    monkeypatch.setattr(common, "MAX_TENSORS", 2)
    refused(tmp_path, "more than 2 tensors")


def test_links(tmp_path):
    """A link out of a folder is refused; those of a cache of Hugging Face lead into `blobs`."""
    content = files.safetensors({"a": files.tensor()}, b"\0" * 4)
    for name in ("blobs", "snapshots", "snapshots/1", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "blobs" / "f00d").write_bytes(content)
    (tmp_path / "secret").write_bytes(content)
    link = tmp_path / "snapshots" / "1" / "model.safetensors"
    link.symlink_to("../../blobs/f00d")
    assert list(weights.read(link.parent)) == ["a"]
    (tmp_path / "inside").symlink_to(link.parent)
    assert list(weights.read(tmp_path / "inside")) == ["a"]
    link.unlink()
    link.symlink_to("../../secret")
    refused(link.parent, "a link out of its folder")
    (tmp_path / "other" / "w.safetensors").symlink_to("../blobs/f00d")
    refused(tmp_path / "other", "a link out of its folder")
