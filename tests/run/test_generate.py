"""Documents that a language model samples: resumed, joined, and read as a data set."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data import token_file
from distill_jax.models import transformer

V, END, ROOT = 12, 11, pathlib.Path(__file__).parents[2]
OPTIONS = {"documents": 10, "steps": 6, "end": END, "batch": 4}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "generate_tokens.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def network():
    model = transformer.make(vocabulary=V, width=8, depth=1, heads=2)
    params, _ = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return model, jax.device_get(params)


@pytest.fixture(scope="module")
def whole(tool, network, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "tokens.npy"
    return out, tool.generate(*network, out, **OPTIONS)


def test_documents_are_between_end_tokens(whole):
    out, found = whole
    ids = np.load(out)
    assert ids.dtype == np.uint16 and ids.max() < V
    texts = np.split(ids, np.flatnonzero(ids == END))
    assert len(texts) == found["kept"] and (ids != END).sum() == found["tokens"]
    assert max(len(text) for text in texts) <= OPTIONS["steps"] + 1
    rows = np.concatenate([np.load(p) for p in sorted(out.with_suffix(".parts").glob("0*.npy"))])
    assert len(rows) == OPTIONS["documents"] and found["ended"] == (rows == END).any(1).sum()
    assert 0 < found["ended"] < len(rows)
    dataset = token_file.make(path=str(out), vocabulary=V, end=END, length=4, held_out=0.2)
    assert dataset.vocabulary == V and len(dataset.train) > 1


@pytest.mark.slow
def test_an_interrupted_command_goes_on(tool, network, whole, tmp_path):
    out, folder = tmp_path / "tokens.npy", tmp_path / "tokens.parts"
    tool.generate(*network, out, **OPTIONS)
    out.unlink()
    (folder / "000000004.npy").unlink()
    kept = (folder / "000000000.npy").stat().st_mtime_ns
    tool.generate(*network, out, **OPTIONS)
    assert out.read_bytes() == whole[0].read_bytes()
    assert (folder / "000000000.npy").stat().st_mtime_ns == kept
    with pytest.raises(ConfigError, match="other settings"):
        tool.generate(*network, out, **{**OPTIONS, "seed": 1})
    assert json.loads((folder / "settings.json").read_text())["seed"] == 0


def test_what_cannot_be_generated(tool, network, tmp_path):
    encoder = transformer.make(vocabulary=V, width=8, depth=1, heads=2, layout="bert", max_length=8)
    params, _ = encoder.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    for name, args, changes, message in (
        ("encoder", (encoder, params), {}, "no `decode`"),
        ("end", network, {"end": -1}, "end is -1"),
        ("range", network, {"end": V}, "end is 12"),
        ("steps", network, {"steps": 0}, "steps is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            tool.generate(*args, tmp_path / f"{name}.npy", **{**OPTIONS, **changes})
