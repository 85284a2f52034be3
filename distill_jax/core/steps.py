"""Step builders: from per-example terms to a pure `(state, frozen, batch, key)` step."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import collapse, rng, sampling
from distill_jax.core.api import (
    Array,
    Batch,
    Key,
    Model,
    Nets,
    Objective,
    Outputs,
    Params,
    PyTree,
    Role,
    Samples,
    State,
    TrainState,
)
from distill_jax.core.errors import ArgumentError
from distill_jax.core.means import Totals, counts_of, mean_loss, totals_of
from distill_jax.core.precision import COMPUTE_DTYPES, cast
from distill_jax.core.state import check_terms

Frozen = Mapping[Role, tuple[Params, State]]
"""Networks that never learn: `{role: (params, state)}`; not donated, not saved."""

Decay = float | Callable[[Array], Array]
"""Share of the old moving average that an update keeps: a number, or a function of the step."""

StepFn = Callable[[TrainState, Frozen, Batch, Key], tuple[TrainState, Mapping[str, Array]]]


class BoundNets:
    """Networks by role, with parameters, state, precision and keys in place (`api.Nets`).

    Each call of a role draws from its own stream, so two views of a batch get two dropout masks.
    Roles in the `teacher_outputs` of `batch` are not applied: called with the teacher's view of
    that batch, in evaluation mode, they return the stored outputs.

    Args:
      models: networks by role.
      params: their parameters.
      state: their states.
      key: of the step, or of the micro-batch.
      sample_key: of the step, where `key` is that of a micro-batch.
      precision: compute type.
      batch: the examples that the networks are called on, as the objective receives them.
    """

    def __init__(
        self,
        models: Mapping[Role, Model],
        params: Mapping[Role, Params],
        state: Mapping[Role, State],
        *,
        key: Key,
        sample_key: Key | None = None,
        precision: str = "float32",
        batch: Batch | None = None,
    ):
        self._batch = {} if batch is None else batch
        self._sample_key = key if sample_key is None else sample_key
        self._models, self._params, self._state, self._key = models, params, state, key
        self._dtype = COMPUTE_DTYPES[precision]
        self._calls: dict[tuple[Role, str], int] = {}

    def __call__(
        self, role: Role, *inputs: Any, train: bool = False, stop_gradient_params: bool = False
    ) -> tuple[Outputs, State]:
        if role in self._batch.get("teacher_outputs", {}):
            return self._stored_outputs(role, inputs, train=train), {}
        key = self._next_key(self._key, role, "dropout")
        params, inputs = cast((self._params[role], inputs), self._dtype)
        params = jax.lax.stop_gradient(params) if stop_gradient_params else params
        outputs, state = self._models[role].apply(
            params, self._state[role], *inputs, train=train, rngs={"dropout": key}
        )
        return cast(outputs, jnp.float32), state

    def sample(
        self, role: Role, prompt: Array, start: Array | None = None, **options: Any
    ) -> Samples:
        if role in self._batch.get("teacher_outputs", {}):
            what = f"the outputs of {role} are stored, so it cannot be sampled from"
            hint = f"leave {role} out of the stored outputs"
            raise ArgumentError(what, where="teacher_outputs", hint=hint)
        key = self._next_key(self._sample_key, role, "sample")
        params = cast(self._params[role], self._dtype)
        given = (role, self._models[role], params, self._state[role], prompt, start)
        return sampling.of_network(*given, batch=self._batch, key=key, **options)

    def _next_key(self, key: Key, role: Role, purpose: str) -> Key:
        """Returns the key of the next call of a role for a purpose."""
        call = self._calls[role, purpose] = self._calls.get((role, purpose), -1) + 1
        return jax.random.fold_in(rng.stream(key, role, purpose), call)

    def _stored_outputs(self, role: Role, inputs: tuple[Any, ...], *, train: bool) -> Outputs:
        if train or len(inputs) != 1 or inputs[0] is not teacher_view(self._batch):
            raise ArgumentError(
                f"the objective calls {role} on more than its view of the batch in evaluation "
                "mode, and only those outputs are stored",
                where="teacher_outputs",
                hint=f"leave {role} out of the stored outputs, or store nothing",
            )
        return self._batch["teacher_outputs"][role]

    def after_sgd_step(
        self, role: Role, loss: Callable[[Nets], Array], *, lr: float
    ) -> "BoundNets":
        def after(params: Params) -> "BoundNets":
            changed = copy.copy(self)
            changed._params = {**self._params, role: params}
            return changed

        old = self._params[role]
        grads = jax.grad(lambda params: loss(after(params)))(old)
        return after(jax.tree.map(lambda p, g: p - lr * g, old, grads))


def teacher_view(batch: Batch) -> Any:
    """Returns the input of a teacher: its own view of the batch if a transform made one."""
    return batch.get("teacher_input", batch["input"])


def bind_networks(
    models: Mapping[Role, Model],
    state: TrainState,
    frozen: Frozen,
    *,
    key: Key,
    precision: str = "float32",
    batch: Batch | None = None,
) -> BoundNets:
    """Returns all networks of a run at a state: trained, averaged and frozen."""
    params = {r: p for r, (p, _) in frozen.items()} | {**state.params, **state.targets}
    model_state = {r: s for r, (_, s) in frozen.items()} | dict(state.model_state)
    return BoundNets(models, params, model_state, key=key, precision=precision, batch=batch)


def check_accumulation(objective: Objective, accum_steps: int) -> None:
    """Raises `ArgumentError` if the gradient of a batch is not the sum over micro-batches."""
    if accum_steps > 1 and objective.couples_batch:
        raise ArgumentError(
            f"objective {type(objective).__name__} couples the examples of a batch, so its "
            f"gradient is not a sum over {accum_steps} micro-batches",
            where="accum_steps",
            hint="set accum_steps to 1 and use a smaller batch_size or more devices",
        )


def make_train_step(
    objective: Objective,
    models: Mapping[Role, Model],
    tx: optax.GradientTransformation,
    *,
    precision: str = "float32",
    accum_steps: int = 1,
    ema: Mapping[Role, tuple[Role, Decay]] | None = None,
    unroll: bool | None = None,
    grad_norm: bool = False,
    skip_nonfinite: bool = False,
    report_nonfinite: bool = False,
    watch_every: int = 0,
) -> StepFn:
    """Builds the step of a single-level method.

    The loss is `sum_i coef_i * sum_b mask_b * values_i[b] / sum_b mask_b * counts_i[b]`, with the
    denominators taken over the whole batch before it is split, so that accumulated gradients equal
    those of the full batch.

    Args:
      objective: the training method.
      models: a network for each role.
      tx: the optimizer over `{role: params}`.
      precision: compute type of the networks, "float32" or "bfloat16".
      accum_steps: number of micro-batches; must divide the batch.
      ema: `{role: (source, decay)}`: `target <- decay * target + (1 - decay) * source` after each
        update, for parameters and, unless the objective returns it, model state. A decay may be a
        function of the step.
      unroll: whether micro-batches are unrolled instead of scanned. By default on CPU only, where
        XLA runs convolution gradients inside a loop some 18 times slower.
      grad_norm: whether the metrics have the norm of the whole gradient; costs a pass over it.
      skip_nonfinite: whether a step whose loss or gradient is not finite changes nothing, see
        `skip`; costs a pass over gradient and state.
      report_nonfinite: whether the metric `nonfinite` is 1 in steps whose loss or gradient is not
        finite, else 0; costs a pass over the gradient. Activations may drop NaN, so that a loss is
        finite where its gradient is not.
      watch_every: number of steps between measurements of the spread of the embeddings, see
        `collapse`; 0 turns them off. In other steps these metrics are zero.

    Raises:
      ArgumentError: `accum_steps` is above 1 and the objective couples the examples of a batch.
    """
    check_accumulation(objective, accum_steps)
    finish = functools.partial(
        finish_step,
        ema=ema or {},
        grad_norm=grad_norm,
        skip_nonfinite=skip_nonfinite,
        report_nonfinite=report_nonfinite,
    )
    if unroll is None:
        unroll = jax.default_backend() == "cpu"

    def step(state: TrainState, frozen: Frozen, batch: Batch, key: Key):
        step_key = key = jax.random.fold_in(rng.stream(key, "step"), state.step)
        fixed = {role: params for role, (params, _) in frozen.items()} | dict(state.targets)
        fixed_state = {role: s for role, (_, s) in frozen.items()}
        returned: set[Role] = set()  # known once traced: roles whose state the objective updates

        def terms_of(params, model_state, memory, micro, key):
            nets = BoundNets(
                models,
                fixed | params,
                fixed_state | model_state,
                key=key,
                sample_key=step_key,
                precision=precision,
                batch=micro,
            )
            terms = objective.loss(nets, micro, memory, state.step)
            check_terms(terms, micro["mask"].shape)
            memory = memory if terms.memory is None else terms.memory
            returned.update(terms.state)
            return terms, ({**model_state, **terms.state}, memory)

        def loss_fn(params, model_state, memory, micro, key, totals=None):
            terms, carry = terms_of(params, model_state, memory, micro, key)
            totals = totals or totals_of(terms, micro["mask"])
            loss, metrics = mean_loss(terms, micro["mask"], totals)
            if watch_every:
                part = micro["mask"].sum() / totals.examples
                spread = collapse.measure_when_due(
                    terms.embeddings, micro["mask"], state.step, every=watch_every
                )
                metrics |= {name: part * value for name, value in spread.items()}
            return loss, (metrics, *carry)

        params, carry = dict(state.params), (dict(state.model_state), state.memory)
        grad_fn = jax.grad(loss_fn, has_aux=True)
        if accum_steps == 1:
            grads, (metrics, *carry) = grad_fn(params, *carry, batch, key)
        else:
            over_parts = functools.partial(
                _accumulate, batch=batch, key=key, accum_steps=accum_steps, unroll=unroll
            )

            def counted(carry, micro, key):
                terms, carry = terms_of(params, carry[0], carry[1], micro, key)
                return counts_of(terms, micro["mask"]), carry

            def differentiated(carry, micro, key):
                grads, (metrics, *carry) = grad_fn(params, *carry, micro, key, totals)
                return (grads, metrics), carry

            # A pass for the counts alone: the compiler drops all that they do not depend on.
            counts = {}
            if jax.eval_shape(counted, carry, batch, key)[0]:
                counts, _ = over_parts(counted, carry)
            totals = Totals.of(batch["mask"], counts)
            (grads, metrics), carry = over_parts(differentiated, carry)
        model_state, memory = carry

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return finish(
            state,
            optax.apply_updates(state.params, updates),
            opt_state,
            model_state,
            memory,
            grads,
            metrics,
            returned=returned,
        )

    return step


def finish_step(
    old: TrainState,
    params: Any,
    opt_state: PyTree,
    model_state: dict[Role, State],
    memory: PyTree,
    grads: PyTree,
    metrics: dict[str, Array],
    *,
    returned: set[Role],
    ema: Mapping[Role, tuple[Role, Decay]],
    grad_norm: bool,
    skip_nonfinite: bool,
    report_nonfinite: bool,
) -> tuple[TrainState, dict[str, Array]]:
    """Returns the state after an update, with averages moved, and the metrics of the step.

    Args:
      old: the state before the step.
      params: by role, after the update; so are `opt_state`, `model_state` and `memory`.
      grads: of the training loss. Metrics named `outer_*` must be finite as well.
      metrics: scalars of the step.
      returned: roles whose state the objective itself updates.
      ema, grad_norm, skip_nonfinite, report_nonfinite: as in `make_train_step`.
    """
    targets = move_targets(
        old.targets, params, model_state, ema=ema, returned=returned, step=old.step
    )
    if grad_norm:
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
    new = TrainState(
        step=old.step + 1,
        params=params,
        targets=targets,
        model_state=model_state,
        opt_state=opt_state,
        memory=memory,
    )
    watched = grads, {name: x for name, x in metrics.items() if name.startswith("outer_")}
    if report_nonfinite:
        metrics = {**metrics, "nonfinite": nonfinite(metrics["loss"], watched)}
    if skip_nonfinite:
        new, metrics = skip(old, new, metrics, watched)
    return new, metrics


def skip(
    old: TrainState, new: TrainState, metrics: Mapping[str, Array], grads: PyTree
) -> tuple[TrainState, dict[str, Array]]:
    """Returns `new`, or `old` with `step` advanced by 1 if the loss or a gradient is not finite.

    In that case, parameters, averages, optimizer and memory equal those of `old` bit for bit. The
    count of the optimizer does not advance either, so that schedules wait. The metric `skipped` is
    1 for such a step, else 0.

    Args:
      old: the state before the step.
      new: the state after it.
      metrics: scalars of the step, including `loss`.
      grads: arrays that must be finite in addition to the loss.
    """
    skipped = nonfinite(metrics["loss"], grads)
    kept = jax.tree.map(lambda n, o: jnp.where(skipped > 0, o, n), new, old)
    return kept.replace(step=new.step), {**metrics, "skipped": skipped}


def nonfinite(loss: Array, grads: PyTree) -> Array:
    """Returns 1 where a loss or one of its gradients is not finite, else 0, in the loss's type."""
    leaves = [loss, *jax.tree.leaves(grads)]
    finite = jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()
    return (~finite).astype(loss.dtype)


def move_targets(
    targets: Mapping[Role, Params],
    params: Mapping[Role, Params],
    model_state: dict[Role, State],
    *,
    ema: Mapping[Role, tuple[Role, Decay]],
    returned: set[Role],
    step: Array,
) -> dict[Role, Params]:
    """Returns moving averages after an update; updates their model state in place if not returned.

    Args:
      targets: old averages by role.
      params: new parameters by role.
      model_state: state by role; that of a target follows its source unless it is in `returned`.
      ema: `{role: (source, decay)}`.
      returned: roles whose state the objective itself updates.
      step: number of updates before this one.
    """
    moved = dict(targets)
    for role, (source, decay) in ema.items():
        decay = decay(step) if callable(decay) else decay
        moved[role] = _lerp(targets[role], params[source], decay)
        if role not in returned:
            model_state[role] = _lerp(model_state[role], model_state[source], decay)
    return moved


def _accumulate(fn, carry, batch, key, *, accum_steps, unroll):
    """Sums results of `fn` over micro-batches; state and memory pass from one to the next.

    `fn` is `(carry, batch, key) -> (results, carry)`. Micro-batch i takes every `accum_steps`-th
    row, so that a batch sharded over devices splits without moving rows between them.
    """
    split = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // accum_steps, accum_steps, *x.shape[1:]).swapaxes(0, 1),
        dict(batch),
    )

    def body(carry, i):
        micro = jax.tree.map(lambda x: x[i], split)
        results, carry = fn(carry, micro, jax.random.fold_in(key, i))
        return tuple(carry), results

    def scan_body(loop, i):
        carry, sums = loop
        carry, new = body(carry, i)
        return (carry, jax.tree.map(jnp.add, sums, new)), None

    carry, sums = body(tuple(carry), 0)
    (carry, sums), _ = jax.lax.scan(
        scan_body, (carry, sums), jnp.arange(1, accum_steps), unroll=unroll or 1
    )
    return sums, list(carry)


def rising_decay(start: float, schedule: str, total: int) -> Decay:
    """Returns the decay of a moving average over training: constant, or rising from `start` to 1.

    "cosine" is `1 - (1 - start) (cos(pi t / T) + 1) / 2` (Grill et al. 2020, BYOL, section 3.2),
    "linear" `start + (1 - start) t / T` (Assran et al. 2023, I-JEPA, appendix A).

    Args:
      start: decay of the first update.
      schedule: "constant", "cosine" or "linear".
      total: T, number of updates.
    """
    if schedule == "constant":
        return start
    if schedule == "linear":
        return lambda step: start + (1 - start) * step / total
    return lambda step: 1 - (1 - start) * (jnp.cos(jnp.pi * step / total) + 1) / 2


def _lerp(old: PyTree, new: PyTree, decay: float | Array) -> PyTree:
    return jax.tree.map(lambda o, n: (decay * o + (1 - decay) * n).astype(o.dtype), old, new)
