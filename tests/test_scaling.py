"""A quantity that grows faster than it may ends the scaling benchmark with code 1 and its name."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "scaling.py"
SPEC = importlib.util.spec_from_file_location("scaling", SCRIPT)
assert SPEC is not None and SPEC.loader is not None
scaling = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scaling)


def rows(values, **powers):
    """Rows of quantities that are constant or grow with a power."""
    return [{k: 1e4 * x ** powers.get(k, 0.0) for k in scaling.STATIC} for x in values]


def test_exponents_are_of_all_points_and_of_the_last_two():
    found = scaling.exponents(
        (1, 2, 4),
        [{**row, "flops": y} for row, y in zip(rows((1, 2, 4)), (1e3, 1e3, 4e3), strict=True)],
    )
    assert found["flops"] == [1.0, 2.0] and found["peak"] == [0.0, 0.0]
    never = [{**row, "collective_bytes": y} for row, y in zip(rows((1, 2)), (0, 8), strict=True)]
    assert scaling.exponents((1, 2), never)["collective_bytes"] == [3.0, 3.0]


def test_what_grows_too_fast_is_named_with_its_bound():
    powers = scaling.exponents((4, 8), rows((4, 8), arguments=1.0, peak=1.0))
    assert scaling.exceeded("ps_kd_table", powers) == []
    powers = scaling.exponents((4, 8), rows((4, 8), arguments=1.0, temporary=1.0))
    (line,) = scaling.exceeded("ps_kd_table", powers)
    assert line.startswith("ps_kd_table: the exponent of temporary is 1.0, expected at most 0")
    assert scaling.EXPECTED["ps_kd_table"].reason in line
    shrinks = scaling.exponents((4, 8), rows((4, 8), flops=-0.5, temporary=-1.0))
    assert [line.split()[4] for line in scaling.exceeded("devices", shrinks)] == ["flops"]


def check(*flags):
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("grown", [False, True])
def test_the_stored_exponents_are_checked(tmp_path, grown):
    stored = json.loads((SCRIPT.parent / "results" / "scaling.json").read_text())
    assert list(stored["results"]) == list(scaling.AXES) == list(scaling.EXPECTED)
    if grown:
        stored["results"]["batch"]["exponents"]["collective_bytes"] = [0.4, 0.7]
    path, page = tmp_path / "scaling.json", tmp_path / "page.md"
    path.write_text(json.dumps(stored))
    mark = "benchmarks/scaling.py -->"
    page.write_text(f"above\n<!-- table: {mark}\nold\n<!-- end of {mark}\nbelow\n")
    done = check("--axes=none", f"--out={path}", f"--page={page}")
    assert done.returncode == int(grown), done.stderr
    assert ("batch: the exponent of collective_bytes is 0.7" in done.stderr) == grown
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert "| 64, 1,024 | " in text and ("0.70 (0)" in text) == grown


@pytest.mark.slow
def test_nothing_in_the_compiled_programs_grows_too_fast():
    done = check("--static")
    assert done.returncode == 0, done.stderr
