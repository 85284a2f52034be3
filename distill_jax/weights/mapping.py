"""Weights of another library into a network of ours and back, by a table of names.

A `Family` is data: rules from names of the source to names of parameters here, with the layout of
each. Every tensor of the file and every parameter of the network must find its counterpart; what
finds none is listed. Names of parameters are paths in the nested dictionaries, such as
`stage1/block0/conv1/kernel`; those of the state begin with its collection, `batch_stats/...`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from distill_jax.weights import common, layouts
from distill_jax.weights.common import Spec, Weights, WeightsError, shown
from distill_jax.weights.patterns import Pattern, compiled

Specs = Mapping[str, Spec]


class MappingError(WeightsError):
    """Weights that do not fit the network that they are to fill."""


class Rule(NamedTuple):
    """A layer or a tensor of the source and its place here.

    Attributes:
      source: its name, with fields as in `patterns.Pattern`. Several names are joined along the
        first axis, such as separate projections to query, key and value.
      target: its path here. Several paths get equal parts of the last axis.
      kind: a layer of `layouts.KINDS`, whose tensors' names are appended to both, or a layout of
        `layouts.LAYOUTS` for a single tensor.
      sizes: what this layer has for the layout in place of the network's, such as `heads`.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    kind: str = "same"
    sizes: Mapping[str, Any] = MappingProxyType({})


Rules = Sequence[Rule]


def _anything(specs: Specs) -> Mapping[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Networks of one library whose tensors follow one scheme of names.

    Attributes:
      name: `<architecture>/<library>`, such as "resnet/timm".
      model: the module of `distill_jax.models` that builds them.
      rules: of all members; a parameter takes the first rule that fits. A function gets the
        arguments of the network, for names that they decide.
      signature: names that every file of the family has.
      describe: `(specs) -> arguments` of `make`, from names and shapes; arguments that a layout
        needs, such as `heads`, are among them.
      head: paths of the last layers, which may be replaced.
      first: the source's name of the first convolution, which adapts to other channels.
      ignored: regular expressions of names that have no place here and need none.
      optional: regular expressions of paths that keep their first values where no tensor fills
        them.
      tied: source names of copies, by which they are copies of: `{copy: original}`.
    """

    name: str
    model: str
    rules: Rules | Callable[[Mapping[str, Any]], Rules]
    signature: tuple[str, ...]
    describe: Callable[[Specs], Mapping[str, Any]] = _anything
    head: tuple[str, ...] = ("head",)
    first: str = ""
    ignored: tuple[str, ...] = (r"(.*\.)?num_batches_tracked",)
    optional: tuple[str, ...] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def tensors(self, sizes: Mapping[str, Any]) -> "list[TensorRule]":
        """Returns the rules tensor by tensor."""
        rules = self.rules(sizes) if callable(self.rules) else self.rules
        return [tensor for rule in rules for tensor in _tensors(rule)]


class TensorRule(NamedTuple):
    """A rule for one parameter: patterns of its sources and targets, and its layout."""

    sources: tuple[Pattern, ...]
    targets: tuple[Pattern, ...]
    layout: str
    sizes: Mapping[str, Any]


def _tensors(rule: Rule) -> Iterable[TensorRule]:
    sources = (rule.source,) if isinstance(rule.source, str) else rule.source
    targets = (rule.target,) if isinstance(rule.target, str) else rule.target
    if rule.kind in layouts.LAYOUTS:
        yield _tensor(sources, targets, rule.kind, rule.sizes)
        return
    for theirs, ours, layout in layouts.KINDS[rule.kind]:
        collection, _, name = ours.rpartition(":")
        front = f"{collection}/" if collection else ""
        yield _tensor(
            tuple(f"{source}.{theirs}" for source in sources),
            tuple(f"{front}{target}/{name}" for target in targets),
            layout,
            rule.sizes,
        )


def _tensor(
    sources: tuple[str, ...], targets: tuple[str, ...], layout: str, sizes: Mapping[str, Any]
) -> TensorRule:
    return TensorRule(
        tuple(compiled(source, sources[0]) for source in sources),
        tuple(compiled(target, sources[0]) for target in targets),
        layout,
        sizes,
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """What was done to weights on their way into a network.

    Attributes:
      family: name of the table.
      tensors: number of tensors that were used.
      replaced: paths of the head that kept their first values.
      adapted: what was changed to fit, one line each: channels, positions.
      kept: paths that no tensor fills and that kept their first values.
      ignored: names without a place here, which need none.
      outside: names outside the prefix, such as those of an optimizer.
      dtypes: of the tensors that were used, by number.
    """

    family: str
    tensors: int
    replaced: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    dtypes: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Mapped(NamedTuple):
    """Parameters and state of a network, filled from a file, and how."""

    params: Any
    state: Any
    report: Report


def listed(names: Sequence[str], most: int = 4) -> str:
    """Returns names for a message: the first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def specs_of(weights: Mapping[str, np.ndarray]) -> Specs:
    """Returns shape and dtype by name, without loading what is in a file."""
    if isinstance(weights, Weights):
        return weights.specs
    return {name: Spec(tuple(array.shape), array.dtype) for name, array in weights.items()}


def apply_map(
    weights: Mapping[str, np.ndarray],
    family: Family,
    params: Any,
    state: Any = None,
    *,
    sizes: Mapping[str, Any] | None = None,
    prefix: str = "",
    head: str = "keep",
) -> Mapped:
    """Fills a network with weights of another library.

    Args:
      weights: arrays by the names of the source.
      family: the table of names.
      params: parameters of the network as nested dictionaries, of arrays or of shapes
        (`jax.eval_shape`). Only what keeps its first values must be arrays.
      state: its state likewise; None for a network without one.
      sizes: arguments of the network; by default inferred from the shapes.
      prefix: prefix of the names of this network, such as "model." in a checkpoint that
        holds more. Other names are left alone.
      head: "keep"; "replace": the last layers keep the values that they have in `params`; "drop":
        the network has none, and those of the file are left out.

    Returns:
      new parameters and state in the types of the given ones, as NumPy arrays, and a report.

    Raises:
      MappingError: tensors or parameters without a counterpart, other shapes, or a dtype that is
        not a floating-point one.
    """
    if head not in ("keep", "replace", "drop"):
        raise ValueError(f'head={head!r}: "keep", "replace" or "drop"')
    where = common.place(weights.path) if isinstance(weights, Weights) else ""
    inside = {n.removeprefix(prefix): n for n in weights if n.startswith(prefix)}
    specs = specs_of(weights)
    if sizes is None:
        sizes = family.describe({short: specs[name] for short, name in inside.items()})
    wanted = _flat(params) | _flat(state or {})
    filler = _Filler(weights, family, sizes, wanted, inside, where, head)
    for rule in family.tensors(sizes):
        filler.follow(rule)
    values, report = filler.finish()
    outside = tuple(n for n in weights if not n.startswith(prefix))
    report = dataclasses.replace(report, outside=outside)
    mine = _flat(params)
    return Mapped(
        unflatten_dict({path: values[path] for path in mine}, sep="/"),
        unflatten_dict({path: values[path] for path in _flat(state or {})}, sep="/"),
        report,
    )


def _flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(dict(tree), sep="/")


class _Filler:
    """The state of one `apply_map`: which names are used, which paths are filled."""

    def __init__(self, weights, family, sizes, wanted, inside, where, head):
        self.weights, self.family, self.sizes = weights, family, sizes
        self.wanted, self.inside, self.where = wanted, inside, where
        self.replaces, self.drops = head == "replace", head == "drop"
        self.values: dict[str, np.ndarray] = {}
        self.used: dict[str, str] = {}
        self.places: dict[str, str] = {}
        self.adapted: list[str] = []
        self.replaced: list[str] = []

    def error(self, what: str, hint: str = "") -> MappingError:
        return MappingError(what, where=self.where, hint=hint)

    def of_head(self, path: str) -> bool:
        path = path.removeprefix("batch_stats/")
        return any(path == at or path.startswith(f"{at}/") for at in self.family.head)

    def follow(self, rule: TensorRule) -> None:
        for name in self.inside:
            if name in self.used or (fields := rule.sources[0].match(name)) is None:
                continue
            names = [source.format(fields) for source in rule.sources]
            targets = [target.format(fields) for target in rule.targets]
            self.places.setdefault(name, targets[0])
            if not all(target in self.wanted for target in targets):
                continue
            if missing := [n for n in names if n not in self.inside]:
                raise self.error(f"lacks {listed(missing)}, which {shown(name)} goes with")
            self.used |= dict.fromkeys(names, targets[0])
            if self.replaces and all(map(self.of_head, targets)):
                continue
            parts = [self._load(n) for n in names]
            array = self._fitted(parts, names, targets, rule)
            split = np.split(array, len(targets), axis=-1) if len(targets) > 1 else [array]
            for target, value in zip(targets, split, strict=True):
                self._put(target, value, names)

    def _load(self, name: str) -> np.ndarray:
        array = self.weights[self.inside[name]]
        if array.dtype.kind not in "fV" or array.dtype.itemsize < 2:
            raise self.error(
                f"tensor {shown(name)} is {array.dtype.name}",
                "weights in float32, float16 or bfloat16; quantised ones must be expanded first",
            )
        return array

    def _fitted(self, parts, names, targets, rule: TensorRule) -> np.ndarray:
        dtype = np.dtype(self.wanted[targets[0]].dtype)
        array = np.concatenate(parts) if len(parts) > 1 else parts[0]
        array = array.astype(np.promote_types(dtype, np.float32))
        shape = tuple(self.wanted[targets[0]].shape)
        shape = (*shape[:-1], shape[-1] * len(targets)) if len(targets) > 1 else shape
        if names[0] == self.family.first and array.ndim == 4 and array.size:
            axis = layouts.LAYOUTS[rule.layout].channels
            channels, rest = divmod(array.shape[axis] * int(np.prod(shape)), array.size)
            if not rest and channels != array.shape[axis]:
                what = f"{names[0]}: {array.shape[axis]} channels to {channels}"
                array = layouts.adapt_channels(array, channels, axis)
                self.adapted.append(what)
        chosen, sizes = layouts.LAYOUTS[rule.layout], {**self.sizes, **rule.sizes}
        try:
            fitted = chosen.forward(array, sizes)
            if fitted.shape != shape and chosen.resize is not None:
                resized = chosen.resize(fitted, shape, sizes)
                self.adapted.append(f"{names[0]}: {fitted.shape} to {resized.shape}")
                fitted = resized
        except KeyError as error:
            raise self.error(
                f"the layout of {shown(names[0])} depends on {error.args[0]!r}",
                f"sizes={{{error.args[0]!r}: ...}}, the argument of the network",
            ) from None
        except (ValueError, IndexError) as error:
            raise self.error(
                f"tensor {shown(names[0])} {array.shape} does not fit {shown(targets[0])} "
                f"{shape}: {error}"
            ) from None
        if fitted.shape != shape:
            hint = "a network of the size of the file"
            if self.of_head(targets[0]):
                hint = 'head="replace", which starts the last layer afresh, or as many classes'
            raise self.error(
                f"tensor {shown(names[0])} {array.shape} becomes {fitted.shape}, and "
                f"{shown(targets[0])} is {shape}",
                hint,
            )
        return np.array(fitted, dtype, order="C")

    def _put(self, target: str, value: np.ndarray, names: Sequence[str]) -> None:
        if target in self.values:
            raise self.error(f"tensor {shown(names[0])} and another one both fill {shown(target)}")
        self.values[target] = value

    def finish(self) -> tuple[dict[str, Any], Report]:
        ignored = self._settle_tied()
        unused = [n for n in self.inside if n not in self.used and n not in ignored]
        ignored += [n for n in unused if matches(n, self.family.ignored) or self._dropped(n)]
        unused = [n for n in unused if n not in ignored]
        kept = []
        for path, value in self.wanted.items():
            if path in self.values:
                continue
            if self.replaces and self.of_head(path):
                self.replaced.append(path)
            elif matches(path, self.family.optional):
                kept.append(path)
            else:
                continue
            if not isinstance(value, np.ndarray) and not hasattr(value, "__array__"):
                raise self.error(f"{path} keeps its first value, and has only a shape")
            self.values[path] = np.asarray(value)
        empty = [path for path in self.wanted if path not in self.values]
        if unused or empty:
            raise self._left_over(unused, empty)
        dtypes: dict[str, int] = {}
        for name in self.used:
            dtype = self.weights[self.inside[name]].dtype.name
            dtypes[dtype] = dtypes.get(dtype, 0) + 1
        return self.values, Report(
            family=self.family.name,
            tensors=len(self.used),
            replaced=tuple(self.replaced),
            adapted=tuple(self.adapted),
            kept=tuple(kept),
            ignored=tuple(ignored),
            dtypes=dtypes,
        )

    def _dropped(self, name: str) -> bool:
        return self.drops and name in self.places and self.of_head(self.places[name])

    def _settle_tied(self) -> list[str]:
        """Returns the names that are copies of others, after comparing them."""
        copies = []
        for copy, original in self.family.tied.items():
            if copy not in self.inside or copy in self.used or original not in self.inside:
                continue
            a, b = (self.weights[self.inside[n]] for n in (copy, original))
            if a.shape != b.shape or not np.array_equal(a, b):
                raise self.error(
                    f"{shown(copy)} should be {shown(original)}, and has other values",
                    "a network that is built without tied weights",
                )
            copies.append(copy)
        return copies

    def _left_over(self, unused: Sequence[str], empty: Sequence[str]) -> MappingError:
        said = []
        if unused:
            said.append(f"{len(unused)} of the file have no place: {listed(unused)}")
        if empty:
            said.append(f"{len(empty)} of the network have no tensor: {listed(empty)}")
        places = [f"{shown(n)} would be {self.places[n]}" for n in unused if n in self.places]
        hint = places[0] if places else f"a file of the family {self.family.name}"
        return self.error(f"does not fit the network; {'; '.join(said)}", hint)


def matches(name: str, expressions: Iterable[str]) -> bool:
    return any(re.fullmatch(expression, name) for expression in expressions)


def invert_map(
    params: Any, state: Any, family: Family, *, sizes: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Returns a network's weights by the names and in the layouts of another library.

    Args:
      params: parameters, nested dictionaries of arrays.
      state: the state, or None.
      family: the table of names.
      sizes: arguments of the network, for layouts that depend on them.

    Raises:
      MappingError: parameters for which the family has no name.
    """
    values = {path: np.asarray(x) for path, x in (_flat(params) | _flat(state or {})).items()}
    sizes, done, result = sizes or {}, set(), {}
    for rule in family.tensors(sizes):
        for path in values:
            if path in done or (fields := rule.targets[0].match(path)) is None:
                continue
            targets = [target.format(fields) for target in rule.targets]
            names = [source.format(fields) for source in rule.sources]
            if not all(target in values for target in targets):
                continue
            joined = np.concatenate([values[target] for target in targets], axis=-1)
            array = layouts.LAYOUTS[rule.layout].backward(joined, {**sizes, **rule.sizes})
            for name, part in zip(names, np.split(array, len(names)), strict=True):
                result[name] = np.ascontiguousarray(part).reshape(part.shape)
                if name.endswith(".running_var"):
                    counter = f"{name.removesuffix('running_var')}num_batches_tracked"
                    result[counter] = np.zeros((), np.int64)
            done.update(targets)
    if nameless := [path for path in values if path not in done]:
        raise MappingError(
            f"{family.name} has no names for {listed(nameless)}",
            hint="a network of the family without additions",
        )
    copies = {copy: result[o] for copy, o in family.tied.items() if o in result}
    return copies | result
