"""How processes find each other, as a function of the environment."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from distill_jax.core.errors import UserError
from distill_jax.run import environment, processes, watch
from distill_jax.run.processes import detect, first_host
from distill_jax.trainer.io import peers

SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NODELIST": "node[07-09,12],other",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
}
KUBERNETES = {
    "JAX_COORDINATOR_ADDRESS": "kd-workers-0-0.kd:8476",
    "JAX_NUM_PROCESSES": "2",
    "JOB_COMPLETION_INDEX": "1",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2", "TPU_WORKER_ID": "2"}
FLAGS = {"coordinator": "h:1", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    "environ, flags, found",
    [
        ({}, {}, None),
        ({}, {"num_processes": 1}, None),
        ({}, FLAGS, ("h:1", 2, 1)),
        (KUBERNETES | SLURM | TPU, FLAGS, ("h:1", 2, 1)),
        (KUBERNETES, {}, ("kd-workers-0-0.kd:8476", 2, 1)),
        (KUBERNETES | {"JAX_PROCESS_ID": "0"}, {}, ("kd-workers-0-0.kd:8476", 2, 0)),
        (SLURM, {}, (f"node07:{61440 + 12345 % 4096}", 4, 3)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, {}, None),
        # A batch script outside srun: the job's variables without the step's.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {}, None),
        (TPU, {}, ("t0:8476", 3, 2)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}, None),
        ({"DISTILL_JAX_PROCESSES": "tpu"}, {}, (None, None, None)),
        (KUBERNETES | {"DISTILL_JAX_PROCESSES": "off"}, {}, None),
        (SLURM | {"DISTILL_JAX_PROCESSES": "off"}, FLAGS, ("h:1", 2, 1)),
    ],
)
def test_the_first_source_that_applies_decides(environ, flags, found):
    settings = detect(environ, **flags)
    assert (settings and tuple(settings[:3])) == found


@pytest.mark.parametrize(
    "environ, flags, message",
    [
        ({}, {"coordinator": "h:1"}, "--num_processes, --process_id: missing beside --coordinator"),
        ({}, {"num_processes": 2, "process_id": 0}, "--coordinator: missing"),
        ({}, FLAGS | {"process_id": 2}, "process 2 of 2"),
        ({}, FLAGS | {"process_id": -1}, "process -1 of 2"),
        ({}, FLAGS | {"coordinator": "host"}, "'host' is no address"),
        ({}, FLAGS | {"coordinator": "host:99999"}, "no address"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, {}, "JAX_NUM_PROCESSES: is not set"),
        (KUBERNETES | {"JAX_NUM_PROCESSES": "two"}, {}, "JAX_NUM_PROCESSES: 'two' is not a number"),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "5"}, {}, "process 5 of 2"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, {}, "SLURM_STEP_NODELIST"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, {}, "SLURM_PROCID: is not set"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, "TPU_WORKER_ID: is not set"),
        ({"DISTILL_JAX_PROCESSES": "gpu"}, {}, "'gpu' is neither"),
        ({"DISTILL_JAX_TIMEOUT": "0"}, {}, "DISTILL_JAX_TIMEOUT: must be at least 1"),
        ({"DISTILL_JAX_TIMEOUT": "x"}, {}, "DISTILL_JAX_TIMEOUT: 'x' is not a number"),
    ],
)
def test_what_does_not_fit_is_refused(environ, flags, message):
    with pytest.raises(UserError) as error:
        detect(environ, **flags)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("a", "a"),
        ("a,b", "a"),
        ("a[1-3]", "a1"),
        ("a[001,7],b", "a001"),
        ("rack[2-3]-ib", "rack2-ib"),
        ("gpu-a3,gpu-b[1-2]", "gpu-a3"),
    ],
)
def test_first_host_of_a_slurm_list(nodes, host):
    assert first_host(nodes) == host


def test_a_coordinator_that_is_not_there_is_told_within_the_time():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        settings = detect(
            {"DISTILL_JAX_TIMEOUT": "1"}, coordinator=address, num_processes=2, process_id=1
        )
        began = time.monotonic()
        with pytest.raises(UserError, match=r"in 1 s: nothing listens there") as error:
            processes.initialize(settings)
    assert error.value.exit_code == 71  # a launcher starts it again
    assert time.monotonic() - began < 10


def test_process_0_tells_in_time_that_the_others_are_missing():
    code = (
        "from distill_jax.run import processes; import socket; s = socket.socket();"
        "s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]; s.close();"
        "processes.initialize(processes.Settings(f'127.0.0.1:{port}', 2, 0, 'flags', 2))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert found.returncode == 71, found.stderr
    assert (
        "error: flags: process 0 of 2 did not meet all other processes at 127.0.0.1" in found.stderr
    )


def test_processes_that_are_done_wait_for_the_report(monkeypatch):
    given = {}
    monkeypatch.setattr("jax.distributed.initialize", lambda **kwargs: given.update(kwargs))
    processes.initialize(processes.Settings("127.0.0.1:1", 2, 0, "flags"))
    assert given["shutdown_timeout_seconds"] >= 1800 > given["heartbeat_timeout_seconds"]


def test_texts_of_any_length_reach_the_others_in_blocks_of_one_shape(monkeypatch):
    shapes, kinds = set(), set()

    def broadcast(x):
        shapes.add(np.shape(x))
        kinds.add(watched.kind)
        return x

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.broadcast_one_to_all", broadcast)
    with watch.Watch([], total=1) as watched:
        for value in ("", "é" * 5000, {"step": 3, "metric": 0.1}):
            assert processes.from_first(lambda value=value: value, where="here") == value
    assert shapes == {(), (peers.BLOCK,)} and kinds == {"asking process 0"}


def test_a_signal_to_any_process_ends_all_at_the_same_point(monkeypatch):
    processes.stop_if_asked("here")
    with environment.stop_on_signal():
        signal.raise_signal(signal.SIGTERM)
        with environment.stop_on_signal() as inner:  # what came before is known within
            assert inner
        with pytest.raises(environment.Preempted, match="stopped here"):
            processes.stop_if_asked("here")
    assert not environment.asked_to_stop()
    monkeypatch.setattr(processes, "any_process", lambda flag: True)
    with pytest.raises(environment.Preempted):
        processes.stop_if_asked("here")


def test_one_process_initializes_nothing():
    processes.initialize(None)
    assert processes.is_main() and processes.count() == 1
    assert processes.any_process(True) and not processes.any_process(False)
    processes.barrier("alone")


FOLLOWER = """
import os, signal, sys, time
from distill_jax.run import processes
processes.ORPHAN_SECONDS = 0.2
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "elsewhere":
    sys.platform = "another system"
processes.follow_launcher()
assert processes.LAUNCHER not in os.environ
print(os.getpid(), flush=True)
time.sleep(120)
"""

LEADER = """
import os, subprocess, sys, time
environ = {**os.environ, "DISTILL_JAX_LAUNCHER": str(os.getpid())}
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], env=environ)
time.sleep(120)
"""


@pytest.mark.parametrize("how", ["polite", "stubborn", "elsewhere"])
def test_a_process_ends_soon_after_a_launcher_that_is_killed(how):
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER, FOLLOWER, how], stdout=subprocess.PIPE, text=True
    )
    assert leader.stdout is not None
    with leader.stdout as lines:
        follower = int(lines.readline())
        leader.kill()
        leader.wait()
        assert lines.read() == ""  # at the end of the pipe, which the follower held open
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # it may wait for its new parent to take note of it
            os.kill(follower, 0)
            time.sleep(0.1)


THROW = """
import ctypes, sys
from distill_jax.run import processes
if not processes._handle_bad_cast():
    sys.exit(77)
library = ctypes.CDLL("libstdc++.so.6")
library.__cxa_allocate_exception.restype = ctypes.c_void_p
kind = ctypes.c_byte.in_dll(library, sys.argv[1])
error = ctypes.c_void_p(library.__cxa_allocate_exception(64))
library.__cxa_throw(error, ctypes.byref(kind), None)
"""


@pytest.mark.parametrize("kind, code", [("_ZTISt8bad_cast", 71), ("_ZTIi", -6)])
def test_the_end_of_jax_without_its_peers_is_told_from_other_ends(kind, code):
    found = subprocess.run([sys.executable, "-c", THROW, kind], capture_output=True, text=True)
    if found.returncode == 77:
        pytest.skip("another C++ library")
    assert found.returncode == code, found.stderr
    assert ("another process of this run has ended" in found.stderr) == (code == 71)
