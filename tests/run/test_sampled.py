"""Reports of language models show text of theirs, and say that fewer bits are better."""

import json
import re

import jax
import numpy as np
import pytest

from distill_jax import report
from distill_jax.core import partition, sequences
from distill_jax.core.errors import UserError
from distill_jax.data import _documents
from distill_jax.run import build, flags, sampled, workdir
from distill_jax.run import config as config_lib


def test_text_of_ids_is_one_document():
    decode = _documents.decoder("", end=256)
    assert decode([256, 256, *b"one", 256, *b"two"]) == "one"
    assert decode([*"ü".encode()[:1]]) == "\ufffd" and decode([256]) == decode([]) == ""


@pytest.fixture
def one_device(monkeypatch):
    devices, make_mesh = jax.devices()[:1], partition.make_mesh
    monkeypatch.setattr(
        partition, "make_mesh", lambda **kwargs: make_mesh(**kwargs, devices=devices)
    )


def experiment_of(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(f"<b>{i} & {i}</b> " * 40)
    config = flags.load("language/next_token:smoke")
    changes = {"data.name": "text_folder", "data.kwargs": {"path": str(tmp_path / "text")}}
    config = config_lib.override(config, changes)
    config.data.held_out = 0.3
    config.mesh.data = 1
    return config, build.build(config)


def test_a_run_shows_what_its_network_writes(tmp_path, one_device):
    config, experiment = experiment_of(tmp_path)
    state = build.initial_state(experiment, jax.random.key(0), config)
    sampled.store(tmp_path, experiment, state, {}, seed=0, write=True)
    stored = json.loads((tmp_path / sampled.FILE).read_text())
    assert stored["part"] == "held_out" and len(stored["samples"]) == sampled.MOST
    net, params = experiment.models["student"], state.params["student"]
    for one in stored["samples"]:
        assert re.fullmatch(r"[<b>/ &\d]{0,32}", one["prompt"])
        ids = [*one["prompt"].encode()]
        ids = [256] * (len(ids) < 32) + ids  # the end before the document
        outputs, _ = net.apply(params, {}, np.array([ids], np.int32), train=False)  # no cache
        text = experiment.dataset.decode([int(np.argmax(outputs["logits"][0, -1]))])
        assert one["greedy"].startswith(text) or text == "\ufffd"
    sampled.store(tmp_path, experiment, state, {}, seed=1, write=True)
    other = json.loads((tmp_path / sampled.FILE).read_text())
    assert other["samples"][0]["sampled"] != stored["samples"][0]["sampled"]
    assert other["samples"][0]["greedy"] == stored["samples"][0]["greedy"]


def test_samples_of_another_program_stay(tmp_path):
    (tmp_path / sampled.FILE).write_text("mine")
    with pytest.raises(UserError, match="not written by this program"):
        workdir.refuse_foreign(tmp_path, "run")


def test_text_is_escaped_and_fewer_bits_are_better(tmp_path):
    config = flags.load("language/next_token:smoke")
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    measured = {
        "test/bits_per_byte": 2.5,
        "held_out/bits_per_byte": 2.4,
        "test/token_accuracy": 0.5,
    }
    result = {"status": "done", "steps": 12, "metrics": measured, "best": {**measured, "step": 12}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    one = {"prompt": "<script>", "greedy": "a & b", "sampled": "\0 \x1b"}
    found = {"part": "held_out", "temperature": 0.8, "samples": [one]}
    (tmp_path / sampled.FILE).write_text(json.dumps(found))
    page = report.write_run_report(tmp_path).read_text()
    assert "<td>&lt;script&gt;</td><td>a &amp; b</td><td>\ufffd \ufffd</td>" in page
    assert "test/bits_per_byte (lower is better) is 2.5000 after the last step" in page
    assert "held_out/bits_per_byte (lower is better), not by the test split" in page
    rows = re.findall(r'<th scope="row">([^<]+)</th>', page)
    assert rows[0] == "bits_per_byte"
    (tmp_path / sampled.FILE).write_text("{")
    assert "samples.json" in report.write_run_report(tmp_path).read_text()


def test_an_image_model_writes_no_text(tmp_path, one_device):
    config = flags.load("distill/supervised:smoke")
    config.mesh.data = 1
    experiment = build.build(config, shapes_only=True)
    assert not sampled.writes(experiment)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA for CPUs")
def test_top_tokens_are_found_without_sorting_all():
    z = jax.ShapeDtypeStruct((2, 3, 5_000), np.float32)
    compiled = jax.jit(lambda z: sequences.top_log_probs(z, 8)).lower(z).compile()
    assert " sort(" not in compiled.as_text()
