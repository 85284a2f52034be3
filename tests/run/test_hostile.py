"""Some cases of `benchmarks/hostile.py`, which has all of them."""

import json
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def hostile(tmp_path, *args: str) -> list[dict]:
    """Runs cases in a process that has started nothing of JAX, since it forks."""
    out = tmp_path / "hostile.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "hostile.py"), f"--out={out}", *args],
        capture_output=True,
        text=True,
    )
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text())["rows"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and limits of Linux")
def test_hostile_commands_and_files_end_as_written_down(tmp_path):
    rows = hostile(tmp_path, "--quick")
    assert len(rows) >= 10
    assert {row["id"]: row["wrong"] for row in rows if row["wrong"]} == {}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and limits of Linux")
def test_the_judge_sees_what_is_wrong(tmp_path):
    rows = hostile(tmp_path, "--judge")
    found = {row["id"]: sorted(kind for kind, _ in row["wrong"]) for row in rows}
    assert found == {
        "executed": ["executed"],
        "foreign": ["foreign lost"],
        "fragment": ["poor message"],
        "outcome": ["silently wrong"],
        "outside": ["wrote outside"],
        "unequal": ["silently wrong"],
    }
