"""A trained network is called from Python as it was evaluated, whatever the folder is called by."""

import jax
import numpy as np
import pytest
from flax import nnx

import distill_jax as dj
from distill_jax.core.errors import UserError
from distill_jax.run import build
from distill_jax.run import config as config_lib
from distill_jax.run.train import loop

from . import nets_by_name


def train(config, folder):
    config.log.tensorboard = False
    loop.train(config, folder, log_line=lambda line: None)
    with np.load(folder / "predictions.npz") as stored:
        logits = dict(stored)["logits_student"]
    return folder, logits, build.load_dataset(config).test


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run with batch norm, a moving average and statistics of its own data."""
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 96, "n_test": 21, "image_size": 6, "num_classes": 3}
    config.data.train_transforms = config.data.eval_transforms = ("normalize",)
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("tests.run.nets_by_name:Net")
    config.evaluators = {"classification": {}}
    config.batch_size, config.total, config.log.every_steps = 16, 6, 3
    config.eval.every = config.checkpoint.every = 2
    return train(config, tmp_path_factory.mktemp("images") / "run")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    config = config_lib.base()
    config.data.name = "synthetic_table"
    config.data.kwargs = {"n_train": 96, "n_test": 21}
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("tabular_mlp", hidden=(4,))
    config.evaluators = {"classification": {}}
    config.batch_size, config.total = 16, 2
    return train(config, tmp_path_factory.mktemp("table") / "run")


TRUST = ("tests.run.nets_by_name",)


def test_outputs_are_those_of_the_evaluation(images):
    folder, logits, test = images
    predict = dj.load(folder, step="last", trust=TRUST)
    found = predict(test.read(np.arange(21))["input"], batch_size=8)
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, rtol=1e-5)
    assert predict.classes == ("prototype 0", "prototype 1", "prototype 2") and predict.step == 6
    params, state = predict.params, predict.state
    inputs = test.read(np.arange(5))["input"]
    pure = jax.jit(predict.apply)(params, state, inputs)
    np.testing.assert_allclose(pure["logits"], logits[:5], rtol=1e-4, atol=1e-5)


def test_table_rows(table):
    folder, logits, test = table
    predict = dj.load(folder, step="last")
    rows = test.read(np.arange(21))["input"]
    np.testing.assert_allclose(predict(rows)["logits"], logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected a dict of"):
        predict(rows["numeric"])
    with pytest.raises(ValueError, match="inputs differ in length"):
        predict({**rows, "numeric": rows["numeric"][:3]})


def test_every_name_of_a_folder(images, monkeypatch):
    folder, _, _ = images
    monkeypatch.chdir(folder.parent)
    whole = dj.load(folder, trust=TRUST)
    steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    for name in ("run", "run/checkpoints", "run#student", f"run/checkpoints/{whole.step}"):
        other = dj.load(name, trust=TRUST)
        assert other.step == whole.step
        jax.tree.map(np.testing.assert_array_equal, other.params, whole.params)
    assert dj.load("run", step="last", trust=TRUST).step == 6
    assert dj.load("run", step=steps[0], trust=TRUST).step == steps[0]


def test_back_into_a_module(images):
    predict = dj.load(images[0], step="last", trust=TRUST)
    like = nets_by_name.Net(num_classes=3, rngs=nnx.Rngs(7))
    module = predict.to_nnx(like)
    assert type(module) is nets_by_name.Net
    back = dj.from_nnx(module).init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, back, (predict.params, predict.state))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: x[0], "expected [n, 6, 6, 1] uint8; add an axis for a single example: x[None]"),
        (lambda x: x[:, :5], "inputs has shape [4, 5, 6, 1]; expected [n, 6, 6, 1] uint8"),
        (lambda x: x / 255, "inputs is float64; expected [n, 6, 6, 1] uint8, in the units of"),
        (lambda x: x.astype(int) + 200, "inputs is int64; expected"),
        (lambda x: x[:0], "inputs has no example"),
    ],
)
def test_inputs_that_do_not_fit(images, make, message):
    folder, _, test = images
    with pytest.raises(ValueError) as caught:
        dj.load(folder, trust=TRUST)(make(test.read(np.arange(4))["input"]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("nowhere", {}, "does not exist"),
        ("run", {"step": 5}, "has no step 5"),
        ("run", {"role": "studnet"}, "did you mean 'student'?"),
        ("run#student/layer", {}, "is a part of a network"),
        ("run", {"trust": ()}, "--trust=tests.run.nets_by_name"),
    ],
)
def test_what_cannot_be_loaded(images, name, kwargs, message):
    folder, _, _ = images
    with pytest.raises(UserError) as caught:
        dj.load(folder.parent / name, **{"trust": TRUST, **kwargs})
    assert message in str(caught.value)
