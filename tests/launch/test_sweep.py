"""Sweeps: spaces, their commands, and a local sweep from start to ranking."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest

from tests.launch.test_launchers import load, python
from tests.report.test_report import checked, write_run

sweep = load("sweep")


def test_grid_and_draws():
    space = {"a": [1, 2], "b": ["x", None]}
    trials = sweep.grid(space)
    assert trials == [{"a": a, "b": b} for a in (1, 2) for b in ("x", None)]
    lines = sweep.commands(trials, config="c.py", workdir=pathlib.Path("/w"), args=["--q"])
    assert lines[3][3:] == [
        "--config=c.py",
        "--workdir=/w/3",
        "--q",
        "--config.a=2",
        "--config.b=none",
    ]
    ranges = {"lr": ("log_uniform", 1e-4, 1.0), "m": ("uniform", -1.0, 1.0), "n": [3, 5]}
    drawn = sweep.draw(ranges, n=400, seed=1)
    assert drawn[:7] == sweep.draw(ranges, n=7, seed=1) != sweep.draw(ranges, n=7, seed=2)
    logs = np.log10([trial["lr"] for trial in drawn])
    assert -4 <= logs.min() < -3.8 and -0.2 < logs.max() <= 0
    assert abs(np.median(logs) + 2) < 0.3
    assert {trial["n"] for trial in drawn} == {3, 5}
    with pytest.raises(sweep.SweepError, match="--random=N"):
        sweep.grid(ranges)


SPACE = "def sweep():\n    return {'optim.lr': [0.1, 0.2], 'seed': [0, 1, 2]}\n"


def test_sweep_prints_commands_and_a_batch_script_without_touching_the_folder(tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text(SPACE)
    args = [f"--config={config}:smoke", f"--workdir={tmp_path / 'w'}", "--dry_run"]
    assert sweep.main([*args, "--", "--config.x=a b"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6
    assert lines[4][3:] == [
        f"--config={config}:smoke",
        f"--workdir={tmp_path / 'w' / '4'}",
        "--config.x=a b",
        "--config.optim.lr=0.2",
        "--config.seed=1",
    ]
    assert sweep.main([*args, "--backend=slurm", "--jobs=2", "--sbatch=--gpus=1"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-5%2\n" in text and "#SBATCH --gpus=1\n" in text
    fake = "srun() { shift; printf '%s\\n' \"$@\"; }\n"
    found = subprocess.run(
        ["bash", "-c", fake + text],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "4"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0 and found.stdout.split()[-2:] == lines[4][-2:]
    assert not (tmp_path / "w").exists()


def test_sweep_refuses_what_it_cannot_run(tmp_path, capsys):
    config = tmp_path / "c.py"
    for text, message in (("x = 1", "no function sweep"), ("def sweep(): return []", "no dict")):
        config.write_text(text)
        assert sweep.main([f"--config={config}", "--workdir=w"]) == 2
        assert message in capsys.readouterr().err
    assert sweep.main(["--config=absent.py", "--workdir=w"]) == 2


@pytest.mark.parametrize(
    "values, message",
    [
        ("3", "3 is no list of values"),
        ("'abc'", "'abc' is no list of values"),
        ("{'a': 1}", "is no list of values"),
        ("None", "None is no list of values"),
        ("[]", "has no values"),
        ("('uniform', 1)", "is no range"),
        ("('uniform', 2, 1)", "is no range"),
        ("('uniform', 1, float('inf'))", "is no range"),
        ("('uniform', 'a', 'b')", "is no range"),
        ("('log_uniform', 0, 1)", "both above 0"),
        ("('normal', 0, 1)", "('uniform', low, high)"),
        ("[lambda: 1]", "cannot stand on a command line"),
        ("[float('nan')]", "cannot stand on a command line"),
        ("range(10**9)", "combinations, at most 100,000"),
        ("1 / 0", "ZeroDivisionError"),
        ("undefined", "NameError"),
        ("(", "SyntaxError"),
    ],
)
def test_sweep_refuses_values_that_it_cannot_try(values, message, tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text(f"def sweep():\n    return {{'seed': [1, 2], 'optim.lr': {values}}}\n")
    for more in ([], ["--random=3"]):
        if "combinations" in message and more:
            continue  # draws need no list of all
        assert sweep.main([f"--config={config}", f"--workdir={tmp_path / 'w'}", *more]) == 2
        told = capsys.readouterr().err
        assert message in told and "Traceback" not in told and len(told.splitlines()) <= 4
    assert not (tmp_path / "w").exists()


def test_sweep_takes_arrays_ranges_and_tuples(tmp_path):
    config = tmp_path / "c.py"
    config.write_text(
        "import numpy as np\n"
        "def sweep():\n"
        "    return {'a': np.arange(2), 'b': range(1), 'c': ((1, 2),), 'd': ('x', 'y')}\n"
    )
    space = sweep.read_space(str(config))
    assert space == {"a": [0, 1], "b": [0], "c": [(1, 2)], "d": ["x", "y"]}
    assert type(space["a"][0]) is int and len(sweep.grid(space)) == 4


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null", None])
def test_a_damaged_or_other_list_of_a_sweep_is_not_overwritten(content, tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text(SPACE)
    (tmp_path / "w").mkdir()
    listing = tmp_path / "w" / "sweep.json"
    listing.mkdir() if content is None else listing.write_bytes(content)
    assert sweep.main([f"--config={config}", f"--workdir={tmp_path / 'w'}"]) == 2
    assert str(tmp_path / "w") in capsys.readouterr().err
    assert content is None or listing.read_bytes() == content


@pytest.mark.parametrize(
    "damage", ["{}", "[]", '{"status": "done"}', '{"status": "done", "best": 3}']
)
def test_a_damaged_result_is_no_finished_trial_and_is_named(damage, tmp_path, capsys):
    whole = json.dumps({"status": "done", "best": {"m": 0.5}})
    for i, text in enumerate((whole, damage, whole)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "result.json").write_text(text)
        (tmp_path / str(i) / "config.json").write_text('{"eval": {"metric": "m", "mode": "min"}}')
    (tmp_path / "2" / "config.json").write_text("{")
    folders = [tmp_path / str(i) for i in range(3)]
    lines = sweep.table([{"seed": i} for i in range(3)], folders).splitlines()
    assert [line.split()[0] for line in lines] == ["trial", "0", "left"]
    assert "config.json" in lines[2]
    assert str(tmp_path / "1" / "result.json") in capsys.readouterr().err


def test_local_sweep_skips_what_is_done_goes_on_after_failures_and_ranks(tmp_path, capsys):
    trials = [{"seed": i} for i in range(4)]
    folders = [tmp_path / str(i) for i in range(4)]
    write = (
        "import json, pathlib, sys; f = pathlib.Path(sys.argv[1]); i = int(f.name)\n"
        "if i == 1: sys.exit(3)\n"
        "metric = {'metric': 'held_out/accuracy', 'mode': 'max'}\n"
        "(f / 'config.json').write_text(json.dumps({'eval': metric}))\n"
        "best = {'held_out/accuracy': [0.2, 0, 0.9, 0.5][i]}\n"
        "(f / 'result.json').write_text(json.dumps({'status': 'done', 'best': best}))\n"
    )
    lines = [[*python(write), str(folder)] for folder in folders]
    assert sweep.run_local(lines, jobs=2, folders=folders) == 3
    assert "0 of 4" in capsys.readouterr().out
    assert sweep.run_local(lines, jobs=2, folders=folders) == 3
    assert "3 of 4" in capsys.readouterr().out
    order = [line.split()[0] for line in sweep.table(trials, folders).splitlines()[1:]]
    assert order == ["2", "3", "0"]


@pytest.mark.parametrize(
    "text",
    [
        "import sys\n\ndef sweep():\n    sys.exit(0)\n",
        "def sweep():\n    raise KeyboardInterrupt\n",
        "raise SystemExit(0)\n",
        "def sweep():\n    return 1 / 0\n",
        "def sweep(:\n",
    ],
)
def test_a_space_that_leaves_or_fails_is_a_mistake(tmp_path, capsys, text):
    path = tmp_path / "space.py"
    path.write_text(text)
    assert sweep.main([f"--config={path}", f"--workdir={tmp_path / 'sweep'}"]) == 2
    assert f"error: {path}:" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_space_may_import_modules_of_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_rates.py").write_text("RATES = [0.1, 0.2]\n")
    (tmp_path / "space.py").write_text(
        "import my_rates\n\ndef sweep():\n    return {'optim.lr': my_rates.RATES}\n"
    )
    assert sweep.main(["--config=space.py", "--workdir=sweep", "--dry_run"]) == 0
    assert "--config.optim.lr=0.2" in capsys.readouterr().out


def test_a_grid_on_the_command_line():
    given = ["optim.lr=0.03,1e-1", "config.data.train_transforms=(normalize,),flip"]
    given += ["total='2 epochs'", "optim.clip_norm=none,1", "log.tensorboard=true,false"]
    space = sweep.read_grid(given)
    assert space == {
        "optim.lr": [0.03, 0.1],
        "data.train_transforms": ["(normalize,)", "flip"],
        "total": ["2 epochs"],
        "optim.clip_norm": [None, 1],
        "log.tensorboard": [True, False],
    }
    for given in (["optim.lr"], ["=1"], ["optim.lr="], ["a=1", "a=2"]):
        with pytest.raises(sweep.SweepError, match="--grid"):
            sweep.read_grid(given)


def test_a_sweep_as_a_study_has_an_arm_for_each_trial(tmp_path):
    trials = [{"optim.lr": lr, "seed": 3} for lr in (0.1, 0.2)]
    line = sweep.study_command(
        trials, config="kd", workdir=tmp_path, args=["--q"], metric="held_out/nll", seed=4
    )
    assert "--config.study.arms.1.optim.lr=0.2" in line
    assert line.index("--config.study.arms={}") < line.index("--config.study.arms.0.optim.lr=0.1")
    assert {"--config.study.metric=held_out/nll", "--config.study.seeds=4,"} <= {*line}


def test_the_report_of_a_sweep_draws_every_trial(tmp_path):
    trials = [{"optim.lr": lr, "optim.name": name} for lr in (0.1, 0.2) for name in ("sgd", "lion")]
    folders = [tmp_path / str(i) for i in range(4)]
    for i, folder in enumerate(folders[:3]):
        write_run(folder, skill=1 + i / 2)
        config = json.loads((folder / "config.json").read_text())
        config["optim"] = {"lr": trials[i]["optim.lr"], "name": trials[i]["optim.name"]}
        (folder / "config.json").write_text(json.dumps(config))
    page = sweep.write_report(trials, folders, tmp_path)
    text = checked(page)
    response, _, rest = text.partition('id="trials"')
    assert response.count('class="ring') == 2 * 3
    best = json.loads((folders[2] / "result.json").read_text())["best"]["held_out/accuracy"]
    assert f"Best: optim.lr=0.2, optim.name=sgd, held_out/accuracy {best:.4f}" in response
    table = rest.partition("</table>")[0]
    assert [name in table for name in ("sgd", "lion", '<tr><th scope="row">3</th>')] == [True] * 3
    assert sweep.write_report(trials, folders[:1], tmp_path) is None
