"""Every shipped config is valid, builds on shapes alone, and is dumped to `tests/golden`.

After a deliberate change: `UPDATE_GOLDEN=1 pytest tests/contract/test_configs.py`.
"""

import json
import math
import os
import pathlib

import jax
import pytest

from distill_jax.core import partition
from distill_jax.run import build, flags, study, unused
from distill_jax.run import config as config_lib
from distill_jax.run.preflight import hyperparameters

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
FILES = sorted(
    p for p in (ROOT / "configs").rglob("*.py") if "def get_config" in p.read_text("utf-8")
)
CASES = [(path, arg) for path in FILES for arg in ("", "smoke")]
MANY = ("kd_", "trust_", "paper_", "ssl_")
"""Studies of many arms: how their names begin."""


def load(path, arg):
    config = flags.load(f"{path}:{arg}" if arg else str(path))
    config_lib.validate(config)
    unused.check(config)
    config.mesh.data = 1
    return config


def runs(config):
    """The single runs of a config: itself, or the first seed of every arm."""
    if not config.study.arms:
        return {"": config}
    study.check(config)
    seed = config.study.seeds[0]
    return {a: study.arm_config(config, a, seed, pathlib.Path("runs")) for a in config.study.arms}


def dump(name, config, base):
    """What an arm changes in the config of its study, or a config whole, and its parameters."""
    experiment = build.build(config, shapes_only=True)
    assert not list(hyperparameters.findings(experiment)), "what a config ships with fits its run"
    lines = [f"== {name}".rstrip()]
    lines += config_lib.differences(base, config) if name else [resolved(config)]
    state = experiment.abstract_state
    for role, params in (*state.params.items(), *state.targets.items()):
        leaves = partition.named_leaves(params)
        total = sum(math.prod(x.shape) for x in leaves.values())
        lines.append(f"-- {role}: {total} parameters")
        if not name:
            lines += [f"{path} {tuple(leaf.shape)} {leaf.dtype}" for path, leaf in leaves.items()]
    lines.append(f"-- {experiment.total_steps} steps")
    return "\n".join(lines)


def resolved(config):
    return json.dumps(json.loads(config_lib.to_json(config)), indent=1)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    make_mesh = partition.make_mesh
    monkeypatch.setattr(
        partition, "make_mesh", lambda **kwargs: make_mesh(**kwargs, devices=devices)
    )


@pytest.mark.parametrize(
    "path, arg",
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case[0].stem.startswith(MANY) else [])
        for case in CASES
    ],
    ids=lambda x: getattr(x, "stem", x),
)
def test_config_builds_and_matches_its_golden_dump(path, arg):
    config = load(path, arg)
    study_config = config.copy_and_resolve_references()
    study_config.study = config_lib.base().study
    arms = runs(config)
    parts = [resolved(config)] if config.study.arms else []
    text = "\n".join([*parts, *(dump(n, one, study_config) for n, one in arms.items())]) + "\n"
    name = "_".join((*path.relative_to(ROOT / "configs").with_suffix("").parts, arg)).rstrip("_")
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.exists(), f"no golden dump: {golden.name}"
    assert text == golden.read_text(), "the resolved experiment changed; see the module docstring"


def test_no_stale_golden_dumps():
    known = {
        "_".join((*p.relative_to(ROOT / "configs").with_suffix("").parts, a)).rstrip("_")
        for p, a in CASES
    }
    assert {p.stem for p in GOLDEN.glob("*.txt")} == known


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_header_gives_the_command(path):
    text = path.read_text()
    assert text.startswith('"""')
    assert "--config=configs/" in text or "make " in text
