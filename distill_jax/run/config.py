"""The config of a run: every key with its default, durations, overrides and checks.

One locked `ml_collections.ConfigDict`. Optional leaves are placeholders, so that a later value is
still checked for its type. Open groups (keyword arguments, roles, evaluators, arms) take new keys;
everything else refuses them. This module needs neither JAX nor data, which keeps `--help` fast.

Values on the command line and in the arms of a study (`override`):

    --config.optim.lr=3e-4                       a number for a number, text for text
    --config.data.kwargs.classes=cat,dog         commas make a tuple, in open groups too
    --config.data.kwargs.name="'a, b'"           quotes keep commas: one string
    --config.optim.clip_norm=none                an optional value is unset
    --config.data.train_transforms=              an empty tuple
    --config.data.corrupt={}                     an open group or a duration is emptied
    --config.evaluators.calibration=none         a role, an evaluator or an arm is deleted

An arm writes the last two as `{"data": {"corrupt": {}}, "evaluators": {"calibration": None}}`.
"""

import ast
import contextlib
import copy
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_dict

from distill_jax.core.errors import ConfigError, nearest
from distill_jax.evaluators._directions import direction
from distill_jax.trainer.io.files import DamagedFile, parse_json

if TYPE_CHECKING:

    class ConfigDict(config_dict.ConfigDict):
        """What a key holds depends on the key, which a type checker cannot follow."""

        def __getattr__(self, attribute: str) -> Any: ...
        def __getitem__(self, key: str) -> Any: ...
        def get(self, key: str, default: Any = None) -> Any: ...

else:
    ConfigDict = config_dict.ConfigDict

UNITS = ("steps", "epochs", "examples", "percent")
SPLITS = ("train", "held_out", "test")

LONGEST_NAME = 200
"""Bytes in the name of an arm: file systems allow 255 in the name of a folder."""

# Groups that accept new keys, as patterns over config paths.
_OPEN = re.compile(
    r"(objective|weighting|data|optim|bilevel\.optim|roles\.\w+)\.kwargs(\..+)?"
    r"|data\.transform_kwargs(\..+)?|data\.corrupt(\..+)?"
    r"|optim\.schedule_kwargs(\..+)?|evaluators(\..+)?"
    r"|study\.arms(\..+)?|study\.(tuned|published|questions)|roles"
)

# Groups whose entries are groups: `none` deletes an entry.
_ENTRIES = ("roles", "evaluators", "data.transform_kwargs", "study.arms")

# A name and the keyword arguments that belong to it: another name drops them.
_OWNED = {"name": "kwargs", "model": "kwargs", "schedule": "schedule_kwargs"}


def role(model: str = "", **kwargs: Any) -> ConfigDict:
    """Returns the config of one network.

    Args:
      model: name of a module in `distill_jax.models`, or `package.module:Symbol`. May stay empty
        for a moving average, which has the architecture of its source, and for a role with
        `init`, which has that of its run.
      **kwargs: keyword arguments of the model.
    """
    config = ConfigDict()
    config.model = model
    config.kwargs = ConfigDict(kwargs)
    config.init = config_dict.placeholder(str)  # checkpoint or run folder to start from
    config.frozen = False  # never trained: a teacher
    config.ema_of = config_dict.placeholder(str)  # role whose moving average this one is
    config.decay = 0.996  # of the moving average, per step
    config.decay_schedule = "constant"  # constant | cosine | linear: up to 1 at the end
    config.lock()
    config.kwargs.unlock()
    return config


def base() -> ConfigDict:
    """Returns every key with its default; locked but for the open groups."""
    config = ConfigDict()
    config.seed = 0  # of initialization, order and augmentation
    config.batch_size = 128  # examples per step, over all devices
    config.total = _duration("steps", "epochs", "examples")  # length of training; exactly one
    config.accum_steps = 1  # micro-batches per step; divides batch_size
    config.precision = "float32"  # compute type: float32 | bfloat16; parameters stay float32
    # float64 computes and keeps everything in it: to compare meshes, not to train

    config.objective = ConfigDict()
    config.objective.name = ""  # module in distill_jax.objectives, or package.module:Symbol
    config.objective.kwargs = ConfigDict()  # open: keyword arguments of the objective

    config.weighting = ConfigDict()
    config.weighting.name = ""  # module in distill_jax.weighting; empty keeps fixed coefficients
    config.weighting.kwargs = ConfigDict()  # open: keyword arguments of the weighting
    config.weighting.loss_terms = (
        "cross_entropy",
        "distillation",
    )  # terms that it weighs, in order
    config.weighting.control = "none"  # none | frozen | joint | shuffled | batch_mean
    config.weighting.stop_features = True  # what it sees has no gradient to the student

    config.bilevel = ConfigDict()  # how a weighting learns from the held-out part
    config.bilevel.method = "exact"  # exact | finite_difference | last_layer
    config.bilevel.outer_update = "after_step"  # after_step | lookahead: from a step tried first
    config.bilevel.every = 1  # student steps between two of the weighting
    config.bilevel.warmup = _duration("steps", "epochs", "percent")  # before its first; at most one
    config.bilevel.outer_batch = 1.0  # held-out examples a step, as a share of batch_size
    config.bilevel.outer_loss = ("cross_entropy",)  # terms whose sum the held-out part judges by
    config.bilevel.jvp_fraction = 1.0  # share 1/m of the training batch in the forward-mode product
    config.bilevel.unroll = 1  # inner steps that the gradient goes through
    config.bilevel.low_memory = False  # a forward pass more instead of activations kept
    config.bilevel.optim = ConfigDict()
    config.bilevel.optim.name = "adamw"  # as optim.name
    config.bilevel.optim.kwargs = ConfigDict()  # open: keyword arguments of the optimizer
    config.bilevel.optim.lr = 1e-3  # constant
    config.bilevel.optim.weight_decay = 1e-4  # as optim.weight_decay; kernels only

    config.lookahead = ConfigDict()  # virtual steps that advance the moving averages
    config.lookahead.steps = 0  # before each real step; 0 is off
    config.lookahead.kind = "deep"  # deep: on the same batch | wide: on so many batches, averaged
    config.lookahead.restore = "all"  # all | params+opt | params: what they leave no trace in

    config.roles = ConfigDict()  # open: {role: role(model, **kwargs)}

    config.data = ConfigDict()
    config.data.name = ""  # module in distill_jax.data, or package.module:Symbol
    config.data.kwargs = ConfigDict()  # open: keyword arguments of the data set
    config.data.held_out = 0.1  # fraction of the training data kept for selection
    config.data.corrupt = ConfigDict()  # open: known faults, keywords of data.corruption.corrupt
    config.data.resident = "auto"  # keep the data on the device: auto | yes | no
    config.data.train_transforms = ()  # make_<name> in distill_jax.data.transforms, in order
    config.data.eval_transforms = ()  # the same for evaluation: those without randomness
    config.data.transform_kwargs = ConfigDict()  # open: {transform: {keyword: value}}

    config.data.views = 0  # augmented views of each example, in turn; 0: a new one every epoch
    config.data.teacher_view = "same"  # as the student's | clean: eval_transforms | independent
    config.data.teacher_shares = ()  # train_transforms whose draws a view of its own shares

    config.cache = ConfigDict()  # answers of frozen networks, stored before training
    config.cache.dir = ""  # their folder; "{seed}" stands for the seed; empty stores nothing
    config.cache.roles = ("teacher",)  # frozen roles that are asked beforehand
    config.cache.outputs = ("logits",)  # what is stored of their outputs
    config.cache.top_k = 0  # store the likeliest classes alone; 0 stores all logits
    config.cache.rest = "spread"  # mass of the other classes: spread evenly | drop
    config.cache.dtype = "float32"  # of stored values: float32 | float16 | bfloat16
    config.cache.teacher = ""  # package.module:Symbol, a function that answers for the one role

    config.optim = ConfigDict()
    config.optim.name = "sgd"  # sgd | momentum | nesterov | adam | adamw | lars | lamb
    config.optim.kwargs = ConfigDict()  # open: keyword arguments of the optimizer
    config.optim.lr = 0.1  # peak learning rate
    config.optim.schedule = "cosine"  # constant | cosine | linear | step | rsqrt
    config.optim.schedule_kwargs = ConfigDict()  # open: keyword arguments of the schedule
    config.optim.warmup = _duration("steps", "epochs", "percent")  # linear from zero; at most one
    config.optim.weight_decay = 0.0  # L2 for the SGD family; decoupled for adamw, lamb; not adam
    config.optim.decay_mask = (  # (regex, decayed) over role/path/to/leaf; the first match decides
        (r"/(kernel|embedding)$", True),
        (r".", False),
    )
    config.optim.clip_norm = config_dict.placeholder(float)  # largest global gradient norm

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices along the batch; -1 takes what is left
    config.mesh.fsdp = 1  # devices that share each large parameter
    config.mesh.model = 1  # devices that share the work on an example, by partition rules
    config.mesh.cpu_devices = 0  # devices to split a CPU into; 0 is automatic

    config.partition = ConfigDict()
    config.partition.rules = ()  # of the state: (regex, (mesh axis or None, ...)) over leaf paths,
    # of which the first match decides, or names of core.partition.RULE_SETS
    config.partition.frozen_rules = ()  # the same for frozen networks, as role/0/path/to/leaf
    config.partition.min_size = 2**14  # smaller parameters are replicated (elements)

    config.eval = ConfigDict()
    config.eval.every = _duration("steps", "epochs", "percent")  # at most one
    config.eval.batch_size = 500  # examples per evaluation step
    config.eval.metric = "held_out/accuracy"  # split/metric that selects the best checkpoint;
    # empty selects none, and goes with data.held_out=0
    config.eval.mode = "max"  # which end of eval.metric is best: max | min

    config.evaluators = ConfigDict()  # open: {module in distill_jax.evaluators: keyword arguments}

    config.log = ConfigDict()
    config.log.every_steps = 50  # steps between two lines of metrics
    config.log.grad_norm = False  # also log the norm of the gradient; costs a pass over it
    config.log.tensorboard = True  # also write TensorBoard events

    config.watch = ConfigDict()  # what a run says of how it is
    config.watch.stall_seconds = 600.0  # nothing done for so long is a stall; 0 is off
    config.watch.on_stall = "report"  # report: write all stacks, go on | exit: with code 70
    config.watch.nonfinite = "stop"  # stop: with code 3 | skip: the step changes nothing
    config.watch.spike = 10.0  # alarm: loss or gradient norm so far above its median; 0 is off

    config.checkpoint = ConfigDict()
    config.checkpoint.every = _duration("steps", "epochs", "percent")  # at most one
    config.checkpoint.keep = 2  # latest checkpoints that stay, beside the best

    config.study = ConfigDict()
    config.study.arms = ConfigDict()  # open: {arm: nested dict of what it changes in this config}
    config.study.tuned = ConfigDict()  # open: {name: arms}; stands for the best of them, held out
    config.study.questions = ConfigDict()  # open: {question: (arm, reference, other arms ...)}
    config.study.published = ConfigDict()  # open: {arm: figure of others, shown beside ours}
    config.study.sources = ()  # arms that others start from and that are not compared
    config.study.title = ""  # of the report
    config.study.seeds = ()  # seeds of every arm
    config.study.replicas = "no"  # seeds and scalars side by side in one program: yes | no | auto
    config.study.reference = ""  # arm that the others are compared with
    config.study.metric = "test/accuracy"  # split/metric that is compared

    return _lock(config)


def _lock(config: ConfigDict) -> ConfigDict:
    config.lock()
    for path, node in _groups(config):
        if _OPEN.fullmatch(path):
            node.unlock()
    for group in config.roles.values():
        if isinstance(group, ConfigDict):
            group.lock()
            if isinstance(group.get("kwargs"), ConfigDict):
                group.kwargs.unlock()
    return config


def _duration(*units: str) -> ConfigDict:
    kinds = {"steps": int, "examples": int, "epochs": float, "percent": float}
    return ConfigDict({unit: config_dict.placeholder(kinds[unit]) for unit in units})


def _groups(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, ConfigDict]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield f"{prefix}{key}", value
            yield from _groups(value, f"{prefix}{key}.")


def _template(config: ConfigDict) -> ConfigDict:
    """Returns `base()` with the roles of `config`: what each closed path may be."""
    template = base()
    for name in config.get("roles", {}):
        template.roles[name] = role()
    return template


def _lookup(config: ConfigDict, path: str) -> Any:
    """Returns the value at a dotted path; refuses an unknown one with the nearest key."""
    node: Any = config
    parts = path.split(".") if path else []
    for i, part in enumerate(parts):
        if not isinstance(node, ConfigDict) or part not in node:
            raise _unknown(".".join(parts[:i]), part, node)
        node = node[part]
    return node


def _unknown(parent: str, key: str, node: Any) -> ConfigError:
    what, where = f"unknown config key {key!r}", f"{parent}.{key}".lstrip(".")
    if not isinstance(node, ConfigDict):
        return ConfigError(what, where=where, hint=f"{parent} is a value, not a group")
    hint = nearest(key, node)
    elsewhere = [p for p in flatten(base()) if p.rpartition(".")[2] == key]
    if elsewhere:
        hint = f"did you mean {min(elsewhere, key=len)!r}? {hint}"
    elif "kwargs" in node and not hint.startswith("did"):
        hint = f"keyword arguments go into {parent}.kwargs; {hint}"
    return ConfigError(what, where=where, hint=hint)


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns `{dotted path: leaf}`; an empty group is a leaf of its own, lists become tuples."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)) and len(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = {} if isinstance(value, ConfigDict) else tuples(value)
    return flat


def tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(tuples(item) for item in value)
    if isinstance(value, dict):  # inside a tuple: arguments of the transforms of a view
        return {key: tuples(item) for key, item in value.items()}
    return value


# Overrides.


def override(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Returns a locked copy of `config` with other values; field references follow.

    The command line and the arms of a study both end here. A string is read as the type of the
    field that it replaces: `"3e-4"` for a float, `"crop,flip"` or `"('crop', 'flip')"` for a
    tuple, `"none"` for an optional field. Inside an open group it is any literal, a tuple where it
    has commas outside quotes, or else a string. Another unit of a duration replaces the unit that
    was set. Another name drops the keyword arguments of the old one, and other transforms those of
    the transforms that are left out, unless `values` sets them too. A role is added by its model,
    init or ema_of. An empty group empties an open group other than roles, or unsets a duration.
    None deletes a role, an evaluator, the arguments of a transform or an arm. Other values for the
    same group are set afterwards.

    Args:
      config: the config, left as it is.
      values: new values by dotted path. A dict goes into a group key by key.

    Raises:
      ConfigError: for a path that does not exist or a value of another type.
    """
    _check_values(config)
    _check_structure(config, _template(config))
    config = _lock(copy.deepcopy(config))
    values = dict(_spread(values))
    for path in values:  # a role that names its network, its weights or its source is a new one
        match = re.fullmatch(r"roles\.(\w+)\.(model|init|ema_of)", path)
        if match and match[1] not in config.roles:
            config.roles[match[1]] = role()
    template = _template(config)

    def first(path: str) -> int:
        if _is_empty(values[path]) or _deletes(path, values[path]):
            return path.count(".") - 100  # the outer group before what is in it
        return 0 if path.rpartition(".")[2] in _OWNED else 1

    for path in sorted(values, key=first):
        _set(config, template, path, values)
    if not {"data.train_transforms", "data.eval_transforms"}.isdisjoint(values):
        used = (*config.data.train_transforms, *config.data.eval_transforms)
        for name in list(config.data.transform_kwargs):
            where = f"data.transform_kwargs.{name}"
            if name not in used and not any(f"{p}.".startswith(f"{where}.") for p in values):
                del config.data.transform_kwargs[name]
    return config


def _spread(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for path, value in values.items():
        if isinstance(value, str) and value.lstrip().startswith("{"):
            with contextlib.suppress(ValueError, SyntaxError):  # a string such as "{seed}"
                value = tuples(ast.literal_eval(value.strip()))
        if isinstance(value, (Mapping, ConfigDict)) and len(value):
            yield from flatten(value, f"{path}.").items()
        else:
            yield path, value


def _set(config: ConfigDict, template: ConfigDict, path: str, values: Mapping[str, Any]) -> None:
    if _deletes(path, values[path]):
        parent, _, key = path.rpartition(".")
        if key not in (group := _lookup(config, parent)):
            raise ConfigError(f"there is no {key!r}", where=path, hint=nearest(key, group))
        with group.unlocked():
            del group[key]
        return
    node, key, is_open = _place(config, path)
    old, value = node.get(key), values[path]
    if _is_empty(value):
        _empty(node, key, path, is_open=is_open)
        return
    if isinstance(old, ConfigDict):
        raise ConfigError(
            "a group cannot be replaced by a value",
            where=path,
            hint=f"set one of its keys: {', '.join(f'{path}.{k}' for k in old) or f'{path}.KEY'}"
            + (f"; {path}={{}} empties it" if _OPEN.fullmatch(path) else ""),
        )
    if is_open:
        if isinstance(value, str):
            value = _open_value(value, old, path=path)
        with node.ignore_type():
            node[key] = float(value) if isinstance(old, float) and type(value) is int else value
        return
    parent = path.rpartition(".")[0]
    optional = _lookup(template, path) is None
    value = _coerce(value, _lookup(template, parent).get_type(key), optional=optional, path=path)
    if key in UNITS and value is not None and set(node) <= set(UNITS):
        for unit in node:
            if unit != key and f"{parent}.{unit}" not in values:
                node[unit] = None
    if (owned := _OWNED.get(key)) and owned in node and old not in (value, ""):
        for name in list(node[owned]):
            del node[owned][name]
    node[key] = value


def _deletes(path: str, value: Any) -> bool:
    """Whether a value deletes an entry of a group of groups."""
    parent = path.rpartition(".")[0]
    text = isinstance(value, str) and value.strip().lower() == "none"
    return (value is None or text) and parent in _ENTRIES


def _empty(node: ConfigDict, key: str, path: str, *, is_open: bool) -> None:
    """Empties an open group, unsets a duration, or adds an empty group to an open one."""
    old = node.get(key)
    if old is None and is_open:
        node[key] = ConfigDict()
    elif isinstance(old, ConfigDict) and path != "roles" and (is_open or _OPEN.fullmatch(path)):
        for name in list(old):
            del old[name]
    elif isinstance(old, ConfigDict) and len(old) and set(old) <= set(UNITS):
        for unit in old:
            old[unit] = None
    else:
        what = "a group of fixed keys" if isinstance(old, ConfigDict) else "a value, not a group,"
        what = "a run needs a role: roles" if path == "roles" else what
        hint = "roles.NAME=none deletes one" if path == "roles" else "leave it out, or set its keys"
        raise ConfigError(f"{what} cannot be emptied", where=path, hint=hint)


def _open_value(text: str, old: Any, *, path: str) -> Any:
    """Reads the text of a value in an open group; a string that is there stays a string."""
    bare = text.strip()
    quoted = len(bare) > 1 and bare[0] in "'\"" and bare[0] == bare[-1]
    if isinstance(old, str) and not quoted:
        return text
    value = _literal(text)
    if not isinstance(value, str) or quoted:
        return value
    if bare[:1] in ("(", "[", "{"):
        raise ConfigError(
            f"{text!r} is not a literal",
            where=path,
            hint="quote its strings, or all of it where it is one string: \"'...'\"",
        )
    return _tuple(text) if "," in text else value


def _place(config: ConfigDict, path: str) -> tuple[ConfigDict, str, bool]:
    """Returns the group and the key that a path names, and whether the group takes new keys.

    Groups inside open groups are made where they are absent, roles excepted.
    """
    parent, _, key = path.rpartition(".")
    is_open = parent != "roles" and bool(_OPEN.fullmatch(parent))
    node: Any = config
    walked: list[str] = []
    for part in parent.split(".") if parent else ():
        group = ".".join(walked)
        if not isinstance(node, ConfigDict) or part not in node:
            if not isinstance(node, ConfigDict) or group == "roles" or not _OPEN.fullmatch(group):
                raise _unknown(group, part, node)
            node[part] = ConfigDict()
        node = node[part]
        walked.append(part)
    if not isinstance(node, ConfigDict) or (key not in node and not is_open):
        raise _unknown(parent, key, node)
    return node, key, is_open


def _is_empty(value: Any) -> bool:
    return isinstance(value, (Mapping, ConfigDict)) and not len(value)


def _coerce(value: Any, kind: type, *, optional: bool, path: str) -> Any:
    if optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    if isinstance(value, str) and kind is not str:
        parse = {bool: flags.BooleanParser().parse, tuple: _tuple}.get(kind, kind)
        try:
            return parse(value)
        except (ValueError, SyntaxError):
            raise _mistyped(value, kind, path) from None
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and isinstance(value, list):
        return tuples(value)
    if not _is_a(value, kind):
        raise _mistyped(value, kind, path)
    return value


def _is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _mistyped(value: Any, kind: type, path: str) -> ConfigError:
    example = {int: "3", float: "0.1", bool: "true", str: "name", tuple: "a,b"}.get(kind, "")
    hint = f"example: {path}={example}" if example else ""
    return ConfigError(f"{value!r} is not of type {kind.__name__}", where=path, hint=hint)


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        text = text.capitalize()
    try:
        return tuples(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return text


def _tuple(text: str) -> tuple[Any, ...]:
    """Reads `1,2`, `(1, 2)`, `a,b`, `('a', 'b')` and the empty string."""
    try:
        value = ast.literal_eval(text.strip() or "()")
    except (ValueError, SyntaxError):
        if text.lstrip()[0] in "([{":
            raise
        parts = re.findall(r"""(?:'[^']*'|"[^"]*"|[^,])+""", text)
        value = tuple(_literal(part.strip()) for part in parts if part.strip())
    return tuples(value) if isinstance(value, (tuple, list)) else (value,)


def data_follow_seed(config: ConfigDict) -> bool:
    """Returns whether runs that differ in `seed` alone have other data: faults of their own."""
    return config.data.corrupt.get("seed") == "run"


def arms(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Returns what each arm of the study overrides: `{arm: {dotted path: value}}`."""
    return {name: dict(flatten(changes)) for name, changes in config.study.arms.items()}


# Durations.


def total_steps(config: ConfigDict, n_train: int) -> int:
    """Returns the length of training in steps, from whichever unit of `total` is set.

    Batches run on across the end of an epoch, so an epoch is `n_train / batch_size` steps.

    Raises:
      ConfigError: more than 32 bits count.
    """
    per_epoch = n_train / config.batch_size
    total = duration(config, "total", steps_per_epoch=per_epoch, total_steps=0)
    if total >= 2**31:
        raise ConfigError(
            f"training of {total:,} steps",
            where="total",
            hint="below 2**31 steps: they are counted in 32 bits",
        )
    return total


def duration(
    config: ConfigDict,
    path: str,
    *,
    steps_per_epoch: float,
    total_steps: int,
    default: int | None = None,
) -> int:
    """Returns the duration at `path` in steps, at least one.

    Args:
      config: the config.
      path: a group of units, e.g. `"eval.every"`.
      steps_per_epoch: steps that one epoch takes; may be a fraction.
      total_steps: steps that 100 percent are.
      default: steps where no unit is set.

    Raises:
      ConfigError: where two units are set, one is not positive, or none is and there is no default.
    """
    chosen = _unit(config, path)
    if chosen is None:
        if default is None:
            units = " or ".join(f"{path}.{unit}" for unit in _lookup(config, path))
            raise ConfigError("no duration is set", where=path, hint=f"set {units}")
        return default
    unit, value = chosen
    scale = {
        "steps": 1.0,
        "epochs": steps_per_epoch,
        "percent": total_steps / 100,
        "examples": 1 / config.batch_size,
    }[unit]
    return max(1, round(value * scale))


def _unit(config: ConfigDict, path: str) -> tuple[str, float] | None:
    given = {unit: value for unit, value in _lookup(config, path).items() if value is not None}
    if len(given) > 1:
        spelt = " and ".join(f"{unit}={value}" for unit, value in given.items())
        raise ConfigError(
            f"ambiguous duration: {spelt}", where=path, hint="keep one unit, set the others to none"
        )
    for unit, value in given.items():
        if not 0 < value < math.inf:
            hint = "leave every unit unset for none" if path != "total" else ""
            raise ConfigError(f"{value} is not positive", where=f"{path}.{unit}", hint=hint)
        if unit == "percent" and value > 100:
            raise ConfigError(f"{value} percent is more than all of it", where=f"{path}.{unit}")
        return unit, value
    return None


# Checks.


def validate(config: ConfigDict) -> None:
    """Refuses what can be known to be wrong before data and arrays exist.

    Names and keyword arguments of open groups are checked when they are resolved.

    Raises:
      ConfigError: naming the path, what would be right, and the nearest name.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"a config is a ConfigDict, not {type(config).__name__}")
    _check_values(config)
    _check_structure(config, _template(config))
    _check_numbers(config)
    for path, options in _CHOICES.items():
        value = _lookup(config, path)
        if value not in options:
            raise ConfigError(f"unknown value {value!r}", where=path, hint=nearest(value, options))
    if _unit(config, "total") is None:
        raise ConfigError(
            "no length of training is set",
            where="total",
            hint="set exactly one of total.steps, total.epochs, total.examples",
        )
    for path in ("optim.warmup", "bilevel.warmup", "eval.every", "checkpoint.every"):
        _unit(config, path)
    for group in ("objective", "data"):
        if not config[group].name:
            hint = f"name a module of distill_jax.{group.removesuffix('s')}"
            hint += "s" if group == "objective" else ""
            raise ConfigError("no name is set", where=f"{group}.name", hint=hint)
    _check_roles(config)
    _check_data(config)
    _check_cache(config)
    _check_rules(config.optim.decay_mask, where="optim.decay_mask")
    trains_on = config.data.corrupt.get("train_on_held_out", 0)
    nothing_held_out = config.data.held_out == 0 or trains_on == 1
    if config.eval.metric == "" and nothing_held_out:
        pass  # nothing to select on: the last state is the result
    elif _check_metric(config, "eval.metric") == "test":
        raise ConfigError(
            "the test split is read only to report, never to select",
            where="eval.metric",
            hint="use held_out/" + config.eval.metric.partition("/")[2],
        )
    if config.eval.mode != (best := direction(config.eval.metric) or config.eval.mode):
        raise ConfigError(
            f"{config.eval.mode} would select the worst by {config.eval.metric}",
            where="eval.mode",
            hint=f'"{best}" is its better end',
        )
    _check_metric(config, "study.metric")
    _check_study(config)


_CHOICES = {
    "precision": ("float32", "bfloat16", "float64"),
    "data.resident": ("auto", "yes", "no"),
    "data.teacher_view": ("same", "clean", "independent"),
    "cache.rest": ("spread", "drop"),
    "cache.dtype": ("float32", "float16", "bfloat16"),
    "eval.mode": ("max", "min"),
    "study.replicas": ("no", "yes", "auto"),
    "watch.on_stall": ("report", "exit"),
    "watch.nonfinite": ("stop", "skip"),
    "lookahead.kind": ("deep", "wide"),
    "lookahead.restore": ("all", "params+opt", "params"),
}


def _check_values(value: Any, path: str = "", above: tuple[int, ...] = ()) -> None:
    """Refuses what cannot be stored: functions, arrays, a config inside itself, keys of no name.

    Numbers in open groups are finite; those elsewhere have ranges of their own.
    """
    if id(value) in above:
        raise ConfigError("a group holds itself", where=path, hint="store a copy of it")
    if isinstance(value, (Mapping, ConfigDict)):
        for key, item in value.items():
            if not isinstance(key, str):
                hint = "write it as a string, or use a tuple of pairs"
                raise ConfigError(f"the key {key!r} is not a string", where=path, hint=hint)
            _check_values(item, f"{path}.{key}".lstrip("."), (*above, id(value)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_values(item, path, (*above, id(value)))
    elif isinstance(value, float):
        if not math.isfinite(value) and _OPEN.fullmatch(path.rpartition(".")[0]):
            raise ConfigError(f"{value} is not finite", where=path, hint="a finite number")
    elif value is not None and not isinstance(value, (bool, int, str)):
        raise ConfigError(
            f"a config cannot hold a {type(value).__name__}",
            where=path,
            hint="numbers, strings, booleans, tuples, dicts; code is named 'package.module:Symbol'",
        )


def _check_structure(config: ConfigDict, template: ConfigDict, prefix: str = "") -> None:
    for key in config:
        if key not in template:
            raise _unknown(prefix.rstrip("."), key, template)
    for key, default in template.items():
        path = f"{prefix}{key}"
        if key not in config:
            raise ConfigError("missing key", where=path, hint="start from config.base() or role()")
        value = config[key]
        if isinstance(default, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise _mistyped(value, ConfigDict, path)
            if path == "roles" or not _OPEN.fullmatch(path):
                _check_structure(value, default, f"{path}.")
            continue
        kind = template.get_type(key)
        if value is None and default is None:
            continue
        if not (_is_a(value, kind) or (kind is float and type(value) is int)):
            raise _mistyped(value, kind, path)


def _check_numbers(config: ConfigDict) -> None:
    def check(path: str, rule: bool, hint: str) -> None:
        if not rule:
            raise ConfigError(f"{_lookup(config, path)} is out of range", where=path, hint=hint)

    for path in ("batch_size", "accum_steps", "eval.batch_size", "log.every_steps", "optim.lr"):
        check(path, 0 < _lookup(config, path) < math.inf, "a positive number")
    for path in ("batch_size", "eval.batch_size"):
        check(path, _lookup(config, path) < 2**31, "below 2**31: rows are counted in 32 bits")
    check("checkpoint.keep", config.checkpoint.keep >= 1, "at least 1")
    check("lookahead.steps", config.lookahead.steps >= 0, "0 for off, or more")
    check("bilevel.every", config.bilevel.every >= 1, "at least 1")
    check("bilevel.outer_batch", 0 < config.bilevel.outer_batch < math.inf, "a positive share")
    for path in ("bilevel.optim.lr", "bilevel.optim.weight_decay"):
        check(path, 0 <= _lookup(config, path) < math.inf, "0 or more")
    for path in ("watch.stall_seconds", "watch.spike"):
        check(path, 0 <= _lookup(config, path) < math.inf, "0 for off, or more")
    check("seed", 0 <= config.seed < 2**32, "from 0 to 2**32 - 1")
    check("data.held_out", 0 <= config.data.held_out < 1, "a fraction from 0 to below 1")
    check("optim.weight_decay", 0 <= config.optim.weight_decay < math.inf, "0 or more")
    clip = config.optim.clip_norm
    check("optim.clip_norm", clip is None or 0 < clip < math.inf, "positive, or none for no limit")
    axes = ("data", "fsdp", "model")
    for axis in axes:
        size = config.mesh[axis]
        check(f"mesh.{axis}", size >= 1 or size == -1, "at least 1, or -1 for what is left")
    if sum(config.mesh[axis] == -1 for axis in axes) > 1:
        raise ConfigError("only one axis can take what is left", where="mesh", hint="set one")
    check("data.views", config.data.views >= 0, "0 for a new view every epoch, or more")
    check("mesh.cpu_devices", config.mesh.cpu_devices >= 0, "0 for automatic, or more")
    check("partition.min_size", config.partition.min_size >= 0, "0 or more")
    if config.batch_size % config.accum_steps:
        raise ConfigError(
            f"{config.batch_size} examples do not divide into {config.accum_steps} micro-batches",
            where="accum_steps",
            hint="a divisor of batch_size",
        )


def _check_roles(config: ConfigDict) -> None:
    trainable = [n for n, r in config.roles.items() if not r.frozen and r.ema_of is None]
    for name, group in config.roles.items():
        where = f"roles.{name}"
        if group.ema_of is not None:
            if group.frozen:
                raise ConfigError(
                    "a frozen role cannot be a moving average",
                    where=f"{where}.frozen",
                    hint=f"drop frozen, or drop {where}.ema_of",
                )
            if group.ema_of not in trainable:
                raise ConfigError(
                    f"{group.ema_of!r} is not a trainable role",
                    where=f"{where}.ema_of",
                    hint=nearest(group.ema_of, trainable),
                )
            if not 0 <= group.decay <= 1:
                raise ConfigError(
                    f"{group.decay} is out of range", where=f"{where}.decay", hint="from 0 to 1"
                )
            if group.decay_schedule not in ("constant", "cosine", "linear"):
                raise ConfigError(
                    f"unknown value {group.decay_schedule!r}",
                    where=f"{where}.decay_schedule",
                    hint=nearest(group.decay_schedule, ("constant", "cosine", "linear")),
                )
        elif not group.model and not group.init:
            raise ConfigError(
                "no model is named",
                where=f"{where}.model",
                hint="name a module of distill_jax.models, or set init or ema_of",
            )
    if not trainable:
        hint = "add role(model, ...) that is neither frozen nor a moving average"
        raise ConfigError("no role is trainable", where="roles", hint=hint)


def _check_data(config: ConfigDict) -> None:
    used = (*config.data.train_transforms, *config.data.eval_transforms)
    for path in ("data.train_transforms", "data.eval_transforms"):
        for transform in _lookup(config, path):
            if not isinstance(transform, str):
                raise _mistyped(transform, str, path)
    for group in ("objective", "weighting"):
        for name in ("total_steps", "steps_per_epoch", "num_examples"):
            if name in config[group].kwargs:
                raise ConfigError(
                    "is known to the run, and would be overruled",
                    where=f"{group}.kwargs.{name}",
                    hint="leave it out",
                )
    if "held_out" in config.data.kwargs:
        raise ConfigError(
            "would overrule data.held_out",
            where="data.kwargs.held_out",
            hint="set data.held_out, and leave this out",
        )
    for transform in config.data.transform_kwargs:
        if transform not in used:
            raise ConfigError(
                f"arguments for {transform!r}, which is not among the transforms",
                where=f"data.transform_kwargs.{transform}",
                hint=nearest(transform, used),
            )


def _check_cache(config: ConfigDict) -> None:
    cache = config.cache
    if not cache.dir:
        if cache.teacher:
            raise ConfigError(
                "a function that answers for a teacher is asked beforehand",
                where="cache.dir",
                hint="name the folder of its answers",
            )
        return
    for path in ("cache.roles", "cache.outputs"):
        if not _lookup(config, path) or not all(isinstance(x, str) for x in _lookup(config, path)):
            raise ConfigError("needs names", where=path, hint="('teacher',) or ('logits',)")
    if cache.teacher and len(cache.roles) != 1:
        raise ConfigError("one function answers for one role", where="cache.roles")
    if cache.teacher and cache.roles[0] in config.roles:
        raise ConfigError(
            f"{cache.teacher} answers for it, so that it has no network",
            where=f"roles.{cache.roles[0]}",
            hint="delete the role, or cache.teacher",
        )


def _check_rules(rules: Iterable[Any], *, where: str) -> None:
    for rule in rules:
        match rule:
            case (str(pattern), bool()):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"{pattern!r} is not a regex: {error}", where=where) from None
            case _:
                hint = '("kernel$", True)'
                raise ConfigError(f"{rule!r} is not a rule", where=where, hint=f"example: {hint}")


def _check_metric(config: ConfigDict, path: str) -> str:
    metric = _lookup(config, path)
    split, slash, name = metric.partition("/")
    if not (slash and name):
        hint = f"split/metric, such as held_out/{metric or 'accuracy'}"
        raise ConfigError(f"{metric!r} names no split or no metric", where=path, hint=hint)
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}", where=path, hint=nearest(split, SPLITS))
    if split == "train":
        raise ConfigError(
            "evaluators do not measure the train split", where=path, hint=f"use held_out/{name}"
        )
    return split


def _check_study(config: ConfigDict) -> None:
    study = config.study
    for seed in study.seeds:
        if not _is_a(seed, int) or seed < 0:
            raise ConfigError(f"{seed!r} is not a seed", where="study.seeds", hint="(0, 1, 2)")
    if len(set(study.seeds)) != len(study.seeds):
        raise ConfigError(f"{study.seeds} repeats a seed", where="study.seeds", hint="(0, 1, 2)")
    if study.reference and study.reference not in study.arms:
        raise ConfigError(
            f"{study.reference!r} is not an arm",
            where="study.reference",
            hint=nearest(study.reference, study.arms),
        )
    for arm in study.sources:
        if arm not in study.arms or arm == study.reference:
            what = "the reference" if arm == study.reference else "not an arm"
            hint = nearest(arm, set(study.arms) - {study.reference})
            raise ConfigError(f"{arm!r} is {what}", where="study.sources", hint=hint)
    for name, figure in study.published.items():
        where = f"study.published.{name}"
        if name not in study.arms:
            hint = nearest(name, study.arms)
            raise ConfigError(f"{name!r} is not an arm", where=where, hint=hint)
        if not _is_a(figure, (int, float)):
            raise ConfigError(f"{figure!r} is not a number", where=where, hint="0.7066")
    for name, candidates in study.tuned.items():
        where = f"study.tuned.{name}"
        if name in study.arms:
            raise ConfigError("an arm has this name", where=where, hint="choose another")
        if not isinstance(candidates, (tuple, list)) or not candidates:
            raise ConfigError(f"{candidates!r} lists no arms", where=where, hint="('a', 'b')")
        for arm in candidates:
            if arm not in study.arms:
                raise ConfigError(
                    f"{arm!r} is not an arm", where=where, hint=nearest(arm, study.arms)
                )
    for name, arms in study.questions.items():
        where = f"study.questions.{name}"
        known = [arm for arm in (*study.arms, *study.tuned) if arm not in study.sources]
        if not isinstance(arms, (tuple, list)) or len(arms) < 2 or len(set(arms)) < len(arms):
            what = f"{arms!r} does not compare two arms"
            raise ConfigError(what, where=where, hint="(arm, reference, other arms ...)")
        for arm in arms:
            if arm not in known:
                what = f"{arm!r} is not an arm that is compared"
                raise ConfigError(what, where=where, hint=nearest(arm, known))
    for name, changes in study.arms.items():
        if not isinstance(changes, ConfigDict):
            raise _mistyped(changes, ConfigDict, f"study.arms.{name}")
        if not re.fullmatch(r"[\w+-][\w.+-]*", name) or len(name.encode()) > LONGEST_NAME:
            raise ConfigError(
                f"{name[:50]!r}{'...' if len(name) > 50 else ''} cannot be the name of a folder",
                where="study.arms",
                hint=f"at most {LONGEST_NAME} bytes: letters, digits, '_', '-', '+' and '.', "
                "not first a '.'",
            )
        if "seed" in changes:
            raise ConfigError(
                "every arm is run with the seeds of the study",
                where=f"study.arms.{name}.seed",
                hint="set study.seeds, and leave this out",
            )
        if "study" in changes:
            raise ConfigError("an arm cannot change the study", where=f"study.arms.{name}.study")
        try:
            changed = override(config, dict(flatten(changes)))
            changed.study = base().study
            validate(changed)
        except ConfigError as error:
            where = f"study.arms.{name}.{error.where}"
            raise ConfigError(error.what, where=where, hint=error.hint) from None


# Files.


def to_json(config: ConfigDict) -> str:
    """Returns the resolved config as indented JSON."""
    return json.dumps(config.copy_and_resolve_references().to_dict(), indent=2, default=_refuse)


def _refuse(value: Any) -> Any:
    raise ConfigError(
        f"{value!r} cannot be stored",
        where="config",
        hint="use numbers, strings, booleans, tuples and dicts",
    )


def from_json(text: str, *, where: str = "config.json") -> ConfigDict:
    """Returns the config that `to_json` wrote, locked and typed as `base()`.

    Args:
      text: JSON.
      where: the file to name in errors.

    Raises:
      ConfigError: for text that is not a config of this version.
    """
    try:
        stored = parse_json(text.encode("utf-8", "replace"), where, optional={"roles": Mapping})
    except DamagedFile as error:
        raise ConfigError(error.what, where=where) from None
    config = base()
    for name in stored.get("roles", {}):
        if not re.fullmatch(r"\w+", str(name)):
            raise ConfigError(f"{name!r} is no name of a role", where=f"{where}: roles")
        config.roles[name] = role()
    for path, value in flatten(stored).items():
        node, key, is_open = _place(config, path)
        if value is None and isinstance(node.get(key), ConfigDict):
            raise ConfigError("is null, not a group", where=f"{where}: {path}")
        try:
            if not _is_empty(value):
                node[key] = value
            elif is_open:
                node[key] = ConfigDict()
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(str(error), where=f"{where}: {path}") from None
    return config


_ABSENT = "(absent)"


def differences(
    a: ConfigDict | Mapping[str, Any],
    b: ConfigDict | Mapping[str, Any],
    *,
    ignore: Iterable[str] = (),
) -> list[str]:
    """Returns `"path: old -> new"` for every leaf in which two configs differ.

    Args:
      a: the old config.
      b: the new config.
      ignore: paths of leaves or groups that do not count.
    """
    old, new = flatten(a), flatten(b)
    ignore = tuple(ignore)

    def counts(path: str) -> bool:
        return not any(path == group or path.startswith(f"{group}.") for group in ignore)

    return [
        f"{path}: {_show(old, path)} -> {_show(new, path)}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path, _ABSENT) != new.get(path, _ABSENT) and counts(path)
    ]


def _show(flat: Mapping[str, Any], path: str) -> str:
    return repr(flat[path]) if path in flat else _ABSENT
