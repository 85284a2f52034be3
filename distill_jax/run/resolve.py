"""Resolves names in a config to functions bound to checked keyword arguments.

Importing a module runs it, and a name may come from a file that somebody else wrote: the config of
a run, or the metadata of a checkpoint. Such a name can only refer to public modules of this package
and to names that the user passes now. Anything else is refused before it is imported. See
`resolve`.
"""

import dataclasses
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from distill_jax.core.errors import (
    ConfigError,
    below,
    explained,
    nearest,
    raised_by_code,
    text_of,
)
from distill_jax.run import old_configs

_NOUNS = {"data": "data set"}
NAME = re.compile(r"[\w.]+:[\w.]+")
_DEFINES_MAKE = re.compile(r"^(def make\(|class make\b|make\b.*=|from .* import .*\bmake\b)", re.M)


def available(package: str) -> list[str]:
    """Returns the modules of `distill_jax.<package>` that offer `make`, without importing them."""
    root = importlib.import_module(f"distill_jax.{package}")
    names = []
    for module in pkgutil.iter_modules(root.__path__):
        path = pathlib.Path(getattr(module.module_finder, "path", ""), module.name)
        path = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
        if not module.name.startswith("_") and _DEFINES_MAKE.search(path.read_text("utf-8")):
            names.append(module.name)
    return sorted(names)


def names_in(value: Any) -> frozenset[str]:
    """Returns the keys and values of a config or a mapping that may be `package.module:Symbol`."""
    if isinstance(value, str):
        return frozenset({value} if ":" in value else ())
    if isinstance(value, ConfigDict):
        value = dict(value.items())
    if isinstance(value, Mapping):
        value = (*value.keys(), *value.values())
    if isinstance(value, (tuple, list, set, frozenset)):
        return frozenset().union(*map(names_in, value))
    return frozenset()


def resolve(
    package: str, name: str, *, where: str, trusted: Collection[str] = ()
) -> Callable[..., Any]:
    """Returns the object that a name in the config refers to.

    A name without a colon is a module of `distill_jax.<package>`, and refers to its `make`. Three
    kinds of `"package.module:Symbol"` are imported:

    - a name that is trusted itself, whatever it leads to;
    - a name in a trusted module, or in the module of a trusted name, if the symbol is defined in
      such a module: objects that a module imports from elsewhere cannot be reached through it;
    - a name in a public module of `distill_jax.<package>`, if the symbol is defined there.

    Args:
      package: `"objectives"`, `"models"`, `"data"`, `"evaluators"` or `"weightings"`.
      name: the name.
      where: the config path of the name.
      trusted: names `"package.module:Symbol"` and modules `"package.module"` that the user gives
        now: on the command line, or in the config file that it names.

    Raises:
      ConfigError: for a name that does not exist or is not trusted, or a module that fails to
        import; the failure is its cause.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError("no name is set", where=where, hint=nearest("", available(package)))
    allowed: Callable[[str | None], bool] | None = None  # None: the name itself is trusted
    if ":" in name:
        module_name, _, symbol = name.partition(":")
        if name not in trusted:
            allowed = _allowed(package, name, where=where, trusted=trusted)
        missing = ConfigError(
            f"no module named {module_name!r}",
            where=where,
            hint="write package.module:Symbol, with the package on the Python path",
        )
    else:
        module_name, symbol = f"distill_jax.{package}.{name}", "make"
        missing = ConfigError(
            f"unknown {_NOUNS.get(package, package.removesuffix('s'))} {name!r}",
            where=where,
            hint=nearest(name, available(package)),
        )
        if name not in available(package):
            raise missing
    target: Any = _import(module_name, missing=missing, where=where)
    for part in symbol.split("."):
        with explained(f"{name} cannot be looked up", where=where):
            if not hasattr(target, part):
                public = [n for n in dir(target) if not n.startswith("_")]
                what = f"{module_name} has no {symbol!r}"
                raise ConfigError(what, where=where, hint=nearest(part, public))
            target = getattr(target, part)
        if allowed is not None and isinstance(target, types.ModuleType):
            raise _foreign(name, f"is reached through the module {target.__name__}", where)
    if allowed is not None and not allowed(_home(target)):
        raise _foreign(name, f"is defined in {_home(target) or 'no module'}", where, _home(target))
    if not callable(target):
        raise ConfigError(f"{name} is a {type(target).__name__}, not a function", where=where)
    return target


def _allowed(
    package: str, name: str, *, where: str, trusted: Collection[str]
) -> Callable[[str | None], bool]:
    """Returns which modules may define the symbol of a name that is not trusted itself.

    Raises:
      ConfigError: the module of the name must not even be imported.
    """
    module, _, symbol = name.partition(":")
    named = (item for item in trusted if ":" not in item or NAME.fullmatch(item))
    modules = {item.partition(":")[0] for item in named}
    if any(part.startswith("_") for part in symbol.split(".")):
        raise _foreign(name, "has a private part", where)
    if module in modules:
        return modules.__contains__
    root = f"distill_jax.{package}"
    if not f"{module}.".startswith(f"{root}.") or "._" in module:
        raise _foreign(name, f"is code outside {root}", where, module)
    return lambda home: f"{home}.".startswith(f"{root}.")


def _home(target: Any) -> str | None:
    """Returns the module that defines a function or class, of a partial that of its function."""
    while isinstance(target, functools.partial):
        target = target.func
    return getattr(target, "__module__", None)


def _foreign(name: str, why: str, where: str, module: str | None = None) -> ConfigError:
    trust = f"if you trust it, add --trust={module}, or " if module else ""
    return ConfigError(
        f"{name!r}, which a stored file names, {why}",
        where=where,
        hint=f"{trust}name it in the config file or on the command line: names in stored files "
        "of a run are not imported",
    )


def _import(name: str, *, missing: ConfigError, where: str) -> types.ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise missing
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The module itself or a parent of it is absent, as opposed to something that it imports.
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise missing from None
        raise _broken(name, error, where) from error
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if not raised_by_code(error):
            raise
        raise _broken(name, error, where) from error


def _broken(name: str, error: BaseException, where: str) -> ConfigError:
    return ConfigError(
        f"module {name} exists but its import failed: {type(error).__name__}: {text_of(error)}",
        where=where,
    )


def bind(
    fn: Callable[..., Any],
    kwargs: Mapping[str, Any],
    *,
    where: str,
    provided: Mapping[str, Any] = types.MappingProxyType({}),
) -> functools.partial[Any]:
    """Binds keyword arguments after checking them against the signature of `fn`.

    Args:
      fn: a function or class.
      kwargs: the arguments that the config sets.
      where: the config path of `kwargs`.
      provided: values such as `num_classes` that are passed if `fn` accepts them and the config
        does not set them.

    Raises:
      ConfigError: for a keyword that is not accepted, one that is missing, or a value of another
        type than annotated.
    """
    kwargs = {name: _plain(value) for name, value in kwargs.items()}
    try:
        keywords, open_ended = _keywords(fn)
    except ValueError:  # of a built-in type, which has none
        what = f"{getattr(fn, '__name__', fn)} is built in, and its arguments cannot be inspected"
        raise ConfigError(what, where=where, hint="name a function or class of Python") from None
    named = fn.func if isinstance(fn, functools.partial) else fn
    label = getattr(named, "__qualname__", repr(named))
    if label == "make":  # of a module, which the config names
        label = fn.__module__.rpartition(".")[2]
    for name in kwargs:
        if name not in keywords and not open_ended:
            hint = nearest(name, keywords)
            new = old_configs.renamed(f"{where}.{name}").removeprefix(f"{where}.")
            if new != name and new in keywords:
                hint = f"write {where}.{new}={kwargs[name]}"
            if (new := old_configs.METHODS.get(name)) in keywords:
                hint = f'write {where}.{new}="{kwargs[name]} epochs"'
            what = f"{label} does not accept {name!r}"
            raise ConfigError(what, where=f"{where}.{name}", hint=hint)
    bound = {name: value for name, value in provided.items() if name in keywords} | kwargs
    for name, parameter in keywords.items():
        if name not in bound and parameter.default is inspect.Parameter.empty:
            raise ConfigError(f"{label} needs {name!r}", where=where, hint=f"set {where}.{name}")
    hints = _hints(fn)
    for name, value in kwargs.items():
        if name in hints and not _fits(value, hints[name]):
            raise ConfigError(
                f"{value!r} is a {type(value).__name__}",
                where=f"{where}.{name}",
                hint=f"{label} expects {_spell(hints[name])}",
            )
    return functools.partial(_explained(fn, where, keywords), **bound)


def _explained(fn: Callable[..., Any], where: str, names: Collection[str]) -> Callable[..., Any]:
    @functools.wraps(fn, updated=())
    def call(**kwargs: Any) -> Any:
        with explained("fails with these arguments", where=where), below(where, frozenset(names)):
            return fn(**kwargs)

    return call


def _keywords(fn: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Returns the parameters that can be passed by keyword, and whether any keyword goes."""
    parameters = _signature(fn).parameters
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    keywords = {name: p for name, p in parameters.items() if p.kind in by_keyword}
    return keywords, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    """Returns the signature of a function or of the constructor of a class.

    `inspect.signature` of a class whose metaclass defines `__call__`, as that of NNX modules does,
    is that of the metaclass: `(*args, **kwargs)`.
    """
    if not isinstance(fn, type) or type(fn).__call__ is type.__call__:
        return inspect.signature(fn)
    bound = inspect.signature(fn.__init__)
    return bound.replace(parameters=list(bound.parameters.values())[1:])


def _plain(value: Any) -> Any:
    """Returns plain dicts for config groups: bound arguments must not be mutable configs."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def _hints(fn: Callable[..., Any]) -> dict[str, Any]:
    fn = fn.func if isinstance(fn, functools.partial) else fn
    by_init = inspect.isclass(fn) and not dataclasses.is_dataclass(fn)
    target = fn.__init__ if by_init else fn
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError, AttributeError):  # annotations that do not evaluate are not types
        return {}


_SIMPLE = (int, float, bool, str, tuple, dict, type(None))


def _fits(value: Any, hint: Any) -> bool:
    """Says whether a value may have the annotated type; only simple annotations can refuse."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    kind = origin or hint
    if kind in (tuple, Sequence) and isinstance(value, (tuple, list)):
        items = typing.get_args(hint)
        if len(items) == 2 and items[1] is Ellipsis:
            items = items[:1]
        if len(items) == 1:  # as many as there are
            items *= len(value)
        return not items or len(items) != len(value) or all(map(_fits, value, items))
    if kind is Sequence:
        return not isinstance(value, (int, float, str, dict, type(None)))
    if kind not in _SIMPLE:
        return True
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float))
    if kind is tuple:
        return isinstance(value, (tuple, list))
    return isinstance(value, kind)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
