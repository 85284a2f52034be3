"""Eight CPU devices, warnings as errors and strict rank promotion for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two workers share the cores
# The suite compiles far more than it computes. Plain code compiles in a fifth of the time, but is
# not that of programs: `make test-all` sets no flags, and some slow tests of equal bits need that.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # fixes the number of devices before anything else may choose it

_left_out: list[str] = []


def pytest_deselected(items):
    _left_out.extend(item.nodeid for item in items if item.get_closest_marker("slow"))


def pytest_terminal_summary(terminalreporter, config):
    kept = config.option.keyword
    chosen = [name for name in _left_out if not kept or kept in name]
    if chosen and config.option.markexpr == "not slow":
        many = f'{len(chosen)} slow tests were left out; -m "slow or not slow" runs them too'
        terminalreporter.write_line(many)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session):
    """Groups of pytest-xdist 3.8 are put into node ids, where pytest 9.2 does not see them."""
    if getattr(session.config.option, "loadgroup", False):
        grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
        assert all("@" in item.nodeid for item in grouped), "groups of pytest-xdist have no effect"
