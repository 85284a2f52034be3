"""The compilation cache: where it is used, and where a program read from it could wait for ever."""

import jax
import pytest

from distill_jax.run import environment

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


def test_several_cpu_devices_read_no_compiled_program(folder):
    assert jax.device_count() > 1
    before = jax.config.jax_compilation_cache_dir
    assert not environment.cache_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == before != str(folder)


@pytest.mark.parametrize(("backend", "devices"), [("cpu", 1), ("gpu", 8)])
def test_other_devices_do(folder, monkeypatch, backend, devices):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert environment.cache_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    monkeypatch.setenv("DISTILL_JAX_CACHE", "off")
    assert not environment.cache_compiled_programs()
