"""Terms that teach nothing: their weight is zero throughout, or their value is always the same."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array, Batch, Outputs, PyTree, Role, Samples, State
from distill_jax.core.errors import UserError
from distill_jax.core.state import ShapeNets, zeros
from distill_jax.run.build import Experiment
from distill_jax.run.preflight.finding import Finding
from distill_jax.run.preflight.trace import Traced, method_of

PROBED_ROWS = 32
"""Examples in the batch of random outputs that shows which terms are constant."""

LARGEST_PROBED = 2**28
"""Numbers in an output, above which no such batch is drawn."""


def never_weighed(experiment: Experiment, traced: Traced) -> list[str]:
    """Returns the terms whose coefficient depends on the step alone and is zero at each."""
    scheduled = [name for name, coef in traced.coef.items() if coef.on == {"0/step"}]
    if not scheduled:
        return []
    shapes, total = experiment.shapes, experiment.total_steps

    def at(step):
        batch, memory = zeros(shapes.batch), zeros(shapes.memory)
        nets = ShapeNets(experiment.models, batch)
        terms = experiment.objective.loss(nets, batch, memory, step)
        return {name: terms.coef[name] for name in scheduled}

    steps = np.unique(np.linspace(0, total - 1, 65).astype(np.int32))
    values = jax.device_get(jax.jit(jax.vmap(at))(steps))
    return [name for name, value in values.items() if not np.any(value)]


def findings(experiment: Experiment, *, idle: set[str]) -> Iterator[Finding]:
    """Yields constant terms other than those of `idle`, which have no weight."""
    constant = {n: v for n, v in constant_terms(experiment).items() if n not in idle}
    if constant.keys() == experiment.shapes.terms.values.keys() - idle:
        spelt = ", ".join(f"{name!r} is {value:.4g}" for name, value in constant.items())
        yield Finding(
            "error",
            f"the loss is constant for all outputs of the networks: {spelt}, and no other term "
            "has a "
            "weight",
            "objective",
            "another objective, other weights, or data that suit it",
        )
        return
    for name, value in constant.items():
        yield Finding(
            "comparison",
            f"the term {name!r} is {value:.4g} for all outputs of the networks, so it teaches "
            "nothing",
            "objective",
            "a weight of 0 for it, another objective, or data that suit it",
        )


def constant_terms(experiment: Experiment) -> dict[str, float]:
    """Returns the terms that are one number whatever the networks return, with that number.

    The objective is computed on random outputs in place of those of its networks, of several sizes,
    for a small batch, at several steps, and twice in a row where it has a memory, which may be
    empty at first. A method that cannot be computed like this has no finding.
    """
    method, total = method_of(experiment.objective), experiment.total_steps
    options: Any = None
    if jax.default_backend() == "cpu":
        options = {"xla_backend_optimization_level": "0"}

    def once(pool: Array, batch: Batch, memory: PyTree, step: Any) -> tuple[PyTree, Any]:
        nets = _RandomNets(experiment, batch, _Draws(pool, jnp.resize))
        terms = method.loss(nets, batch, memory, step)
        ends = {name: (value.min(), value.max()) for name, value in terms.values.items()}
        return memory if terms.memory is None else terms.memory, ends

    def start(batch: Batch) -> PyTree:
        return method.memory(jax.random.key(0), batch)

    start_now, probe = (jax.jit(fn, compiler_options=options) for fn in (start, once))
    draws: list[Any] = []
    try:
        random = np.random.default_rng(1)
        for i, scale in enumerate((0.3, 1.0, 3.0, 10.0, 30.0)):
            pool = scale * random.standard_normal(2**15).astype(np.float32)
            batches = [_batch(experiment, pool, seed) for seed in range(2)]
            memory = jax.eval_shape(start, batches[0])
            if jax.tree.leaves(memory):
                memory = start_now(batches[0])
            else:
                del batches[1:]
            for batch in batches:
                memory, ends = probe(pool, batch, memory, np.int32(i * (total - 1) // 4))
            draws.append(jax.device_get(ends))
    except UserError:
        raise
    except Exception:
        return {}
    constant = {}
    for name in draws[0]:
        low, high = min(x[name][0] for x in draws), max(x[name][1] for x in draws)
        if np.isfinite([low, high]).all() and high - low <= 1e-6 * max(1.0, abs(low)):
            constant[name] = float(low)
    return constant


class _Draws:
    """Normal numbers in any shape: parts of a pool, from places that each call draws.

    Args:
      pool: the numbers.
      resize: repeats a part until it fills a shape, as `np.resize`.
      seed: of the places.
    """

    def __init__(self, pool: Any, resize: Callable[[Any, Any], Any], seed: int = 0):
        self._pool, self._resize, self._random = pool, resize, np.random.default_rng(seed)

    def __call__(self, shape: Sequence[int]) -> Any:
        size = int(np.prod(shape, dtype=np.int64))
        if size > LARGEST_PROBED:
            raise ValueError(f"outputs of shape {shape}")
        few = min(size, len(self._pool) // 2)
        start = int(self._random.integers(len(self._pool) - few))
        return self._resize(self._pool[start : start + few], shape)


def _batch(experiment: Experiment, pool: np.ndarray, seed: int) -> Batch:
    """Returns a small batch of random examples, all of them labelled."""
    shapes, random = experiment.shapes.batch, np.random.default_rng(seed)
    rows = min(shapes["mask"].shape[0], PROBED_ROWS)
    classes, normal = max(len(experiment.dataset.classes), 2), _Draws(pool, np.resize, seed)

    def part(name: str, x: Any) -> Any:
        shape = (rows, *x.shape[1:])
        if name in ("mask", "labelled"):
            return np.ones(shape)
        if name == "index":
            return np.arange(rows)
        if name == "label" and experiment.dataset.task == "multilabel":
            return random.integers(2, size=shape).astype(np.float32)
        if name == "label" and experiment.dataset.task == "regression":
            return random.normal(size=shape)  # not from the pool, unlike the outputs
        if name == "label_probs":
            return random.dirichlet(np.ones(shape[-1]), shape[:-1])
        if jnp.issubdtype(x.dtype, jnp.floating):
            return normal(shape)
        return random.integers(classes if name == "label" else 2, size=shape)

    return {
        name: jax.tree.map(lambda x, name=name: part(name, x).astype(x.dtype), leaves)
        for name, leaves in shapes.items()
    }


class _RandomNets:
    """Networks that return random numbers of the shapes that their outputs have in a run."""

    def __init__(self, experiment: Experiment, batch: Batch, draw: Callable[[Any], Array]):
        self._models, self._shapes, self._draw = experiment.models, experiment.shapes.roles, draw
        self._batch = batch

    def __call__(
        self, role: Role, *inputs: Any, train: bool = False, stop_gradient_params: bool = False
    ) -> tuple[Outputs, State]:
        del stop_gradient_params
        seen = self._shapes[role]
        now, before = jax.tree.leaves(inputs), jax.tree.leaves(seen.inputs)
        rows = {x.shape[0] / y.shape[0] for x, y in zip(now, before, strict=False) if x.ndim}
        alike = [x.shape[1:] for x in now] == [x.shape[1:] for x in before]
        if alike and len(rows) == 1 and all(x.ndim for x in seen.outputs.values()):
            [ratio], b = rows, before[0].shape[0]
            outputs, state = dict(seen.outputs), seen.state
            for name, x in outputs.items():
                if x.shape[0] % b == 0:  # per example, unlike a learned vector
                    shape = (round(x.shape[0] * ratio), *x.shape[1:])
                    outputs[name] = jax.ShapeDtypeStruct(shape, x.dtype)
        else:
            shapes, state = ShapeNets(self._models)(role, *inputs, train=train)
            outputs = {name: shapes[name] for name in seen.outputs if name in shapes}
        return {name: self._output(name, x) for name, x in outputs.items()}, zeros(state)

    def _output(self, name: str, like: Any) -> Array:
        """Returns random numbers, those of log-probabilities below 0, and 0 or 1 for ids."""
        drawn = self._draw(like.shape)
        if jnp.issubdtype(like.dtype, jnp.integer):
            return (drawn > 0).astype(like.dtype)
        return -jnp.abs(drawn) if "log_prob" in name else drawn

    def sample(
        self, role: Role, prompt: Array, start: Array | None = None, **options: Any
    ) -> Samples:
        shapes = ShapeNets(self._models, self._batch).sample(role, prompt, start, **options)
        decode, p = self._models[role].decode, prompt.shape[1]
        assert decode is not None  # or it could not be sampled from
        drawn = jnp.abs(1e3 * self._draw(shapes.tokens[:, :, p:].shape)).astype(jnp.int32)
        return Samples(
            shapes.tokens.at[:, :, :p]
            .set(prompt[:, None])
            .at[:, :, p:]
            .set(drawn % decode.vocabulary),
            shapes.mask.at[:, :, p:].set(1),
            shapes.log_probs.at[:, :, p:].set(-jnp.abs(self._draw(drawn.shape))),
        )

    def after_sgd_step(
        self, role: Role, loss: Callable[[Any], Array], *, lr: float
    ) -> "_RandomNets":
        del role, lr
        loss(self)
        return self
