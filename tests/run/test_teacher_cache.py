"""Stored answers: equal to asking, complete or filled up, and refused where they answer others."""

import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.configs import common
from distill_jax.core import partition, rng, steps
from distill_jax.core.errors import CheckpointError, ConfigError, UserError
from distill_jax.data.source import example_ids
from distill_jax.run import build, describe, environment, teacher_cache, workdir
from distill_jax.run import config as config_lib
from distill_jax.trainer.io import peers
from distill_jax.trainer.io.teacher_cache import store

STEPS = 7  # of 32 of 87 examples: 2.6 epochs
WEIGHTS = np.random.RandomState(0).randn(256, 4).astype(np.float32)


def numpy_teacher(images, *, index, raw):
    """A teacher without JAX: of the view, of which example it is, and of the image as read."""
    if raw is not None:
        assert raw.dtype == np.uint8 and len(raw) == len(index)
    return {"logits": images.reshape(len(images), -1) @ WEIGHTS + index[:, None] % 3}


def make_config(folder: pathlib.Path | None = None, **changes):
    config = config_lib.smoke(common.fashion_mnist())
    config.data.kwargs.n_train = 96
    config.total = STEPS
    config.objective.name = "kd"
    config.roles.student = config_lib.role("mlp", hidden=(8,))
    config.roles.teacher = config_lib.role("mlp", hidden=(16,))
    config.roles.teacher.frozen, config.roles.teacher.init = True, "unread"
    config.cache.dir = "" if folder is None else str(folder)
    config = config_lib.override(config, changes)
    for name in set(config.data.transform_kwargs) - set(config.data.train_transforms):
        del config.data.transform_kwargs[name]
    return config


def make_experiment(config):
    experiment = build.build(config)
    teacher = experiment.models["teacher"].init(jax.random.key(7), jnp.zeros((2, 16, 16, 1)))
    return experiment, {"teacher": jax.device_get(teacher)}


def train(config, *, frozen=None):
    experiment, made = make_experiment(config)
    frozen = made if frozen is None else frozen
    teacher_outputs = build.stored_teacher_outputs(experiment, config, frozen, lambda line: None)
    feed = build.Feed(experiment, seed=config.seed, start=0, teacher_outputs=teacher_outputs)
    key = jax.device_put(jax.random.key(config.seed), partition.replicated(experiment.mesh))
    state = build.initial_state(experiment, key, config)
    online = experiment.online(build.on_device(experiment, frozen))
    like = experiment.online(experiment.abstract_frozen)
    online = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), online, like)
    update = build.compile_step(experiment, build.feed_shapes(experiment))
    for step in range(STEPS):
        state, metrics = update(state, online, feed(step), key)
    feed.close()
    return jax.device_get((state, metrics)), teacher_outputs


@pytest.fixture(scope="module")
def online():
    return train(make_config())[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_the_student_is_the_same_bit_for_bit(online, folder, resident):
    config = make_config(folder, **{"data.resident": resident})
    (state, metrics), teacher_outputs = train(config)
    assert teacher_outputs is not None
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, (state, metrics), online)))
    assert len(list((folder / "teacher").glob("0*"))) == 3  # one chunk for each epoch begun


def test_seeds_with_other_labels_share_outputs(tmp_path):
    lines, shown = [], []
    for seed in (0, 1):
        corrupt = {"labels_per_class": 3, "label_noise": 0.2, "seed": seed}
        changes = {"data.corrupt": corrupt, "data.train_transforms": "normalize"}
        config = make_config(tmp_path, **changes)
        experiment, frozen = make_experiment(config)
        build.stored_teacher_outputs(experiment, config, frozen, lines.append)
        train = experiment.dataset.train
        shown.append(train.read(np.arange(len(train)))["labelled"] > 0)
    assert (shown[0] != shown[1]).any()
    assert lines[-1].endswith(" 0 chunks to fill")


def task_config(tmp_path, task, folder=None):
    """Images with four labels or values each."""
    r = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 96), ("test", 32)):
        arrays[f"x_{part}"] = r.integers(0, 256, (n, 16, 16, 1), np.uint8)
        y = r.random((n, 4))
        arrays[f"y_{part}"] = y.round() if task == "multilabel" else y
    np.savez(tmp_path / "data.npz", **arrays)
    config = make_config(folder)
    config.data.name = "npz_file"
    config.data.kwargs = {"path": str(tmp_path / "data.npz"), "task": task}
    config.evaluators = {task: {}}
    config.eval.metric = "held_out/nll" if task == "multilabel" else "held_out/rmse"
    config.eval.mode = "min"
    return config


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_other_tasks_are_the_same_bit_for_bit(tmp_path, task):
    one, teacher_outputs = train(task_config(tmp_path, task, tmp_path / "cache"))
    assert teacher_outputs is not None
    other, _ = train(task_config(tmp_path, task))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_the_likeliest_classes_are_of_classes(tmp_path):
    config = task_config(tmp_path, "multilabel", tmp_path / "cache")
    config.cache.top_k = 2
    with pytest.raises(ConfigError, match="the task of the data is multilabel"):
        build.build(config, shapes_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("resident", ["yes", "no"])
def test_a_transformer_is_the_same(tmp_path, resident):
    def config(folder=None, **changes):
        made = make_config(folder)
        for role in made.roles.values():
            role.model, role.kwargs = "vit", {"width": 32, "depth": 2, "heads": 2, "patch_size": 4}
        return config_lib.override(made, changes)

    (one, _), teacher_outputs = train(config(tmp_path, **{"data.resident": resident}))
    (other, _), _ = train(config(**{"data.resident": resident}))
    assert teacher_outputs is not None
    # Where the compiler fuses the rest of the step in another way, the last bits of losses differ.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)


def test_stored_rows_are_what_the_teacher_says_of_each_view(folder):
    config = make_config(folder)
    experiment, frozen = make_experiment(config)
    teacher_outputs = build.stored_teacher_outputs(experiment, config, frozen, lambda line: None)
    assert teacher_outputs is not None
    position, epoch = np.array([5, 80, 5, 0]), np.array([0, 2, 1, 2])
    source = experiment.dataset.train
    batch = {
        **source.read(position),
        "index": example_ids(source)[position],
        "epoch": epoch,
        "mask": np.ones(4, np.float32),
    }
    key = rng.stream(jax.random.key(config.seed), "transform")
    seen = build.make_transform(config, experiment.dataset, train=True)(key, batch, jnp.int32(0))
    want, _ = experiment.models["teacher"].apply(
        *frozen["teacher"], seen["input"], train=False, rngs={}
    )
    found = teacher_outputs.read(epoch, position)["teacher"]["logits"]
    np.testing.assert_allclose(found, want["logits"], rtol=1e-5, atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-3


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"seed": 1}, r"seed: 0 -> 1"),
        ({"data.transform_kwargs.random_crop.padding": 1}, r"random_crop.padding: 2 -> 1"),
        ({"data.train_transforms": "normalize"}, r"view.transforms"),
        ({"cache.dtype": "float16"}, r"dtype: 'float32' -> 'float16'"),
        ({"cache.top_k": 2}, r"top_k: 0 -> 2"),
        ({"data.kwargs.seed": 3}, r"data: '\w+' -> '\w+'"),
        ({"precision": "bfloat16"}, r"precision: 'float32' -> 'bfloat16'"),
    ],
)
def test_answers_to_other_questions_are_refused(folder, changes, told):
    first = make_config(folder)
    experiment, frozen = make_experiment(first)
    build.stored_teacher_outputs(experiment, first, frozen, lambda line: None)
    config = make_config(folder, **changes)
    experiment, frozen = make_experiment(config)
    with pytest.raises(ConfigError, match=f"holds other teacher outputs(.|\n)*{told}"):
        build.stored_teacher_outputs(experiment, config, frozen, lambda line: None)


def test_another_teacher_is_refused_and_a_folder_may_name_the_seed(tmp_path):
    config = make_config(tmp_path / "{seed}")
    experiment, frozen = make_experiment(config)
    build.stored_teacher_outputs(experiment, config, frozen, lambda line: None)
    other = jax.tree.map(lambda x: x + 1, frozen)
    with pytest.raises(ConfigError, match=r"teacher: '\w+' -> '\w+'"):
        build.stored_teacher_outputs(experiment, config, other, lambda line: None)
    build.stored_teacher_outputs(
        experiment, make_config(tmp_path / "{seed}", seed=1), other, lambda line: None
    )
    assert (tmp_path / "0" / "teacher").is_dir() and (tmp_path / "1" / "teacher").is_dir()


def test_an_interrupted_filling_goes_on_and_damage_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 16 * 40)  # 40 rows of 4 float32
    config = make_config(tmp_path)
    experiment, frozen = make_experiment(config)
    write, written = store.Store.write, []

    def write_two(self, view, chunk, rows):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, view, chunk, rows)
        written.append((view, chunk))

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write", write_two)
        with pytest.raises(KeyboardInterrupt):
            build.stored_teacher_outputs(experiment, config, frozen, lambda line: None)
    said = []
    teacher_outputs = build.stored_teacher_outputs(experiment, config, frozen, said.append)
    assert written == [(0, 0), (0, 1)] and "7 chunks to fill" in said[0]
    assert "3 views x 16 B" in said[0]
    everything = np.arange(87)
    assert teacher_outputs is not None
    whole = teacher_outputs.read(np.full(87, 1), everything)["teacher"]["logits"]
    some = np.array([86, 3, 41, 40])
    np.testing.assert_array_equal(
        teacher_outputs.read(np.full(4, 1), some)["teacher"]["logits"], whole[some]
    )
    path = tmp_path / "teacher" / "00001-00002" / "logits.npy"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    again = build.stored_teacher_outputs(experiment, config, frozen, said.append)
    assert "0 chunks to fill" in said[1] and again is not None
    again.read(np.zeros(87, int), everything)
    with pytest.raises(CheckpointError, match="delete this folder"):
        again.read(np.ones(87, int), everything)


@pytest.mark.parametrize(
    "changes, views, by_seed",
    [
        ({}, 3, True),
        ({"data.views": 2}, 2, True),
        ({"data.train_transforms": "normalize"}, 1, False),
        ({"data.teacher_view": "clean"}, 1, False),
        ({"data.teacher_view": "independent"}, 3, True),
    ],
)
def test_as_many_views_are_stored_as_the_teacher_sees(tmp_path, changes, views, by_seed):
    plan = build.build(make_config(tmp_path, **changes), shapes_only=True).cache
    assert plan is not None and (plan.views, plan.by_seed) == (views, by_seed)
    assert plan.bytes_per_example == 16


def test_views_that_depend_on_the_batch_are_refused(tmp_path):
    mixing = {"data.train_transforms": ("normalize", "random_crop", "horizontal_flip", "mixup")}
    with pytest.raises(ConfigError, match="depends on the step"):
        build.build(make_config(tmp_path, **mixing), shapes_only=True)
    clean = {**mixing, "data.teacher_view": "clean"}
    plan = build.build(make_config(tmp_path, **clean), shapes_only=True).cache
    assert plan is not None and plan.views == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_likeliest_classes_in_a_small_type(tmp_path, dtype):
    config = make_config(tmp_path, **{"cache.top_k": 2, "cache.dtype": dtype})
    experiment, frozen = make_experiment(config)
    teacher_outputs = build.stored_teacher_outputs(experiment, config, frozen, lambda line: None)
    plan = experiment.cache
    assert (
        plan is not None and teacher_outputs is not None and plan.bytes_per_example == 2 * (2 + 2)
    )
    dense = make_config(tmp_path / "dense")
    full = build.stored_teacher_outputs(make_experiment(dense)[0], dense, frozen, lambda line: None)
    assert full is not None
    rows = np.arange(20)
    want = np.asarray(jax.nn.log_softmax(full.read(rows * 0, rows)["teacher"]["logits"]))
    got = plan.decode(teacher_outputs.read(rows * 0, rows))["teacher"]["logits"]
    got = jax.nn.log_softmax(got)
    order = np.argsort(-want, axis=1)
    top = np.take_along_axis(np.asarray(got), order[:, :2], axis=1)
    np.testing.assert_allclose(top, np.take_along_axis(want, order[:, :2], axis=1), atol=0.03)
    rest = np.take_along_axis(np.exp(got), order[:, 2:], axis=1)
    mass = np.take_along_axis(np.exp(want), order[:, 2:], axis=1).mean(1, keepdims=True)
    np.testing.assert_allclose(rest, np.broadcast_to(mass, rest.shape), atol=0.02)


def function_config(folder):
    config = make_config(folder)
    del config.roles["teacher"]
    config.cache.teacher = f"{__name__}:numpy_teacher"
    return config


def test_a_function_may_answer_in_place_of_a_network(tmp_path):
    config = function_config(tmp_path)
    experiment = build.build(config)
    told = describe.describe(config).split("== teacher cache")[1]
    assert "examples x 3 views x 16 B" in told
    teacher_outputs = build.stored_teacher_outputs(experiment, config, {}, lambda line: None)
    assert teacher_outputs is not None
    feed = build.Feed(experiment, seed=0, start=0, teacher_outputs=teacher_outputs)
    key = jax.device_put(jax.random.key(0), partition.replicated(experiment.mesh))
    state = build.initial_state(experiment, key, config)
    state, metrics = build.compile_step(experiment, feed(0))(state, {}, feed(0), key)
    assert np.isfinite(metrics).all()
    source = experiment.dataset.train
    rows = np.arange(32)
    batch = {
        **source.read(rows),
        "index": example_ids(source)[rows],
        "epoch": rows * 0,
        "mask": np.ones(32, np.float32),
    }
    transform = build.make_transform(config, experiment.dataset, train=True)
    seen = transform(rng.stream(jax.random.key(0), "transform"), batch, jnp.int32(0))
    want = numpy_teacher(np.asarray(seen["input"]), index=batch["index"], raw=batch["input"])
    found = teacher_outputs.read(rows * 0, rows)["teacher"]["logits"]
    np.testing.assert_allclose(found, want["logits"], rtol=1e-5, atol=1e-5)
    stored = json.loads((tmp_path / "teacher" / "key.json").read_text())["key"]
    assert stored["teacher"].endswith(":numpy_teacher")


def test_evaluators_cannot_read_a_function(tmp_path):
    config = function_config(tmp_path)
    config.evaluators.agreement = {}
    with pytest.raises(ConfigError, match="reads 'teacher', which the run does not have"):
        build.build(config, shapes_only=True)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"cache.roles": "student"}, "student learns"),
        ({"cache.roles": "teachr"}, "did you mean 'teacher'"),
        ({"cache.outputs": "hidden"}, "no output 'hidden'"),
        ({"cache.outputs": "embedding"}, "logits"),
        ({"cache.top_k": 5}, "5 of 4 classes"),
        ({"cache.teacher": "a:b"}, "it has no network"),
    ],
)
def test_caches_that_cannot_be_are_refused(tmp_path, changes, told):
    with pytest.raises((ConfigError, KeyError), match=told):
        build.build(make_config(tmp_path, **changes), shapes_only=True)


def test_only_the_stored_question_is_answered():
    x = jnp.ones((2, 3))
    batch = {"input": x, "teacher_outputs": {"teacher": {"logits": 2 * x}}}
    nets = steps.BoundNets({}, {}, {}, key=jax.random.key(0), batch=batch)
    assert nets("teacher", x)[0]["logits"] is batch["teacher_outputs"]["teacher"]["logits"]
    for inputs, train in (((x + 0,), False), ((x,), True), ((x, x), False)):
        with pytest.raises(ConfigError, match="more than its view"):
            nets("teacher", *inputs, train=train)
    view = x - 1
    nets = steps.BoundNets(
        {}, {}, {}, key=jax.random.key(0), batch={**batch, "teacher_input": view}
    )
    nets("teacher", view)
    with pytest.raises(ConfigError, match="more than its view"):
        nets("teacher", x)


def test_processes_divide_the_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 16 * 40)
    told = {}  # the first process decides what is missing
    first = lambda decide, where: told.setdefault(where, decide())  # noqa: E731
    for module in (peers, teacher_cache.processes):
        monkeypatch.setattr(module, "from_first", first)
    monkeypatch.setattr(peers, "barrier", lambda name: None)
    monkeypatch.setattr(peers, "any_process", lambda flag: flag)
    config = make_config(tmp_path)
    experiment, frozen = make_experiment(config)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    found = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        build.stored_teacher_outputs(experiment, config, frozen, lambda line: None)
        found.append(len(list((tmp_path / "teacher").glob("0*"))))
    assert found == [5, 9]


def test_a_signal_ends_the_filling_and_what_is_filled_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 16 * 40)
    config = make_config(tmp_path)
    experiment, frozen = make_experiment(config)
    write, written = store.Store.write, []

    def stopped(self, view, chunk, rows):
        write(self, view, chunk, rows)
        written.append((view, chunk))
        if len(written) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(store.Store, "write", stopped)
    with environment.stop_on_signal(), pytest.raises(environment.Preempted):
        build.stored_teacher_outputs(experiment, config, frozen, lambda line: None)
    assert len(list((tmp_path / "teacher").glob("0*"))) == len(written) == 2
    said = []
    build.stored_teacher_outputs(experiment, config, frozen, said.append)
    assert len(written) == len(set(written)) == 9 and "7 chunks to fill" in said[0]


def test_runs_may_make_one_cache_at_the_same_time(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    plan = build.build(config, shapes_only=True).cache
    assert plan is not None
    replace = os.replace

    def race(source, to):
        monkeypatch.setattr(os, "replace", replace)
        store.open_store(tmp_path / "teacher", {"key": 1}, plan.fields["teacher"], 8)
        replace(source, to)

    monkeypatch.setattr(os, "replace", race)
    store.open_store(tmp_path / "teacher", {"key": 1}, plan.fields["teacher"], 8)
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == ["key.json"]


def test_a_run_waits_while_another_fills_its_cache(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    experiment, frozen = make_experiment(config)
    hold, refused, said = workdir.hold, [], []

    def busy_once(folder, log_line):
        if not refused:
            refused.append(folder)
            raise workdir.InUse("in use by process 7 on far")
        return hold(folder, log_line=log_line)

    monkeypatch.setattr(workdir, "hold", busy_once)
    monkeypatch.setattr(teacher_cache.time, "sleep", lambda seconds: None)
    build.stored_teacher_outputs(experiment, config, frozen, said.append)
    assert refused == [tmp_path / "teacher"] and len(said) == 2
    assert said[1] == f"waiting for teacher cache {tmp_path}/teacher: in use by process 7 on far"
    monkeypatch.setattr(workdir, "hold", pytest.fail)  # a full cache may be read-only
    build.stored_teacher_outputs(experiment, config, frozen, said.append)
    assert not (tmp_path / "teacher" / workdir.LOCK).exists()


def test_a_cache_folder_of_another_program_is_refused(tmp_path):
    (tmp_path / "00000-00000").mkdir()
    (tmp_path / "00000-00000/x.npy").write_text("mine")
    with pytest.raises(UserError, match=r"00000-00000.*not written by this program"):
        workdir.refuse_foreign(tmp_path, "cache")
