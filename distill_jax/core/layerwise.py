"""Frozen parts and learning rates by layer, for any optax optimizer over `{role: params}`."""

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax.core.api import Role
from distill_jax.core.errors import ArgumentError, nearest

Rates = Sequence[tuple[str, float]]
"""(regex, factor) pairs; the first regex that matches in `role/path/to/leaf` applies."""

_BLOCK = re.compile(r"(?:stage_?(\d+))?_?(?:(?:block|bottleneck)_?(\d+))?(?:_.*)?", re.IGNORECASE)
_BEFORE = re.compile(
    r"stem|patches|cls|distilled|registers|mask_token|positions|pre_norm|\w*embedding"
    r"|(?:Conv|BatchNorm)_0$"
)


def by_layer(
    optimizer: optax.GradientTransformation,
    *,
    freeze: Mapping[Role, Sequence[str]] | None = None,
    lr_by_layer: Rates = (),
    layer_decay: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that freezes some parameters and scales the updates of others.

    A factor multiplies the update, including decoupled weight decay, like a separate learning
    rate. Frozen parameters do not change by a bit, and their gradients do not count in the norm
    that the optimizer clips. The optimizer state is that of `optimizer`. Running statistics of
    batch norms are not parameters and are still updated.

    Args:
      optimizer: an optimizer over `{role: params}`.
      freeze: role -> patterns of paths within its parameters, such as "stem*" or "stage1_*". "*"
        matches any text; a pattern also matches everything below the path.
      lr_by_layer: factors of the learning rate; they override those of `layer_decay`.
      layer_decay: ratio of the learning rate of each block to that of the next block (Clark et al.
        2020, arXiv:2003.10555, appendix A; Bao et al. 2021, arXiv:2106.08254). Stem, embeddings and
        positions count as the block before the first. Layers after the blocks, and roles without
        numbered blocks, have the full rate.

    Raises:
      ArgumentError: a factor is out of range, or a pattern is not a regex. In `init`, also under
        `jax.eval_shape`: a role or a pattern matches no parameter, a role is frozen completely, or
        `layer_decay` is set and no role has blocks.
    """
    freeze = {role: tuple(patterns) for role, patterns in (freeze or {}).items() if patterns}
    _check(lr_by_layer, layer_decay)
    wrapped = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Any:
        _check_patterns(params, freeze, lr_by_layer, layer_decay)
        return wrapped.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        factors = rates(updates, freeze, lr_by_layer, layer_decay)
        seen = jax.tree.map(lambda f, g: g if f else jnp.zeros_like(g), factors, updates)
        updates, state = wrapped.update(seen, state, params, **extra)
        return jax.tree.map(_scaled, factors, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _scaled(factor: float, update: Any) -> Any:
    if not factor:
        return jnp.full_like(update, -0.0)  # the only addend that keeps -0.0
    return update if factor == 1 else update * jnp.asarray(factor, update.dtype)


def rates(
    params: Any, freeze: Mapping[Role, Sequence[str]], lr_by_layer: Rates, layer_decay: float
) -> Any:
    """Returns the factor of each leaf of `{role: params}`, 0 for frozen leaves."""
    paths = [_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    decays = _decays(paths, layer_decay)
    factors = []
    for path in paths:
        role, _, inner = path.partition("/")
        if any(_names(pattern, inner) for pattern in freeze.get(role, ())):
            factors.append(0.0)
            continue
        rules = (factor for regex, factor in lr_by_layer if re.search(regex, path))
        factors.append(float(next(rules, decays[path])))
    return jax.tree.unflatten(jax.tree.structure(params), factors)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _names(pattern: str, path: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*")


def _decays(paths: Sequence[str], decay: float) -> dict[str, float]:
    """Returns the factor of each path by its depth."""
    if decay == 1:
        return dict.fromkeys(paths, 1.0)
    factors = {}
    for role in {path.partition("/")[0] for path in paths}:
        own = [path for path in paths if path.partition("/")[0] == role]
        factors |= {path: decay**height for path, height in _heights(own).items()}
    return factors


def _heights(paths: Sequence[str]) -> dict[str, int]:
    """Returns the number of layers after each path of a role: 0 for the last layers."""
    places = {path: _place(_layer(path)) for path in paths}
    # Layers of a stage outside its blocks count with the first block of the stage.
    first: dict[int, int] = {}
    for place in places.values():
        if place is not None and place[1] >= 0:
            first[place[0]] = min(place[1], first.get(place[0], place[1]))
    settled = {
        path: place and (place[0], place[1] if place[1] >= 0 else first.get(place[0], 0))
        for path, place in places.items()
    }
    layers = sorted({place for place in settled.values() if place is not None})
    if len(layers) < 2:
        return dict.fromkeys(paths, 0)
    heights = {}
    for path, place in settled.items():
        before = _BEFORE.match(_layer(path))
        behind = len(layers) - layers.index(place) if place else len(layers) + 1 if before else 0
        heights[path] = behind
    return heights


def _layer(path: str) -> str:
    """Returns the outermost layer of `role/layer/.../leaf`."""
    return path.partition("/")[2].partition("/")[0]


def _place(name: str) -> tuple[int, int] | None:
    """Returns the stage and block in a layer's name, -1 for those it does not contain."""
    match = _BLOCK.fullmatch(name)
    if match is None or not (match[1] or match[2]):
        return None
    return int(match[1] or 0), int(match[2]) if match[2] else -1


def _check(lr_by_layer: Rates, layer_decay: float) -> None:
    for rule in lr_by_layer:
        match rule:
            case (str(regex), float() | int() as factor) if not isinstance(factor, bool):
                try:
                    re.compile(regex)
                except re.error as error:
                    what = f"{regex!r} is not a regex: {error}"
                    raise ArgumentError(what, where="lr_by_layer") from None
                if not 0 < factor < math.inf:
                    raise ArgumentError(
                        f"{regex!r} has the factor {factor}",
                        where="lr_by_layer",
                        hint="above 0; what is not to learn is frozen",
                    )
            case _:
                hint = 'example: ("Dense_0", 10.0)'
                raise ArgumentError(f"{rule!r} is no rule", where="lr_by_layer", hint=hint)
    if not 0 < layer_decay <= 1:
        raise ArgumentError(
            f"layer_decay is {layer_decay}", where="layer_decay", hint="above 0; 1 is off"
        )


def _check_patterns(
    params: Any, freeze: Mapping[Role, Sequence[str]], lr_by_layer: Rates, layer_decay: float
) -> None:
    paths = [_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for role, patterns in freeze.items():
        own = [p.partition("/")[2] for p in paths if p.partition("/")[0] == role]
        if not own:
            raise ArgumentError(
                f"{role!r} is not trained by this optimizer",
                where=f"{role}.freeze",
                hint=nearest(role, {p.partition("/")[0] for p in paths}),
            )
        for pattern in patterns:
            if not any(_names(pattern, path) for path in own):
                raise ArgumentError(
                    f"{pattern!r} matches no parameter",
                    where=f"{role}.freeze",
                    hint=nearest(pattern, _parts(own)),
                )
        if all(any(_names(pattern, path) for pattern in patterns) for path in own):
            raise ArgumentError(
                "nothing of it would learn", where=f"{role}.freeze", hint="a role that is frozen"
            )
    for regex, _ in lr_by_layer:
        if not any(re.search(regex, path) for path in paths):
            raise ArgumentError(
                f"the rule {regex!r} matches no parameter",
                where="lr_by_layer",
                hint=nearest(regex, paths[:20]),
            )
    if layer_decay != 1 and len(set(_decays(paths, layer_decay).values())) < 2:
        raise ArgumentError(
            "no network has numbered blocks, such as block1 or stage1_block0",
            where="layer_decay",
            hint="lr_by_layer, which names them",
        )


def _parts(paths: Sequence[str]) -> list[str]:
    return sorted({path.partition("/")[0] for path in paths})[:40]
