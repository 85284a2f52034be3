"""Folders of runs: whose they are, who writes them, and what a run goes on with."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from distill_jax import main
from distill_jax.core.errors import CheckpointError, ConfigError, NonFiniteError, UserError
from distill_jax.data import npz_file, source
from distill_jax.run import build, config, flags, study, workdir
from distill_jax.run.environment import Preempted
from distill_jax.run.train import evaluation, loop
from distill_jax.run.train.result import format_result
from distill_jax.run.train.run import Run
from distill_jax.run.workdir import lock
from distill_jax.trainer.io import step_folder, step_index
from distill_jax.trainer.io.files import write_text

ROOT = pathlib.Path(__file__).parents[2]


def arguments(data, folder, *overrides):
    """A command line of three steps on a file of a few examples."""
    return [
        "--config=configs/distill/supervised.py:smoke",
        f"--workdir={folder}",
        "--config.data.name=npz_file",
        "--config.data.kwargs={}",
        f"--config.data.kwargs.path={data}",
        "--config.data.train_transforms=scale",
        "--config.data.eval_transforms=scale",
        "--config.data.transform_kwargs={}",
        "--config.roles.student.model=mlp",
        "--config.roles.student.kwargs.hidden=(4,)",
        "--config.batch_size=8",
        "--config.total=3",
        "--config.checkpoint.every=1",
        "--config.log.tensorboard=false",
        *overrides,
    ]


def tiny(data, *overrides):
    return flags.parse(["main", *arguments(data, "unused", *overrides)]).config


def write_data(path, seed=0):
    r = np.random.RandomState(seed)
    parts = {f"x_{part}": r.randint(0, 256, (40, 4, 4, 1), np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": np.arange(40) % 4 for part in ("train", "test")}
    np.savez(path, allow_pickle=False, **parts, **labels)


def listing(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def stop(line):
    """Asks to stop once the first step is done."""
    if line.startswith("step "):
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that stopped after a step, its data beside it, and the experiment."""
    folder = tmp_path_factory.mktemp("begun")
    write_data(folder / "data.npz")
    made = tiny(folder / "data.npz")
    experiment = build.build(made)

    with pytest.raises(Preempted):
        loop.train(made, folder / "run", make_experiment=lambda _: experiment, log_line=stop)
    return folder, made, experiment


@pytest.fixture
def copied(begun, tmp_path):
    folder, made, experiment = begun
    shutil.copytree(folder / "run", tmp_path / "run")
    return tmp_path / "run", made, experiment


# Nothing of another program is overwritten or deleted.

FOREIGN = {
    "checkpoints/1000/model.safetensors": "a checkpoint of another program",
    "checkpoints/1000/meta": "a file where an item is a folder, without any mark",
    "checkpoints/3.orbax-checkpoint-tmp-1/state/data": "a save of another program",
    "report.html": "<html>",
    "result.json": '{"accuracy": 0.9}',
    "config.json": '{"model_type": "bert"}',
    "metrics.jsonl": '{"epoch": 1}\n',
    "predictions.npz": "arrays",
    "tensorboard/events.out.tfevents.1": "events",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_files_of_another_program_is_refused_and_stays(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FOREIGN[name])
    before = listing(tmp_path)
    with pytest.raises(UserError, match="was not written by this program") as error:
        loop.train(config.base(), tmp_path)
    assert error.value.exit_code == 2 and str(path)[: len(error.value.where)] == error.value.where
    assert error.value.where != str(tmp_path) and listing(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoints/1000/x.bin", "checkpoints/1/x.bin", "result.json"])
def test_what_is_put_into_a_run_later_is_refused_too(copied, name):
    folder, made, experiment = copied
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('{"accuracy": 0.9}')
    before = listing(folder)
    with pytest.raises(UserError, match="was not written by this program") as error:
        loop.train(made, folder, make_experiment=lambda _: experiment)
    assert error.value.where == str(folder / name) and listing(folder) == before


def test_files_under_other_names_are_no_hindrance(copied):
    folder, made, experiment = copied
    others = [folder / "notes.txt", folder / "checkpoints/notes.txt", folder / "2/x"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    loop.train(made, folder, make_experiment=lambda _: experiment, log_line=lambda line: None)
    assert [path.read_text() for path in others] == ["mine"] * 3


@pytest.mark.parametrize("kind, name", [("study", "study.json"), ("sweep", "sweep.json")])
def test_folders_of_another_kind_are_refused(tmp_path, kind, name):
    with workdir.claim(tmp_path / "ours", kind, log_line=print):
        pass
    with pytest.raises(UserError, match=f"holds a {kind}, not a run"):
        loop.train(config.base(), tmp_path / "ours")
    (tmp_path / name).write_text('{"unknown": 1}')
    with pytest.raises(UserError, match="was not written"), workdir.claim(tmp_path, kind):
        pass


def test_a_run_without_a_mark_as_version_0_1_wrote_it_goes_on(copied):
    folder, made, experiment = copied
    (folder / workdir.MARK).unlink()
    (folder / "checkpoints/index.json").unlink()
    said = []
    loop.train(made, folder, make_experiment=lambda _: experiment, log_line=said.append)
    assert "continuing from step 1" in said


def test_a_sweep_leaves_what_is_not_its_own(tmp_path, capsys):
    from launch import sweep

    (tmp_path / "c.py").write_text("def sweep():\n    return {'seed': [0, 1]}\n")
    args = [f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'w'}"]
    for name, text in (("sweep.json", '{"mine": 1}'), ("sweep.sh", "rm"), ("1/log.txt", "mine")):
        path = tmp_path / "w" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        before = listing(tmp_path / "w")
        assert sweep.main([*args, "--backend=slurm"]) == 2
        assert f"error: {path}: was not written by" in capsys.readouterr().err
        assert listing(tmp_path / "w") == before
        path.unlink()
    with other(tmp_path / "w", 100) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        assert sweep.main(args) == 2
        first.kill()
    assert f"in use by process {first.pid}" in capsys.readouterr().err


# A start that fails leaves the folder as it was.


@pytest.mark.parametrize("there", [False, True])
def test_a_start_that_fails_leaves_the_folder_as_it_was(begun, tmp_path, there):
    _, made, experiment = begun
    folder = tmp_path / "new" / "run"
    if there:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    before = listing(tmp_path)

    def fail(_):
        raise ConfigError("no such teacher")

    with pytest.raises(ConfigError, match="no such teacher"):
        loop.train(made, folder, make_experiment=fail)
    assert listing(tmp_path) == before
    with pytest.raises(ConfigError, match=r"nothing measures|available"):
        other = config.override(made, {"eval.metric": "held_out/none"})
        loop.train(other, folder, make_experiment=lambda _: experiment)
    assert listing(tmp_path) == before
    result = loop.train(
        made, folder, make_experiment=lambda _: experiment, log_line=lambda line: None
    )
    assert result["steps"] == 3


def test_a_start_that_was_killed_binds_nothing(begun, tmp_path):
    _, made, experiment = begun
    write_text(tmp_path / workdir.MARK, '{"kind": "run"}')
    (tmp_path / "config.json").write_text(config.to_json(config.override(made, {"seed": 5})))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 7.0}\n')
    assert not workdir.is_run(tmp_path)
    loop.train(made, tmp_path, make_experiment=lambda _: experiment, log_line=lambda line: None)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0
    assert "7.0" not in (tmp_path / "metrics.jsonl").read_text()


def diverge(self, pending, step):
    raise NonFiniteError("loss is nan", where=str(self.workdir), hint="lower optim.lr")


def test_after_a_divergence_the_remedy_works_or_the_message_names_what_does(
    copied, begun, tmp_path, monkeypatch
):
    folder, made, experiment = copied
    kwargs = {"make_experiment": lambda _: experiment, "log_line": lambda line: None}
    lower = config.override(made, {"optim.lr": made.optim.lr / 2})
    for target, hint in ((tmp_path / "fresh", "lower optim.lr$"), (folder, "--start_over")):
        with monkeypatch.context() as patch:
            patch.setattr(Run, "read", diverge)
            with pytest.raises(NonFiniteError, match=hint):
                loop.train(made, target, **kwargs)
    assert loop.train(lower, tmp_path / "fresh", **kwargs)["steps"] == 3
    with pytest.raises(ConfigError, match=r"optim\.lr(.|\n)*--start_over"):
        loop.train(lower, folder, **kwargs)
    kept = listing(folder / "checkpoints")
    assert loop.train(lower, folder, start_over=True, **kwargs)["steps"] == 3
    assert listing(folder / "earlier-1" / "checkpoints") == kept
    loop.train(lower, folder, **kwargs)
    assert not (folder / "earlier-2").exists()


# One writer.


def owner(folder):
    return json.loads((folder / workdir.LOCK).read_text())


OTHER = """
import pathlib, sys, time
from distill_jax.run import workdir
try:
    with workdir.hold(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except workdir.InUse as error:
    print(error, flush=True)
    sys.exit(2)
"""


def other(folder, seconds):
    command = [sys.executable, "-c", OTHER, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_second_process_is_refused_and_a_killed_one_is_succeeded_at_once(tmp_path):
    with other(tmp_path, 100) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(workdir.InUse, match=f"in use by process {first.pid} on ") as error:
            loop.train(config.base(), tmp_path)
        assert error.value.exit_code == 2 and str(tmp_path) in str(error.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == [workdir.LOCK]
        first.kill()
        first.wait()
        assert owner(tmp_path)["pid"] == first.pid
    with workdir.hold(tmp_path), workdir.hold(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()
        with other(tmp_path, 0) as second:
            assert second.wait() == 2
            assert second.stdout is not None and str(os.getpid()) in second.stdout.read()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_of_many_that_find_a_stale_lock_one_takes_it_over(tmp_path):
    with other(tmp_path, 100) as dead:
        assert dead.stdout is not None and dead.stdout.readline() == "held\n"
        dead.kill()
        dead.wait()
    all_of_them = [other(tmp_path, 3) for _ in range(4)]
    codes = []
    for process in all_of_them:
        with process:
            codes.append(process.wait())
    assert sorted(codes) == [0, 2, 2, 2] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("alive", [True, False])
def test_a_lock_of_another_machine_is_judged_by_its_signs_of_life(tmp_path, monkeypatch, alive):
    path = tmp_path / workdir.LOCK
    path.write_text(json.dumps({"token": "x", "host": "far", "pid": 7, "boot": "another"}))
    monkeypatch.setattr(lock, "STALE_SECONDS", 60.0 if alive else 0.5)
    said = []

    def wait(line):
        said.append(line)
        if alive:
            later = time.time() + 1
            os.utime(path, (later, later))

    if alive:
        with pytest.raises(workdir.InUse, match="in use by process 7 on far"):
            workdir.hold(tmp_path, log_line=wait).__enter__()
        assert owner(tmp_path)["token"] == "x"
    else:
        with workdir.hold(tmp_path, log_line=wait):
            assert owner(tmp_path)["pid"] == os.getpid()
    assert len(said) == 1 and "waiting for a sign of life" in said[0]


def test_a_lock_of_another_machine_without_signs_for_long_is_taken_over_at_once(tmp_path):
    path = tmp_path / workdir.LOCK
    path.write_text(json.dumps({"token": "x", "host": "far", "pid": 7, "boot": "another"}))
    earlier = time.time() - 2 * lock.STALE_SECONDS
    os.utime(path, (earlier, earlier))
    with workdir.hold(tmp_path, log_line=pytest.fail):
        assert owner(tmp_path)["pid"] == os.getpid()


def test_a_reused_process_number_is_no_owner(tmp_path):
    with workdir.hold(tmp_path):
        stale = owner(tmp_path) | {"started": "1", "token": "x"}
    (tmp_path / workdir.LOCK).write_text(json.dumps(stale))
    with workdir.hold(tmp_path):
        assert owner(tmp_path)["token"] != "x"


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_copy_of_a_folder_in_use_is_another_folder(tmp_path, monkeypatch, is_copy):
    """The owner gives signs of life in one of the two paths, or in both where they are one."""
    original, copy = tmp_path / "run", tmp_path / "copy"
    original.mkdir()
    with workdir.hold(original):
        shutil.copytree(original, copy)
        monkeypatch.setattr(lock, "_held", {})  # as another process sees it
        ended = threading.Event()

        def beat():
            later = time.time()
            while not ended.wait(0.05):
                later += 1
                for folder in (copy, original)[is_copy:]:
                    os.utime(folder / workdir.LOCK, (later, later))

        beating = threading.Thread(target=beat)
        beating.start()
        try:
            if is_copy:
                with workdir.hold(copy):
                    assert owner(copy)["token"] != owner(original)["token"]
                    ended.set()
                    beating.join()
            else:
                with pytest.raises(workdir.InUse):
                    workdir.hold(copy).__enter__()
        finally:
            ended.set()
            beating.join()
        with pytest.raises(workdir.InUse):
            workdir.hold(original).__enter__()
    assert not (original / workdir.LOCK).exists()


def test_the_lock_of_a_folder_that_was_renamed_counts(tmp_path):
    original, renamed = tmp_path / "run", tmp_path / "renamed"
    original.mkdir()
    with other(original, 100) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        original.rename(renamed)
        with pytest.raises(workdir.InUse):
            workdir.hold(renamed).__enter__()
        first.kill()


def test_a_damaged_result_is_kept_beside_the_one_that_is_made_again(tmp_path):
    path = tmp_path / "result.json"
    path.write_text('{"status": "done", "met')
    (tmp_path / workdir.MARK).write_text('{"kind": "run"}')
    with workdir.claim(tmp_path, "run"):
        assert path.exists()
    workdir.write_result(tmp_path, {"status": "failed"})
    assert (tmp_path / "result.json.damaged").read_text() == '{"status": "done", "met'
    workdir.write_result(tmp_path, {"status": "done"})
    assert json.loads(path.read_text()) == {"status": "done"}
    assert sorted(p.name for p in tmp_path.glob("result*")) == [
        "result.json",
        "result.json.damaged",
    ]


def test_an_owner_notices_that_it_was_taken_for_dead(tmp_path):
    with workdir.hold(tmp_path):
        held = lock._held[tmp_path]
        old = time.time() - 100
        os.utime(held.path, (old, old))
        held.beat()
        assert held.path.stat().st_mtime > old + 50
        workdir.check_held(tmp_path)
        held.path.write_text(json.dumps(owner(tmp_path) | {"token": "x"}))
        held.beat()
        with pytest.raises(workdir.InUse, match="has taken over this folder"):
            workdir.check_held(tmp_path)
    assert owner(tmp_path)["token"] == "x"  # which is another's by now


@pytest.mark.parametrize("is_first", [True, False])
def test_processes_decide_once_on_a_claim_within_a_claim(tmp_path, monkeypatch, is_first):
    """Where one process asks the others, all have to."""
    asked = []

    def from_first(decide, where):
        asked.append(where)
        return decide() if is_first else None

    monkeypatch.setattr("distill_jax.run.processes.from_first", from_first)
    for n in (1, 2):
        with workdir.claim(tmp_path, "run"), workdir.claim(tmp_path, "run"):
            assert (tmp_path / workdir.LOCK).exists() == is_first
        assert asked == [str(tmp_path)] * n


def test_a_folder_that_cannot_be_written_has_a_message(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(lock, "_acquire", refuse)
    with pytest.raises(UserError, match="cannot be written: Read-only file system"):
        loop.train(config.base(), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_two_starts_at_once_make_one_run(tmp_path):
    """Two whole programs; the one that is refused leaves the other alone."""
    write_data(tmp_path / "data.npz")
    module = [sys.executable, "-m", "distill_jax.main"]
    command = [*module, *arguments(tmp_path / "data.npz", tmp_path / "run")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "DISTILL_JAX_CACHE": "off"}
    both = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        for _ in range(2)
    ]
    told = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], told
    assert f"in use by process {both[codes.index(0)].pid} on " in told[codes.index(2)]
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    assert steps == sorted(steps) and steps[-1] == 3
    assert workdir.read_result(tmp_path / "run") is not None
    assert not (tmp_path / "run" / workdir.LOCK).exists()


def test_a_result_says_that_a_better_state_was_lost(copied):
    folder, made, experiment = copied
    index = folder / "checkpoints/index.json"
    index.write_text(json.dumps({"saved": {"0": 0.99, "1": None}, "lost": {}}))
    said = []
    result = loop.train(made, folder, make_experiment=lambda _: experiment, log_line=said.append)
    assert result["selection_lost"] == [{"step": 0, "metric": 0.99}]
    assert any("checkpoints/0: is missing" in line for line in said)
    assert "step 0, lost since, may have been the best" in format_result(result)
    assert "step 0, lost since" in evaluate(made, folder, experiment)


# Data, networks and config by checksum.


def test_small_files_are_known_by_their_bytes_and_large_ones_by_a_manifest(tmp_path, monkeypatch):
    files = [tmp_path / name for name in "ab"]
    for path in files:
        path.write_bytes(b"x" * 10)
        os.utime(path, (0, 0))

    def changed_by(act):
        before = source.files_checksum(files)
        act()
        return source.files_checksum(files) != before

    assert source.manifest(files) == ""
    assert not changed_by(lambda: os.utime(files[1], (5, 5)))
    assert changed_by(lambda: files[1].write_bytes(b"y" * 10))
    monkeypatch.setattr(source, "WHOLE_BYTES", 19)
    assert source.files_checksum(files) == source.manifest(files) != ""
    assert changed_by(lambda: os.utime(files[1], (7, 7)))
    os.utime(files[0], (7, 7))
    swap = lambda: (files[0].rename(tmp_path / "c"), files[1].rename(files[0]))  # noqa: E731
    assert not changed_by(lambda: (swap(), (tmp_path / "c").rename(files[1])))


def test_a_large_folder_of_arrays_is_not_read_for_its_checksum(tmp_path, monkeypatch):
    for part in ("train", "test"):
        np.save(tmp_path / f"x_{part}.npy", np.zeros((40, 4, 4, 1), np.uint8))
        np.save(tmp_path / f"y_{part}.npy", np.arange(40) % 4)
    whole = npz_file.make(path=str(tmp_path)).test.provenance.sha256
    monkeypatch.setattr(source, "WHOLE_BYTES", 100)
    monkeypatch.setattr(source, "checksum", pytest.fail)
    listed = npz_file.make(path=str(tmp_path)).test.provenance.sha256
    os.utime(tmp_path / "x_train.npy", (0, 0))
    assert len({whole, listed, npz_file.make(path=str(tmp_path)).test.provenance.sha256}) == 3


def test_a_run_goes_on_with_the_data_it_began_with(begun, tmp_path):
    old, made, experiment = begun
    folder = tmp_path / "run"
    shutil.copytree(old / "run", folder)
    write_data(tmp_path / "other.npz", seed=1)
    changed = build.build(tiny(tmp_path / "other.npz"))
    before = listing(folder)
    for act in (
        lambda: loop.train(made, folder, make_experiment=lambda _: changed),
        lambda: evaluate(made, folder, changed),
    ):
        with pytest.raises(ConfigError, match=r"data, train: 36 examples(.|\n)*data, test: 40"):
            act()
        assert listing(folder) == before
    assert "held_out/accuracy" in evaluate(made, folder, experiment)


def evaluate(made, folder, experiment):
    return evaluation.evaluate_run(made, folder, make_experiment=lambda _: experiment)


def test_a_run_goes_on_with_the_network_it_began_with(begun, tmp_path, monkeypatch):
    old, made, experiment = begun
    shutil.copytree(old / "run", tmp_path / "teacher")
    student = config.override(made, {"roles.student.init": str(tmp_path / "teacher")})
    monkeypatch.setattr(Run, "_check_inputs", lambda self, folder: None)
    said = []
    with pytest.raises(Preempted):
        loop.train(
            student,
            tmp_path / "student",
            make_experiment=lambda _: experiment,
            log_line=stop,
        )
    monkeypatch.undo()
    again = {"make_experiment": lambda _: experiment, "log_line": said.append}
    loop.train(made, tmp_path / "teacher", **again)  # whose best state is another now, or not
    step = step_index.find_step(tmp_path / "teacher", where="test")
    if step.name == "1":
        shutil.rmtree(step)
        (tmp_path / "teacher/checkpoints/index.json").unlink()
    with pytest.raises(ConfigError, match=r"roles\.student\.init: checksum \w{12} -> \w{12}"):
        loop.train(student, tmp_path / "student", **again)
    shutil.rmtree(tmp_path / "teacher")  # a run that goes on does not need where it started from
    assert loop.train(student, tmp_path / "student", **again)["steps"] == 3


@pytest.mark.parametrize("how", ["absent", "replaced"])
def test_the_config_of_the_checkpoint_counts(copied, how):
    folder, made, experiment = copied
    seven = config.override(made, {"seed": 7})
    if how == "absent":
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(config.to_json(seven))
    with pytest.raises(ConfigError, match=r"another config:\n    seed: 0 -> 7"):
        loop.train(seven, folder, make_experiment=lambda _: experiment)
    kwargs = {"make_experiment": lambda _: experiment, "log_line": lambda line: None}
    assert loop.train(made, folder, **kwargs)["seed"] == 0
    assert json.loads((folder / "config.json").read_text())["seed"] == 0


@pytest.mark.parametrize("mode", ["eval", "describe"])
def test_without_its_config_json_a_run_is_read_by_that_of_its_checkpoint(copied, mode, capsys):
    folder, made, _ = copied
    stored = config.to_json(made)
    (folder / "config.json").unlink()
    found = flags.parse(["main", f"--mode={mode}", f"--workdir={folder}"])
    assert config.to_json(found.config) == stored
    assert not found.trusted
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        flags.parse(["main", f"--mode={mode}", f"--workdir={folder}"])


@pytest.mark.parametrize(("mode", "step"), [("max", 2), ("min", 1)])
def test_the_best_step_is_chosen_by_the_config_of_the_checkpoints(tmp_path, mode, step):
    for number in (1, 2):
        meta = {"step": number, "metric": float(number), "config": {"eval": {"mode": mode}}}
        write_step(tmp_path / f"run/checkpoints/{number}", meta)
    assert step_index.find_step(tmp_path / "run", where="here").name == str(step)


def test_another_environment_is_warned_of_and_listed(copied, monkeypatch):
    folder, made, experiment = copied
    now = loop.environment.describe_environment()
    later = {**now, "x64": not now["x64"], "devices": 99}
    later["versions"] = {**now["versions"], "jaxlib": "99.0", "distill_jax": "9.9"}
    monkeypatch.setattr(loop.environment, "describe_environment", lambda: later)
    said = []
    loop.train(made, folder, make_experiment=lambda _: experiment, log_line=said.append)
    [line] = [line for line in said if "another environment" in line]
    assert line.startswith("warning: ")
    for name in ("x64", "devices", "jaxlib", "distill_jax"):
        assert f"{name}: " in line
    assert "-> 99.0" in line and "numpy" not in line
    stored = json.loads((folder / "env.json").read_text())
    assert stored["versions"]["jaxlib"] == "99.0" and stored["step"] == 1
    assert [env["versions"] for env in stored["history"]] == [now["versions"]]


def test_a_study_compares_runs_on_the_same_data_alone(begun):
    _, made, experiment = begun
    alike = workdir.Alike()
    data = workdir.data_checksums(experiment.dataset)
    assert data["train"]["origin"] == data["held_out"]["origin"] != data["train"]["sha256"]
    moved = json.loads(json.dumps(data))
    moved["test"]["origin"] = "0" * 64
    alike.check(made, data, "a seed 0")
    alike.check(made, None, "of an earlier version")
    alike.check(config.override(made, {"data.kwargs.path": "elsewhere"}), moved, "b seed 0")
    with pytest.raises(ConfigError, match=r"data of a seed 1 are not those of a seed 0: .* test"):
        alike.check(made, moved, "a seed 1")


def test_a_study_without_its_teacher_is_refused_before_any_run(begun, tmp_path):
    folder, _, _ = begun
    arms = {"a": {}, "b": {"roles": {"student": {"init": str(tmp_path / "no")}}}}
    made = tiny(
        folder / "data.npz",
        f"--config.study.arms={arms}",
        "--config.study.reference=a",
        "--config.study.seeds=(0,)",
    )
    with pytest.raises(UserError, match=r"no does not exist") as error:
        study.run_study(made, tmp_path / "study", log_line=lambda line: None)
    assert error.value.where == "study.arms.b: roles.student.init"
    assert not (tmp_path / "study/a").exists()


def test_an_arm_that_changed_is_refused_before_any_other_runs(begun, tmp_path):
    folder, _, _ = begun
    made = tiny(
        folder / "data.npz",
        "--config.study.arms={'a': {}, 'b': {'optim': {'lr': 0.5}}}",
        "--config.study.reference=a",
        "--config.study.seeds=(0,)",
    )
    shutil.copytree(folder / "run", tmp_path / "study/b/seed0")
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        study.run_study(made, tmp_path / "study", log_line=lambda line: None)
    assert listing(tmp_path) == before


def test_a_run_among_the_checkpoints_of_another_is_refused(copied):
    folder, made, experiment = copied
    before = listing(folder)
    with pytest.raises(UserError, match="is inside the checkpoints of the run"):
        loop.train(made, folder / "checkpoints/12", make_experiment=lambda _: experiment)
    assert listing(folder) == before


def test_data_replaced_midway_through_a_study_end_it_before_the_next_run(tmp_path, monkeypatch):
    write_data(tmp_path / "data.npz")
    arms = {"a": {}, "b": {"optim.lr": 0.2}}
    made = tiny(
        tmp_path / "data.npz",
        "--mode=study",
        f"--config.study.arms={arms}",
        "--config.study.reference=a",
        "--config.study.seeds=(0,)",
        "--config.study.metric=test/accuracy",
        "--config.study.replicas=no",
    )
    train = loop.train

    def then_replace(config, folder, **kwargs):
        result = train(config, folder, **kwargs)
        write_data(tmp_path / "data.npz", seed=1)
        return result

    monkeypatch.setattr(loop, "train", then_replace)
    with pytest.raises(ConfigError, match="data of the runs that are left are not those of a seed"):
        study.run_study(made, tmp_path / "study", log_line=lambda line: None)
    assert not (tmp_path / "study/b/seed0/checkpoints").exists()
    assert workdir.read_result(tmp_path / "study/a/seed0") is not None


def test_nothing_finished_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        evaluation.evaluate_run(config.base(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_starting_over_is_asked_for_in_words(capsys):
    argv = ["main", "--config=configs/distill/supervised.py:smoke", "--workdir=unused"]
    assert flags.parse([*argv, "--start_over"]).start_over and not flags.parse(argv).start_over
    assert main.main([*argv, "--mode=eval", "--start_over"]) == 2
    assert "--start_over: mode eval" in capsys.readouterr().err


def write_step(folder, meta):
    (folder / step_folder.META).parent.mkdir(parents=True)
    (folder / step_folder.META).write_text(json.dumps(meta))
    step_folder.seal(folder)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"step": "6"},
        {"step": 7},
        {"step": -6},
        {"metric": "high"},
        {"metric": [1]},
        {"config": None},
        {"config": "x"},
        {"seconds": "x"},
        {"skipped": None},
        {"metrics": [1]},
        {"metrics": {"held_out/accuracy": "high"}},
        {"unlogged": {"a": 1}},
        {"unlogged": [1]},
        {"first_spread": [3]},
    ],
    ids=str,
)
def test_metadata_of_another_shape_are_damage_though_their_checksum_is_right(tmp_path, change):
    right = {"step": 6, "metric": 0.5, "metrics": {"held_out/accuracy": 0.5}, "unlogged": []}
    assert step_folder.read_meta(write_step(tmp_path / "right/6", right)) == right
    with pytest.raises(CheckpointError, match=next(iter(change))):
        step_folder.read_meta(write_step(tmp_path / "wrong/6", {**right, **change}))


@pytest.mark.parametrize(
    ("name", "step"),
    [("0", 0), ("12", 12), ("012", None), ("\u00b2", None), ("\u0667", None), ("9" * 200, None)]
    + [(name, None) for name in ("", "-1", "1.0", "6.damaged", "6\n", "6.orbax-checkpoint-tmp")],
)
def test_only_plain_numbers_name_steps(name, step):
    assert step_folder.step_number(name) == step


@pytest.mark.parametrize(
    "change",
    [
        {"compute": None},
        {"alarms": [1]},
        {"parameters": 3},
        {"metrics": {"test/accuracy": "high"}},
        {"best": []},
        {"classes": "ab"},
    ],
    ids=str,
)
def test_a_result_of_another_shape_is_made_again(tmp_path, change):
    right = {"status": "done", "seed": 0, "steps": 9, "metrics": {"test/accuracy": 1.0}, "best": {}}
    told = []
    (tmp_path / "result.json").write_text(json.dumps(right))
    assert workdir.read_result(tmp_path, log_line=told.append) == right and not told
    (tmp_path / "result.json").write_text(json.dumps({**right, **change}))
    assert workdir.read_result(tmp_path, log_line=told.append) is None
    assert len(told) == 1 and next(iter(change)) in told[0]
