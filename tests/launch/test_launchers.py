"""Launchers: what they would run, what they hand back, and two processes that equal one."""

import importlib.util
import io
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def load(name):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


local, jobset = load("local"), load("jobset")


def script(name, *args, **environ):
    return subprocess.run(
        ["bash", str(LAUNCH / name), *args],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )


# local.py


def python(code):
    return [sys.executable, "-c", code]


def test_local_commands_share_a_coordinator_and_differ_in_their_number(capsys):
    args = ["--processes=2", "--devices=3", "--port=5555", "--dry_run", "--", "--config=a b.py"]
    assert local.main(args) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:4] == [sys.executable, "-m", "distill_jax.main", "--config=a b.py"]
    shared = ["--coordinator=127.0.0.1:5555", "--num_processes=2"]
    assert [line[4:] for line in lines] == [
        ["--config.mesh.cpu_devices=3", *shared, f"--process_id={i}"] for i in range(2)
    ]
    assert len(local.commands(["x"], processes=1, devices=0, port=1)[0]) == 4


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_local_hands_back_the_code_and_marks_each_line(code):
    out = io.StringIO()
    late = f"import time; print('hello'); time.sleep(0.5); raise SystemExit({code})"
    lines = [python(late), python("print('there')")]
    assert local.run(lines, grace=5, stdout=out) == code
    assert sorted(out.getvalue().splitlines()) == ["[0] hello", "[1] there"]


def test_local_ends_the_others_when_one_fails():
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)"
    began = time.monotonic()
    lines = [python(f"{stubborn}; time.sleep(60)"), python("import time; time.sleep(1); exit(3)")]
    assert local.run(lines, grace=0.5, stdout=io.StringIO()) == 3
    assert time.monotonic() - began < 30


def test_local_reports_a_process_that_a_signal_ended():
    lines = [python("import os; os.kill(os.getpid(), 9)")]
    assert local.run(lines, grace=1, stdout=io.StringIO()) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_local_reports_one_of_several_that_a_signal_ended_as_a_lost_peer(number):
    out = io.StringIO()
    lines = [
        python("import time; time.sleep(60)"),
        python(f"import os; os.kill(os.getpid(), {number})"),
    ]
    assert local.run(lines, grace=5, stdout=out) == 71
    assert f"process 1 was ended by {number.name}" in out.getvalue()


def test_local_goes_on_without_its_console(tmp_path):
    code = f"print('x' * 10**6); open({str(tmp_path / 'done')!r}, 'w').close()"
    start = (
        "import sys; sys.argv = ['local.py']; from launch import local; "
        f"local.main = lambda _: local.run([[sys.executable, '-c', {code!r}]], grace=1); "
        "local.entry()"
    )
    command = f"set -o pipefail; {shlex.join([sys.executable, '-c', start])} | true"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, timeout=60).returncode == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("module", ["local", "sweep"])
def test_launchers_end_in_one_line_on_an_unexpected_error(module, tmp_path):
    start = (
        f"import sys, tempfile; tempfile.tempdir = {str(tmp_path)!r}; from launch import {module}\n"
        f"def fail(argv): raise RuntimeError('surprise')\n"
        f"{module}.main = fail; {module}.entry()"
    )
    command = [sys.executable, "-c", start]
    found = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert found.returncode == 1
    [line] = found.stderr.splitlines()
    assert line.startswith("error: unexpected RuntimeError while ") and ": surprise; " in line
    assert "in fail" in (tmp_path / "crash.txt").read_text()


def test_local_hands_sigterm_on():
    wait = "import signal, time; signal.signal(15, lambda *a: exit(75)); print('up', flush=True)"
    out = io.StringIO()

    def stop():
        while out.getvalue().count("up") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert local.run([python(f"{wait}; time.sleep(60)")] * 2, grace=5, stdout=out) == 75


@pytest.mark.parametrize("resident", ["yes", pytest.param("no", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(resident, tmp_path):
    args = [
        "--config=configs/distill/supervised.py:smoke",
        "--config.roles.student.model=mlp",
        "--config.roles.student.kwargs.hidden=(16,)",
        "--config.roles.student.kwargs.batch_norm=True",
        "--config.log.every_steps=1",
        "--config.log.tensorboard=False",
    ]
    environ = {**os.environ, "DISTILL_JAX_TIMEOUT": "120"}
    for processes, devices in ((1, 2), (2, 1)):
        folder = tmp_path / str(processes)
        launcher = [f"--processes={processes}", f"--devices={devices}", "--"]
        own = [f"--workdir={folder}", f"--config.data.resident={resident}"]
        found = subprocess.run(
            [sys.executable, str(LAUNCH / "local.py"), *launcher, *args, *own],
            env=environ,
            capture_output=True,
            text=True,
            timeout=500,
            cwd=ROOT,
        )
        assert found.returncode == 0, found.stdout + found.stderr

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        steps = [row["step"] for row in rows if "train/loss" in row]
        assert steps == list(range(1, 13))  # one process writes, each step once
        return [row["train/loss"] for row in rows if "train/loss" in row]

    np.testing.assert_allclose(losses("2"), losses("1"), rtol=2e-5)
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("1", "2")]
    np.testing.assert_allclose(*[result["metrics"]["test/nll"] for result in results], rtol=1e-4)
    assert json.loads((tmp_path / "2" / "env.json").read_text())["processes"] == 2


PATCHED = """
import os, signal, sys
from distill_jax.trainer.io import checkpoint
from distill_jax import main
from distill_jax.run import processes
from distill_jax.run.train import evaluation
from distill_jax.run.train.run import Run

PATCH
sys.exit(main.main(sys.argv))
"""


def run_patched(patch, *args):
    """Runs two processes of `main` after some changes to the program; returns code and output."""
    more = ["--config=configs/distill/supervised.py:smoke", "--config.roles.student.model=mlp"]
    more += ["--config.roles.student.kwargs.hidden=(4,)", "--config.log.tensorboard=False", *args]
    lines = local.commands(more, processes=2, devices=1, port=local.free_port())
    lines = [[sys.executable, "-c", PATCHED.replace("PATCH", patch), *line[3:]] for line in lines]
    out = io.StringIO()
    return local.run(lines, grace=30, stdout=out), out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_the_others_end_with_71_where_one_is_killed(index, tmp_path):
    patch = f"""
read = Run.read
def killed(self, pending, step):
    if step >= 8 and "--process_id={index}" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, pending, step)
Run.read = killed
"""
    args = ["--config.log.every_steps=4", "--config.total=400"]
    code, told = run_patched(patch, *args, f"--workdir={tmp_path}")
    assert code == 71, told
    assert f"[{1 - index}] error: another process of this run has ended" in told
    assert "SIGABRT" not in told and "Traceback" not in told


@pytest.mark.slow
def test_processes_that_see_the_folder_differently_go_on_together(tmp_path):
    stale = """
steps = checkpoint.Checkpointer.steps
checkpoint.Checkpointer.steps = lambda self: steps(self) if processes.is_main() else []
from distill_jax.run import workdir
result = workdir.read_result
workdir.read_result = lambda folder, **kw: result(folder, **kw) if processes.is_main() else None
measure, calls = evaluation.measure, []
def falling(experiment, outputs, facts, split, parts=None):
    calls.append(split)
    found = measure(experiment, outputs, facts, split, parts)
    return {**found, "held_out/accuracy": 1 / len(calls)} if split == "held_out" else found
evaluation.measure = falling
"""
    args = ["--config.eval.every=3", f"--workdir={tmp_path}"]
    code, told = run_patched(stale, *args)
    assert code == 0, told
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["best"]["step"] < found["steps"]
    assert "compiled again" not in told and found["compute"]["compilations_after_start"] == 0
    code, told = run_patched(stale, *args)
    assert code == 0 and "is finished" in told, told


@pytest.mark.slow
def test_a_signal_to_one_process_ends_a_study_after_its_run(tmp_path):
    patch = """
measure = evaluation.measure
def stopped(experiment, outputs, facts, split, parts=None):
    if split == "test" and not processes.is_main():
        os.kill(os.getpid(), signal.SIGTERM)
    return measure(experiment, outputs, facts, split, parts)
evaluation.measure = stopped
"""
    study = ["--mode=study", "--config.study.arms={'a': {}, 'b': {'optim.lr': 0.2}}"]
    study += ["--config.study.reference=a", "--config.study.seeds=(0,)"]
    code, told = run_patched(
        patch, *study, "--config.study.metric=test/accuracy", f"--workdir={tmp_path}"
    )
    assert code == 75, told
    assert told.count("stopped before the run began; the same command continues it") == 2
    assert (tmp_path / "a" / "seed0" / "result.json").exists() and not (tmp_path / "b").exists()


# slurm.sh and tpu_vm.sh


def test_slurm_dry_run_prints_the_step_and_what_follows_preemption():
    found = script("slurm.sh", "--config=a b.py", DRY_RUN="1", PYTHON="python", SLURM_JOB_ID="7")
    assert found.returncode == 0, found.stderr
    step, requeue = (shlex.split(line) for line in found.stdout.splitlines())
    assert step[0] == "srun" and step[-4:] == [
        "python",
        "-m",
        "distill_jax.main",
        "--config=a b.py",
    ]
    assert requeue == ["scontrol", "requeue", "7"]
    assert script("slurm.sh").returncode == 2


@pytest.mark.parametrize(
    "code, requeued", [(0, False), (2, False), (3, False), (75, True), (143, True)]
)
def test_slurm_puts_the_job_back_after_preemption_alone(tmp_path, code, requeued):
    for name, body in (("srun", f"exit {code}"), ("scontrol", 'echo "$@" > called')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    found = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sh"), "--config=x"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        cwd=tmp_path,
        timeout=60,
    )
    assert found.returncode == code
    called = tmp_path / "called"
    assert called.exists() == requeued
    assert not requeued or called.read_text() == "requeue 7\n"


TPU = {"DRY_RUN": "1", "TPU": "t", "ZONE": "z", "ACCELERATOR": "v4-32", "VERSION": "v"}


def test_tpu_dry_run_prints_every_command():
    found = script("tpu_vm.sh", "create", SPOT="1", PROJECT="p", **TPU)
    create = "gcloud compute tpus tpu-vm create t --zone=z --project=p --accelerator-type=v4-32"
    assert found.stdout.split() == [*create.split(), "--version=v", "--spot"]
    found = script("tpu_vm.sh", "run", "--config=c.py", "--workdir=/a b", **TPU)
    *ssh, command = shlex.split(found.stdout)
    assert ssh == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t", "--zone=z", "--worker=all"]
    inner = shlex.split(command.removeprefix("--command="))
    assert inner[-2:] == ["--config=c.py", "--workdir=/a b"]
    assert "DISTILL_JAX_PROCESSES=tpu" in inner
    found = script("tpu_vm.sh", "watch", "--config=c.py", **TPU)
    verbs = [line.split()[4] for line in found.stdout.splitlines() if line.startswith("gcloud")]
    assert verbs == ["ssh", "delete", "create", "scp", "ssh", "ssh"]
    install = script("tpu_vm.sh", "install", **TPU).stdout
    assert install.index("uv venv") < install.index("pip install --quiet -c constraints.txt")
    assert "delete t" in script("tpu_vm.sh", "delete", **TPU).stdout


def watch_tpu(tmp_path, gcloud):
    """Runs `watch` with a gcloud of `case $4 in ... esac`; returns its code and what it called."""
    head = '#!/bin/bash\necho "$4" >> calls\nmade=$(grep -c create calls)\n'
    programs = {"gcloud": f"{head}case $4 in {gcloud} esac\n", "git": "", "sleep": ""}
    for name, text in programs.items():
        (tmp_path / name).write_text(text or "#!/bin/bash\n")
        (tmp_path / name).chmod(0o755)
    environ = {k: v for k, v in TPU.items() if k != "DRY_RUN"}
    found = subprocess.run(
        ["bash", str(LAUNCH / "tpu_vm.sh"), "watch", "--config=x"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "ATTEMPTS": "3", **environ},
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
    )
    return found.returncode, (tmp_path / "calls").read_text().split()


def test_tpu_watch_makes_a_new_one_after_preemption(tmp_path):
    # The first TPU is preempted while it trains, and said to be ready twice more.
    gcloud = """
        describe)
            if [[ $made -gt 0 || ! -e gone || $(grep -c describe calls) -lt 4 ]]; then echo READY
            else echo PREEMPTED; fi ;;
        ssh) if [[ $made -eq 0 ]]; then touch gone; exit 255; fi ;;"""
    code, calls = watch_tpu(tmp_path, gcloud)
    assert code == 0
    first = ["describe", "ssh", "describe", "describe", "describe"]
    assert calls == [*first, "delete", "create", "describe", "scp", "ssh", "ssh"]


@pytest.mark.parametrize("code, runs", [(0, 1), (2, 1), (3, 1), (1, 4), (75, 4)])
def test_tpu_watch_runs_again_what_may_continue(tmp_path, code, runs):
    gcloud = f"describe) echo READY ;; ssh) exit {code} ;;"
    found, calls = watch_tpu(tmp_path, gcloud)
    assert found == (75 if runs > 1 else code)
    assert calls.count("ssh") == runs and "create" not in calls


def test_tpu_watch_trains_only_what_is_installed(tmp_path):
    gcloud = """
        describe) if [[ $made -gt 0 ]]; then echo READY; fi ;;
        scp) if [[ $(grep -c scp calls) -lt 2 ]]; then exit 1; fi ;;"""
    assert watch_tpu(tmp_path, gcloud) == (
        0,
        ["describe", "delete", "create", "describe", "scp", "describe", "scp", "ssh", "ssh"],
    )


@pytest.mark.parametrize("name", ["slurm.sh", "tpu_vm.sh"])
def test_scripts_parse_and_pass_shellcheck(name):
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(LAUNCH / name)], check=True)


# jobset.py

# Required fields and names of the public API (jobset.x-k8s.io/v1alpha2, batch/v1, core/v1), as far
# as the manifest uses them: {field: type, or a schema of its own, or [schema of the items]}.
PAIR = {"name!": str, "value": str}
POD = {
    "restartPolicy!": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": dict,
    "containers!": [
        {
            "name!": str,
            "image!": str,
            "command": [str],
            "env": [PAIR],
            "ports": [{"containerPort!": int}],
            "volumeMounts": [{"name!": str, "mountPath!": str}],
            "resources": {"limits": dict},
        }
    ],
    "volumes": [{"name!": str, "persistentVolumeClaim": {"claimName!": str}}],
}
EXIT = {"containerName": str, "operator!": str, "values!": [int]}
JOB = {
    "completionMode": str,
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules!": [{"action!": str, "onExitCodes": EXIT}]},
    "template!": {"spec!": POD},
}
JOBSET = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"name!": str},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "successPolicy": {"operator!": str},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name!": str, "action!": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"spec!": JOB}}],
    },
}


def check(value, schema, path="$"):
    if isinstance(schema, list):
        assert isinstance(value, list), path
        for i, item in enumerate(value):
            check(item, schema[0], f"{path}[{i}]")
    elif isinstance(schema, dict):
        names = {name.rstrip("!"): kind for name, kind in schema.items()}
        assert isinstance(value, dict) and set(value) <= set(names), (path, value)
        required = {name[:-1] for name in schema if name.endswith("!")}
        assert required <= set(value), (path, required - set(value))
        for name, item in value.items():
            check(item, names[name], f"{path}.{name}")
    else:
        assert type(value) is schema, (path, value)


@pytest.mark.parametrize("hosts", [1, 4])
def test_jobset_fits_the_public_api_and_its_processes_find_each_other(hosts, capsys):
    flags = [f"--hosts={hosts}", "--name=kd", "--image=i", "--claim=c"]
    more = ["--resource=nvidia.com/gpu=8", "--select=a/b=c=d"]
    assert jobset.main([*flags, *more, "--", "--config=c.py", "--workdir=/runs/kd"]) == 0
    found = json.loads(capsys.readouterr().out)
    check(found, JOBSET)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [workers] = found["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == hosts
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy requires
    assert pod["nodeSelector"] == {"a/b=c": "d"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert container["command"][-2:] == ["--config=c.py", "--workdir=/runs/kd"]

    from distill_jax.run import processes

    environ = {pair["name"]: pair["value"] for pair in container["env"]}
    ids = []
    for index in range(hosts):
        settings = processes.detect({**environ, "JOB_COMPLETION_INDEX": str(index)})
        assert (settings is None) == (hosts == 1)
        if settings:
            host = f"kd-{workers['name']}-0-0.{found['spec']['network']['subdomain']}"
            assert settings.coordinator == f"{host}:{container['ports'][0]['containerPort']}"
            ids.append((settings.num_processes, settings.process_id))
    assert ids == [(hosts, i) for i in range(hosts) if hosts > 1]


def test_jobset_refuses_a_name_that_is_no_host_name(capsys):
    with pytest.raises(SystemExit):
        jobset.main(["--name=K_D", "--image=i", "--claim=c", "--", "--config=x"])
    assert "lower-case letters" in capsys.readouterr().err
