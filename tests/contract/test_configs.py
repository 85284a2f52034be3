"""Every shipped config is valid, builds on shapes alone, and is dumped to `tests/golden`.

A dump has what differs from `config.base()`, and for an arm of a study what it changes beyond its
own entries, such as arguments that go with another method. Their `smoke` builds likewise.

After a deliberate change: `UPDATE_GOLDEN=1 pytest tests/contract/test_configs.py`.
"""

import contextlib
import math
import os
import pathlib

import jax
import pytest

from distill_jax.configs import common
from distill_jax.core import partition
from distill_jax.core.errors import ConfigError, DataUnavailable
from distill_jax.run import build, flags, study, unused
from distill_jax.run import config as config_lib
from distill_jax.run.preflight import hyperparameters

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
FILES = sorted(
    p for p in (ROOT / "configs").rglob("*.py") if "def get_config" in p.read_text("utf-8")
)
MANY = ("kd_", "trust_", "paper_", "ssl_", "efficientnet")
"""Studies of many arms: how their names begin."""

CASES = [
    pytest.param(path, marks=[pytest.mark.slow] if path.stem.startswith(MANY) else [], id=path.stem)
    for path in FILES
]


def load(spec):
    config = flags.load(spec)
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


def built(config):
    experiment = build.build(config, shapes_only=True)
    assert not list(hyperparameters.findings(experiment)), "what a config ships with fits its run"
    return experiment


def changes(config):
    """What a config has beside the defaults."""
    flat = config_lib.flatten(config)
    del flat["mesh.data"]
    return {path: value for path, value in flat.items() if value != config_lib.default(path)}


def lines(flat):
    return [f"{path}: {flat[path]!r}" for path in sorted(flat)]


def networks(experiment, *, leaves):
    """The sizes of the networks that a run trains, and their parameters."""
    state = experiment.abstract_state
    for role, params in (*state.params.items(), *state.targets.items()):
        named = partition.named_leaves(params)
        yield f"-- {role}: {sum(math.prod(x.shape) for x in named.values())} parameters"
        if leaves:
            yield from (f"{path} {tuple(leaf.shape)} {leaf.dtype}" for path, leaf in named.items())
    yield f"-- {experiment.total_steps} steps"


def dump(config):
    whole = changes(config)
    text = lines(whole)
    if not config.study.arms:
        return [*text, *networks(built(config), leaves=True)]
    arms = config_lib.arms(config)
    for arm, single in runs(config).items():
        own = changes(single)
        follows = {path: own.get(path, "(default)") for path in own.keys() | whole.keys()}
        for path, value in follows.copy().items():
            stands = arms[arm].get(path, whole.get(path)) == value
            if path.startswith("study.") or path == "seed" or stands:
                del follows[path]
        text += [f"== {arm}", *lines(follows), *networks(built(single), leaves=False)]
    return text


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    make_mesh = partition.make_mesh
    monkeypatch.setattr(
        partition, "make_mesh", lambda **kwargs: make_mesh(**kwargs, devices=devices)
    )


@pytest.mark.parametrize("path", CASES)
def test_config_builds_and_matches_its_golden_dump(path):
    text = "\n".join(dump(load(str(path)))) + "\n"
    golden = GOLDEN / f"{name_of(path)}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.exists(), f"no golden dump: {golden.name}"
    assert text == golden.read_text(), "the resolved experiment changed; see the module docstring"


@pytest.mark.parametrize("path", CASES)
def test_smoke_builds_and_is_small(path):
    config = load(f"{path}:smoke")
    assert len(config.study.arms) * len(config.study.seeds) <= config_lib.MOST_RUNS
    for run in runs(config).values():
        experiment = built(run)
        assert experiment.total_steps == 12
        assert len(experiment.dataset.train) <= 512


FILES_OF_THE_USER = ("novels", "plays")
"""Options that read a file whose content the user makes."""

TOGETHER = {"losses": "bilevel,losses"}
"""Options that change another."""


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.parent.name == "studies"), id=path.stem)
        for path in FILES
    ],
)
def test_every_option_builds_and_measures_what_it_chooses_by(path, monkeypatch):
    parse, own = common.parse, []

    def spy(arg, *options):
        if arg != "?":
            return parse(arg, *options)
        own.extend(options)
        return set()

    monkeypatch.setattr(common, "parse", spy)
    with contextlib.suppress(ConfigError):  # of a file without options
        load(f"{path}:?")
    assert own or "common.parse(arg, " not in path.read_text()
    for option in sorted(set(own) - set(FILES_OF_THE_USER)):
        config = load(f"{path}:{TOGETHER.get(option, option)}")
        single = next(iter(runs(config).values()))
        try:
            experiment = built(single)
        except DataUnavailable:
            continue  # of data sets that are not packages
        for metric in {single.eval.metric, config.study.metric * bool(config.study.arms)} - {""}:
            build.check_metric(experiment, metric, where=option)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("studies/longer.py:ferkd,sla", "ferkd and sla"),
        ("studies/tjepa.py:census,nsl_kdd", "census and nsl_kdd"),
        ("studies/trust_attack.py:noisy,nsl_kdd,random", "noisy and random"),
        ("studies/kd_full.py:convnet,vit", "convnet and vit"),
        ("studies/ssl_masked.py:mae,digits", "digits and mae"),
        ("studies/ssl_masked.py:mae,tune,twice", "tune and twice"),
        ("distill/kd.py:full,table", "full and table"),
        ("distill/multilabel.py:bilevel,teacher", "bilevel and teacher"),
        ("language/kd.py:top,smollm2", "smollm2 and top"),
        ("ssl/tjepa.py:no_average,collapse", "collapse and no_average"),
        ("studies/kd_full.py:settings,kd", "kd and settings"),
    ],
)
def test_options_that_exclude_each_other_are_refused(spec, options):
    with pytest.raises(ConfigError, match=f"^--config: {options} behind the colon exclude"):
        load(str(ROOT / "configs" / spec))


def test_an_option_that_changes_another_needs_it():
    with pytest.raises(ConfigError, match=r"^--config: losses behind the colon changes bilevel"):
        load(str(ROOT / "configs/distill/multilabel.py:losses"))


def test_data_without_more_of_it_are_not_replaced():
    with pytest.raises(ConfigError, match=r"^--config: 'fst' already has all of digits"):
        load(str(ROOT / "configs/studies/longer.py:fst,full"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("mlp,at", "at is not among the methods of this student\n  available: kd, "),
        ("few,dkd", "dkd is not among the methods of this student\n  available: kd, "),
        (
            "vit,jeffreys",
            "no scale of the weight of jeffreys was .*\n  ':vit,tune,jeffreys'",
        ),
        ("convnet,few", "few does not go with convnet\n  ':mlp,few'"),
    ],
)
def test_methods_that_do_not_fit_a_student_are_refused(options, message):
    with pytest.raises(ConfigError, match=f"^--config: {message}"):
        load(str(ROOT / "configs" / f"studies/kd_full.py:{options}"))


def name_of(path):
    return "_".join(path.relative_to(ROOT / "configs").with_suffix("").parts)


def test_no_stale_golden_dumps():
    assert {p.stem for p in GOLDEN.glob("*.txt")} == {name_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_header_gives_the_command(path):
    text = path.read_text()
    assert text.startswith('"""')
    assert "--config=configs/" in text or "make " in text
