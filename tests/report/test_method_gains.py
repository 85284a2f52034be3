"""The picture of gains over a reference, and how many arms are above it."""

import json
import pathlib
import runpy
import sys
from xml.etree import ElementTree

import pytest

ROOT = pathlib.Path(__file__).parents[2]

STUDY = {
    "title": "Pair",
    "metric": "test/accuracy",
    "reference": "alone",
    "values": {
        "alone": {"test/accuracy": {"0": 0.80, "1": 0.82, "2": 0.81}},
        "rkd": {"test/accuracy": {"0": 0.81, "1": 0.81, "2": 0.81}},
        "kd": {"test/accuracy": {"0": 0.83, "1": 0.851, "2": 0.84}},
        "one_seed": {"test/accuracy": {"1": 0.9}},
        "tf_kd": {"test/accuracy": {"0": 0.70, "1": 0.73}},
    },
}


def test_the_picture_has_a_row_for_each_arm_and_the_arms_above_0_are_named(
    tmp_path, monkeypatch, capsys
):
    results, out = tmp_path / "results.json", tmp_path / "out.svg"
    results.write_text(json.dumps({"pair": STUDY, "other": {}}))
    monkeypatch.setattr(sys, "argv", ["_", f"--results={results}", f"--out={out}", "pair"])
    runpy.run_path(str(ROOT / "tools/method_gains.py"), run_name="__main__")
    assert capsys.readouterr().out == "Pair: 1 of 4 above 0 (kd)\n"
    text = out.read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert text.count('class="mean') == 4
    shown = [text.index(f">{arm}<") for arm in ("one_seed", "kd", "rkd", "tf_kd")]
    assert shown == sorted(shown)


def test_arms_below_the_floor_are_named_in_the_title(tmp_path, monkeypatch):
    results, out = tmp_path / "results.json", tmp_path / "out.svg"
    results.write_text(json.dumps({"pair": STUDY}))
    argv = ["_", "--floor=-0.05", f"--results={results}", f"--out={out}", "pair"]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(ROOT / "tools/method_gains.py"), run_name="__main__")
    text = out.read_text()
    assert ">Pair (beyond the axis: tf_kd -0.095)<" in text
    assert text.count('class="mean') == 3
    assert ">tf_kd<" not in text


def test_an_unknown_study_is_named_with_the_nearest(tmp_path, monkeypatch, capsys):
    results, out = tmp_path / "results.json", tmp_path / "out.svg"
    results.write_text(json.dumps({"pair": STUDY}))
    monkeypatch.setattr(sys, "argv", ["_", f"--results={results}", f"--out={out}", "pairs"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "tools/method_gains.py"), run_name="__main__")
    assert f"no study pairs in {results}; did you mean 'pair'?" in capsys.readouterr().err
    assert not out.exists()
