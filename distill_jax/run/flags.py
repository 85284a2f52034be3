"""The command line: a config file, overrides of its values, a mode and a folder.

`ml_collections.config_flags` reads `sys.argv`, answers a misspelt key with a traceback and refuses
new keys in open groups. The same syntax is parsed here, so that every error is a `UserError`.
Nothing here imports JAX.
"""

import dataclasses
import difflib
import inspect
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from distill_jax.core.errors import ConfigError, UserError, nearest
from distill_jax.run import config as config_lib
from distill_jax.run import config_files, paths, resolve, unused
from distill_jax.run import workdir as workdir_lib
from distill_jax.run.config.durations import spelled
from distill_jax.trainer.io.files import read_text
from distill_jax.trainer.io.paths import absolute, check_folder, check_places, for_checkpoints

MODES = {
    "train": "train, evaluate and write the report; continues a run that the workdir holds",
    "eval": "evaluate the last and the best checkpoint of a workdir, on its data or on others",
    "export": "write the best network for other programs: --formats=onnx,... (docs/export.md)",
    "describe": "print networks, parameters, memory and cost of a config or of a workdir",
    "study": "train every arm with every seed, then compare the arms",
    "compare": "compare runs: RUN RUN ..., folders or patterns, the reference first; --metric=NAME",
}

STORED = ("eval", "describe", "export")
"""Modes that take their config from the workdir where none is given."""

EXPORT_FLAGS = ("formats", "outputs", "preprocessing", "role")

PROCESS_FLAGS = ("coordinator", "num_processes", "process_id")

USAGE = """\
usage: python -m distill_jax.main --config=FILE[:ARG] --workdir=DIR [--mode=MODE]
           [--config.KEY=VALUE ...] [--trust=package.module,...]

modes:
{modes}

example:
  python -m distill_jax.main --config=configs/distill/kd.py:smoke --workdir=runs/kd \\
      --config.optim.lr=0.05 --config.total="10 epochs"

common overrides (distill_jax/run/config/schema.py describes every key):
  --config.seed=1                              seed of initialization, order and augmentation
  --config.total="20 epochs"                   length of training; a plain number counts steps
  --config.batch_size=256                      examples per step, over all devices
  --config.optim.lr=0.05                       peak learning rate
  --config.optim.clip_norm=none                `none` unsets an optional value
  --config.objective.kwargs.temperature=4      keyword argument of the method
  --config.eval.metric=held_out/nll            metric that selects the best checkpoint
  --config.eval.mode=min                       whether the best value is the max or the min
  --config.study.seeds=0,1,2                   commas make a tuple; quote a text: "'a, b'"
  --config.data.corrupt={{}}                     `{{}}` empties an open group
  --config.evaluators.calibration=none         `none` deletes a role or an evaluator
  --config.roles.teacher.init=runs/teacher     start from the checkpoint of another run
  --config.precision=bfloat16                  compute type
  --start_over                                 move an earlier run or study aside, begin at step 0
  --stop_at="30 %"                             stop at an evaluation; without it: continue
  --extend="40 epochs"                         continue the run in the workdir to this new total
  --change=optim.lr,evaluators                 accept new values from here on: docs/continuing.md

your own code: write `package.module:Symbol` in a config. Modules are found from the current folder.
Names in the config file and on the command line are imported. Names in stored files of a run (when
no config is given, or a network comes from another run) are imported only if you trust them:
  --trust=package.module                       modules that stored files may name

several processes (detected under SLURM, Kubernetes and on TPU hosts; see launch/):
  --coordinator=HOST:PORT --num_processes=N --process_id=I
"""

_CONFIG = re.compile(r"--?(?P<no>no)?config(?:\.(?P<path>[^=]+))?(?:=(?P<value>.*))?", re.DOTALL)
_NUMBER = re.compile(r"-[\d.]")


@dataclasses.dataclass(frozen=True)
class Flags:
    """A parsed command line.

    Attributes:
      config: the locked config with all overrides.
      workdir: folder of the run or study; may be absent on disk, None where the mode needs none.
      mode: a key of `MODES`.
      config_spec: the value of `--config`, or the path of the stored config.
      overrides: values of the `--config.KEY` flags, as text by dotted path.
      trusted: names and modules that may be imported, see `resolve.resolve`.
      start_over: whether to move the earlier run or study in the workdir aside first.
      changes: keys in which the config may differ from that of the run in the workdir, see
        `workdir.changes`; "total" for --extend.
      export: arguments of `run.export.export_run`, in mode export.
      runs: folders and patterns of the runs to compare, in mode compare.
      metric: metric of the comparison; empty for that of the runs.
      stop_at: duration after which training stops, with its state saved; empty for its end.
      coordinator: address of process 0, if given.
      num_processes: number of processes, if given.
      process_id: index of this process, if given.
    """

    config: config_lib.ConfigDict
    workdir: pathlib.Path | None
    mode: str
    config_spec: str
    overrides: Mapping[str, str]
    trusted: frozenset[str]
    start_over: bool = False
    changes: frozenset[str] = frozenset()
    export: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    runs: Sequence[str] = ()
    metric: str = ""
    stop_at: str = ""
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def usage() -> str:
    """Returns the text of `--help`."""
    return USAGE.format(modes="\n".join(f"  {name:<9} {text}" for name, text in MODES.items()))


def parse(argv: Sequence[str]) -> Flags:
    """Parses a command line. It keeps no state between calls and does not read `sys.argv`.

    `--help` prints the usage and exits with code 0.

    Args:
      argv: program name, then the flags.

    Raises:
      UserError: for any error in the command line, the config file or an override.
    """
    if any(re.fullmatch(r"-h|--?help(full|short)?", arg) for arg in argv[1:]):
        print(usage())
        raise SystemExit(0)
    spec, overrides, rest = _split(argv)
    plain = _parse_plain(rest)
    mode, workdir, modules = plain.mode, plain.workdir, plain.trusted
    if mode in ("export", "compare") and (spec is not None or overrides):
        where = f"--config.{next(iter(overrides))}" if overrides else "--config"
        held = "checkpoint holds" if mode == "export" else "runs hold"
        what = f"mode {mode} takes the config that the {held}"
        raise UserError(what, where=where, hint="leave it out")
    if mode == "compare":
        runs, metric = plain.runs, plain.metric
        return Flags(config_lib.base(), workdir, mode, "", {}, modules, runs=runs, metric=metric)
    from_run = spec is None
    changes = _changes(plain, overrides, from_run=from_run)
    if plain.extend is not None:
        overrides = {**overrides, workdir_lib.changes.LENGTH: _new_total(plain.extend, overrides)}
    if spec is None:
        spec, config = _stored(workdir, continues=bool(changes), mode=mode)
    else:
        config = load(spec)
    # A stored config is data: a name in it is no reason to import a module.
    trusted = modules.union(*map(resolve.NAME.findall, overrides.values()))
    before = config
    config_lib.refuse_old_keys(overrides, prefix="--config.")
    config = config_lib.override(config, overrides)
    config_lib.validate(config)
    # A stored config may belong to an arm, which need not read every key that it inherits.
    if mode != "eval" and not from_run:
        unused.check(config, changes=overrides, before=before)
    if not from_run:
        trusted |= resolve.names_in(config)
    config = paths.of_config(config)
    flags.FLAGS.mark_as_parsed()  # libraries such as grain require parsed flags
    return Flags(
        config,
        workdir,
        mode,
        spec,
        overrides,
        trusted,
        start_over=plain.start_over,
        changes=changes,
        stop_at=plain.stop_at,
        export=plain.export,
        **plain.processes,
    )


def _stored(
    workdir: pathlib.Path | None, *, mode: str, continues: bool
) -> tuple[str, config_lib.ConfigDict]:
    """Returns the config of the run in a folder, and where it is stored."""
    if workdir is None or not (continues or mode in STORED):
        hint = "--config=FILE[:ARG], for example --config=configs/distill/kd.py:smoke"
        raise UserError("no config is given", where="--config", hint=hint)
    file = workdir / "config.json"
    given = config_lib.from_json(read_text(file)) if os.path.lexists(file) else None
    stored = workdir_lib.stored_config(workdir)
    if given is None:
        if stored is None:
            hint = "give the folder of a run, or --config=FILE[:ARG]"
            raise UserError("holds no config.json", where=str(workdir), hint=hint)
        return str(workdir), stored
    if stored is None:
        return str(file), given
    # A run that went on differently and was killed has saved no state under its new config.
    _, others = workdir_lib.changes.split(
        config_lib.changed(stored, given), workdir_lib.changes.STORED
    )
    return str(file), given if others else stored


def _changes(plain: "_Plain", overrides: Mapping[str, str], *, from_run: bool) -> frozenset[str]:
    """Returns the keys in which the config may differ from that of the run in the workdir.

    In mode eval, overrides of the config of a run ask for themselves.

    Raises:
      UserError: the workdir holds no run that could go on, or a flag does not fit the others.
    """
    lib, mode = workdir_lib.changes, plain.mode
    flag = "--extend" if plain.extend is not None else "--change"
    if plain.extend is not None and mode != "train":
        raise UserError(f"mode {mode} trains no single run", where=flag, hint="leave it out")
    lib.check_names(plain.change, mode)
    if (plain.extend is not None or plain.change) and plain.start_over:
        what = "a run that starts over does not go on"
        raise UserError(what, where=flag, hint="leave out one of it and --start_over")
    names = set(plain.change)
    if from_run and (idle := [k for k in sorted(names) if not lib.touched(k, overrides)]):
        hint = f"--config.{idle[0]}=VALUE sets it"
        raise UserError(f"{idle[0]} is not set to another value", where="--change", hint=hint)
    if mode == "train" and (names or plain.extend is not None):
        assert plain.workdir is not None
        lib.check_extendable(plain.workdir, flag)
    if mode == "eval" and from_run:
        for path in overrides:
            if lib.within(path, [f"data.{key}" for key in lib.UNMEASURED]):
                what = "evaluation does not read it"
                raise UserError(what, where=f"--config.{path}", hint="leave it out")
        names |= {group for group in lib.EVALUATION if lib.touched(group, overrides)}
    return frozenset(names | ({lib.LENGTH} if plain.extend is not None else set()))


def _new_total(extend: str, overrides: Mapping[str, str]) -> str:
    """Returns the value of --extend as a duration in its one spelling."""
    if "total" in overrides:
        what = "it sets the new total, as --config.total does"
        raise UserError(what, where="--extend", hint="leave --config.total out")
    if extend.strip().startswith("+"):
        hint = 'a run of 10 epochs goes on for 10 more with --extend="20 epochs"'
        raise UserError(f"{extend!r}: it takes the new total", where="--extend", hint=hint)
    try:
        return spelled(extend, "total")
    except ConfigError as error:
        raise UserError(error.what, where="--extend", hint=error.hint) from None


def _split(argv: Sequence[str]) -> tuple[str | None, dict[str, str], list[str]]:
    """Returns the config spec, the overrides in order, and the other arguments."""
    spec: str | None = None
    overrides: dict[str, str] = {}
    rest = list(argv[:1])
    args = list(argv[1:])
    while args:
        arg = args.pop(0)
        match = _CONFIG.fullmatch(arg)
        if not match:
            rest.append(arg)
            continue
        path, value = match["path"], match["value"]
        if match["no"]:
            if not path or value is not None:
                raise UserError("unknown flag", where=arg, hint="write --config.KEY=false")
            value = "false"
        elif value is None and args and (not args[0].startswith("-") or _NUMBER.match(args[0])):
            value = args.pop(0)
        if value is None or (not path and not value):
            shape = f"--config.{path}=VALUE" if path else "--config=FILE[:ARG]"
            raise UserError("the flag has no value", where=arg, hint=f"write {shape}")
        if not path:
            if spec is not None:
                raise UserError("the flag is given twice", where="--config", hint="keep one")
            spec = value
        elif spec is None and any(re.match(r"--?config(=|$)", later) for later in args):
            raise UserError(
                "an override stands before the config that it changes",
                where=arg,
                hint="put --config=FILE first",
            )
        else:
            overrides[path] = value
    return spec, overrides, rest


class _Plain(NamedTuple):
    """The flags other than those of the config; attributes as those of `Flags`."""

    mode: str
    workdir: pathlib.Path | None
    start_over: bool
    extend: str | None
    change: tuple[str, ...]
    trusted: frozenset[str]
    export: dict[str, Any]
    processes: dict[str, Any]
    runs: Sequence[str]
    metric: str
    stop_at: str


def _parse_plain(argv: Sequence[str]) -> _Plain:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("mode", "train", "what to do", flag_values=values)
    flags.DEFINE_boolean("start_over", False, "move an earlier run aside", flag_values=values)
    flags.DEFINE_string("extend", None, "new total of a run", flag_values=values)
    flags.DEFINE_multi_string("change", [], "keys that may change", flag_values=values)
    flags.DEFINE_multi_string("trust", [], "modules that stored files may name", flag_values=values)
    flags.DEFINE_list("formats", None, "formats to export", flag_values=values)
    flags.DEFINE_list("outputs", None, "outputs of the exported network", flag_values=values)
    flags.DEFINE_boolean("preprocessing", None, "export the transforms too", flag_values=values)
    flags.DEFINE_string("role", None, "network to export", flag_values=values)
    flags.DEFINE_string("metric", None, "metric of a comparison", flag_values=values)
    flags.DEFINE_string("stop_at", None, "when to stop and save", flag_values=values)
    flags.DEFINE_string("coordinator", None, "address of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "number of processes", flag_values=values)
    flags.DEFINE_integer("process_id", None, "index of this process", flag_values=values)
    for arg in argv[1:]:  # absl handles these two itself and would ignore the flags they name
        if match := re.fullmatch(r"--?(undefok|flagfile)(=.*)?", arg, re.DOTALL):
            raise _unknown_flag(match[1])
    try:
        positional = values(list(argv) or [""])[1:]
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname) from None
    except flags.Error as error:
        raise UserError(str(error), where="command line", hint="see --help") from None
    mode = values["mode"].value or ""
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}", where="--mode", hint=nearest(mode, MODES))
    if positional and mode != "compare":
        raise UserError(
            "not a flag", where=positional[0], hint="flags are written --name=value; see --help"
        )
    metric = values["metric"].value
    if metric is not None and mode != "compare":
        raise UserError(f"mode {mode} compares nothing", where="--metric", hint="--mode=compare")
    processes = {name: values[name].value for name in PROCESS_FLAGS}
    start_over = bool(values["start_over"].value)
    if start_over and mode not in ("train", "study"):
        raise UserError(f"mode {mode} starts nothing", where="--start_over", hint="leave it out")
    stop_at = values["stop_at"].value
    if stop_at is not None:
        if mode != "train":
            raise UserError(
                f"mode {mode} trains no single run", where="--stop_at", hint="leave it out"
            )
        stop_at = spelled(stop_at, "--stop_at")
    options = {name: values[name].value for name in EXPORT_FLAGS}
    options = {name: value for name, value in options.items() if value is not None}
    if options and mode != "export":
        where = f"--{next(iter(options))}"
        raise UserError(f"mode {mode} exports nothing", where=where, hint="--mode=export")
    change = [name.strip() for text in values["change"].value or () for name in text.split(",")]
    return _Plain(
        mode=mode,
        workdir=_workdir(values["workdir"].value, mode),
        start_over=start_over,
        extend=values["extend"].value,
        change=tuple(change),
        trusted=_modules(values["trust"].value or ()),
        export=options,
        processes=processes,
        runs=positional,
        metric=metric or "",
        stop_at=stop_at or "",
    )


def _modules(given: Sequence[str]) -> frozenset[str]:
    modules = frozenset(name for text in given for name in text.split(","))
    for name in modules:
        if not all(part.isidentifier() for part in name.split(".")):
            hint = "--trust=package.module[,package.module]"
            raise UserError(f"{name!r} names no module", where="--trust", hint=hint)
    return modules


def _unknown_flag(name: str) -> UserError:
    known = (
        "config",
        "workdir",
        "mode",
        "start_over",
        "extend",
        "change",
        "trust",
        "metric",
        "stop_at",
        "help",
        *EXPORT_FLAGS,
        *PROCESS_FLAGS,
    )
    parts = name.split(".")
    hint = nearest(parts[-1], known)
    paths = [
        p for p in config_lib.flatten(config_lib.base()) if p.split(".")[-len(parts) :] == parts
    ]
    if paths:
        hint = f"did you mean --config.{min(paths, key=len)}?"
    elif len(parts) > 1 and parts[1] and difflib.get_close_matches(parts[0], ["config"]):
        hint = "did you mean --config." + ".".join(parts[1:]) + "?"
    return UserError("unknown flag", where=f"--{name}", hint=hint)


def _workdir(text: str | None, mode: str) -> pathlib.Path | None:
    if not text:
        if mode == "describe":
            return None
        hint = "--workdir=runs/NAME, the folder for checkpoints, metrics and the report"
        raise UserError(f"mode {mode} needs a folder", where="--workdir", hint=hint)
    workdir = for_checkpoints(absolute(text, where="--workdir"), where="--workdir")
    if mode in ("eval", "export") and not os.path.lexists(workdir):
        hint = f"mode {mode} reads the workdir of a finished run"
        raise UserError(f"{workdir} does not exist", where="--workdir", hint=hint)
    if mode == "describe":
        if os.path.lexists(workdir) and not workdir.is_dir():
            raise UserError(f"{workdir} is a file", where="--workdir", hint="name a folder")
        return workdir
    hint = "choose another folder or change its permissions"
    check_folder(workdir, where="--workdir", hint=hint)
    check_places(
        workdir, files=workdir_lib.WRITTEN[mode], folders=workdir_lib.WRITTEN_FOLDERS[mode]
    )
    return workdir


def load(spec: str) -> config_lib.ConfigDict:
    """Returns what `get_config` of a config file returns.

    Args:
      spec: `"path.py"` or the name of a shipped config, such as `"kd"` or `"distill/kd"`. A
        suffix `":arg"` calls `get_config(arg)`. Commas separate options. Every config has the
        option `smoke` (see `config.smoke`), which is not passed to `get_config`.

    Raises:
      UserError: the file is missing, raises an exception, or does not return a config.
    """
    name, _, arg = (spec, "", "") if os.path.isfile(spec) else spec.partition(":")
    options = arg.split(",") if arg else []
    arg = ",".join(option for option in options if option != "smoke")
    path = config_files.find(name)
    namespace = config_files.run(path)
    get_config = namespace.get("get_config")
    if not callable(get_config):
        functions = [key for key, value in namespace.items() if inspect.isfunction(value)]
        raise ConfigError(
            "get_config is not defined", where=name, hint=nearest("get_config", functions)
        )
    args = (arg,) if arg else ()
    try:
        inspect.signature(get_config).bind(*args)
    except TypeError:
        hint = f"drop ':{arg}'" if arg else f"write --config={name}:ARG"
        what = f"get_config{inspect.signature(get_config)} does not take {len(args)} arguments"
        raise ConfigError(what, where=spec, hint=hint) from None
    with config_files.explained(path):
        config = get_config(*args)
    if not isinstance(config, config_lib.ConfigDict):
        raise ConfigError(
            f"get_config returned {type(config).__name__}",
            where=name,
            hint="return a config that starts from distill_jax.run.config.base()",
        )
    return config_lib.smoke(config) if "smoke" in options else config
