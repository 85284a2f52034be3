"""Any Linen module, NNX module or builder as a `Model` over plain nested dicts of arrays."""

import functools
import inspect
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors

from distill_jax.core.api import Key, Model, Outputs, Params, State
from distill_jax.core.errors import ConfigError

_TRAIN = ("train", "training", "is_training")
_EVAL = ("deterministic", "use_running_average", "eval")


def from_linen(module: nn.Module) -> Model:
    """Returns a Linen module as a `Model`.

    Parameters are the collection "params"; all other collections (batch statistics) are the
    state, but for "intermediates". The module may take the mode as `train`, `training`,
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


def from_nnx(module: Any, **kwargs: Any) -> Model:
    """Returns an NNX module as a `Model`.

    Parameters are `nnx.Param`; every other variable except random streams is the state. Paths
    become nested dicts with string keys. Modes and outputs are handled as in `from_linen`.

    Args:
      module: a class or function that takes `rngs` and returns an NNX module, or a module, whose
        values (imported weights, say) are then what `init` returns.
      **kwargs: arguments of the class or function.

    Raises:
      ConfigError: arguments for a module that is already built.
    """
    from flax import nnx

    if isinstance(module, nnx.Module):
        if kwargs:
            raise ConfigError(f"{type(module).__name__} is already built and takes no arguments")
        built = module

        def build(key: Key) -> nnx.Module:
            del key
            return built
    else:

        def build(key: Key) -> nnx.Module:
            return module(rngs=nnx.Rngs(params=key, default=key), **kwargs)

    kinds = (nnx.Param, nnx.RngState, ...)

    @functools.cache
    def abstract() -> Any:
        return nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), *kinds)

    def init(key: Key, *inputs: Any) -> tuple[Params, State]:
        del inputs

        def values(key: Key) -> tuple[Params, State]:
            _, params, _, state = nnx.split(build(key), *kinds)
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
        outputs = net(*inputs, **_mode(type(net).__call__)(train))
        updated = _to_dict(nnx.split(net, *kinds)[3]) if train else state
        return _named(outputs), updated

    return Model(init, apply)


def _nnx_module() -> type:
    """Returns `nnx.Module` if anybody has imported NNX, else a class without instances.

    Importing NNX costs a few tenths of a second, which runs without NNX networks need not pay.
    """
    loaded = sys.modules.get("flax.nnx")
    return loaded.Module if loaded is not None else type("Nothing", (), {})


def as_model(obj: Any, **kwargs: Any) -> Model:
    """Returns what a config's "package.module:Symbol" names as a `Model`.

    Args:
      obj: a `Model`, a Linen or NNX module or class, or a function that returns any of these; a
        function that takes `rngs` is an NNX factory.
      **kwargs: arguments of the class or function.

    Raises:
      ConfigError: the object is or returns something else, or arguments are left over.
    """
    nnx_module = _nnx_module()
    if isinstance(obj, type) and issubclass(obj, nnx_module):
        return from_nnx(obj, **kwargs)
    if isinstance(obj, (Model, nn.Module, nnx_module)):
        if kwargs:
            raise ConfigError(
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
    raise ConfigError(
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
    return outputs if isinstance(outputs, Mapping) else {"logits": outputs}


class _explained:
    """Turns Flax's complaints about missing random keys and other inputs into a `ConfigError`."""

    def __init__(self, inputs: tuple[Any, ...]):
        self.inputs = inputs

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, errors.InvalidRngError):
            raise _missing_key("dropout") from error
        if isinstance(error, errors.ScopeParamShapeError):
            shapes = ", ".join(str(x.shape[1:]) for x in jax.tree.leaves(self.inputs))
            raise ConfigError(
                f"the weights of a network do not fit inputs of shape {shapes}",
                where="roles",
                hint="an mlp takes images, or views, of one size; a convnet those of any size",
            ) from error


def _missing_key(purpose: str) -> ConfigError:
    return ConfigError(
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


def _seeded(streams: Any, rngs: Mapping[str, Key], *, train: bool) -> Any:
    """Returns random streams in the structure of `streams`, one key per purpose and path.

    A stream takes the key of its own tag, else that of "dropout". Evaluation without keys gets a
    constant one, since modules may hold streams that they do not use then.
    """
    from flax import nnx

    def fill(path: tuple[Any, ...], variable: Any) -> Any:
        if isinstance(variable, nnx.RngCount):
            return variable.replace(jnp.zeros((), jnp.uint32))
        key = rngs.get(variable.tag, rngs.get("dropout"))
        if key is None:
            if train:
                raise _missing_key("dropout")
            key = jax.random.key(0)
        return variable.replace(jax.random.fold_in(key, zlib.crc32(repr(path).encode())))

    flat = [(path, fill(path, v)) for path, v in nnx.to_flat_state(streams)]
    return nnx.from_flat_state(flat)
