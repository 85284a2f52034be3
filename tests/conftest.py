"""Eight CPU devices, warnings as errors and strict rank promotion for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite compiles far more than it computes; unoptimized code takes 40 % off its time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # fixes the number of devices before anything else may choose it

SLOW = (
    "test_objectives.py::test_finite_in_bfloat16",
    "test_objectives.py::test_jit_equals_eager",
    "test_hypergradient.py::test_one_step_equals_brute_force[virtual",
    "test_hypergradient.py::test_features_with_gradient_equal_brute_force",
    "test_hypergradient.py::test_unrolled_steps_equal_brute_force[1",
    "test_models.py::test_endpoints_modes_and_gradients",
    "test_cifar_models.py::",
    "test_crd.py::test_memory_form_step_by_step",
    "test_learned_trust.py::",
    "test_kd_cifar100.py::",
    "test_configs.py::test_config_builds_and_matches_its_golden_dump[kd_",
    "test_configs.py::test_config_builds_and_matches_its_golden_dump[trust_",
    "test_configs.py::test_config_builds_and_matches_its_golden_dump[paper_",
    "test_configs.py::test_config_builds_and_matches_its_golden_dump[ssl_images",
)
"""Parts of the names of tests that take long and that others cover in part."""


def pytest_collection_modifyitems(items):
    for item in items:
        if any(part in item.nodeid for part in SLOW):
            item.add_marker("slow")
