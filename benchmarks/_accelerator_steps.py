"""Steps of this package for `accelerator.py`, and hand-written `jit` loops of the same steps."""

import importlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _accelerator_workers as workers

TEMPERATURE, ALPHA, TAU = 4.0, 0.9, 0.2
LR = 1e-3

SIZES = {
    # part: ((batch, image size, classes) at full size, (...) of --tiny)
    "resnet_kd": ((256, 224, 1000), (4, 32, 10)),
    "vit_kd": ((256, 224, 1000), (4, 32, 10)),
    "simclr": ((128, 224, 1000), (4, 32, 10)),
    "bilevel": ((128, 224, 1000), (4, 32, 10)),
    "dino": ((64, 224, 1000), (4, 32, 10)),
    "mae": ((256, 224, 1000), (4, 32, 10)),
    "ijepa": ((128, 224, 1000), (4, 64, 10)),
    "clip": ((8192, 64, 1000), (16, 32, 10)),
    "decoder": ((16, 1024, 49_152), (2, 16, 64)),
}
"""Of the decoder: rows, tokens of a row, vocabulary."""

EVENTS = 3
"""Repetitions of an event of which the median counts, after one that compiles."""

DISTILLED = ("resnet_kd", "vit_kd", "bilevel")


def network(kind: str, *, tiny: bool, classes: int) -> Any:
    """Returns the role of a network: "resnet50", "vit_base" and so on."""
    from distill_jax.run import config as config_lib

    if kind.startswith("resnet"):
        sizes = {"variant": "resnet18", "width": 8, "max_depth": 1} if tiny else {"variant": kind}
        return config_lib.role("resnet_four_stages", num_classes=classes, stem="imagenet", **sizes)
    sizes = {"width": 32, "depth": 1, "heads": 2} if tiny else {"variant": kind.split("_")[1]}
    return config_lib.role("vit", num_classes=classes, patch_size=8 if tiny else 16, **sizes)


def make_config(part: str, *, tiny: bool, stored: str = "") -> Any:
    """Returns the config of a part; `stored` is a folder for stored teacher outputs."""
    from distill_jax.run import config as config_lib

    b, size, classes = SIZES[part][tiny]
    if part == "decoder":
        return _decoder(b, size, classes, tiny=tiny)
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {
        "n_train": 64 if tiny else 4096 if part == "bilevel" else max(1024, b),
        "n_test": classes,
        "image_size": size,
        "channels": 3,
        "num_classes": classes,
    }
    config.data.held_out, config.eval.metric = 0.0, ""
    config.data.train_transforms = config.data.eval_transforms = ("scale",)
    config.batch_size, config.total = b, 1_000_000
    config.precision = "bfloat16"
    adam = part not in ("resnet_kd", "bilevel")
    config.optim.name = "adamw" if adam else "momentum"
    config.optim.lr, config.optim.schedule = LR, "constant"
    make = lambda kind, k=classes: network(kind, tiny=tiny, classes=k)  # noqa: E731
    if part in DISTILLED:
        config.objective.name = "kd"
        config.objective.kwargs = {"temperature": TEMPERATURE, "alpha": ALPHA}
        pair = ("vit_base", "vit_small") if part == "vit_kd" else ("resnet50", "resnet18")
        config.roles.teacher, config.roles.student = map(make, pair)
        config.roles.teacher.frozen, config.roles.teacher.init = True, "unread"
        config.cache.dir = stored
        config.evaluators = {"classification": {}}
    if part == "bilevel":
        config.objective.kwargs = {"temperature": TEMPERATURE}
        config.roles.weighting = config_lib.role("ratio_mlp", hidden=(128,))
        config.weighting.name, config.bilevel.method = "trilateral", "exact"
        config.data.held_out, config.data.outer = 0.25, 0.0
        config.eval.metric = "held_out/accuracy"
        config.bilevel.outer_batch = 1.0
    if part in DISTILLED:
        return config
    shipped = importlib.import_module(f"distill_jax.configs.ssl.{part}").get_config("")
    flip = (("horizontal_flip", {}),)
    for key in ("objective", "roles"):
        config[key] = shipped[key]
    if part in ("simclr", "dino", "clip"):
        config.data.train_transforms = ("scale", "views")
        config.data.transform_kwargs.views = {"count": 2, "transforms": flip}
    if part == "simclr":
        config.roles.student = make("resnet50", 0)
        config.objective.kwargs["temperature"] = TAU
        wide = (64, 32) if tiny else (2048, 128)
        config.roles.projector.kwargs = {"hidden": (wide[0],), "features": wide[1]}
        config.roles.projector.kwargs["batch_norm"] = True
    if part == "clip":
        config.roles.student = make("vit_small", 0)
    if part == "dino":
        config.roles.student = make("vit_small", 0)
        crop = ("random_resized_crop", {"area": (0.05, 0.4), "size": size // 2 if tiny else 96})
        config.data.transform_kwargs.local_views = {"count": 6, "transforms": (crop,)}
        config.data.train_transforms = ("scale", "views", "local_views")
        config.roles.prototypes.kwargs.count = 64 if tiny else 65_536
        config.objective.kwargs["num_prototypes"] = config.roles.prototypes.kwargs.count
        config.roles.projector.kwargs["hidden"] = (64,) if tiny else (2048, 2048)
        config.roles.projector.kwargs["features"] = 32 if tiny else 256
        # Learned positions fit one size; crops of two sizes need fixed ones.
        config.roles.student.kwargs.positions = "fourier"
    if part in ("mae", "ijepa"):
        config.roles.student = make("vit_base", 0)
        config.roles.student.kwargs.update(positions="fourier", pool="mean")
        patch = config.roles.student.kwargs.patch_size
        masks = "random_masks" if part == "mae" else "block_masks"
        config.data.train_transforms = ("scale", masks)
        config.data.transform_kwargs[masks] = {"patch_size": patch}
        head = "decoder" if part == "mae" else "predictor"
        wide = (
            {"width": 32, "depth": 1, "heads": 2}
            if tiny
            else {
                "width": 512 if part == "mae" else 384,
                "depth": 8 if part == "mae" else 6,
                "heads": 16 if part == "mae" else 12,
            }
        )
        config.roles[head].kwargs = {**wide, "grid": (size // patch,) * 2}
    return config


def _decoder(b: int, length: int, vocabulary: int, *, tiny: bool) -> Any:
    """A student of SmolLM's 135M shape and a teacher of the same that names its 16 best tokens."""
    import numpy as np
    from distill_jax.configs.language import kd

    from distill_jax.run import config as config_lib

    path = Path(tempfile.mkdtemp(prefix="accelerator")) / "tokens.npy"
    r = np.random.default_rng(0)
    tokens = r.integers(1, vocabulary, 80 * b * (length + 1)).astype(np.uint16)
    tokens[:: length // 2] = 0
    np.save(path, tokens)
    config = kd.get_config("")
    config.data.name = "token_file"
    config.data.kwargs = {"path": str(path), "vocabulary": vocabulary, "end": 0, "length": length}
    config.data.kwargs["test_fraction"] = 0.1
    config.data.held_out, config.eval.metric, config.evaluators = 0.0, "", {}
    config.batch_size, config.total, config.precision = b, 1_000_000, "bfloat16"
    config.optim.schedule, config.optim.warmup = "constant", None
    sizes = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 64}
    if not tiny:
        sizes = {"width": 576, "depth": 30, "heads": 9, "groups": 3, "mlp_width": 1536}
    config.roles.student = config_lib.role("transformer", **sizes)
    config.roles.teacher = config_lib.role("transformer", **sizes, top=4 if tiny else 16)
    config.roles.teacher.frozen, config.roles.teacher.init = True, "unread"
    return config


class Step:
    """A config's step, and the hand-written loop of the same networks, data and optimizer."""

    def __init__(self, part: str, variant: str, *, tiny: bool, folder: str):
        from distill_jax.run import environment

        environment.configure_jax(cpu_devices=1)
        environment.cache_compiled_programs()
        import jax

        if not tiny and jax.default_backend() == "cpu":
            raise SystemExit("Error: JAX finds no accelerator; --tiny validates on the CPU")
        from distill_jax.core import partition, state
        from distill_jax.run import build

        stored = os.path.join(folder, f"{part}-outputs") if variant == "stored" else ""
        config = make_config(part, tiny=tiny, stored=stored)
        if variant == "fused_attention":
            for role in config.roles.values():
                role.kwargs.attention = "xla" if tiny else "cudnn"
        self.part, self.config, self.folder = part, config, folder
        self.experiment = experiment = build.build(config)
        whole = partition.replicated(experiment.mesh)
        frozen = {
            role: jax.device_get(
                jax.jit(experiment.models[role].init)(
                    jax.random.key(1), *state.zeros(experiment.shapes.roles[role].inputs)
                )
            )
            for role in experiment.frozen
        }
        outputs = build.stored_teacher_outputs(experiment, config, frozen, lambda line: None)
        self.feed = build.Feed(experiment, seed=0, start=0, teacher_outputs=outputs)
        self.kind = "outer" if experiment.outer is not None else "inner"
        self.frozen = jax.device_put(frozen, whole)
        self.online = jax.device_put(experiment.online(frozen, self.kind), whole)
        self.key = jax.device_put(jax.random.key(0), whole)
        self.count = 0
        if variant == "hand_written":
            self.advance = {"loop": self.hand_written()}
        else:
            self.state = build.initial_state(experiment, self.key, config)
            self.fed = self.feed(0, self.kind)
            self.compiled = build.compile_step(experiment, self.fed, self.kind)
            modes = ("loop", "bare", "constant") if variant == "ours" else ("loop",)
            self.advance = {mode: lambda n, mode=mode: self.ours(n, mode) for mode in modes}
        self.advance["loop"](1)

    def ours(self, n: int, mode: str) -> None:
        """Takes n steps of this package.

        Args:
          n: steps.
          mode: "loop" with the loader, the watch and the progress display; "bare" with the loader
            alone; "constant" with the arguments of one step.
        """
        import numpy as np

        from distill_jax.run import watch, writers
        from distill_jax.run.train.stepping import IN_FLIGHT

        loop, pending = mode == "loop", []
        progress = writers.Progress(10**9, file=io.StringIO()) if loop else None
        enter = watch.enter if loop else lambda phase: None
        for _ in range(n):
            enter("data")
            fed = self.fed if mode == "constant" else self.feed(self.count, self.kind)
            enter("dispatch")
            self.state, metrics = self.compiled(self.state, self.online, fed, self.key)
            self.count += 1
            pending.append(metrics)
            if len(pending) % IN_FLIGHT == 0:
                enter("device")
                pending[-IN_FLIGHT].block_until_ready()
            enter("other")
            if progress:
                progress.update(self.count)
        for metrics in pending:
            np.asarray(metrics)

    def hand_written(self) -> Callable[[int], None]:
        """Returns what a careful user writes: one jitted function, no framework."""
        import jax
        import jax.numpy as jnp
        import optax

        models, b = self.experiment.models, self.config.batch_size
        arrays = self.feed(0)[0]
        images, labels = arrays["input"], arrays["label"]
        adam = self.config.optim.name == "adamw"
        tx = optax.adamw(LR, weight_decay=0.0) if adam else optax.sgd(LR, momentum=0.9)
        learned = ("student", "projector") if self.part == "simclr" else ("student",)

        def low(tree):
            floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
            return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if floats(x) else x, tree)

        def kd(params, states, frozen, x, y):
            out, new = models["student"].apply(
                low(params["student"]), states["student"], x, train=True, rngs={}
            )
            teacher_params, teacher_state = frozen["teacher"]
            target, _ = models["teacher"].apply(
                low(teacher_params), teacher_state, x, train=False, rngs={}
            )
            s, t = (z["logits"].astype(jnp.float32) for z in (out, target))
            ce = optax.softmax_cross_entropy_with_integer_labels(s, y).mean()
            log_s, log_t = (jax.nn.log_softmax(z / TEMPERATURE) for z in (s, t))
            kl = TEMPERATURE**2 * (jnp.exp(log_t) * (log_t - log_s)).sum(-1).mean()
            return ALPHA * kl + (1 - ALPHA) * ce, {"student": new}

        def simclr(params, states, frozen, x, y):
            del frozen, y
            x, new = jnp.concatenate([x, x[:, :, ::-1]]), {}
            out, new["student"] = models["student"].apply(
                low(params["student"]), states["student"], x, train=True, rngs={}
            )
            out, new["projector"] = models["projector"].apply(
                low(params["projector"]), states["projector"], out["embedding"], train=True, rngs={}
            )
            z = out["output"].astype(jnp.float32)
            z /= jnp.linalg.norm(z, axis=-1, keepdims=True)
            table = z @ z.T / TAU - 1e9 * jnp.eye(len(z))
            other = jnp.roll(jnp.arange(len(z)), len(z) // 2)
            return optax.softmax_cross_entropy_with_integer_labels(table, other).mean(), new

        loss_fn = simclr if self.part == "simclr" else kd

        def step(carry, frozen, images, labels, order, i):
            params, states, opt_state = carry
            rows = jax.lax.dynamic_slice_in_dim(order, i * b, b)
            x = (images[rows].astype(jnp.float32) / 255).astype(jnp.bfloat16)
            (loss, states), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                params, states, frozen, x, labels[rows]
            )
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), states, opt_state), loss

        from distill_jax.core import state as state_lib

        params, states = {}, {}
        for role in learned:
            inputs = state_lib.zeros(self.experiment.shapes.roles[role].inputs)
            params[role], states[role] = jax.jit(models[role].init)(jax.random.key(0), *inputs)
        compiled = jax.jit(step, donate_argnums=0)
        order = jax.random.permutation(jax.random.key(2), len(labels))
        carry, parts = (params, states, jax.jit(tx.init)(params)), len(labels) // b

        def advance(n: int) -> None:
            nonlocal carry
            loss = None
            for _ in range(n):
                at = self.count % parts
                carry, loss = compiled(carry, self.frozen, images, labels, order, at)
                self.count += 1
            jax.block_until_ready(loss)

        return advance

    def events(self) -> dict[str, Any]:
        """Returns what the loop waits for at an event of each kind, in seconds.

        "logging" is the mean over the metrics of `every` steps and a line of `metrics.jsonl`;
        "evaluation" all of one on `examples` test examples, where the part has evaluators;
        "checkpoint" the part of a save that holds the loop, and `written` the whole. The first of
        each, which compiles, does not count.
        """
        import numpy as np

        from distill_jax.run import writers
        from distill_jax.run.train import evaluation
        from distill_jax.trainer.io.checkpoint import Checkpointer

        every = self.config.log.every_steps
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        names = self.experiment.metric_names(self.kind)
        fed = self.feed(self.count, self.kind)
        state, last = self.compiled(self.state, self.online, fed, self.key)
        self.state, rows = state, [np.asarray(last)] * every
        writer, checkpointer = writers.make_writer(folder), Checkpointer(folder / "checkpoints")
        held, written = [], []

        def log(i: int) -> None:
            writer.write(i, dict(zip(names, np.stack(rows).mean(0).tolist(), strict=True)))

        def evaluate(i: int) -> None:
            del i
            evaluation.evaluate(self.experiment, state, self.frozen, "test")

        found = {"logging": {"every": every, "seconds": _median_seconds(log)}}
        if self.config.evaluators:
            examples = len(self.experiment.dataset.parts["test"])
            found["evaluation"] = {"examples": examples, "seconds": _median_seconds(evaluate)}
        for i in range(EVENTS + 1):
            began = time.perf_counter()
            checkpointer.save(state.replace(step=state.step + i), {}, metric=None)
            held.append(time.perf_counter() - began)
            checkpointer.wait()
            written.append(time.perf_counter() - began)
        checkpointer.close()
        writer.close()
        found["checkpoint"] = {
            "seconds": round(statistics.median(held[1:]), 5),
            "written": round(statistics.median(written[1:]), 5),
        }
        return found

    def facts(self) -> dict[str, Any]:
        """Returns device, peak memory and the operations of a step before optimization.

        Operations are those of the traced program: what XLA recomputes does not count, and the
        body of a loop counts once.
        """
        import jax

        from distill_jax.run import build

        device = jax.local_devices()[0]
        found: dict[str, Any] = {"device_kind": device.device_kind, "backend": device.platform}
        found["versions"] = {"jax": jax.__version__}
        found["peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
        if hasattr(self, "compiled"):
            lowered = build.make_step(self.experiment, self.kind).lower(
                self.experiment.abstract_state, self.online, self.fed, self.key
            )
            found["flops"] = (lowered.cost_analysis() or {}).get("flops")
        return found


def _median_seconds(event: Callable[[int], None]) -> float:
    """Returns the median seconds of an event, without its first time."""
    took = []
    for i in range(EVENTS + 1):
        began = time.perf_counter()
        event(i)
        took.append(time.perf_counter() - began)
    return round(statistics.median(took[1:]), 6)


def serve(part: str, variant: str, *, tiny: bool, folder: str) -> None:
    """Serves a variant of a part."""
    if part.startswith("replicas"):
        return _serve_replicas(part.split("_")[1], variant, tiny=tiny)
    step = Step(part, "ours" if variant == "ours_from_cache" else variant, tiny=tiny, folder=folder)
    events = step.events if hasattr(step, "compiled") else None
    return workers.serve(step.advance, step.facts, events=events, batch=step.config.batch_size)


def _serve_replicas(net: str, variant: str, *, tiny: bool) -> None:
    """Serves 32 runs one after the other, or as replicas of one program."""
    import replicas

    os.environ["DISTILL_JAX_CACHE"] = "off"
    replicas.RUNS = 2 if tiny else 32
    replicas.NETS["resnet20"] = ("resnet", {"depth": 8 if tiny else 20}, 8 if tiny else 128)
    advance, _ = replicas.make_step(net, variant)
    batch = replicas.RUNS * replicas.NETS[net][2]
    advance()

    def steps(n: int) -> None:
        for _ in range(n):
            advance()

    def facts() -> dict[str, Any]:
        import jax

        device = jax.local_devices()[0]
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return {"device_kind": device.device_kind, "backend": device.platform, "peak_bytes": peak}

    workers.serve({"loop": steps}, facts, batch=batch)
