"""The picture of gains over a reference, and how many arms are above it."""

import json
import pathlib
import runpy
import sys
from xml.etree import ElementTree

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
