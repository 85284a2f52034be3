"""Eight CPU devices, warnings as errors and strict rank promotion for every test."""

import os
import pathlib

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

SLOW = (
    "test_hypergradient.py::test_one_step_equals_brute_force[virtual",
    *(
        f"test_hypergradient.py::test_one_step_equals_brute_force[real-{name}]"
        for name in ("heavy_ball", "nesterov", "lamb", "schedule")
    ),
    "test_hypergradient.py::test_features_with_gradient_equal_brute_force",
    "test_hypergradient.py::test_unrolled_steps_equal_brute_force[1",
    "test_hypergradient.py::test_unrolled_steps_equal_brute_force[2",
    "test_hypergradient.py::test_unrolled_steps_equal_brute_force[4-nesterov",
    *(
        f"test_weighers.py::test_one_device_equals_eight[{way}"
        for way in ("annealed", "constant", "teacher_margin", "reweight", "meta_weight_net", "wsl")
    ),
    *(f"test_weighers.py::test_one_device_equals_eight[trilateral-{c}" for c in ("b", "s")),
    "test_models.py::test_endpoints_modes_and_gradients",
    "test_cifar_models.py::",
    "test_meta_dmoe.py::test_loss_and_gradient_of_the_aggregator",
    "test_crd.py::test_memory_form_step_by_step",
    "test_learned_trust.py::",
    "test_lanes.py::test_a_lane_that_diverges_leaves_the_others_alone",
    "test_lanes.py::test_a_convolutional_network_goes_side_by_side",
    "test_lanes.py::test_lanes_that_died_apart_go_on_from_their_last_common_step",
    *(
        f"test_kd_cifar100.py::test_{name}"
        for name in ("every", "published", "rates", "one_pair", "cifar100_reads")
    ),
    "test_configs.py::test_config_builds_and_matches_its_golden_dump[kd_",
    "test_configs.py::test_config_builds_and_matches_its_golden_dump[trust_",
    "test_configs.py::test_config_builds_and_matches_its_golden_dump[paper_",
    "test_configs.py::test_config_builds_and_matches_its_golden_dump[ssl_",
)
"""Parts of the names of tests that take long, of which others cover a part."""


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


def pytest_collection_modifyitems(items):
    found = set()
    for item in items:
        if parts := [part for part in SLOW if part in item.nodeid]:
            found.update(parts)
            item.add_marker("slow")
    folders = {path.parent for path in pathlib.Path(__file__).parent.rglob("test_*.py")}
    if folders <= {item.path.parent for item in items}:  # all of them
        assert not set(SLOW) - found, f"no test is called {set(SLOW) - found}"
