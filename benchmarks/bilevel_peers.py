"""Time of one bilevel step against PyTorch and Betty on the same machine.

    pip install --no-deps --target /tmp/peers betty-ml
    python benchmarks/bilevel_peers.py --nets resnet20,mlp --rounds 15 --betty /tmp/peers

The same problem for all: a student learns from labels and from stored teacher logits (temperature
4) by SGD with momentum 0.9, a ratio network 9k-128-1 over trilateral features without gradient
weighs the two, and learns by Adam from the cross-entropy of the student's next parameters on a
held-out batch as large as the training batch. Variants:

  ours_bilevel           exact gradient, the step of training is the inner step
  ours_bilevel_virtual   the inner step is made again with the new weights
  torch_bilevel          as public code has it: an update with create_graph, the outer gradient
                         by autograd.grad into the ratio network, then the step made again
  torch_bilevel_everything   the same with backward(), which also fills the student's gradients
  torch_bilevel_reuse    the step of training is the inner step, like ours_bilevel
  betty_bilevel          Betty's Engine with two ImplicitProblems and its defaults: a central
                         difference about the new parameters ("darts", 0.01), one inner step

and the plain distillation steps. "tuned" is PyTorch with freed memory kept in the process, as our
package does, and channels last; "two_devices" is ours with the batch over two CPU devices. Before
the times, `same_problem` runs both sides in float64 from the same weights and compares.

Every variant lives in a process of its own and takes its turn in every round (`_turns.py`).
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import _record
import _turns
from torch_step import DESCRIPTION, NETS, jax_model, torch_model

K, T, ALPHA, LR, MOMENTUM, OUTER_LR = 10, 4.0, 0.9, 0.01, 0.9, 1e-3
STEPS = {"mlp": 25, "resnet20": 1}
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_ARENA_MAX": "1",
}
PLAIN = {
    # bilevel variant: the plain step that it is compared with
    "ours_bilevel": "ours_plain",
    "ours_bilevel_virtual": "ours_plain",
    "ours_bilevel_two_devices": "ours_plain_two_devices",
    "torch_bilevel": "torch_plain",
    "torch_bilevel_everything": "torch_plain",
    "torch_bilevel_reuse": "torch_plain",
    "torch_bilevel_reuse_tuned": "torch_plain_tuned",
    "betty_bilevel": "torch_plain",
}
VARIANTS = (*dict.fromkeys(PLAIN.values()), *PLAIN)


def data(net: str, shape: tuple[int, ...], b: int) -> dict[str, Any]:
    """Returns images, labels, stored logits and class means as NumPy arrays."""
    import numpy as np

    r = np.random.default_rng(0)
    means = r.random((K, K), np.float32)
    return {
        "x": r.standard_normal((b, *shape), np.float32),
        "y": r.integers(0, K, b),
        "teacher": 3 * r.standard_normal((b, K), np.float32),
        "held_x": r.standard_normal((b, *shape), np.float32),
        "held_y": r.integers(0, K, b),
        "class_means": means / means.sum(1, keepdims=True),
    }


# Ours.


class Ours:
    """The package's steps on stored batches; `state` is donated."""

    def __init__(
        self, net: str, arrays: dict[str, Any], *, virtual=False, plain=False, outer_tx: Any = None
    ):
        import hypergradient
        import jax
        import jax.numpy as jnp
        import optax

        from distill_jax.core import partition, state, steps
        from distill_jax.core.bilevel import Bilevel

        model, teacher = jax_model(net), hypergradient.stored_teacher()
        tx = optax.sgd(LR, momentum=MOMENTUM)
        outer_tx = optax.adam(OUTER_LR) if outer_tx is None else outer_tx
        self.problem = hypergradient.make_problem(model, teacher, tx, outer_tx)
        mesh = partition.make_mesh()
        split, whole = partition.over_batch(mesh), partition.replicated(mesh)
        put = functools.partial(jax.device_put, device=split)
        train = put(hypergradient.as_batch(arrays["x"], arrays["y"]))
        held_out = put(hypergradient.as_batch(arrays["held_x"], arrays["held_y"]))
        self.frozen = {"teacher": (put(jnp.asarray(arrays["teacher"])), {})}
        self.key = jax.device_put(jax.random.key(0), whole)
        if plain:
            objective = self.problem.weighted.objective
            models = {"student": model, "teacher": teacher}
            shapes = state.infer_shapes(objective, models, train)
            init = state.make_init(objective, models, tx, shapes, trainable=("student",), ema={})
            step, self.fed = steps.make_train_step(objective, models, tx), train
        else:
            init = self.problem.init(train)
            step = self.problem.step(Bilevel(outer_update="lookahead" if virtual else "after_step"))
            self.fed = {"train": train, "held_out": held_out}
        self.state = jax.jit(init, out_shardings=whole)(self.key)
        if not plain:
            means = jax.device_put(jnp.asarray(arrays["class_means"]), whole)
            self.state = self.state.replace(memory={**self.state.memory, "class_means": means})
        self.compiled = jax.jit(step, donate_argnums=0, out_shardings=(whole, whole))

    def __call__(self) -> Any:
        self.state, metrics = self.compiled(self.state, self.frozen, self.fed, self.key)
        return metrics["loss"]


# PyTorch.


class Torch:
    """Distillation and bilevel distillation in eager PyTorch, as one writes them by hand."""

    def __init__(self, net: str, arrays: dict[str, Any], *, channels_last: bool = False):
        import torch
        from torch import nn

        _turns.place_torch()
        self.student = torch_model(net)
        self.ratio = nn.Sequential(nn.Linear(9 * K, 128), nn.ReLU(), nn.Linear(128, 1))
        tensors = {name: torch.as_tensor(a) for name, a in arrays.items()}
        for name in ("x", "held_x"):
            tensors[name] = tensors[name].permute(0, 3, 1, 2).contiguous()
        if channels_last:
            self.student = self.student.to(memory_format=torch.channels_last)
            for name in ("x", "held_x"):
                tensors[name] = tensors[name].to(memory_format=torch.channels_last)
        self.x, self.y, self.teacher = tensors["x"], tensors["y"], tensors["teacher"]
        self.held_x, self.held_y = tensors["held_x"], tensors["held_y"]
        self.class_means = tensors["class_means"]
        self.inner = torch.optim.SGD(self.student.parameters(), lr=LR, momentum=MOMENTUM)
        self.outer = torch.optim.Adam(self.ratio.parameters(), lr=OUTER_LR)
        self.found: Any = None

    def losses(self, logits: Any) -> tuple[Any, Any]:
        """Returns cross-entropy and distillation loss, `[b]`."""
        import torch.nn.functional as F

        log_s, log_t = F.log_softmax(logits / T, -1), F.log_softmax(self.teacher / T, -1)
        distillation = T**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
        return F.cross_entropy(logits, self.y, reduction="none"), distillation

    def features(self, logits: Any) -> Any:
        """Returns edges and vertices of the two triangles `[b, 9k]`, without gradient."""
        import torch
        import torch.nn.functional as F

        s, t = F.softmax(logits.detach(), -1), F.softmax(self.teacher, -1)
        g, mean = F.one_hot(self.y, K).to(s.dtype), self.class_means[self.y]
        return torch.cat([g - s, g - t, t - s, g - mean, mean - s, s, t, mean, g], -1)

    def weighted(self, logits: Any, ratio: Callable[[Any], Any], features: Any = None) -> Any:
        """Returns the inner loss."""
        label, distillation = self.losses(logits)
        features = self.features(logits) if features is None else features
        alpha = ratio(features).sigmoid()[:, 0]
        return ((1 - alpha) * label + alpha * distillation).mean()

    def plain(self) -> Any:
        self.inner.zero_grad()
        label, distillation = self.losses(self.student(self.x))
        loss = ((1 - ALPHA) * label + ALPHA * distillation).mean()
        loss.backward()
        self.inner.step()
        return loss.detach()

    def bilevel(self, *, everything: bool = False, reuse: bool = False) -> Any:
        """One step of both levels.

        Args:
          everything: whether backward() fills the gradients of the student as well.
          reuse: whether the student makes the very step that the ratio network learned from;
            otherwise it makes it again with the new ratios.
        """
        import torch
        import torch.nn.functional as F
        from torch.func import functional_call

        params = dict(self.student.named_parameters())
        loss = self.weighted(self.student(self.x), self.ratio)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        moved = {}
        for (name, p), grad in zip(params.items(), grads, strict=True):
            buffer = self.inner.state[p].get("momentum_buffer")
            moved[name] = p - LR * (grad if buffer is None else MOMENTUM * buffer + grad)
        statistics = {name: x.clone() for name, x in self.student.named_buffers()}
        held_out = functional_call(self.student, (moved, statistics), (self.held_x,))
        value = F.cross_entropy(held_out, self.held_y)
        if everything:
            self.inner.zero_grad()
            self.outer.zero_grad()
            value.backward()
        else:
            found = torch.autograd.grad(value, list(self.ratio.parameters()))
            for p, grad in zip(self.ratio.parameters(), found, strict=True):
                p.grad = grad
        self.found = [p.grad.clone() for p in self.ratio.parameters()]
        self.outer.step()
        if reuse:
            for p, grad in zip(params.values(), grads, strict=True):
                p.grad = grad.detach()
        else:
            self.inner.zero_grad()
            loss = self.weighted(self.student(self.x), torch.no_grad()(self.ratio))
            loss.backward()
        self.inner.step()
        return loss.detach()

    def betty(self, *, hold: bool = True) -> Callable[[], Any]:
        """Returns the step of Betty's engine over the same networks and optimizers.

        Args:
          hold: whether the features of a step are computed once. Otherwise the difference moves
            them along, `detach` or not, and is that of another problem.
        """
        import logging

        import torch.nn.functional as F
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem

        logging.disable(logging.INFO)  # it goes to stdout
        mine = self

        class Outer(ImplicitProblem):
            def get_batch(self):
                return mine.held_x, mine.held_y

            def training_step(self, batch):
                x, y = batch
                return F.cross_entropy(self.student(x), y)

        class Inner(ImplicitProblem):
            def get_batch(self):
                self.features = None
                return (mine.x,)

            def training_step(self, batch):
                logits = self.module(batch[0])
                if not hold or self.features is None:
                    self.features = mine.features(logits)
                return mine.weighted(logits, self.ratio, self.features)

        config = Config(type="darts", unroll_steps=1)
        ratio = Outer("ratio", config, self.ratio, self.outer)
        student = Inner("student", config, self.student, self.inner)
        dependencies = {"u2l": {ratio: [student]}, "l2u": {student: [ratio]}}
        engine = Engine([ratio, student], EngineConfig(), dependencies)
        engine.train()

        def step() -> Any:
            engine.global_step += 1
            engine.train_step()
            return self.ratio[2].bias.detach()[0]

        return step


def serve(net: str, variant: str) -> None:
    """Takes turns as one variant."""
    arrays = data(net, NETS[net]["shape"], NETS[net]["batch"])
    if variant.startswith("ours"):
        from distill_jax.run import environment

        environment.configure_jax(cpu_devices=2 if "two_devices" in variant else 1)
        _turns.serve(Ours(net, arrays, virtual="lookahead" in variant, plain="plain" in variant))
        return
    made = Torch(net, arrays, channels_last="tuned" in variant and net == "resnet20")
    if variant.startswith("betty"):
        step = made.betty()
    elif "plain" in variant:
        step = made.plain
    else:
        step = functools.partial(
            made.bilevel, everything="everything" in variant, reuse="reuse" in variant
        )
    _turns.serve(step)


# The same problem?


def torch_parameters(net: str, params: Any) -> dict[str, Any]:
    """Returns Flax parameters of the student under their PyTorch names and in its layout."""

    def conv(name: str, p: Any) -> dict[str, Any]:
        return {f"{name}.weight": p["kernel"].transpose(3, 2, 0, 1)}

    def norm(name: str, p: Any) -> dict[str, Any]:
        return {f"{name}.weight": p["scale"], f"{name}.bias": p["bias"]}

    def dense(name: str, p: Any) -> dict[str, Any]:
        return {f"{name}.weight": p["kernel"].T, f"{name}.bias": p["bias"]}

    if net == "mlp":
        return (
            dense("1", params["Dense_0"])
            | dense("3", params["Dense_1"])
            | dense("5", params["Dense_2"])
        )
    found = conv("0", params["Conv_0"]) | norm("1", params["BatchNorm_0"])
    for i in range(9):
        block, name = params[f"Block_{i}"], str(3 + i)
        layers = ("conv1", "bn1"), ("conv2", "bn2"), ("short.0", "short.1")
        for j in range(sum(key.startswith("Conv") for key in block)):
            found |= conv(f"{name}.{layers[j][0]}", block[f"Conv_{j}"])
            found |= norm(f"{name}.{layers[j][1]}", block[f"BatchNorm_{j}"])
    return found | dense("14", params["Dense_0"])


def torch_ratio(params: Any) -> dict[str, Any]:
    first, last = params["Dense_0"], params["Dense_1"]
    return {
        "0.weight": first["kernel"].T,
        "0.bias": first["bias"],
        "2.weight": last["kernel"].T,
        "2.bias": last["bias"],
    }


def same_problem(net: str, *, steps: int = 3) -> dict[str, float]:
    """Compares both sides over some steps in float64 from equal weights.

    Returns:
      outer_gradient_error: relative error in norm of PyTorch's outer gradient, the largest of all
        steps.
      student_error, ratio_error: that of the parameters after the last step.
      betty_cosine: of Betty's outer gradient with the exact one in the first step.
      betty_detached_cosine: the same where features are detached, as one would in PyTorch, but not
        held while it takes its difference.
      betty_displacement: distance of Betty's student, after that step, from where the optimizer
        put it, in lengths of the step.
    """
    import jax

    jax.config.update("jax_enable_x64", True)
    import hypergradient
    import numpy as np
    import optax
    import torch

    torch.set_default_dtype(torch.float64)
    arrays = data(net, NETS[net]["shape"] if net == "mlp" else (16, 16, 3), 8)
    arrays = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in arrays.items()}
    ours = Ours(net, arrays, outer_tx=hypergradient.recording(optax.adam(OUTER_LR)))
    state = jax.tree.map(hypergradient.widen, ours.state)
    r = np.random.default_rng(1)
    ratio = jax.tree.map(lambda x: r.standard_normal(x.shape) / 9, state.params["weighting"])
    ours.state = state.replace(params={**state.params, "weighting": ratio})

    def parameters() -> tuple[dict[str, Any], dict[str, Any]]:
        found = jax.device_get(ours.state.params)
        return torch_parameters(net, found["student"]), torch_ratio(found["weighting"])

    def load(made: Torch) -> Torch:
        for module, values in zip((made.student, made.ratio), parameters(), strict=True):
            tensors = {name: torch.tensor(x) for name, x in values.items()}
            assert module.double().load_state_dict(tensors, strict=False).unexpected_keys == []
        return made

    def distance(module: Any, values: dict[str, Any]) -> tuple[float, float]:
        """Distance of a module's parameters from `values`, and the norm of these."""
        named = {name: p.detach().numpy() for name, p in module.named_parameters()}
        assert named.keys() == values.keys()
        differences = [named[name] - values[name] for name in named]
        return _norm(differences), _norm(values.values())

    def bettys_gradient(made: Torch, *, hold: bool) -> list[Any]:
        made.outer = torch.optim.SGD(made.ratio.parameters(), lr=1.0)
        start = [p.detach().clone() for p in made.ratio.parameters()]
        made.betty(hold=hold)()
        pairs = zip(start, made.ratio.parameters(), strict=True)
        return [(a - b.detach()).numpy() for a, b in pairs]

    made = load(Torch(net, arrays))
    betty = {name: load(Torch(net, arrays)) for name in ("betty", "betty_detached")}
    before = parameters()[0]
    result: dict[str, float] = {"outer_gradient_error": 0.0}
    for i in range(steps):
        ours()
        made.bilevel(reuse=True)
        want = torch_ratio(jax.device_get(ours.state.opt_state["outer"][-1]["weighting"]))
        pairs = zip(want.values(), made.found, strict=True)
        error = _norm(b.numpy() - a for a, b in pairs) / _norm(want.values())
        result["outer_gradient_error"] = max(result["outer_gradient_error"], error)
        if i == 0 and importlib.util.find_spec("betty"):
            after = parameters()[0]
            length = _norm(after[name] - before[name] for name in after)
            for key, theirs in betty.items():
                found = bettys_gradient(theirs, hold=key == "betty")
                inner = sum(float((a * b).sum()) for a, b in zip(found, want.values(), strict=True))
                result[f"{key}_cosine"] = inner / (_norm(found) * _norm(want.values()))
            result["betty_displacement"] = distance(betty["betty"].student, after)[0] / length
    student, ratio = parameters()
    for name, module, values in (("student", made.student, student), ("ratio", made.ratio, ratio)):
        difference, size = distance(module, values)
        result[f"{name}_error"] = difference / size
    return result


def _norm(arrays: Any) -> float:
    return sum(float((x**2).sum()) for x in arrays) ** 0.5


def measure(net: str, variants: list[str], rounds: int, betty: str) -> dict[str, Any]:
    """Returns medians over rounds of all variants and of their ratios."""
    env: dict[str, dict[str, str]] = {name: {} for name in variants}
    for name in env:
        if name.endswith("tuned"):
            env[name] = KEEP_MEMORY
        if name.startswith("betty"):
            env[name] = {"PYTHONPATH": betty}
    times = _turns.take_turns(__file__, env, net=net, rounds=rounds, steps=STEPS[net])
    result: dict[str, Any] = {
        "net": DESCRIPTION[net],
        "rounds": rounds,
        "load_average": os.getloadavg(),
    }
    for name, turns in times.items():
        result[name] = {
            "wall_ms": _turns.median_ms(turns),
            "cpu_ms": _turns.median_ms(turns, "cpu"),
            "peak_mib": round(turns[-1]["peak_mib"]),
        }
        if PLAIN.get(name) in times:
            result[name]["over_plain"] = _turns.ratio(turns, times[PLAIN[name]])
        if name in PLAIN and not name.startswith("ours"):
            for ours in (n for n in times if n.startswith("ours_bilevel")):
                result[name][f"{ours}_over_this"] = _turns.ratio(times[ours], turns)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", default="resnet20,mlp")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--betty", default="", help="folder where Betty is installed")
    parser.add_argument("--out", default="benchmarks/results/bilevel_peers.json")
    parser.add_argument("--unchecked", action="store_true", help="keep same_problem of --out")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--same", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve.split(":"))
    if args.same:
        print(json.dumps(same_problem(args.same)))
        return None
    from importlib.metadata import distributions

    versions = _record.versions("jax", "jaxlib", "flax", "torch")
    if args.betty:
        found = distributions(path=[args.betty])
        versions |= {d.name: d.version for d in found if d.name.startswith("betty")}
    result: dict[str, Any] = {
        "versions": versions,
        **_record.machine(),
        "same_problem": {},
        "nets": {},
    }
    if args.unchecked and os.path.exists(args.out):
        with open(args.out) as file:
            result["same_problem"] = json.load(file)["same_problem"]
    variants = [n for n in args.variants.split(",") if args.betty or not n.startswith("betty")]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join((root, args.betty))}
    for net in () if args.unchecked else args.nets.split(","):
        command = [sys.executable, __file__, "--same", net]
        done = subprocess.run(command, env=env, text=True, check=True, stdout=subprocess.PIPE)
        result["same_problem"][net] = json.loads(done.stdout.splitlines()[-1])
        print(net, done.stdout, flush=True)
        if result["same_problem"][net]["outer_gradient_error"] > 1e-8:
            raise SystemExit("the two sides do not solve the same problem")
    for net in args.nets.split(","):
        result["nets"][net] = measure(net, variants, args.rounds, args.betty)
        _record.write(result, args.out, indent=2)
        print(json.dumps(result["nets"][net], indent=2), flush=True)
    return None


if __name__ == "__main__":
    main()
