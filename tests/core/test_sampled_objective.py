"""An objective that samples from its student: exact in micro-batches, any order, over devices."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distill_jax as dj
from distill_jax.core import bilevel, partition, rng, state, steps
from distill_jax.core.api import ExampleWeighting, Model, Objective, Terms
from distill_jax.core.errors import ConfigError
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.models import transformer
from tests import harness

V, P, K, STEPS, REWARDED = 7, 3, 4, 4, 2
SIZES = {"layout": "llama", "vocabulary": V, "width": 8, "depth": 1, "heads": 2, "mlp_width": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rloo(Objective):
    """REINFORCE with a leave-one-out baseline among the samples of a prompt.

    The reward is the number of tokens `REWARDED`; the memory holds the best of each example.
    """

    steps: int = STEPS
    count: int = K
    role: str = "student"
    roles: ClassVar[tuple[str, ...]] = ("student",)

    def memory(self, key, batch):
        return {"best": jnp.zeros(16)}

    def loss(self, nets, batch, memory, step):
        samples = nets.sample(
            self.role,
            batch["prompt"],
            batch.get("start"),
            steps=self.steps,
            count=self.count,
            end=0,
        )
        tokens = samples.tokens.reshape(-1, samples.tokens.shape[-1])
        mask = jnp.ones(tokens.shape)
        if "start" in batch:
            start = jnp.repeat(batch["start"], self.count)
            mask = (jnp.arange(tokens.shape[1])[None] >= start[:, None]).astype(jnp.float32)
        outputs, new = nets("student", {"tokens": tokens, "mask": mask}, train=True)
        log_probs = jax.nn.log_softmax(outputs["logits"][:, :-1])
        chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1)[..., 0]
        chosen = chosen.reshape(samples.mask[..., 1:].shape) * samples.mask[..., 1:]
        reward = ((samples.tokens == REWARDED) * samples.mask).sum(-1).astype(chosen.dtype)
        advantage = (reward - reward.mean(1, keepdims=True)) * self.count / (self.count - 1)
        index = jnp.where(batch["mask"] > 0, batch["index"], 16)
        return Terms(
            values={
                "policy_gradient": -(advantage * chosen.sum(-1)).mean(1),
                "reward": reward.mean(1),
            },
            coef={"reward": 0.0},
            state={"student": new},
            memory={"best": memory["best"].at[index].max(reward.max(1), mode="drop")},
        )


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def batch_of(b=8):
    r = np.random.RandomState(0)
    batch = {
        "input": r.randint(0, V, (b, P)),
        "prompt": r.randint(0, V, (b, P)),
        "start": np.arange(b) % 2,
        "label": np.zeros(b, int),
        "index": np.arange(b) + 3,
        "epoch": np.arange(b) // 4,
        "mask": np.ones(b, np.float32),
    }
    return {k: jnp.asarray(x.astype(np.int32) if x.dtype == int else x) for k, x in batch.items()}


def wide(model):
    """The network in float64."""

    def init(key, *inputs):
        params, model_state = model.init(key, *inputs)
        return jax.tree.map(lambda x: x.astype(jnp.float64), params), model_state

    return model._replace(init=init)


def setup(lr=0.5, **options):
    objective, models = Rloo(), {"student": wide(transformer.make(**SIZES))}
    shapes = state.infer_shapes(objective, models, jax.eval_shape(batch_of))
    tx = optax.sgd(lr)
    init = state.make_init(objective, models, tx, shapes, trainable=("student",), ema={})
    step = steps.make_train_step(objective, models, tx, precision="float64", **options)
    return harness.Setup(objective, models, shapes, init, step, {})


@functools.cache
def reference():
    return harness.run(setup(), batch_of(), n_steps=2)


def compare(current, metrics):
    wanted, alone = reference()
    current = jax.device_get(current)
    assert harness.max_relative(wanted.params, current.params) < 1e-12
    assert harness.max_relative(wanted.memory, current.memory) < 1e-12
    assert harness.max_relative(alone[-1], metrics[-1]) < 1e-12
    assert jax.tree.leaves(current.params)[0].dtype == np.float64


@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_accumulation_changes_no_draw(unroll):
    compare(*harness.run(setup(accum_steps=4, unroll=unroll), batch_of(), n_steps=2))


def test_order_and_padding_change_no_draw():
    batch = jax.tree.map(lambda x: x[::-1], batch_of())
    compare(*harness.run(setup(), harness.padded(batch, 8), n_steps=2))


@pytest.mark.slow  # `gkd` in the contract suite is the fast sibling, also of resuming
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_devices_change_no_draw(axes):
    compare(*harness.run(setup(), batch_of(), mesh=partition.make_mesh(**axes), n_steps=2))


@pytest.mark.slow
def test_a_trainer_that_splits_parameters_samples_the_same():
    """Networks gather their parameters before they are used, in the sampler too."""
    found = []
    for axes in ({"data": 8}, {"data": 2, "fsdp": 4}):
        options = dj.Options(
            mesh=partition.make_mesh(**axes), partition_min_size=1, precision="float64"
        )
        net = wide(transformer.make(**SIZES))
        trainer = dj.Trainer(Rloo(), student=net, optimizer=optax.sgd(0.5), options=options)
        current = trainer.init(jax.random.key(0), batch_of())
        for _ in range(2):
            current, metrics = trainer.step(current, batch_of())
        found.append(jax.device_get((current.train.params, current.train.memory, metrics)))
    assert harness.max_relative(*found) < 1e-12


@pytest.mark.slow
def test_a_resumed_run_is_the_same(tmp_path):
    made, batch, key = setup(), batch_of(), jax.random.key(3)
    step = jax.jit(made.step)
    states = [jax.jit(made.init)(jax.random.key(0))]
    for _ in range(3):
        states.append(step(states[-1], {}, batch, key)[0])
    current = harness.saved_and_restored(states[1], tmp_path)
    for _ in range(2):
        current, _ = step(harness.fresh(current), {}, batch, key)
    same = jax.tree.map(np.array_equal, *jax.device_get((current, states[3])))
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(*(jax.tree.leaves(s.params)[0] for s in states[2:]))


@pytest.mark.slow
def test_the_reward_rises():
    _, metrics = harness.run(setup(lr=1.0), batch_of(), n_steps=60)
    rewards = [m["reward"] for m in metrics]
    assert rewards[0] < 1 and np.mean(rewards[-3:]) > 0.9 * STEPS


def test_steps_and_examples_get_their_own_draws():
    made, batch = setup(), batch_of()
    same = {
        **batch,
        "prompt": jnp.ones_like(batch["prompt"]),
        "start": jnp.zeros_like(batch["start"]),
    }
    params, _ = made.models["student"].init(jax.random.key(0), batch["prompt"])

    @functools.partial(jax.jit, static_argnames="times")
    def draw(key, times):
        nets = steps.BoundNets(
            made.models, {"student": params}, {"student": {}}, key=key, batch=same
        )
        for _ in range(times):
            samples = nets.sample("student", same["prompt"], steps=STEPS, count=2)
        return samples.tokens[:, :, P:].reshape(16, STEPS)

    def drawn(key, times=1):
        return np.asarray(draw(key, times=times))

    first = drawn(jax.random.key(0))
    assert len(np.unique(first, axis=0)) > 12
    np.testing.assert_array_equal(first, drawn(jax.random.key(0)))
    for other in (drawn(jax.random.key(1)), drawn(jax.random.key(0), times=2)):
        assert (first != other).any(1).mean() > 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneWeight(ExampleWeighting):
    """A single learned weight."""

    roles: ClassVar[tuple[str, ...]] = ("weight",)

    def __call__(self, nets, evidence, step):
        one = nets("weight", evidence.mask)[0]["output"]
        return jnp.exp(one)[None, None] * jnp.ones((*evidence.mask.shape, 1))


@pytest.mark.slow
def test_a_bilevel_step_around_a_sampler():
    """The gradient in the weight is the product of the gradients of both losses."""
    lr, batch, key = 0.1, batch_of(), jax.random.key(3)
    weight = Model(
        lambda key, x: ({"w": jnp.zeros(())}, {}),
        lambda params, state, x, **_: ({"output": params["w"]}, state),
    )
    models = {"student": wide(transformer.make(**SIZES)), "weight": weight}
    weighted = WeightedObjective(
        objective=Rloo(), weighting=OneWeight(), loss_terms=("policy_gradient",)
    )
    tx = bilevel.Optimizers(optax.sgd(lr), optax.sgd(1.0), ("weight",), "exact")
    shapes = state.infer_shapes(weighted, models, jax.eval_shape(batch_of))
    learned = ("student", "weight")
    init = state.make_init(weighted, models, tx, shapes, trainable=learned, ema={})
    current = jax.jit(init)(jax.random.key(0))
    step = bilevel.make_bilevel_step(
        weighted,
        models,
        tx,
        bilevel.Bilevel(outer_terms=("policy_gradient",)),
        outer=True,
        precision="float64",
    )
    fed = {"train": batch, "held_out": jax.tree.map(lambda x: x[:4], batch)}
    new, metrics = jax.jit(step)(current, {}, fed, key)
    before, after = current.params["student"], new.params["student"]
    root = jax.random.fold_in(rng.stream(key, "step"), 0)

    def loss(params, batch, key):
        nets = steps.BoundNets(
            models, {"student": params}, {"student": {}}, key=key, precision="float64", batch=batch
        )
        return Rloo().loss(nets, batch, {"best": jnp.zeros(16)}, 0).values["policy_gradient"].mean()

    gradient = jax.jit(jax.grad(loss))
    inner = gradient(before, batch, root)
    outer = gradient(after, fed["held_out"], rng.stream(root, "held_out"))
    moved = jax.tree.map(lambda p, g: p - lr * g, before, inner)
    assert harness.max_relative(moved, after) < 1e-10
    wanted = lr * sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), inner, outer)))
    assert abs(wanted) > 1e-6
    np.testing.assert_allclose(new.params["weight"]["w"], wanted, rtol=1e-10)
    np.testing.assert_allclose(metrics["outer_grad_norm"], abs(wanted), rtol=1e-10)


@pytest.mark.slow  # `test_sampling` has derivatives in both modes
def test_a_sampler_within_linearize():
    made, batch = setup(), batch_of()
    params, _ = made.models["student"].init(jax.random.key(0), batch["prompt"])
    ones = jax.tree.map(jnp.ones_like, params)

    def loss(params):
        nets = steps.BoundNets(
            made.models, {"student": params}, {"student": {}}, key=jax.random.key(0), batch=batch
        )
        return made.objective.loss(nets, batch, {"best": jnp.zeros(16)}, 0).values[
            "policy_gradient"
        ]

    @jax.jit
    def three(params):
        value, push = jax.linearize(loss, params)
        (pulled,) = jax.linear_transpose(push, params)(jnp.ones_like(value))
        return pulled, push(ones), jax.grad(lambda p: loss(p).sum())(params)

    pulled, pushed, gradient = three(params)
    assert harness.max_relative(gradient, pulled) < 1e-5
    total = sum(float(x.sum()) for x in jax.tree.leaves(gradient))
    np.testing.assert_allclose(pushed.sum(), total, rtol=1e-4, atol=1e-4)
    assert harness.max_relative(gradient, jax.tree.map(jnp.zeros_like, gradient)) == 1


def refused(objective=None, model=None, **changes):
    model = transformer.make(**SIZES) if model is None else model
    batch = {**batch_of(), **changes}
    batch = {name: x for name, x in batch.items() if x is not None}
    with pytest.raises(ConfigError) as error:
        state.infer_shapes(objective or Rloo(), {"student": model}, batch)
    return error.value


NORMED = transformer.make(**SIZES)._replace(
    init=lambda key, x: (transformer.make(**SIZES).init(key, x)[0], {"mean": jnp.zeros(2)}),
    apply=lambda params, state, x, **options: (
        transformer.make(**SIZES).apply(params, {}, x, **options)[0],
        state,
    ),
)


@pytest.mark.parametrize(
    ("given", "where", "what"),
    [
        ({"model": transformer.make(**{**SIZES, "layout": "bert"})}, "student", "no `decode`"),
        ({"model": harness.tiny_model()}, "student", "no `decode`"),
        ({"model": NORMED}, "student", "batch statistics"),
        ({"objective": Rloo(steps=0)}, "steps", "steps is 0"),
        ({"objective": Rloo(count=0)}, "count", "count is 0"),
        ({"objective": Rloo(role="studnt")}, "roles", "studnt"),
        ({"prompt": jnp.zeros((8, 0), jnp.int32)}, "prompt", "(8, 0)"),
        ({"prompt": jnp.zeros((8, P))}, "prompt", "float32"),
        ({"prompt": jnp.zeros((4, P), jnp.int32)}, "prompt", "(4, 3)"),
        ({"start": jnp.zeros((8, 1), jnp.int32)}, "start", "(8, 1)"),
        ({"index": None}, "prompt", "epoch (8,)"),
        (
            {"model": transformer.make(**{**SIZES, "layout": "gpt2", "max_length": P})},
            "steps",
            "7 tokens with the prompt",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_what_is_refused_on_shapes(given, where, what):
    error = refused(**given)
    assert what in str(error) and error.where.endswith(where)


def test_stored_outputs_cannot_be_sampled_from():
    batch = {**batch_of(), "teacher_outputs": {"student": {}}}
    nets = steps.BoundNets({}, {}, {}, key=jax.random.key(0), batch=batch)
    with pytest.raises(ConfigError, match="are stored"):
        nets.sample("student", batch["prompt"], steps=1)
