"""Runs that go on differently: longer, with declared changes, and evaluated on other data."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

import distill_jax as dj
from distill_jax import main, report
from distill_jax.core.errors import ConfigError
from distill_jax.run import build, config, flags, workdir
from distill_jax.run.environment import Preempted
from distill_jax.run.train import loop
from distill_jax.run.train.run import Run
from distill_jax.run.workdir import segments
from distill_jax.trainer.io import step_folder
from distill_jax.trainer.io.checkpoint import Checkpointer
from distill_jax.trainer.io.step_index import finished_steps
from tests.run.test_phases import make_config
from tests.run.test_workdir import arguments, listing, stop, write_data

CONSTANT = "--config.optim.schedule=constant"
ON = (
    "--config.data.train_transforms=scale",
    "--config.log.every_steps=1",
    "--config.optim.warmup=none",
)


def run(*args):
    return main.main(["distill-jax", *args])


def train(data, folder, *overrides):
    assert run(*arguments(data, folder, *ON, *overrides)) == 0


def state(folder, step):
    """Every array of a checkpoint, as bytes by path."""
    stored: Any = workdir.stored_config(folder)
    experiment = build.build(stored, trusted=())
    found: Any = Checkpointer(folder / "checkpoints").restore(experiment.abstract_state, step=step)
    leaves = jax.tree_util.tree_leaves_with_path(found.state)
    assert len(leaves) > 4
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def rows(folder, until=10**9):
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k != "seconds"} for r in lines if r["step"] <= until]


def training(folder):
    """Means of training steps, by step."""
    return {r["step"]: r["train/loss"] for r in rows(folder) if "train/loss" in r}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, and a finished run of three steps at a constant rate and one with a cosine."""
    folder = tmp_path_factory.mktemp("finished")
    write_data(folder / "data.npz")
    train(folder / "data.npz", folder / "constant", CONSTANT)
    train(folder / "data.npz", folder / "cosine")
    return folder


@pytest.fixture
def copy(place, tmp_path):
    def make(name):
        shutil.copytree(place / name, tmp_path / name)
        return tmp_path / name

    return make


def test_a_run_at_a_constant_rate_that_is_extended_equals_one_that_was_long(place, copy, tmp_path):
    folder = copy("constant")
    before, old = rows(folder), state(folder, 3)
    assert run(f"--workdir={folder}", "--extend=6") == 0
    train(place / "data.npz", tmp_path / "long", CONSTANT, "--config.total=6")
    assert state(folder, 6) == state(tmp_path / "long", 6)
    assert state(place / "constant", 3) == old
    assert training(folder) == training(tmp_path / "long")
    assert rows(folder)[: len(before)] == before  # what was written stays
    assert json.loads((folder / "config.json").read_text())["total"] == "6 steps"


def test_the_extended_part_goes_on_bit_for_bit_where_it_was_cut(copy):
    whole, cut = copy("cosine"), None
    shutil.copytree(whole, cut := whole.with_name("cut"))
    parsed = flags.parse(["", f"--workdir={cut}", "--extend=6"])
    with pytest.raises(Preempted):
        loop.train(parsed.config, cut, changes=parsed.changes, log_line=stop)
    [done] = [s for s in finished_steps(cut / "checkpoints") if s > 3]
    assert done < 6 and workdir.read_result(cut) is None
    assert json.loads((cut / "result.json").read_text())["steps"] == 3  # of the earlier end
    assert run(f"--workdir={whole}", "--extend=6") == 0
    assert run(f"--workdir={cut}", "--extend=6") == 0
    assert state(cut, 6) == state(whole, 6)
    assert training(cut) == training(whole)
    ends = [(s["from"], s["to"]) for s in segments.read(cut)]
    assert ends == [(0, 3), (3, 6)] == [(s["from"], s["to"]) for s in segments.read(whole)]


def test_the_schedule_is_that_of_the_longer_total_from_there_on(copy, capsys):
    folder = copy("cosine")
    kept = listing(folder)
    assert run(f"--workdir={folder}", "--extend=6") == 0
    out = capsys.readouterr()
    assert "extending from step 3 to step 6, the new total" in out.out
    rates = {r["step"]: r["train/lr"] for r in rows(folder) if "train/lr" in r}
    peak = json.loads((folder / "config.json").read_text())["optim"]["lr"]
    cosine = lambda t, total: peak * 0.5 * (1 + np.cos(np.pi * t / total))  # noqa: E731
    wanted = [*(cosine(t, 3) for t in range(3)), *(cosine(t, 6) for t in range(3, 6))]
    assert rates == pytest.approx(dict(enumerate(wanted, 1)), rel=1e-5)
    [first, second] = segments.read(folder)
    assert first["changes"] == {} and first["versions"]["jax"]
    assert second["changes"] == {"total": ["'3 steps'", "'6 steps'"]}
    assert second["learning_rate"] == pytest.approx([cosine(2, 3), cosine(3, 6)], rel=1e-5)
    # The earlier end is kept, and nothing else is lost.
    for name in ("result.json", "predictions.npz", "report.html", "config.json"):
        assert (folder / "segments/3" / name).read_bytes() == kept[name]
    assert not list(folder.glob("*.damaged*"))
    page = (folder / "report.html").read_text()
    assert "3 to 6" in page and "&#x27;3 steps&#x27; → &#x27;6 steps&#x27;" in page
    assert page.count("Dashed vertical lines") == 1 and str(folder) not in page


def test_extending_to_the_same_total_changes_nothing(copy, capsys):
    folder = copy("cosine")
    before = listing(folder)
    for total in ("3", "3 steps"):
        assert run(f"--workdir={folder}", f"--extend={total}") == 0
        assert "is finished" in capsys.readouterr().out
    after = listing(folder)
    different = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and different <= {"report.html"}


def test_an_extension_twice_over_and_a_rate_that_changes_with_it(copy):
    folder = copy("constant")
    assert run(f"--workdir={folder}", "--extend=4") == 0
    more = ("--config.optim.lr=0.01", "--change=optim.lr")
    assert run(f"--workdir={folder}", "--extend=5", *more) == 0
    assert [s["to"] for s in segments.read(folder)] == [3, 4, 5]
    assert segments.read(folder)[2]["changes"]["optim.lr"] == ["0.1", "0.01"]
    assert segments.read(folder)[2]["learning_rate"] == pytest.approx([0.1, 0.01])
    assert {p.name for p in (folder / "segments").iterdir()} == {"3", "4"}
    assert run(f"--workdir={folder}", "--extend=5", *more) == 0  # the same command again


def test_a_stopped_run_goes_on_with_another_rate_and_evaluator(place, tmp_path, capsys):
    folder = tmp_path / "run"
    given = arguments(place / "data.npz", folder, *ON, CONSTANT)
    made = flags.parse(["", *given]).config
    with pytest.raises(Preempted):
        loop.train(made, folder, log_line=stop)
    step = finished_steps(folder / "checkpoints")[-1]
    changed = [*given, "--config.optim.lr=0.02", "--config.evaluators.calibration.bins=7"]
    assert run(*given, "--config.optim.lr=0.02") == 2
    assert "--change=optim.lr accepts a new value from here on" in capsys.readouterr().err
    assert run(*changed, "--change=optim.lr,evaluators") == 0, capsys.readouterr().err
    rates = {r["step"]: r["train/lr"] for r in rows(folder) if "train/lr" in r}
    assert rates[step] == pytest.approx(0.1) and rates[step + 1] == pytest.approx(0.02)
    assert [s["from"] for s in segments.read(folder)] == [0, step]
    # Without the declaration the changed run is another one, as before.
    (folder / "result.json").unlink()
    assert run(*given) == 2
    assert "optim.lr: 0.02 -> 0.1" in capsys.readouterr().err


# Evaluation on other data.


@pytest.fixture(scope="module")
def other(place):
    """Other files beside the data of the run."""
    r = np.random.RandomState(7)
    parts = {f"x_{part}": r.randint(0, 256, (24, 4, 4, 1), np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": np.arange(24) % 4 for part in ("train", "test")}
    save = lambda name, **arrays: np.savez(place / f"{name}.npz", **arrays)  # noqa: E731
    save("other", **parts, **labels)
    save("three", **parts, **{name: y % 3 for name, y in labels.items()})
    save("wide", **{name: np.tile(x, (1, 2, 2, 1)) for name, x in parts.items()}, **labels)
    save("floats", **{name: x / np.float32(255) for name, x in parts.items()}, **labels)
    save("unlabelled", **parts, y_train=labels["y_train"])
    return place


def evaluate(folder, *overrides, capsys=None):
    return run("--mode=eval", f"--workdir={folder}", *overrides)


def test_a_run_is_evaluated_on_other_data_by_one_command(copy, other, capsys, monkeypatch):
    folder = copy("cosine")
    before = listing(folder)
    monkeypatch.chdir(other)
    assert evaluate(folder, "--config.data.kwargs.path=other.npz") == 0  # relative, as a user does
    out = capsys.readouterr().out
    [path] = folder.glob("eval-*.json")
    assert re.fullmatch(r"eval-npz_file-[0-9a-f]{6}\.json", path.name) and path.name in out
    found = json.loads(path.read_text())
    assert found["states"].keys() == {"last", "best"} and found["states"]["last"]["step"] == 3
    assert found["provenance"]["test"]["n"] == 24 and str(other) not in path.read_text()
    network = dj.load(folder, step="last")
    with np.load(other / "other.npz") as file:
        right = network(file["x_test"])["logits"].argmax(1) == file["y_test"]
    assert found["states"]["last"]["test/accuracy"] == pytest.approx(right.mean())
    after = listing(folder)
    changed = {n for n in after if n not in before or after[n] != before[n]}
    assert changed == {path.name, "report.html"} and before.keys() <= after.keys()
    page = (folder / "report.html").read_text()
    assert "Other data" in page and "24" in page and str(other) not in page
    # Twice: the same file; other settings: another; the run's own: as ever.
    assert evaluate(folder, "--config.data.kwargs.path=other.npz") == 0
    assert evaluate(folder, "--config.data.corrupt.label_noise=0.5") == 0
    assert "warning: the held-out and test parts are those of the run" in capsys.readouterr().out
    assert evaluate(folder, "--config.evaluators.calibration.bins=5") == 0
    assert len(list(folder.glob("eval-*.json"))) == 3 and not (folder / "eval.json").exists()
    assert evaluate(folder) == 0
    assert json.loads((folder / "eval.json").read_text()).keys() == {"last", "best"}
    # None of this makes it another run.
    assert run(f"--workdir={folder}", "--extend=4") == 0


def test_inputs_are_normalized_as_in_training(place, other, tmp_path):
    folder, data = tmp_path / "run", place / "data.npz"
    own = "--config.data.train_transforms=normalize", "--config.data.eval_transforms=normalize"
    train(data, folder, *own)
    with np.load(other / "other.npz") as file:
        dark = {k: x // 4 if k.startswith("x") else x for k, x in file.items()}
    np.savez(tmp_path / "dark.npz", **dark)
    assert evaluate(folder, f"--config.data.kwargs.path={tmp_path / 'dark.npz'}") == 0
    [path] = folder.glob("eval-*.json")
    found = json.loads(path.read_text())["states"]["last"]
    logits = dj.load(folder, step="last")(dark["x_test"])["logits"].astype(np.float64)
    nll = (np.log(np.exp(logits).sum(1)) - logits[np.arange(24), dark["y_test"]]).mean()
    assert found["test/nll"] == pytest.approx(nll, rel=1e-5)


# Wrong ways in: (what is done, command line after --workdir, parts of the message).

WRONG = {
    "shorter than done": ("--extend=2", ["--extend: 2 steps: the run", "new total"]),
    "shorter, in epochs": (
        '--extend="0.1 epochs"',
        ["--extend: 0.1 epochs, 1 steps", "done them all"],
    ),
    "more in place of the total": ("--extend=+3", ["it takes the new total"]),
    "no duration": ("--extend=banana", ["--extend: 'banana'"]),
    "a wrong unit": ('--extend="6 epocs"', ["--extend", "did you mean 'epochs'"]),
    "a share": ('--extend="50 %"', ["--extend", "share of itself"]),
    "nothing": ("--extend=0", ["--extend: '0' is not positive"]),
    "no value": ("--extend=", ["--extend"]),
    "negative": ("--extend=-5", ["--extend"]),
    "too long": ("--extend=9e12", ["below 2**31 steps"]),
    "total twice": ("--extend=6 --config.total=7", ["leave --config.total out"]),
    "starting over": ("--extend=6 --start_over", ["does not go on", "--start_over"]),
    "in mode eval": ("--extend=6 --mode=eval", ["mode eval trains no single run"]),
    "in a study": ("--extend=6 --mode=study --config=studies/demo", ["mode study"]),
    "an undeclared change": (
        "--extend=6 --config.optim.lr=0.01",
        ["optim.lr: 0.1 -> 0.01", "--change=optim.lr accepts"],
    ),
    "unknown key": (
        "--change=optim.lrr --config.optim.lr=1",
        ["--change: 'optim.lrr'", "optim.lr"],
    ),
    "a key that is not set": ("--extend=6 --change=optim.lr", ["optim.lr is not set", "=VALUE"]),
    "a key that is set to its value": (
        "--extend=6 --change=optim.lr --config.optim.lr=0.1",
        ["nothing of optim.lr differs"],
    ),
    "the total by --change": ("--change=total --config.total=9", ['--extend="20 epochs"']),
    "data by --change": (
        "--extend=6 --change=data --config.data.name=digits",
        ["--change: data may differ in mode eval alone"],
    ),
    "a seed": ("--extend=6 --change=seed --config.seed=1", ["--change: 'seed' cannot change"]),
    "a network": (
        "--extend=6 --config.roles.student.kwargs.hidden=(5,)",
        ["holds a run of another config", "roles.student.kwargs.hidden"],
    ),
    "the batch size": ("--extend=6 --config.batch_size=4", ["batch_size: 8 -> 4"]),
    "a change of a finished run": (
        "--change=optim.lr --config.optim.lr=1",
        ["is finished after 3 steps", "--extend=TOTAL"],
    ),
    "a rate by --mode=eval": (
        "--mode=eval --change=optim.lr --config.optim.lr=1",
        ["--change: 'optim.lr' cannot change", "in mode train"],
    ),
    "the selecting evaluator": (
        "--extend=6 --change=evaluators --config.evaluators.classification.role=student",
        ["evaluators.classification: it measures held_out/accuracy"],
    ),
    "a deleted selecting evaluator": (
        "--extend=6 --change=evaluators --config.evaluators.classification=none",
        ["no evaluator measures 'accuracy'"],
    ),
    "code by a changed evaluator": (
        "--extend=6 --change=evaluators --config.evaluators.os:system={}",
        ["evaluators"],
    ),
    "a misspelt flag": ("--extends=6", ["--extends: unknown flag", "extend"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ways_in_are_refused_and_leave_the_run_alone(name, place, capsys):
    folder = place / "cosine"
    before = listing(folder)
    line, expected = WRONG[name]
    assert run(f"--workdir={folder}", *shlex.split(line)) == 2
    err = capsys.readouterr().err
    for text in expected:
        assert text in err, err
    assert "Traceback" not in err
    assert listing(folder) == before


WRONG_DATA = {
    "other classes": ("path={}/three.npz", ["3 classes, and the networks of the run have 4"]),
    "names in another order": (
        "classes='1','0','2','3'",
        ["class 0 is '1', and '0' in the run", "order"],
    ),
    "other names": ("classes=a,b,c,d", ["class 0 is 'a'"]),
    "another shape": ("path={}/wide.npz", ["inputs of [8, 8, 1]", "trained on [4, 4, 1]"]),
    "no such file": ("path={}/absent.npz", ["absent.npz"]),
    "no such argument": ("pth={}/other.npz", ["data.kwargs.pth"]),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_data_that_do_not_fit_are_refused_before_anything_is_compiled(
    name, other, capsys, monkeypatch
):
    folder = other / "cosine"
    before = listing(folder)
    override, expected = WRONG_DATA[name]
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert evaluate(folder, f"--config.data.kwargs.{override.format(other)}") == 2
    err = capsys.readouterr().err
    for text in expected:
        assert text in err, err
    assert listing(folder) == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.name=diabetes", "the task is regression"),
        ("data.name=digits", "10 classes"),
        ("data.train_transforms=scale", "evaluation does not read it"),
        ("data.nme=digits", "did you mean 'name'"),
        ("seed=3", "holds a run of another config"),
        ("data.eval_transforms=normalise", "normalize"),
    ],
)
def test_other_overrides_of_an_evaluation_are_refused(override, expected, place, capsys):
    assert evaluate(place / "cosine", f"--config.{override}") == 2
    assert expected in capsys.readouterr().err


def test_folders_that_hold_no_run_of_ones_own_are_not_extended(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    study = tmp_path / "study"
    shutil.copytree(place / "cosine", study / "kd" / "seed0")
    (study / "study.json").write_text("{}")
    shutil.copytree(place / "cosine", tmp_path / "sweep" / "0")
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    shutil.copytree(place / "cosine", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "checkpoints")
    for name, expected in {
        "empty": "holds no run that could go on",
        "absent": "holds no run that could go on",
        "study": "holds a study, not a run",
        "study/kd/seed0": "belongs to the study",
        "sweep": "holds a sweep",
        "sweep/0": "belongs to the sweep",
        "bare": "holds no readable checkpoint",
    }.items():
        before = listing(tmp_path)
        assert run(f"--workdir={tmp_path / name}", "--extend=6") == 2
        assert expected in capsys.readouterr().err
        assert listing(tmp_path) == before


def test_a_run_in_progress_is_not_extended(copy, capsys):
    folder = copy("cosine")
    with workdir.claim(folder, "run", log_line=print):
        line = [sys.executable, "-m", "distill_jax.main", f"--workdir={folder}", "--extend=6"]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "in use by process" in done.stderr


def test_a_stored_config_does_not_choose_code_for_an_extended_run(copy, capsys):
    folder = copy("cosine")
    meta = folder / "checkpoints/3/meta/metadata"
    content = json.loads(meta.read_text())
    content["config"]["evaluators"]["os:system"] = {}
    meta.write_text(json.dumps(content))
    step_folder.seal(folder / "checkpoints/3")
    (folder / "config.json").unlink()
    assert run(f"--workdir={folder}", "--extend=6") == 2
    assert "--trust" in capsys.readouterr().err


def test_a_killed_start_of_an_extension_leaves_the_run_as_it_was(copy, monkeypatch):
    """Its config files name the new total, but no state was saved under it."""
    folder = copy("cosine")
    parsed = flags.parse(["", f"--workdir={folder}", "--extend=6"])
    monkeypatch.setattr(Run, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        loop.train(parsed.config, folder, changes=parsed.changes, log_line=lambda _: None)
    monkeypatch.undo()
    assert json.loads((folder / "config.json").read_text())["total"] == "6 steps"
    assert (workdir.read_result(folder) or {})["steps"] == 3
    assert evaluate(folder) == 0
    assert run(f"--workdir={folder}", "--extend=5") == 0  # another length is as well
    assert [(s["from"], s["to"]) for s in segments.read(folder)] == [(0, 3), (3, 5)]


def test_a_damaged_history_is_made_again_and_reported(copy):
    folder = copy("cosine")
    assert run(f"--workdir={folder}", "--extend=4") == 0
    for content in ("{", "[]", '{"segments": [{"from": 0}]}', '{"segments": 3}'):
        (folder / "history.json").write_text(content)
        page = report.write_run_report(folder).read_text()
        assert "history.json" in page and segments.read(folder) == []
    assert run(f"--workdir={folder}", "--extend=5") == 0
    assert [(s["from"], s["to"]) for s in segments.read(folder)] == [(0, 4), (4, 5)]


def test_a_comparison_shows_that_a_run_went_on_differently(copy, place, tmp_path):
    folder = copy("cosine")
    assert run(f"--workdir={folder}", "--extend=4") == 0
    train(place / "data.npz", tmp_path / "long", "--config.total=4")
    runs = [str(folder), str(tmp_path / "long")]
    assert run("--mode=compare", f"--workdir={tmp_path / 'page'}", *runs) == 0
    page = (tmp_path / "page/report.html").read_text()
    assert "history" in page and "from step 3: total" in page
    assert len(json.loads((tmp_path / "page/comparison.json").read_text())["arms"]) == 2


# What the length of training decides besides the learning rate.


def extend(made, folder, total, **kwargs):
    longer = config.override(made, {"total": total})
    said = []
    result = loop.train(longer, folder, changes={"total"}, log_line=said.append, **kwargs)
    return result, "\n".join(said)


def test_phases_at_steps_go_on_and_phases_at_shares_are_refused(tmp_path):
    quiet: Any = {"log_line": lambda line: None}
    teacher = make_config("supervised")
    teacher.roles.student = config.role("mlp", hidden=(12,))
    loop.train(teacher, tmp_path / "teacher", **quiet)
    at_step = make_config(teacher=str(tmp_path / "teacher"), alone="3 steps")
    at_share = make_config(teacher=str(tmp_path / "teacher"), alone="50 %")
    loop.train(at_step, tmp_path / "at_step", **quiet)
    assert extend(at_step, tmp_path / "at_step", 8)[0]["steps"] == 8
    loop.train(at_share, tmp_path / "at_share", **quiet)
    before = listing(tmp_path / "at_share")
    with pytest.raises(ConfigError, match=r"began at step 3, .* would move that to step 4"):
        extend(at_share, tmp_path / "at_share", 8)
    assert listing(tmp_path / "at_share") == before
    assert (workdir.read_result(tmp_path / "at_share") or {})["steps"] == 6


@pytest.mark.slow
def test_a_rising_average_follows_the_new_length(tmp_path):
    line = ["--config=configs/ssl/byol.py:smoke", f"--workdir={tmp_path}", "--config.total=3"]
    line += ["--config.optim.warmup=none", "--config.log.tensorboard=false"]
    made = flags.parse(["", *line]).config
    role, spec = next((r, s) for r, s in made.roles.items() if s.ema_of)
    assert spec.decay_schedule == "cosine"
    loop.train(made, tmp_path / "run", log_line=lambda line: None)
    _, said = extend(made, tmp_path / "run", 6)
    goes_on = 1 - (1 - spec.decay) / 2  # cos(pi / 2) is 0
    assert f"the decay of the average {role} goes on at {goes_on:.6g}" in said


@pytest.mark.slow
def test_a_learned_weighting_goes_on_unless_its_first_step_would_move(tmp_path):
    line = [
        "--config=configs/bilevel/tgeo_kd.py:smoke",
        f"--workdir={tmp_path / 'run'}",
        f"--config.roles.teacher.init={tmp_path / 'teacher'}",
        "--config.log.tensorboard=false",
        "--config.total=6",
    ]
    own = ["--config=configs/distill/supervised.py:smoke", f"--workdir={tmp_path / 'teacher'}"]
    widths = flags.parse(["", *line]).config.roles.teacher
    own.append(f"--config.roles.student.model={widths.model}")
    own += [f"--config.roles.student.kwargs.{k}={v}" for k, v in widths.kwargs.items()]
    assert run(*own) == 0
    made = flags.parse(["", *line, "--config.bilevel.warmup=2"]).config
    loop.train(made, tmp_path / "steps", log_line=lambda line: None)
    assert extend(made, tmp_path / "steps", 8)[0]["steps"] == 8
    made = flags.parse(["", *line, "--config.bilevel.warmup=50 %"]).config
    loop.train(made, tmp_path / "share", log_line=lambda line: None)
    with pytest.raises(ConfigError, match=r"learns from step 3 on, .* would move that to step 4"):
        extend(made, tmp_path / "share", 8)
