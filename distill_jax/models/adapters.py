"""Any Linen module, NNX module or builder as a `Model` over plain nested dicts of arrays."""

import functools
import inspect
import math
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors

from distill_jax.core.api import Key, Model, Outputs, Params, State
from distill_jax.core.errors import ArgumentError

_TRAIN = ("train", "training", "is_training")
_EVAL = ("deterministic", "use_running_average", "eval")


def from_linen(module: nn.Module) -> Model:
    """Returns a Linen module as a `Model`.

    Parameters are the collection "params"; all other collections (batch statistics) are the
    state, except "intermediates". The module may take the mode as `train`, `training`,
    `is_training` or, negated, as `deterministic`, `use_running_average` or `eval`. An output that
    is an array becomes `{"logits": array}`.
    """
    mode = _mode(type(module).__call__)

    def init(key: Key, *inputs: Any) -> tuple[Params, State]:
        # Only shapes of the inputs matter; under `jit` the forward pass is dead code.
        like = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), inputs)
        arguments: dict[str, Any] = mode(False)
        run = jax.jit(lambda key, inputs: module.init(key, *inputs, **arguments))
        variables = run(key, like)
        state = {k: v for k, v in variables.items() if k not in ("params", "intermediates")}
        return variables.get("params", {}), state

    def apply(
        params: Params,
        state: State,
        *inputs: Any,
        train: bool = False,
        rngs: Mapping[str, Key] | None = None,
    ) -> tuple[Outputs, State]:
        variables = {"params": params, **state}
        mutable = list(state) if train else []
        arguments: dict[str, Any] = {**mode(train), "rngs": dict(rngs or {}), "mutable": mutable}
        with _explained(inputs):
            outputs, updated = module.apply(variables, *inputs, **arguments)
        if not train:
            return _named(outputs), state
        return _named(outputs), {**state, **updated}

    return Model(init, apply)


class Later:
    """Placeholder for an argument of a network that is known only at `init`."""

    def __init__(self, meaning: str):
        self.meaning = meaning


LATER = {
    "rngs": Later("random streams from the key of the run"),
    "in_features": Later("size of the input"),
}
"""What `build` fills in by name where a builder is bound to these values."""


def build(make: functools.partial[Any]) -> Model:
    """Returns the network of a builder, a class or function bound to its arguments.

    Arguments of `LATER` are filled in: `rngs` from the key that `init` is given; `in_features` from
    the first input of the network, as the size of its last axis, as for `nnx.Linear` and
    `nnx.Conv`, or, where the network fails on that, as the number of values of an example, as for a
    network that flattens its input.

    Raises:
      ArgumentError: the builder does not return a network.
    """
    later = {name for name, value in make.keywords.items() if isinstance(value, Later)}
    if "in_features" in later:

        def sized(n: int) -> Model:
            return build(functools.partial(make, in_features=n))

        return _sized(sized)
    symbol = inspect.unwrap(make.func)
    known = {name: value for name, value in make.keywords.items() if name not in later}
    bound = functools.partial(make.func, **known)
    if later or (isinstance(symbol, type) and issubclass(symbol, _nnx_module())):
        return from_nnx(bound)
    try:
        return as_model(bound)
    except (ArgumentError, TypeError) as error:
        # A function with `**kwargs` that forwards `rngs` to its callee.
        if _takes_rngs(symbol) and "rngs" in str(error):
            return from_nnx(bound)
        raise


def _sized(make: Callable[[int], Model]) -> Model:
    """Returns a network that is made for the size of its first input.

    Args:
      make: from the size to the network.
    """
    make = functools.cache(make)

    @functools.cache
    def chosen(structure: Any, specs: tuple[Any, ...]) -> Model:
        like = jax.tree.unflatten(structure, specs)
        shape = specs[0].shape
        sizes = tuple(dict.fromkeys((shape[-1], math.prod(shape[1:]))))
        for n in sizes[:-1]:
            model = make(n)

            def run(key: Key, *inputs: Any, model: Model = model) -> Any:
                return model.apply(*model.init(key, *inputs), *inputs)

            try:
                jax.eval_shape(run, jax.random.key(0), *like)
            except Exception:  # of whatever layer the size does not fit
                continue
            return model
        return make(sizes[-1])

    def model_of(inputs: tuple[Any, ...]) -> Model:
        specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(inputs)]
        return chosen(jax.tree.structure(inputs), tuple(specs))

    def init(key: Key, *inputs: Any) -> tuple[Params, State]:
        return model_of(inputs).init(key, *inputs)

    def apply(params: Params, state: State, *inputs: Any, **kwargs: Any) -> tuple[Outputs, State]:
        return model_of(inputs).apply(params, state, *inputs, **kwargs)

    return Model(init, apply)


def from_nnx(module: Any, **kwargs: Any) -> Model:
    """Returns an NNX module as a `Model`.

    Parameters are `nnx.Param`; every other variable is the state, except random streams and what
    `sow` stores. Paths become nested dicts with string keys. Modes and outputs are handled as in
    `from_linen`; a module whose call takes `rngs` gets them.

    Args:
      module: a class or function that takes `rngs` and returns an NNX module, or a module, whose
        values (imported weights, say) are then what `init` returns.
      **kwargs: arguments of the class or function.

    Raises:
      ArgumentError: arguments for a module that is already built.
    """
    from flax import nnx

    if isinstance(module, nnx.Module):
        if kwargs:
            raise ArgumentError(f"{type(module).__name__} is already built and takes no arguments")
        built = module

        def make(key: Key) -> nnx.Module:
            del key
            return built
    else:
        takes_rngs = _takes_rngs(module)

        def make(key: Key) -> nnx.Module:
            rngs = {"rngs": nnx.Rngs(params=key, default=key)} if takes_rngs else {}
            made = module(**rngs, **kwargs)
            if not isinstance(made, nnx.Module):
                raise ArgumentError(
                    f"{made!r} is not an NNX module",
                    hint="only what returns an NNX module has an argument rngs",
                )
            return made

    kinds = (nnx.Param, nnx.RngState, ...)

    @functools.cache
    def abstract() -> Any:
        return nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))), *kinds)

    def init(key: Key, *inputs: Any) -> tuple[Params, State]:
        del inputs

        def values(key: Key) -> tuple[Params, State]:
            _, params, _, state = nnx.split(make(key), *kinds)
            return _to_dict(params), _to_dict(state)

        return jax.jit(values)(key)

    def apply(
        params: Params,
        state: State,
        *inputs: Any,
        train: bool = False,
        rngs: Mapping[str, Key] | None = None,
    ) -> tuple[Outputs, State]:
        graph, params_like, streams, state_like = abstract()
        net = nnx.merge(
            graph,
            _from_dict(params_like, params),
            _seeded(streams, rngs or {}, train=train),
            _from_dict(state_like, state),
            copy=True,
        )
        net.train() if train else net.eval()
        arguments: dict[str, Any] = _mode(type(net).__call__)(train)
        if "rngs" in inspect.signature(type(net).__call__).parameters:
            arguments["rngs"] = nnx.Rngs(**_streams(rngs, train=train))
        with _explained(inputs):
            outputs = net(*inputs, **arguments)
        nnx.pop(net, nnx.Intermediate)
        updated = _to_dict(nnx.split(net, *kinds)[3]) if train else state
        return _named(outputs), updated

    return Model(init, apply)


def to_nnx(weights: tuple[Params, State], *, like: Any) -> Any:
    """Returns an NNX module with the weights of a network that was trained from it.

    Args:
      weights: `(params, state)`, such as `Trainer.student(state)` or those of a loaded network.
      like: a module of the same structure; it does not change.

    Raises:
      ArgumentError: the weights do not fit the module.
    """
    from flax import nnx

    kinds = (nnx.Param, nnx.RngState, ...)
    graph, params, streams, state = nnx.split(like, *kinds)
    for name, kept, given in (("params", params, weights[0]), ("state", state, weights[1])):
        wanted = jax.tree.map(lambda x: tuple(x.shape), _to_dict(kept))
        shapes = jax.tree.map(lambda x: tuple(x.shape), given)
        if wanted != shapes:
            raise ArgumentError(
                f"the {name} do not fit {type(like).__name__}",
                hint=f"they have the shapes {shapes}, the module {wanted}",
            )
    values = (_from_dict(params, weights[0]), streams, _from_dict(state, weights[1]))
    return nnx.merge(graph, *values, copy=True)


def _nnx_module() -> type:
    """Returns `nnx.Module` if NNX has been imported, else a class without instances.

    Importing NNX costs a few tenths of a second, which runs without NNX networks avoid.
    """
    loaded = sys.modules.get("flax.nnx")
    return loaded.Module if loaded is not None else type("Nothing", (), {})


def _takes_rngs(make: Callable[..., Any]) -> bool:
    """Returns whether a class or function takes `rngs` by name, or any keyword."""
    target = inspect.unwrap(make.func if isinstance(make, functools.partial) else make)
    if isinstance(target, type):  # whose metaclass hides the signature of the constructor
        target = target.__init__
    parameters = inspect.signature(target).parameters
    any_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return "rngs" in parameters or any_keyword


def as_model(obj: Any, **kwargs: Any) -> Model:
    """Returns an object named by "package.module:Symbol" as a `Model`.

    Args:
      obj: a `Model`, a Linen or NNX module or class, or a function that returns any of these; a
        function that takes `rngs` is an NNX factory.
      **kwargs: arguments of the class or function.

    Raises:
      ArgumentError: the object is none of these, or arguments are left over.
    """
    nnx_module = _nnx_module()
    if isinstance(obj, type) and issubclass(obj, nnx_module):
        return from_nnx(obj, **kwargs)
    if isinstance(obj, (Model, nn.Module, nnx_module)):
        if kwargs:
            raise ArgumentError(
                f"{type(obj).__name__} is already built and takes no arguments",
                hint=f"remove {', '.join(kwargs)}",
            )
        if isinstance(obj, Model):
            return obj
        return from_linen(obj) if isinstance(obj, nn.Module) else from_nnx(obj)
    if callable(obj):
        if not isinstance(obj, type) and "rngs" in inspect.signature(obj).parameters:
            return from_nnx(obj, **kwargs)
        built = obj(**kwargs)
        if isinstance(built, (Model, nn.Module, _nnx_module())):
            return as_model(built)
        obj = built
    raise ArgumentError(
        f"{obj!r} is not a network",
        hint="give a Model, a Linen or NNX module or class, or a function that returns one",
    )


def _mode(call: Callable[..., Any]) -> Callable[[bool], dict[str, bool]]:
    """Returns the map from the training mode to the keyword arguments by which `call` takes it."""
    names = inspect.signature(call).parameters

    def arguments(train: bool) -> dict[str, bool]:
        return {n: train for n in _TRAIN if n in names} | {
            n: not train for n in _EVAL if n in names
        }

    return arguments


def _named(outputs: Any) -> Outputs:
    if isinstance(outputs, Mapping):
        return outputs
    if not hasattr(outputs, "shape"):
        raise ArgumentError(
            f"a network returns a {type(outputs).__name__}",
            hint="it must return an array, which is taken as its logits, or a dict of arrays",
        )
    return {"logits": outputs}


class _explained:
    """Converts Flax's errors about missing random keys and other inputs into an `ArgumentError`."""

    def __init__(self, inputs: tuple[Any, ...]):
        self.inputs = inputs

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, errors.InvalidRngError):
            raise _missing_key("dropout") from error
        if isinstance(error, errors.ScopeParamShapeError):
            shapes = ", ".join(str(x.shape[1:]) for x in jax.tree.leaves(self.inputs))
            raise ArgumentError(
                f"the weights of a network do not fit inputs of shape {shapes}",
                where="roles",
                hint="an mlp takes images or views of one size; a convnet takes any size",
            ) from error


def _missing_key(purpose: str) -> ArgumentError:
    return ArgumentError(
        "the network draws random numbers while training and was given no key",
        where="rngs",
        hint=f'pass rngs={{"{purpose}": key}}, or set its dropout rates to 0',
    )


def _to_dict(state: Any) -> dict[str, Any]:
    """Returns the values of an NNX state as nested dicts with string keys."""
    from flax import nnx

    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        *parents, leaf = map(str, path)
        node = functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)
        node[leaf] = variable.get_value()
    return tree


def _from_dict(like: Any, tree: Mapping[str, Any]) -> Any:
    """Returns the NNX state of the structure of `like` with the values of `tree`."""
    from flax import nnx

    return nnx.from_flat_state(
        (path, variable.replace(functools.reduce(lambda n, k: n[k], map(str, path), tree)))
        for path, variable in nnx.to_flat_state(like)
    )


def _streams(rngs: Mapping[str, Key] | None, *, train: bool) -> dict[str, Key]:
    """Returns keys by purpose, and as "default" that of "dropout".

    Evaluation without keys gets a constant key, since modules may hold streams that evaluation does
    not use.
    """
    if not rngs and train:
        raise _missing_key("dropout")
    rngs = dict(rngs or {"dropout": jax.random.key(0)})
    return {"default": rngs.get("dropout", next(iter(rngs.values()))), **rngs}


def _seeded(streams: Any, rngs: Mapping[str, Key], *, train: bool) -> Any:
    """Returns random streams in the structure of `streams`, one key per purpose and path.

    A stream takes the key of its own tag, else that of "dropout".
    """
    from flax import nnx

    def fill(path: tuple[Any, ...], variable: Any) -> Any:
        if isinstance(variable, nnx.RngCount):
            return variable.replace(jnp.zeros((), jnp.uint32))
        keys = _streams(rngs, train=train)
        key = keys.get(variable.tag, keys["default"])
        return variable.replace(jax.random.fold_in(key, zlib.crc32(repr(path).encode())))

    flat = [(path, fill(path, v)) for path, v in nnx.to_flat_state(streams)]
    return nnx.from_flat_state(flat)
