"""One run of the accelerator benchmark fills the comparison with the plan."""

import copy
import json
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


def compare(tmp_path, measured):
    path, page, mark = tmp_path / "measured.json", tmp_path / "page.md", "benchmarks/scale_plan.py"
    path.write_text(json.dumps(measured))
    page.write_text(f"above\n<!-- table: {mark} -->\nold\n<!-- end of {mark} -->\nbelow\n")
    command = [sys.executable, str(FOLDER / "scale_plan.py"), f"--against={path}"]
    command += [f"--out={FOLDER / 'results' / 'scale_plan.json'}", f"--page={page}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert done.stdout.strip() in text and "old" not in text and text.endswith("\nbelow\n")
    rows = [line.strip("| ").split(" | ") for line in done.stdout.strip().splitlines()]
    return [[*(cell.strip() for cell in row), *[""] * (5 - len(row))] for row in rows[2:]]


def test_a_measurement_stands_beside_the_plan(tmp_path):
    stored = json.loads((FOLDER / "results" / "accelerator_cpu.json").read_text())
    assert all(row[3] == row[4] == "" for row in compare(tmp_path, stored))
    plan = json.loads((FOLDER / "results" / "scale_plan.json").read_text())["results"]
    measured = copy.deepcopy(stored)
    measured["purpose"] = "measurement"
    planned = plan["chip:vit_kd"]
    measured["parts"]["vit_kd"]["variants"]["ours"] |= {
        "flops": 1.1 * planned["flops"],
        "peak_bytes": 0.5 * planned["peak"],
        "ms": 2e3 * planned["flops"] / 989.4e12,
        "device_kind": "NVIDIA H100 80GB HBM3",
    }
    del measured["parts"]["bilevel"]
    found = {(row[0], row[1]): row[4] for row in compare(tmp_path, measured)}
    assert found["vit_kd", "operations, TFLOP"] == "+10%"
    assert found["vit_kd", "peak memory, GB"] == "-50%, more than 15%"
    assert found["vit_kd", "least time on one H100, ms"] == "+100%, more than 15%"
    assert found["bilevel", "operations, TFLOP"] == ""
