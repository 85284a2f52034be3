"""The cores that are used, and where a compiled program read back could wait for ever."""

import os
import signal

import jax
import jax.numpy as jnp
import pytest

from distill_jax.run import config as config_lib
from distill_jax.run import environment, program_cache

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path))
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_cpu_processes_that_work_together_read_no_compiled_program(folder, monkeypatch):
    assert jax.device_count() > 1
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    before = jax.config.jax_compilation_cache_dir
    assert not environment.cache_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == before != str(folder)


def test_several_cpu_devices_need_a_choice_of_what_is_written(folder, monkeypatch):
    monkeypatch.setattr(program_cache, "write_ordered_only", lambda: False)
    assert not environment.cache_compiled_programs()


@pytest.mark.parametrize(("backend", "devices"), [("cpu", 1), ("gpu", 8)])
def test_other_devices_do(folder, monkeypatch, backend, devices):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert environment.cache_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    monkeypatch.setenv("DISTILL_JAX_CACHE", "off")
    assert not environment.cache_compiled_programs()


def test_a_process_uses_the_cores_that_it_is_given(monkeypatch):
    config = config_lib.base()
    config.batch_size = 64
    config.roles.student = config_lib.role("convnet")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert environment.cpu_devices(config) == 2
    assert environment.cpu_devices(config, processes=2) == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert environment.cpu_devices(config) == 16


def test_the_first_interrupt_is_answered_and_the_second_ends(capfd):
    with environment.stop_on_signal() as flag:
        signal.raise_signal(signal.SIGINT)
        assert flag and environment.asked_to_stop()
        assert "Ctrl-C again" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert not environment.asked_to_stop()


def test_decompositions_use_one_thread_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(environment, "keep_freed_memory", lambda: True)
    for set_before, expected in ((None, "1"), ("4", "4")):
        monkeypatch.delenv("OPENBLAS_NUM_THREADS")
        if set_before:
            monkeypatch.setenv("OPENBLAS_NUM_THREADS", set_before)
        environment.configure_jax(cpu_devices=jax.device_count())
        assert os.environ["OPENBLAS_NUM_THREADS"] == expected


def test_what_runs_in_the_background_has_its_result_its_error_and_its_types():
    with jax.enable_x64(True):
        assert environment.in_background(lambda: jnp.result_type(float))() == "float64"
    assert environment.in_background(lambda: jnp.result_type(float))() == "float32"
    wait = environment.in_background(lambda: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        wait()
