"""Successive halving: the rule, sweeps of planted trials, and runs that stop at a step."""

import fractions
import json

import jax
import numpy as np
import pytest

from distill_jax.core.errors import UserError
from distill_jax.main import main
from distill_jax.run import build, flags, halving, sweep_trials
from distill_jax.run.environment import Paused, Preempted
from distill_jax.run.sweep_space import SweepError
from distill_jax.run.train import loop
from distill_jax.trainer.io import files
from distill_jax.trainer.io.network import read_network
from tests.launch.test_launchers import load, python
from tests.report.test_report import checked
from tests.run.test_survival import stop_after_a_step

sweep = load("sweep")
METRIC = "held_out/accuracy"

# A trial of 90 steps, evaluated at every tenth. 0 is the best at first and 7 at the end; 4 is
# second at the first rung and diverges after it. The settings of 2 are refused, and 5 crashes once.
# On the test part the order is the opposite.
TRIAL = """
import json, pathlib, sys
folder, i = pathlib.Path(sys.argv[1]), int(pathlib.Path(sys.argv[1]).name)
named = [a.partition("=")[2] for a in sys.argv if a.startswith("--stop_at=")]
end = round(90 * float(named[0].split()[0]) / 100) if named else 90
starts = folder / "starts"
with starts.open("a") as file:
    file.write(f"{end} ")
if i == 2:
    sys.exit(2)
if i == 5 and starts.read_text() == "10 ":
    sys.exit(1)
if i == 4 and end > 10:
    sys.exit(3)
values = {0: lambda at: 0.5, 4: lambda at: 0.4, 7: lambda at: 0.3 + 0.7 * at / 90}
rows = []
for step in range(10, end + 1, 10):
    value = values.get(i, lambda at: 0.01 * i)(step)
    rows.append({"step": step, "held_out/accuracy": value, "test/accuracy": 1 - value})
(folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in rows))
(folder / ".distill_jax.json").write_text('{"kind": "run"}')
config = {"eval": {"metric": "held_out/accuracy", "mode": "max"}, "seed": 0, "optim": {"lr": i}}
(folder / "config.json").write_text(json.dumps(config))
if end == 90:
    best = {"step": 90, "held_out/accuracy": rows[-1]["held_out/accuracy"]}
    result = {"status": "done", "best": best, "metrics": {}, "seed": 0, "steps": 90}
    (folder / "result.json").write_text(json.dumps(result))
"""


class Spied(dict):
    """A row of metrics whose test part must not be read."""

    def __getitem__(self, name):
        assert not name.startswith("test/"), name
        return super().__getitem__(name)

    def values(self):
        raise AssertionError("all metrics are read")

    items = values


def halved(folder, n=9, jobs=3, **changes):
    folders = [folder / str(i) for i in range(n)]
    lines = [[*python(TRIAL), str(path)] for path in folders]
    rule = {"eta": 3, "metric": METRIC, "mode": "max", **changes}
    parts = halving.plan(n, eta=rule["eta"])
    record = halving.Record.open(folder / "halving.json", parts=parts, **rule)
    return sweep_trials.run_halved(lines, jobs=jobs, folders=folders, record=record), record


def test_rungs_are_those_of_hyperband():
    def plan(n, eta, most=None):
        return [str(part) for part in halving.plan(n, eta=eta, most=most)]

    assert plan(9, 3) == plan(26, 3) == ["1/9", "1/3"]
    assert plan(8, 2) == ["1/8", "1/4", "1/2"]
    assert plan(81, 3, most=2) == ["1/9", "1/3"]
    assert plan(2, 2) == ["1/2"]
    with pytest.raises(SweepError, match="2 trials cannot be cut to one in 3"):
        plan(2, 3)
    for part in (fractions.Fraction(1, 9), fractions.Fraction(1, 27)):
        text = halving.stop_flag(part).partition("=")[2].split()[0]
        assert [round(n * float(text) / 100) for n in (27, 270)] == [27 * part, 270 * part]


def test_the_best_third_goes_on_and_values_that_are_not_finite_never_do():
    values = {"0": 0.5, "1": None, "2": 0.9, "3": float("nan"), "4": 0.9, "5": 0.1}
    assert halving.best(values, eta=3, mode="max") == ["2", "4"]
    assert halving.best(values, eta=3, mode="min") == ["5", "0"]
    assert halving.best(values, eta=2, mode="max") == ["2", "4", "0"]
    assert halving.best({"a": 0.2, "b": 0.2}, eta=3, mode="max") == ["a"]
    assert halving.best({"a": None, "b": None}, eta=2, mode="max") == []


def test_planted_trials_stop_when_they_should_and_the_test_part_is_not_read(tmp_path, monkeypatch):
    read = files.read_rows
    monkeypatch.setattr(files, "read_rows", lambda path, **k: [Spied(r) for r in read(path, **k)])
    code, record = halved(tmp_path)
    assert code == 1 and "on" not in record.rungs[0]  # 5 failed, so nothing is decided
    assert [*sorted(record.rungs[0]["at"])] == ["0", "1", "2", "3", "4", "6", "7", "8"]
    code, record = halved(tmp_path)
    assert code == 0
    assert [rung["on"] for rung in record.rungs] == [["0", "4", "7"], ["7"]]
    starts = {i: (tmp_path / str(i) / "starts").read_text().split() for i in range(9)}
    rung = {0: ["10", "30"], 4: ["10", "30"], 5: ["10", "10"], 7: ["10", "30", "90"]}
    assert starts == {i: rung.get(i, ["10"]) for i in range(9)}
    results = {
        int(path.parent.name): json.loads(path.read_text())
        for path in tmp_path.glob("*/result.json")
    }
    # 2 has its log.txt, and 4 stopped where it diverged.
    steps = {0: 30, 1: 10, 3: 10, 5: 10, 6: 10, 7: 90, 8: 10}
    assert {i: result["steps"] for i, result in results.items()} == steps
    assert {i for i, result in results.items() if result["status"] == "done"} == {7}
    assert "0.08 at step 10 has rank 4 of 9 trials at 1/9 of training" in results[8]["reason"]
    stopped = record.stopped()
    assert "the settings are refused" in stopped["2"]["why"] and stopped["2"]["rung"] == 0
    assert "a loss that is not finite" in stopped["4"]["why"] and stopped["4"]["rung"] == 1
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert halved(tmp_path)[0] == 0  # nothing is left to do
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_report_and_the_table_say_which_trials_stopped_when(tmp_path):
    halved(tmp_path)
    _, record = halved(tmp_path)
    trials = [{"optim.lr": i} for i in range(9)]
    folders = [tmp_path / str(i) for i in range(9)]
    lines = sweep.table(trials, folders, record).splitlines()
    assert lines[1].split()[0] == "7" and len([x for x in lines if x.startswith("stopped")]) == 8
    page = sweep.write_report(trials, folders, tmp_path, record)
    text = checked(page)
    assert "Successive halving stopped 8 before their end" in text
    rungs, _, rest = text.partition('id="halving"')[2].partition('id="trials"')
    cells = [cell.partition("</td>")[0].rpartition(">")[2] for cell in rungs.split("<td")[1:]]
    assert cells[:4] == ["1/9", "10", "9", "3"] and cells[6:10] == ["1/3", "30", "3", "1"]
    order = [row.partition("<")[0] for row in rest.split('<th scope="row">')[1:10]]
    assert order == ["7", "0", "4", "8", "6", "5", "3", "1", "2"]
    assert "step 30: 0.5000" in rest and "the settings are refused" in rest
    assert "the run is stopped: successive halving" in checked(tmp_path / "8/report.html")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--", "--config.data.held_out=0", "--config.eval.metric="], "no held-out part"),
        (["--backend=replicas"], "trials of --backend=replicas do not stop early"),
        (["--backend=slurm"], "trials of --backend=slurm do not stop early"),
        (["--halving=5"], "4 trials cannot be cut to one in 5"),
        (["--", "--config.eval.every=none"], "evaluated at their end only"),
        (["--", "--config.eval.every=6 steps"], "does not tell the rungs apart"),
        (["--", "--config.eval.every=60 %"], "does not tell the rungs apart"),
        (["--grid=eval.mode=max,min"], "cannot be ranked"),
    ],
)
def test_sweeps_that_cannot_be_halved_are_refused(more, message, tmp_path, capsys):
    line = ["--config=supervised:smoke", f"--workdir={tmp_path / 'w'}", "--halving=2"]
    grid = "--grid=optim.lr=1,2" if any("mode=" in m for m in more) else "--grid=optim.lr=1,2,3,4"
    rest = (
        [] if "--" in more or any("mode=" in m for m in more) else ["--", "--config.eval.every=1"]
    )
    assert sweep.main([*line, grid, *more, *rest]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("flag", ["--halving=1", "--rungs=1", "--halving=2 --rungs=0"])
def test_numbers_out_of_range_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--config=supervised:smoke", "--workdir=w", *flag.split()])
    said = "--rungs is 1 or more" if "--rungs" in flag else "--halving is 2 or more"
    assert said in capsys.readouterr().err


def test_a_sweep_keeps_its_rule(tmp_path, capsys):
    halved(tmp_path)
    with pytest.raises(SweepError, match="2 rungs with 1 in 3 going on by held_out/accuracy"):
        halved(tmp_path, mode="min")
    listed = [{"folder": str(i), "values": {"optim.lr": float(i)}} for i in range(9)]
    (tmp_path / "sweep.json").write_text(json.dumps(listed))
    values = ",".join(f"{i}." for i in range(9))
    line = ["--config=supervised:smoke", f"--workdir={tmp_path}", f"--grid=optim.lr={values}"]
    assert sweep.main(line) == 2
    assert "give --halving=3" in capsys.readouterr().err
    (tmp_path / "halving.json").unlink()
    assert sweep.main([*line, "--halving=3", "--", "--config.eval.every=1"]) == 2
    assert "began without --halving" in capsys.readouterr().err


def config(*overrides):
    return flags.parse(
        [
            *("main", "--config=supervised:smoke", "--workdir=unused"),
            *("--config.roles.student.model=mlp", "--config.roles.student.kwargs.hidden=(4,)"),
            *("--config.total=8", "--config.eval.every=2", "--config.log.every_steps=3"),
            *("--config.log.tensorboard=false", *overrides),
        ]
    ).config


def test_a_run_that_stops_at_rungs_has_the_bits_of_one_that_does_not(tmp_path):
    made = build.build(config())

    def train(folder, **more):
        quiet = {"make_experiment": lambda _: made, "log_line": lambda line: None}
        return loop.train(config(), folder, **quiet, **more)

    def rows(folder):
        read = files.read_rows(folder / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k != "seconds"} for row in read]

    whole = train(tmp_path / "whole")
    broken = tmp_path / "broken"
    for at, step in (("12.5 %", 2), ("37.5 %", 4), ("3 steps", 4)):
        with pytest.raises(Paused, match=f"step {step}") as caught:
            train(broken, stop_at=at)
        assert caught.value.exit_code == 0
        [value] = [r[METRIC] for r in rows(tmp_path / "whole") if r["step"] == step]
        assert halving.read_value(broken, METRIC) == (step, value)
        assert not (broken / "predictions.npz").exists()
    with pytest.raises(Preempted) as stopped:
        loop.train(
            config(),
            broken,
            make_experiment=lambda _: made,
            log_line=stop_after_a_step,
        )
    assert stopped.value.exit_code == 75
    told = {"status": "stopped", "seed": 0, "steps": 4, "reason": "successive halving"}
    (broken / "result.json").write_text(json.dumps(told))
    result = train(broken)
    drop = lambda r: {k: v for k, v in r.items() if k != "compute"}  # noqa: E731
    assert drop(result) == drop(whole) and rows(broken) == rows(tmp_path / "whole")
    assert json.loads((broken / "result.json").read_text())["status"] == "done"
    assert not list(broken.glob("*damaged*"))
    (want, _), (got, _) = (read_network(f) for f in (tmp_path / "whole", broken))
    for a, b in zip(*map(jax.tree.leaves, (want, got)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("more", "at", "message"),
    [
        ((), "90 %", "no evaluation between"),
        (("--config.eval.every=none",), "50 %", "no evaluation between"),
        (("--config.data.held_out=0", "--config.eval.metric="), "50 %", "no held-out part"),
    ],
)
def test_a_step_without_an_evaluation_is_no_end(more, at, message, tmp_path):
    with pytest.raises(UserError, match=message):
        loop.train(config(*more), tmp_path / "run", stop_at=at, log_line=lambda line: None)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (["--stop_at=soon"], "is not a duration"),
        (["--stop_at=0"], "is not positive"),
        (["--stop_at=5", "--mode=study"], "trains no single run"),
        (["--stop-at=5"], "did you mean 'stop_at'"),
    ],
)
def test_wrong_ends_are_refused(flag, message, tmp_path, capsys):
    line = ["main", "--config=supervised:smoke", f"--workdir={tmp_path / 'w'}", *flag]
    assert main(line) == 2
    assert message in capsys.readouterr().err
