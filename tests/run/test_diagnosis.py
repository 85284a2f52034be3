"""What is said where a loss, a gradient or an output is not finite."""

import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import partition
from distill_jax.core.api import Dataset, Model, Provenance, Terms
from distill_jax.core.errors import ConfigError, DataUnavailable, NonFiniteError, UserError
from distill_jax.data import loader
from distill_jax.data.source import ArraySource, Subset
from distill_jax.objectives.supervised import Supervised
from distill_jax.run import build, diagnosis
from distill_jax.run import config as config_lib
from distill_jax.run.train import loop

HERE = __name__
BAD = 13


def images(n=48, *, top=1.0, seed=0):
    x = np.random.default_rng(seed).random((n, 6, 6, 1), np.float32) * top
    return x, np.arange(n) % 2


def make(*, top: float = 1.0, raw: bool = False):
    def part(x, y, name):
        return ArraySource(x, y, Provenance(name, "here", len(x), ""))

    x, y = images(top=top)
    if raw:
        x[BAD, 2, 2, 0] = np.nan
    train, test = part(x, y, "train"), part(*images(16, top=top, seed=1), "test")
    held = np.arange(40, 48)
    return Dataset(Subset(train, np.arange(40), "t"), Subset(train, held, "h"), test, ("a", "b"))


def make_poisoned():
    """Returns a transform that makes NaN of finite inputs of one example."""

    def apply(key, batch, step):
        del key, step
        hit = (batch["index"] == BAD).reshape(-1, 1, 1, 1)
        return {**batch, "input": jnp.where(hit, jnp.nan, batch["input"])}

    return apply


def dropping() -> Model:
    """A network whose activation drops NaN, as `relu` may: its loss stays finite."""

    def init(key, x):
        return {"w": 0.1 * jax.random.normal(key, (x[0].size, 2))}, {}

    def apply(params, state, x, *, train, rngs):
        del train, rngs
        h = x.reshape(len(x), -1) @ params["w"]
        return {"logits": jnp.where(jnp.isnan(h), 0, h)}, state

    return Model(init, apply)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rooted(Supervised):
    """Adds a norm whose derivative at 0 is not finite, from a step on."""

    roles: ClassVar[tuple[str, ...]] = ("student",)
    after: int = 0

    def loss(self, nets, batch, memory, step):
        found = super().loss(nets, batch, memory, step)
        logits = nets("student", batch["input"])[0]["logits"]
        zero = jnp.where(step >= self.after, 0.0, 1.0) * logits.sum(-1)
        value = jnp.sqrt(jnp.where(step >= self.after, zero**2, 1.0))
        return Terms(values={name: x + value for name, x in found.values.items()})


def config_of(**changes):
    config = config_lib.base()
    config.data.name, config.data.kwargs = f"{HERE}:make", {}
    config.objective.name = "supervised"
    config.roles.student = config_lib.role(f"{HERE}:dropping")
    config.evaluators = {"classification": {}}
    config.batch_size, config.total = 8, 6
    config.log.every_steps, config.log.tensorboard = 2, False
    config.eval.every = 6
    return config_lib.override(config, {"mesh.data": 1, **changes})


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make_mesh = partition.make_mesh
    monkeypatch.setattr(
        partition, "make_mesh", lambda **k: make_mesh(**k, devices=jax.devices()[:1])
    )


def fails(config, tmp_path):
    with pytest.raises(NonFiniteError) as error:
        loop.train(config, tmp_path, log_line=lambda line: None)
    return error.value


def test_missing_values_of_the_data_are_refused_before_training(tmp_path):
    with pytest.raises(DataUnavailable, match="1 of 40 examples of the train part"):
        loop.train(config_of(**{"data.kwargs.raw": True}), tmp_path, log_line=print)


def test_a_gradient_that_is_not_finite_stops_where_the_loss_is(tmp_path):
    poisoned = (f"{HERE}:make_poisoned",)
    error = fails(config_of(**{"data.train_transforms": poisoned}), tmp_path)
    assert "the gradient is not finite at step" in error.what
    assert "transforms of the train part turn finite values into NaN" in error.what
    assert f"the first is example {BAD}" in error.what and "optim.lr" not in error.hint
    assert "no checkpoint was saved yet" in error.hint
    position = loader.batch_rows
    at = int(re.findall(r"at step (\d+), where the loss is 0\.", error.what)[0])
    assert BAD in position(at - 1, batch_size=8, seed=0, n=40)[0]


def test_the_derivative_of_a_root_is_told_from_a_learning_rate(tmp_path):
    rooted = {"objective.name": f"{HERE}:Rooted", "checkpoint.every": 2}
    error = fails(config_of(**rooted), tmp_path / "first")
    assert "at step 1, where" in error.what and "no update came before" in error.what
    assert "the learning rate has not acted yet" in error.hint
    later = {**rooted, "objective.kwargs.after": 5, "optim.lr": 0.01}
    error = fails(config_of(**later), tmp_path / "later")
    assert "the gradient is not finite at step 6" in error.what
    assert "the loss is finite and had not grown" in error.what and "optim.lr" not in error.hint
    assert "the checkpoint of step 4 is intact" in error.hint


def test_a_loss_that_exploded_shows_its_last_values(tmp_path):
    mlp = {"roles.student.model": "mlp", "roles.student.kwargs.hidden": (8,)}
    error = fails(config_of(**mlp, **{"optim.lr": 1e12, "optim.clip_norm": None}), tmp_path)
    assert "the last finite losses were 0." in error.what and diagnosis.RATE in error.hint


@pytest.mark.parametrize(
    ("updates", "loss", "losses", "what"),
    [
        (0, np.nan, [], "no update came before"),
        (9, np.nan, [0.7, 2.0, 900.0], "exploded"),
        (9, 3e30, [0.7, 0.7, 0.6, 0.7], "exploded"),
        (9, 0.7, [0.7, 0.7, 0.6, 0.7], "had not grown"),
        (1, np.nan, [0.7], "1 updates came before"),
    ],
)
def test_causes_that_losses_show(updates, loss, losses, what):
    assert what in diagnosis.of_losses(updates, loss, losses).what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda x: x, None),
        (lambda x: np.where(np.arange(4).reshape(-1, 1, 1, 1) == 2, np.inf, x), "1 of 4 .* 72 of"),
        (lambda x: 255 * x, "unscaled, from 0.* to 25"),
    ],
)
def test_causes_that_a_batch_shows(change, what):
    x = images(4)[0]
    batch = {"input": change(x), "index": np.arange(70, 74), "mask": np.ones(4)}
    found = diagnosis.of_inputs(batch, lambda raw: raw, "train")
    assert (found is None) == (what is None)
    if found is not None:
        assert re.search(what, found.what), found.what


def test_an_evaluation_names_what_is_not_finite(tmp_path):
    mlp = {"roles.student.model": "mlp", "roles.student.kwargs.hidden": (8,)}
    poisoned = {"data.eval_transforms": (f"{HERE}:make_poisoned",)}
    error = fails(config_of(**mlp, **poisoned), tmp_path)
    assert "evaluation of the test part" in error.what
    assert f"the first is example {BAD}" in error.what and "eval_transforms" in error.hint


# Inputs of networks.


def built(**changes):
    return build.build(config_of(**changes))


def test_unscaled_images_are_found_before_the_first_step():
    mlp = {"roles.student.model": "mlp", "data.kwargs.top": 255.0}
    with pytest.raises(ConfigError, match=r"unscaled, with values from 0.* to 25.*\n.*normalize"):
        built(**mlp)
    own = built(**{"data.kwargs.top": 255.0})  # a network of somebody's own may scale them
    assert "images reach the networks unscaled" in own.data.warnings[0]
    scaled = {"data.train_transforms": ("normalize",), "data.eval_transforms": ("normalize",)}
    experiment = built(**mlp, **scaled)
    batch = next(loader.eval_batches(experiment.dataset.train, batch_size=40))
    out = np.asarray(experiment.transform(train=False)(jax.random.key(0), batch, 0)["input"])
    assert abs(out.mean()) < 1e-5 and abs(out.std() - 1) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.kwargs.top": 255.0, "data.train_transforms": ("scale",)}, "leaves floats"),
        ({"data.name": "imagefolder"}, r"did you mean 'image_folder'"),
        ({"data.train_transforms": ("normalize", "solarize")}, "the order solarize, normalize"),
        (
            {
                "data.train_transforms": ("normalize",),
                "data.transform_kwargs.normalize.mean": (0.1, 0.2, 0.3),
                "data.transform_kwargs.normalize.std": (0.1, 0.2, 0.3),
            },
            "3 numbers for images of 1 channels",
        ),
    ],
)
def test_data_that_networks_cannot_take_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        built(**changes)


def test_a_run_tells_of_test_examples_that_it_has_seen(tmp_path, monkeypatch):
    whole = make()
    seen = whole.train.read(np.arange(12))
    x = np.concatenate([seen["input"], images(4, seed=5)[0]])
    test = ArraySource(x, np.arange(16) % 2, Provenance("test", "here", 16, ""))
    monkeypatch.setattr(f"{HERE}.make", lambda: whole._replace(test=test))
    said = []
    result = loop.train(config_of(), tmp_path, log_line=said.append)
    assert result["data"]["in_training"]["test"]["repeated"] == 12
    assert any("12 of 16 examples of the test part" in line for line in said)
