"""A tiny network, batch and training setup that every contract test shares."""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.core import partition, sampling, state, steps, tokens
from distill_jax.core.api import Model, Objective
from distill_jax.core.errors import ConfigError
from distill_jax.data.transforms import tokens as token_transforms
from distill_jax.models.adapters import as_model
from distill_jax.run.resolve import bind
from distill_jax.trainer.io.checkpoint import Checkpointer

K, SIZE = 5, 6


def modules(package: str) -> list[str]:
    """Names of the modules of a subpackage that offer `make`."""
    root = importlib.import_module(f"distill_jax.{package}")
    names = [m.name for m in pkgutil.iter_modules(root.__path__) if not m.name.startswith("_")]
    return [n for n in names if hasattr(importlib.import_module(f"{root.__name__}.{n}"), "make")]


def tiny_model(*, width: int = 8, batch_norm: bool = False) -> Model:
    """A two-layer network `[b, 6, 6, 1] -> logits [b, 5]`, written without any library."""

    def init(key, x):
        k1, k2 = jax.random.split(key)
        d = int(np.prod(x.shape[1:]))
        params = {
            "first": {"kernel": jax.random.normal(k1, (d, width)) / 6, "bias": jnp.zeros(width)},
            "last": {"kernel": jax.random.normal(k2, (width, K)) / 3, "bias": jnp.zeros(K)},
        }
        return params, {"mean": jnp.zeros(width)} if batch_norm else {}

    def apply(params, state, x, *, train, rngs):
        del rngs
        h = x.reshape(x.shape[0], -1) @ params["first"]["kernel"]
        if batch_norm:
            mean = h.mean(0) if train else state["mean"].astype(h.dtype)
            h = h - mean[None]
            if train:
                state = {"mean": 0.9 * state["mean"] + 0.1 * mean.astype(state["mean"].dtype)}
        h = jnp.tanh(h + params["first"]["bias"][None])
        logits = h @ params["last"]["kernel"] + params["last"]["bias"][None]
        return {"logits": logits, "embedding": h, "stage1": h}, state

    return Model(init, apply)


def tiny_convnet(*, width: int = 8, batch_norm: bool = False, head: bool = True) -> Model:
    """A three-layer network `[b, 6, 6, 1] -> logits [b, 5]`, written without any library.

    Its features are maps, `stage1` `[b, 3, 3, w]` and `stage2` `[b, 3, 3, 2w]`, and those before
    the activation (`_pre`); `embedding` is `[b, 2w]`.
    """

    def init(key, x):
        keys = jax.random.split(key, 3)
        d, wide = 4 * x.shape[-1], 2 * width
        sizes = {"first": (d, width), "second": (width, wide)} | (
            {"last": (wide, K)} if head else {}
        )
        params = {
            name: {"kernel": jax.random.normal(k, shape) / shape[0] ** 0.5, "bias": jnp.zeros(n)}
            for k, (name, shape) in zip(keys, sizes.items(), strict=False)
            for n in shape[1:]
        }
        return params, {"mean": jnp.zeros(width)} if batch_norm else {}

    def linear(layer, x):
        y = x.reshape(-1, x.shape[-1]) @ layer["kernel"]
        return y.reshape(*x.shape[:-1], -1)

    def shift(layer, x):
        return x + layer["bias"].reshape((1,) * (x.ndim - 1) + (-1,))

    def apply(params, state, x, *, train, rngs):
        del rngs
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(b, h // 2, w // 2, 4 * c)
        pre1 = linear(params["first"], x)
        if batch_norm:
            mean = pre1.mean((0, 1, 2)) if train else state["mean"].astype(pre1.dtype)
            pre1 = pre1 - mean[None, None, None]
            if train:
                state = {"mean": 0.9 * state["mean"] + 0.1 * mean.astype(state["mean"].dtype)}
        pre1 = shift(params["first"], pre1)
        stage1 = jnp.tanh(pre1)
        pre2 = shift(params["second"], linear(params["second"], stage1))
        stage2 = jnp.tanh(pre2)
        embedding = stage2.mean((1, 2))
        outputs = {"stage1_pre": pre1, "stage1": stage1, "stage2_pre": pre2, "stage2": stage2}
        outputs["embedding"] = embedding
        if head:
            outputs["logits"] = shift(params["last"], linear(params["last"], embedding))
        return outputs, state

    return Model(init, apply)


def tiny_token_encoder(*, width: int = 8) -> Model:
    """Nine tokens of `[b, 6, 6, 1]`, or those to keep, each told the mean of all that are seen."""

    def init(key, x, keep=None):
        del keep
        k1, k2 = jax.random.split(key)
        d = 4 * x.shape[-1]
        return {
            "patches": {"kernel": jax.random.normal(k1, (d, width)) / 2},
            "mix": {"kernel": jax.random.normal(k2, (width, width)) / 3, "bias": jnp.zeros(width)},
        }, {}

    def apply(params, state, x, keep=None, *, train, rngs):
        del train, rngs
        x = tokens.patchify(x, patch_size=2)
        x = jnp.tanh(jnp.einsum("btd,dk->btk", x, params["patches"]["kernel"]))
        x = x if keep is None else tokens.take(x, keep)
        mean = x.mean(1) @ params["mix"]["kernel"] + params["mix"]["bias"][None]
        x = x + jnp.tanh(mean)[:, None]
        return {"tokens": x, "embedding": x.mean(1)}, state

    return Model(init, apply)


def tiny_token_predictor() -> Model:
    """What tokens are at `targets`: a map of the mean context and a vector for each place."""

    def init(key, context, keep, targets, like):
        del keep, targets
        k1, k2 = jax.random.split(key)
        t, d = like.shape[1:]
        places = jax.random.normal(k2, (t, d))
        kernel = jax.random.normal(k1, (context.shape[-1], d)) / 3
        return {"kernel": kernel, "places": places}, {}

    def apply(params, state, context, keep, targets, like, *, train, rngs):
        del keep, like, train, rngs
        known = jnp.tanh(context.mean(1) @ params["kernel"])
        return {"output": known[:, None, None] + params["places"][targets]}, state

    return Model(init, apply)


VOCABULARY, TOKENS = 11, 6


def tiny_decoder(*, width: int = 8, head: bool = True) -> Model:
    """Tokens `[b, t]` to `logits` `[b, t, v]`; each position sees the mean of those up to it."""

    def init(key, x):
        del x
        k1, k2 = jax.random.split(key)
        params: dict[str, Any] = {"embedding": jax.random.normal(k1, (VOCABULARY, width))}
        size = VOCABULARY if head else width
        params["last"] = {"kernel": jax.random.normal(k2, (width, size)) / 3}
        return params, {}

    def apply(params, state, x, *, train, rngs):
        del train, rngs
        seen = (
            jnp.cumsum(jnp.take(params["embedding"], x, axis=0), 1)
            / jnp.arange(1, x.shape[1] + 1)[None, :, None]
        )
        hidden = jnp.tanh(seen)
        logits = jnp.einsum("btd,dv->btv", hidden, params["last"]["kernel"])
        return {"logits": logits, "tokens": hidden} if head else {"tokens": logits}, state

    return Model(init, apply)


def answering(model: Model) -> Model:
    """A decoder that returns `log_probs` `[b, t, k]` of the tokens that its input asks for."""

    def ids_of(x):
        return x["tokens"] if isinstance(x, dict) else x

    def apply(params, state, x, *, train, rngs):
        outputs, state = model.apply(params, state, ids_of(x), train=train, rngs=rngs)
        if isinstance(x, dict) and "ask" in x:
            logs = jax.nn.log_softmax(outputs["logits"], axis=-1)
            outputs = {**outputs, "log_probs": jnp.take_along_axis(logs, x["ask"], axis=-1)}
        return outputs, state

    def logits(params, tokens, mask):
        del mask
        return model.apply(params, {}, tokens, train=False, rngs={})[0]["logits"]

    decode = sampling.uncached(logits, VOCABULARY)
    return Model(lambda key, x: model.init(key, ids_of(x)), apply, decode)


def make_token_batch(b: int = 16, *, seed: int = 0) -> dict[str, Any]:
    """A batch of token sequences of unequal lengths; one has no target at all."""
    r = np.random.RandomState(seed)
    ids = r.randint(0, VOCABULARY, (b, TOKENS + 1)).astype(np.int32)
    length = r.randint(1, TOKENS + 1, b)
    length[1] = 0
    return {
        "input": jnp.asarray(ids[:, :-1]),
        "target": jnp.asarray(ids[:, 1:]),
        "target_mask": jnp.asarray(np.arange(TOKENS) < length[:, None], float),
        "prompt": jnp.asarray(ids[:, :2]),
        "label": jnp.arange(b, dtype=jnp.int32) % K,
        "mask": jnp.asarray(np.arange(b) != 3, float),
        "index": jnp.arange(b, dtype=jnp.int32),
        "epoch": jnp.zeros(b, jnp.int32),
    }


def make_batch(b: int = 16, *, seed: int = 0, mixed: bool = False) -> dict[str, Any]:
    """A batch of everything that objectives read; made on the host, where nothing compiles."""
    r = np.random.RandomState(seed)
    first = np.arange(b)[:, None]
    keep = (first + np.arange(3)) % 9  # masks of 9 patches, 3 of them kept
    rows = (first + np.arange(2))[:, :, None] % 3  # up to 6 of 9 patches of a view masked
    patch_mask = rows < np.arange(9) % 3
    batch = {
        "input": r.randn(b, SIZE, SIZE, 1),
        "label": r.randint(0, K, b),
        "mask": np.ones(b),
        "index": np.arange(b),
        "epoch": np.zeros(b, int),
        "domain": np.arange(b) % 2,
        "conflict": np.arange(b) % K,
        "votes": np.where(first % 5 == 4, -1, (first + np.arange(3) ** 2) % (K + 1) - 1),
        "views": r.randn(b, 2, SIZE, SIZE, 1),
        "local_views": r.randn(b, 2, SIZE - 2, SIZE - 2, 1),
        "keep": keep,
        "targets": (first[:, None] + np.arange(3, 7).reshape(1, 2, 2)) % 9,
        "hidden": (keep[:, :, None] != np.arange(9)).all(1),
        "patch_mask": patch_mask,
        "masked": np.argsort(~patch_mask, axis=-1, kind="stable")[:, :, :6],
    }
    if mixed:
        probs = r.rand(b, K)
        batch["label_probs"] = probs / probs.sum(1, keepdims=True)
    return {
        name: jnp.asarray(x.astype(np.int32) if np.issubdtype(x.dtype, np.integer) else x)
        for name, x in batch.items()
    }


class Setup(NamedTuple):
    """Everything a test needs to step an objective."""

    objective: Objective
    models: dict[str, Model]
    shapes: state.Shapes
    init: Any
    step: Any
    frozen: Any


PROVIDED = {"num_classes": K, "num_examples": 64, "total_steps": 10, "steps_per_epoch": 2.0}
"""What a run tells every objective about its data and length."""

ROLE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "aggregator": ("expert_aggregator", {"heads": 2}),
    "augmentor": ("augmentor_affine", {"scale": 0.5}),
    "detector": ("projector", {"features": 3}),
    "head": ("linear_head", {"num_classes": K}),
    "heads": ("projector", {"features": 2 * K}),
    "fusion": ("review_fusion", {"width": 8, "batch_norm": False}),
    "paraphraser": ("paraphraser", {"depth": 1, "batch_norm": False}),
    "posterior": ("regressor", {"variance": 5.0}),
    "regressor": ("regressor", {}),
    "teacher_head": ("linear_head", {"num_classes": K}),
    "translator": ("translator", {"depth": 1, "batch_norm": False}),
    "joint": ("projector", {"features": 4 * K}),
    "projector": ("projector", {"features": 32}),
    "predictor": ("projector", {"features": 32}),
    "target_projector": ("projector", {"features": 32}),
    "prototypes": ("prototypes", {"count": 1024}),
    "target_prototypes": ("prototypes", {"count": 1024}),
    "projector_of_teacher": ("projector", {"features": 32}),
    "temperature": ("temperature", {}),
}
"""Networks of roles that are not classifiers of the input: `{role: (model, kwargs)}`."""

MODELS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    name: {"projector": ("projector", {"features": 32, "last_bias": False})}
    for name in ("barlow_twins", "vicreg")
} | {
    "moco": {role: ("projector", {"features": 128}) for role in ("projector", "target_projector")},
    "mugs": {
        role: ("projector", {"features": 128})
        for role in ("instance_projector", "instance_predictor", "target_instance_projector")
    },
    "ibot": {
        role: (
            "vit",
            {
                "num_classes": 0,
                "patch_size": 2,
                "width": 16,
                "depth": 1,
                "heads": 2,
                "positions": "fourier",
                "mask_token": True,
            },
        )
        for role in ("student", "target")
    },
}
"""Networks of one objective alone, where they are not the above: `{objective: {role: ...}}`."""

STEPS_TO_LEARN = {"moco": 2, "mugs": 2}
"""Steps after which all has moved, 1 where left out: the first batch finds an empty queue."""

MASKED = ("ijepa", "mae", "tjepa", "vjepa")
"""Objectives whose networks see some tokens and say what others are."""

TEXT = ("gkd", "instruct_mining", "mcl", "next_token", "salt", "salt_ds", "token_kd")
"""Objectives over tokens, on `make_token_batch`."""

EQUAL_WIDTHS = ("fsp", "meta_dmoe")
"""Objectives that compare a student with a teacher of its own widths."""


def make_objective(name: str, **kwargs) -> Objective:
    """Makes an objective as a run does: what it needs to know of the data is given to it."""
    make = importlib.import_module(f"distill_jax.objectives.{name}").make
    return bind(make, kwargs, where="objective.kwargs", provided=PROVIDED)()


def role_model(role: str, *, objective: str = "", batch_norm: bool = False) -> Model:
    """The network of a role: tiny, and wider for a teacher."""
    if objective in MASKED:
        heads = ("predictor", "decoder")
        return tiny_token_predictor() if role in heads else tiny_token_encoder()
    if (objective, role) == ("mcl", "student"):
        return tiny_decoder(head=False)
    if objective in TEXT and role != "detector":
        return answering(tiny_decoder(width=16 if is_frozen(role) else 8))
    known = {**ROLE_MODELS, **MODELS.get(objective, {})}
    if role in known:
        name, kwargs = known[role]
        return as_model(importlib.import_module(f"distill_jax.models.{name}").make(**kwargs))
    return tiny_convnet(width=16 if is_frozen(role) else 8, batch_norm=batch_norm)


def batch_of(name: str) -> dict[str, Any]:
    """The batch that an objective is tested on."""
    if name in ("pg_rank", "ranking"):  # images as lists of five candidates, with relevances
        r = np.random.RandomState(1)
        lists = {"label": r.randint(0, 4, (16, K)), "gumbel": r.gumbel(size=(16, 3, K))}
        return make_batch() | {key: jnp.asarray(x, float) for key, x in lists.items()}
    if name == "mcl":  # rows of tokens, and where they are corrupted
        batch = make_token_batch()
        view = {"tokens": batch["input"], "segments": batch["target_mask"].astype(int) - 1}
        courses = token_transforms.make_token_courses(rate=0.4)
        made = courses(jax.random.key(5), {**batch, "input": view}, jnp.int32(0))
        return {**made, "input": batch["input"]}
    return make_token_batch() if name in TEXT else make_batch()


def is_frozen(role: str) -> bool:
    """Roles named for a teacher never learn; every other role does."""
    return role.startswith("teacher")


def averages(roles: Iterable[str]) -> dict[str, tuple[str, float]]:
    """Roles named for a target are moving averages: `target` of the student, `target_x` of x."""
    targets = [role for role in roles if role.startswith("target")]
    return {role: (role[len("target_") :] or "student", 0.9) for role in targets}


def reads_logits(objective: Objective, models: dict[str, Model]) -> bool:
    """Whether a method asks its student for logits; those that learn from views alone do not."""
    if any(is_frozen(role) for role in objective.roles):
        return True
    try:
        headless = {**models, "student": tiny_convnet(head=False)}
        state.infer_shapes(objective, headless, make_batch())
    except (KeyError, ConfigError):
        return True
    return False


def setup(
    name: str, *, batch_norm: bool = False, tx=None, batch=None, kwargs=None, **step_kwargs
) -> Setup:
    """Builds an objective on tiny networks: teachers are frozen, targets follow, others learn."""
    objective = make_objective(name, **(kwargs or {}))
    models = {
        role: role_model(role, objective=name, batch_norm=batch_norm) for role in objective.roles
    }
    own = name in (*MASKED, *TEXT) or "student" in MODELS.get(name, {})
    if not own and not reads_logits(objective, models):
        encoder = tiny_convnet(batch_norm=batch_norm, head=False)
        models |= {r: encoder for r in models if r in ("student", "target")}
    ema = averages(objective.roles)
    if name in EQUAL_WIDTHS:
        models |= {role: models["student"] for role in models if is_frozen(role)}
    tx = optax.sgd(0.1, momentum=0.9) if tx is None else tx
    shapes = state.infer_shapes(objective, models, batch_of(name) if batch is None else batch)
    trainable = tuple(r for r in objective.roles if not is_frozen(r) and r not in ema)
    sources = {role: source for role, (source, _) in ema.items()}
    init = state.make_init(objective, models, tx, shapes, trainable=trainable, ema=sources)
    step = steps.make_train_step(objective, models, tx, ema=ema, **step_kwargs)
    frozen = {
        role: models[role].init(jax.random.key(7 + i), *state.zeros(shapes.roles[role].inputs))
        for i, role in enumerate(objective.roles)
        if is_frozen(role)
    }
    return Setup(objective, models, shapes, init, step, frozen)


def run(made: Setup, batch, *, mesh=None, n_steps: int = 1, min_size: int = 1):
    """Steps on a mesh (default: eagerly compiled on one device); returns states and metrics."""
    mesh = partition.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    shardings = partition.infer(shapes, mesh, rules={}, min_size=min_size)
    current = jax.jit(made.init, out_shardings=shardings)(jax.random.key(0))
    batch = jax.device_put(batch, partition.over_batch(mesh))
    frozen = jax.device_put(made.frozen, partition.replicated(mesh))
    key = jax.jit(lambda: jax.random.key(3), out_shardings=partition.replicated(mesh))()
    step = jax.jit(
        made.step, donate_argnums=0, out_shardings=(shardings, partition.replicated(mesh))
    )
    history = []
    for _ in range(n_steps):
        current, metrics = step(current, frozen, batch, key)
        history.append({k: float(v) for k, v in metrics.items()})
    assert step._cache_size() == 1, "compiled more than once"
    return current, history


def max_relative(a, b) -> float:
    """Largest difference of two trees relative to the largest entry of each leaf of `a`."""

    def one(x, y):
        return float(np.max(np.abs(x - y)) / max(np.max(np.abs(x)), 1e-30)) if np.size(x) else 0.0

    a, b = jax.device_get((a, b))
    return max(jax.tree.leaves(jax.tree.map(one, a, b)), default=0.0)


class Case(NamedTuple):
    """A setup on one device, and where steps on one batch lead."""

    made: Setup
    batch: Any
    step: Any
    states: list[Any]
    metrics: list[Any]


def follow(made: Setup, batch, *, n_steps: int, donate: bool = False) -> Case:
    """Steps on one batch from the same key; states and metrics are on the host."""
    step = jax.jit(made.step, donate_argnums=0 if donate else ())
    states, metrics = [jax.device_get(jax.jit(made.init)(jax.random.key(0)))], []
    for _ in range(n_steps):
        current, found = step(fresh(states[-1]), made.frozen, batch, jax.random.key(3))
        states.append(jax.device_get(current))
        metrics.append(jax.device_get(found))
    return Case(made, batch, step, states, metrics)


def fresh(current):
    """A state on the device, whose buffers a step may take."""
    return jax.tree.map(jnp.array, current)


def padded(batch, rows: int) -> dict[str, np.ndarray]:
    """A batch with so many rows more, of mask 0 and other numbers."""
    b = len(batch["mask"])
    longer = {
        key: np.concatenate([x, np.full_like(x[:rows], 3)])
        for key, x in jax.device_get(batch).items()
    }
    longer["mask"][b:] = 0
    longer["label"][b:] = 0
    return longer


def saved_and_restored(current, folder):
    """A state of the host after a checkpoint in a folder."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), current
    )
    checkpointer = Checkpointer(folder)
    checkpointer.save(fresh(current), {}, metric=None)
    checkpointer.wait()
    found = jax.device_get(checkpointer.restore(like).state)
    checkpointer.close()
    return found


def copies_of_logits(loss):
    """Temporaries of the compiled gradient of a loss of bfloat16 logits, in float32 arrays of them.

    Args:
      loss: `(student [b, k], teacher [b, k], class ids [b]) -> [b]`.
    """
    rows, classes = 64, 20_000
    logits = jax.ShapeDtypeStruct((rows, classes), jnp.bfloat16)
    label = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def mean(z, t, y):
        return loss(z.astype(jnp.float32), t.astype(jnp.float32), y).mean()

    compiled = jax.jit(jax.grad(mean)).lower(logits, logits, label).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * rows * classes)
