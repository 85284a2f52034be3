"""Runs that tell how they are: stalls, heartbeats, skipped steps, alarms, late compilations."""

import dataclasses
import fnmatch
import functools
import json
import math
import os
import re
import threading
import time
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import bilevel, state, steps
from distill_jax.core.api import Model, Objective, Terms
from distill_jax.core.errors import ConfigError, NonFiniteError
from distill_jax.losses.classification import cross_entropy
from distill_jax.report.wording import alarm_line
from distill_jax.run import alarms, build, speed, watch
from distill_jax.run import config as config_lib
from distill_jax.run.train import loop
from distill_jax.run.train import run as run_lib
from distill_jax.run.train.result import format_result
from tests.contract import test_weightings


class Time:
    """A clock that moves when told."""

    now = 0.0

    def __call__(self):
        return self.now


def make_watch(tmp_path, **kwargs):
    return watch.Watch([tmp_path], total=9, clock=Time(), **kwargs)


# The watch.


def test_a_stall_is_told_once_with_stacks_phase_and_process(tmp_path, capsys):
    ended = []
    made = make_watch(tmp_path, stall_seconds=10.0, process=1, end=ended.append)
    made.enter("compile")
    made._clock.now = 59.0  # before the first step patience is longer
    made.check()
    made.start(1)
    made.enter("data")
    made._clock.now += 9.9
    made.check()
    assert made.stalls == [] and capsys.readouterr().err == ""
    made._clock.now += 0.2
    made.check()
    made.check()
    [stall] = made.stalls
    assert (stall.step, stall.phase) == (1, "data")
    for told in (capsys.readouterr().err, (tmp_path / "stall-1.txt").read_text()):
        assert "process 1 is in phase 'data' for 10 s, after step 1 of 9, on " in told
        assert told.count("test_a_stall_is_told_once") == 1 and "is MainThread" in told
    made.enter("data")  # a sign of life, then another stall
    made._clock.now += 11
    made.check()
    assert len(made.stalls) == 2 and ended == []


def test_what_takes_long_the_first_time_is_told_of(tmp_path):
    said = []
    made = make_watch(tmp_path, log_line=said.append)

    def after(seconds):
        made._clock.now += seconds
        made.report()
        made.report()

    made.enter("compile")
    after(9)
    assert said == []
    after(2)
    after(8)
    after(4)
    assert said == [f"compiling the step, for {n} s so far" for n in (11, 23)]
    made.start(1)
    made.enter("device")
    after(100)  # a step may take long
    for _ in range(2):
        with made.during("evaluation", "evaluation of test"):
            after(10)
    assert said[2:] == ["compiling and evaluating, for 10 s so far"]


def test_a_stall_before_the_first_step_takes_longer_and_may_end_the_process(tmp_path, capsys):
    ended = []
    made = make_watch(tmp_path, stall_seconds=10.0, on_stall="exit", end=ended.append)
    made._clock.now = 59.0
    made.check()
    assert ended == []
    made._clock.now = 60.0
    made.check()
    assert ended == [watch.STALLED]
    assert "watch.on_stall" in capsys.readouterr().err
    assert json.loads((tmp_path / "heartbeat.json").read_text())["phase"] == "stalled"


def test_the_thread_of_the_watch_sees_a_loop_that_hangs(tmp_path, capsys):
    made = watch.Watch([tmp_path], total=9, stall_seconds=0.05)
    with made:
        watch.enter("device")
        made.start(3)
        with watch.during("barrier"):
            deadline = time.monotonic() + 20
            while not made.stalls and time.monotonic() < deadline:
                time.sleep(0.01)
        assert made.phase == "other"
    assert [stall.phase for stall in made.stalls] == ["barrier"]
    assert "sees_a_loop_that_hangs" in (tmp_path / "stall.txt").read_text()
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["total"], beat["pid"], beat["process"]) == (3, 9, os.getpid(), 0)
    assert abs(beat["time"] - time.time()) < 60
    assert "watch" not in {thread.name for thread in threading.enumerate()}
    watch.enter("nobody listens")  # outside nothing happens
    assert made.phase == "other"


def test_zero_switches_stalls_off_and_a_full_disk_ends_nothing(tmp_path):
    made = make_watch(tmp_path)
    made._clock.now = 1e9
    made.check()
    assert made.stalls == []
    (tmp_path / "heartbeat.json").mkdir()
    made.beat()


def test_time_is_shared_out_from_the_first_step_on(tmp_path):
    made = make_watch(tmp_path)
    made._clock.now = 100.0
    made.start(1)
    for phase, seconds in (("data", 1), ("dispatch", 2), ("device", 4), ("data", 8)):
        made.enter(phase)
        made._clock.now += seconds
    with made.during("checkpoint"):
        made._clock.now += 16
    assert made.spend() == {"other": 0, "data": 9, "dispatch": 2, "device": 4, "checkpoint": 16}


def test_what_compiles_again_is_told_with_its_name_and_caller(tmp_path):
    said = []

    @jax.jit
    def predict(x):
        return x + 1

    with watch.Watch([tmp_path], total=9, log_line=said.append) as made:
        made.start(1)
        for n in (2, 2):
            with made.during("evaluation", "evaluation of held_out"):
                predict(np.ones(n))
        assert made.recompiled == []
        with made.during("evaluation", "evaluation of test"):  # the first of its kind
            predict(np.ones(3))
        with made.during("evaluation", "evaluation of held_out"):
            predict(np.ones(4))
    assert said == made.recompiled
    [line] = said
    assert "jit(predict) was compiled again" in line and "evaluation of held_out" in line
    assert f"{__file__}:" in line


# Steps that are not finite.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rooted(Objective):
    """The root of a product: at 0 its gradient is not finite, while its value is."""

    roles: ClassVar = ("student", "average")

    def memory(self, key, batch):
        return {"seen": jnp.int32(0), "last": jnp.zeros(batch["input"].shape[1:])}

    def loss(self, nets, batch, memory, step):
        found, new = nets("student", batch["input"], train=True)
        nets("average", batch["input"])
        return Terms(
            values={"root": jnp.sqrt(found["product"])},
            state={"student": new},
            memory={"seen": memory["seen"] + 1, "last": batch["input"][-1]},
        )


def rooted_step(**kwargs):
    def apply(params, model_state, x, *, train, rngs):
        del rngs
        product = jnp.abs(x @ params["w"])
        new = {"mean": 0.5 * model_state["mean"] + 0.5 * x.mean(0)} if train else model_state
        return {"product": product}, new

    def init(key, x):
        d = x.shape[-1]
        return {"w": jax.random.normal(key, (d,)) + 3}, {"mean": jnp.zeros(d)}

    models = {role: Model(init, apply) for role in ("student", "average")}
    objective, tx = Rooted(), optax.adam(0.1)
    shapes = state.infer_shapes(objective, models, batch_of(1.0))
    make = state.make_init(
        objective, models, tx, shapes, trainable=("student",), ema={"average": "student"}
    )
    ema = {"average": ("student", 0.5)}
    step = steps.make_train_step(objective, models, tx, ema=ema, **kwargs)
    return jax.jit(make)(jax.random.key(0)), step


def batch_of(value):
    x = jnp.full((4, 3), value)
    zeros = jnp.zeros(4, jnp.int32)
    return {"input": x, "mask": jnp.ones(4), "index": zeros, "epoch": zeros}


def leaves(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
    begin, made = rooted_step(skip_nonfinite=True)
    step, key = jax.jit(made), jax.random.key(1)
    after, metrics = step(begin, {}, batch_of(1.0), key)
    assert metrics["skipped"] == 0
    plain, plain_metrics = jax.jit(rooted_step()[1])(begin, {}, batch_of(1.0), key)
    assert leaves(after) == leaves(plain) and "skipped" not in plain_metrics
    for value, finite in ((np.nan, False), (0.0, True)):  # a loss; a gradient alone
        skipped, metrics = step(after, {}, batch_of(value), key)
        assert metrics["skipped"] == 1 and bool(jnp.isfinite(metrics["loss"])) is finite
        assert int(skipped.step) == 2
        assert leaves(skipped.replace(step=after.step)) == leaves(after)
    moved = step(skipped, {}, batch_of(1.0), key)[0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(moved))
    assert leaves(moved.params) != leaves(skipped.params) and int(moved.memory["seen"]) == 2


def test_of_runs_side_by_side_only_the_one_that_is_not_finite_skips():
    begin, made = rooted_step(skip_nonfinite=True)
    both = jax.tree.map(lambda *x: jnp.stack(x), begin, begin)
    batches = jax.tree.map(lambda *x: jnp.stack(x), batch_of(1.0), batch_of(jnp.nan))
    stepped, metrics = jax.jit(jax.vmap(made, (0, None, 0, None)))(
        both, {}, batches, jax.random.key(1)
    )
    assert metrics["skipped"].tolist() == [0, 1]
    first, second = (jax.tree.map(lambda x, i=i: x[i], stepped) for i in (0, 1))
    assert leaves(second.replace(step=begin.step)) == leaves(begin)
    assert np.isfinite(first.params["student"]["w"]).all() and int(first.memory["seen"]) == 1


def test_a_bilevel_step_skips_where_only_its_outer_level_is_not_finite(monkeypatch):
    skipping = functools.partial(bilevel.make_bilevel_step, skip_nonfinite=True)
    monkeypatch.setattr(bilevel, "make_bilevel_step", skipping)
    made, outer = test_weightings.setup("meta_weight_net")
    begin = jax.jit(made.init)(jax.random.key(0))
    fed, step = test_weightings.fed(outer), jax.jit(made.step)
    after, metrics = step(begin, made.frozen, fed, jax.random.key(1))
    assert metrics["skipped"] == 0 and leaves(after.params) != leaves(begin.params)
    held_out = {**fed["held_out"], "input": fed["held_out"]["input"] * jnp.nan}
    after, metrics = step(begin, made.frozen, {**fed, "held_out": held_out}, jax.random.key(1))
    assert metrics["skipped"] == 1 and jnp.isfinite(metrics["loss"]) and int(after.step) == 1
    assert leaves(after.replace(step=begin.step)) == leaves(begin)


# Alarms.


def history(values):
    return [(50 * (i + 1), float(v)) for i, v in enumerate(values)]


def test_a_spike_is_far_above_the_median_of_what_came_before():
    rule = alarms.spike(10.0)
    noise = 1 + 0.1 * np.random.default_rng(0).standard_normal(200)
    falling = np.linspace(5, 0.5, 200) * noise
    for calm in (noise, falling, np.ones(50), np.zeros(50)):
        found = [rule(history(calm[:i])) for i in range(1, len(calm) + 1)]
        assert not any(found)
    assert rule(history([*noise, 4.0])).startswith("is 4, ")
    assert "median 1" in rule(history([*np.ones(16), 1.6]))
    assert rule(history([*np.ones(16), 1.4])) is None  # 8 times a twentieth of the median
    assert rule(history([*np.ones(15), 9.0])) is None  # too few to tell
    assert rule(history([*np.ones(16), -9.0])) is None
    # Only the window counts: a loss that once was high has fallen since.
    assert rule(history([*np.full(200, 9.0), *np.ones(alarms.WINDOW), 5.0])) is not None


def collapse(found):
    """A rule that compares with the first value, as one for collapse does."""
    return "has lost half of its first value" if found[-1][1] < found[0][1] / 2 else None


def first_alarm(**curves):
    """The first log with an alarm about collapse, None without; `__` in names stands for `/`."""
    rules, found = alarms.default_rules(spike_deviations=0), []
    for name, values in curves.items():
        name = f"train/{name.replace('__', '/')}"
        for rule in [rule for _, pattern, rule in rules if fnmatch.fnmatchcase(name, pattern)]:
            found += [i + 1 for i in range(len(values)) if rule(history(values[: i + 1]))][:1]
    return min(found, default=None)


def of_embedding(name, **curves):
    return first_alarm(**{f"embedding__{name}__{kind}": x for kind, x in curves.items()})


def test_a_collapse_is_a_small_share_of_the_first_value_at_two_logs_in_a_row():
    # Steps 1, 20, 40, ... of `benchmarks/collapse.py`, seed 0.
    without_stop_gradient = {  # SimSiam: a dimensional collapse, which the deviation does not show
        "std": [0.9973, 0.9967, 0.9607, 0.8949, 0.7574, 0.7639],
        "rank": [67.86, 56.47, 18.23, 9.617, 6.283, 5.558],
    }
    without_predictor = {"std": [0.8101, 0.4352, 0.3287, 0.2913, 0.2673]}  # BYOL
    without_variance = {"variance": [0.1206, 0.03414, 0.004396, 0.001319, 0.00064, 0.0005048]}
    without_covariance = {"rank": [60.63, 45.18, 14.14, 9.03, 7.026]}  # both VICReg
    assert of_embedding("projector", **without_stop_gradient) == 5
    assert of_embedding("projector", **without_predictor) == 5
    assert of_embedding("projector", **without_variance) == 6
    assert of_embedding("projector", **without_covariance) == 5
    byol = {
        "std": [0.8101, 0.8368, 0.8599, 0.8714, 0.8653, 0.8624],
        "rank": [39.52, 34.21, 24.96, 24.81, 24.78, 25.49],
    }
    barlow_twins = {"rank": [60.63, 45.17, 24.07, 22.0, 22.3, 20.2]}
    tjepa = {  # its tokens side by side come to say where they are, and are good all the same
        "std": [0.1772, 0.1281, 0.08595, 0.06229, 0.05713, 0.05419],
        "rank": [8.083, 5.877, 3.968, 2.936, 2.737, 2.631],
        "variance": [0.03394, 0.01753, 0.007963, 0.004218, 0.003526, 0.003163],
    }
    assert of_embedding("projector", **byol) is None
    assert of_embedding("projector", **barlow_twins) is None
    assert of_embedding("target", **tjepa) is None


def test_tokens_that_fill_a_single_dimension_have_collapsed():
    assert of_embedding("student", rank=[3.4, 2.2, 1.68, 1.6, 1.5]) == 4
    assert of_embedding("student", rank=[3.4, 2.2, 1.8, 1.8, 1.75]) is None  # half is left
    assert of_embedding("student", rank=[3.4, 1.6, 2.2, 1.6]) is None


def test_alarms_of_one_metric_by_two_rules_are_one_event(tmp_path):
    rules = alarms.default_rules(spike_deviations=0)
    made = alarms.Alarms(tmp_path, rules, log_line=lambda line: None)
    for step, rank in enumerate([40.0, 5.0, 5.0, 1.5, 1.5, 5.0]):
        made.see(step, {"train/embedding/student/rank": rank})
    assert [alarm.step for alarm in made.raised] == [2]


def test_one_low_log_is_no_collapse():
    assert of_embedding("student", std=[1.0, 0.3, 0.9, 0.3, 0.9]) is None
    assert of_embedding("student", std=[1.0, 0.3]) is None
    assert of_embedding("student", std=[1.0, 0.3, 0.3]) == 3
    assert of_embedding("student", std=[0.0, 0.0, 0.0]) is None  # no share of nothing


def test_assignments_collapse_onto_one_prototype_or_onto_all():
    assert first_alarm(prototype_entropy=[2.4, 1.4, 0.72, 0.695, 0.695]) == 4
    assert first_alarm(assignment_information=[0.62, 0.2, 0.04, 0.03]) == 4
    assert first_alarm(patch_assignment_information=[0.02, 0.009, 0.009]) == 3
    assert first_alarm(assignment_information=[0.02, 0.011, 0.03, 0.049]) is None  # rises
    healthy = {"prototype_entropy": [3.4, 4.7, 4.8], "assignment_information": [0.6, 0.37, 0.35]}
    assert first_alarm(**healthy) is None
    assert first_alarm(loss=[3.0, 0.0, 0.0], assignment_entropy=[3.0, 0.0, 0.0]) is None


def test_a_run_without_tokens_is_told(tmp_path):
    """Once, after 100 batches or the whole of a shorter run, and only where none has a token."""
    curves = [
        ("all", [0.0] * 5, 0),
        ("one", [0.0, 0.5, 0.0, 0.0, 0.0], 0),
        ("short", [0.0] * 3, 50),
    ]
    raised = {}
    for name, values, total in curves:
        rules = alarms.default_rules(spike_deviations=10, total=total)
        made = alarms.Alarms(tmp_path / name, rules, log_line=lambda line: None)
        (tmp_path / name).mkdir()
        for i, value in enumerate(values):
            made.see(25 * (i + 1), {"train/counts/tokens": value, "train/loss": 1.0})
        raised[name] = [(alarm.step, alarm.rule) for alarm in made.raised]
        assert all("no token to learn from" in alarm.message for alarm in made.raised)
    assert raised == {"all": [(100, "nothing")], "one": [], "short": [(50, "nothing")]}


def test_alarms_are_raised_once_for_each_event_and_survive_a_resume(tmp_path):
    said, rules = [], [("collapse", "train/std*", collapse)]
    made = alarms.Alarms(tmp_path, rules, log_line=said.append)
    values = {10: 1.0, 20: 0.4, 30: 0.3, 40: 0.9, 50: 0.2}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, value in values.items():
            row = {"train/std/student": value, "train/loss": math.nan if step == 30 else 1.0}
            made.see(step, row)
            file.write(json.dumps({"step": step, "train/std/student": value}) + "\n")
    want = [(20, "collapse", "train/std/student"), (50, "collapse", "train/std/student")]
    assert [alarm[:3] for alarm in made.raised] == want
    assert said[0] == alarm_line(made.raised[0]._asdict()) and len(said) == 2
    stored = [json.loads(x) for x in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert stored == [alarm._asdict() for alarm in made.raised]

    again = alarms.Alarms(tmp_path, rules, resume_step=40, log_line=said.append)
    assert [alarm.step for alarm in again.raised] == [20]
    again.see(40, {"train/std/student": 0.1})  # its step is there already
    again.see(50, {"train/std/student": 0.2})
    assert [alarm.step for alarm in again.raised] == [20, 50]
    assert len((tmp_path / "alarms.jsonl").read_text().splitlines()) == 2

    silent = alarms.Alarms(None, rules, log_line=said.append)  # a process that does not write
    silent.see(10, {"train/std": 1.0})
    silent.see(20, {"train/std": 0.1})
    assert silent.raised == []


# A whole run.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stumbling(Objective):
    """Cross-entropy, which is not finite from step 3 on, for as many steps as asked."""

    steps: int

    roles: ClassVar = ("student",)

    def loss(self, nets, batch, memory, step):
        found, new = nets("student", batch["input"], train=True)
        bad = (step >= 3) & (step < 3 + self.steps)
        value = cross_entropy(found["logits"], batch["label"])
        return Terms(values={"label": jnp.where(bad, jnp.nan, value)}, state={"student": new})


def make_config(**changes):
    config = config_lib.base()
    config.objective.name = "tests.run.test_watch:Stumbling"
    config.objective.kwargs = {"steps": 1}
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 40, "n_test": 16, "image_size": 6, "channels": 1}
    config.data.train_transforms = config.data.eval_transforms = ("scale",)
    config.roles.student = config_lib.role("mlp", hidden=(4,))
    config.evaluators = {"classification": {}}
    config.batch_size, config.total, config.log.every_steps = 8, 12, 2
    config.eval.every, config.checkpoint.every = 3, 6
    config.log.tensorboard = False
    return config_lib.override(config, {"watch.nonfinite": "skip", **changes})


def test_a_run_tells_how_it_was(tmp_path):
    said = []
    result = loop.train(make_config(), tmp_path, log_line=said.append)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = {row["step"]: row["train/skipped"] for row in rows if "train/skipped" in row}
    assert skipped == {2: 0, 4: 1, 6: 0, 8: 0, 10: 0, 12: 0}
    assert result["skipped"] == 1 and result["alarms"] == []
    assert any("step 4 is skipped" in line for line in said)
    assert "1 steps were skipped" in format_result(result)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["phase"]) == (12, "done")

    compute = result["compute"]
    assert compute["compilations_after_start"] == 0, said
    shares = compute["shares"]
    assert {"data", "dispatch", "device", "evaluation", "checkpoint"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert compute["flops_per_second"] > 0
    assert re.search(r"FLOP a step, .*FLOP/s; floor .*FLOP a step", format_result(result))


def test_a_run_that_only_skips_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lib, "SKIPPED_IN_A_ROW", 5)
    with pytest.raises(NonFiniteError, match="5 steps in a row, the last of them step 8"):
        loop.train(make_config(**{"objective.kwargs.steps": 99}), tmp_path, log_line=lambda _: None)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["phase"] == "failed"


def test_the_floor_is_three_forwards_of_what_learns_and_one_of_what_does_not():
    config = make_config(**{"objective.name": "supervised"})
    experiment = build.build(config, shapes_only=True)
    # 36 x 4 and 4 x k products and what is added and rectified beside them.
    k = len(experiment.dataset.classes)
    products = 2 * 8 * (36 * 4 + 4 * k)
    found = speed.floor(experiment)
    assert 3 * products <= found["floor_flops_per_step"] <= 3 * 1.3 * products
    parameters = 36 * 4 + 4 + 4 * k + k
    assert found["floor_bytes_per_step"] >= 4 * (2 * parameters + 8 * 36)


def test_looking_ahead_refuses_to_skip():
    changes = {
        "objective.name": "self_training",
        "objective.kwargs": {},
        "roles.teacher.ema_of": "student",
        "lookahead.steps": 1,
    }
    with pytest.raises(ConfigError, match=r"watch\.nonfinite: lookahead"):
        build.build(make_config(**changes))


@pytest.mark.parametrize(
    ("path", "value"),
    [("watch.on_stall", "wait"), ("watch.nonfinite", "ignore"), ("watch.stall_seconds", -1.0)],
)
def test_the_config_refuses(path, value):
    with pytest.raises(ConfigError, match=path):
        config_lib.validate(make_config(**{path: value}))
