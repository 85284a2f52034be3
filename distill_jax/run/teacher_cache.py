"""Stored outputs of frozen networks, as set in a config, see `trainer.io.teacher_cache`."""

import contextlib
import functools
import inspect
import json
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.core.api import Model, PyTree, Role, Source
from distill_jax.core.errors import ConfigError, DataUnavailable, nearest
from distill_jax.data import corruption
from distill_jax.data.source import checksum
from distill_jax.run import config as config_lib
from distill_jax.run import environment, foreign, processes, watch, workdir
from distill_jax.run.config import ConfigDict
from distill_jax.run.resolve import bind, resolve
from distill_jax.trainer.io import teacher_cache as cache
from distill_jax.trainer.io.paths import absolute, check_folder
from distill_jax.weights import onnx_teacher


def find_teacher(
    config: ConfigDict, trusted: Collection[str], *, shapes_only: bool = False, num_classes: int = 0
) -> Callable[..., Any]:
    """Returns the teacher that replaces a network: a function, or an ONNX file.

    Args:
      config: whose `cache.teacher` names it.
      trusted: as in `resolve`; an ONNX file is data, and needs no trust.
      shapes_only: whether a file that is not on this machine is assumed to have `num_classes`.
      num_classes: k of the data.

    Raises:
      ConfigError: it names neither, or does not take `cache.teacher_kwargs`.
      DataUnavailable: the file or package is not on this machine.
    """
    name, kwargs = config.cache.teacher, config.cache.teacher_kwargs.to_dict()
    if onnx_teacher.is_onnx(name):
        bound = bind(
            onnx_teacher.open_onnx, kwargs | {"source": name}, where="cache.teacher_kwargs"
        )
        try:
            return bound(where="cache.teacher")
        except DataUnavailable:
            if not shapes_only:
                raise
            return lambda view: {"logits": np.zeros((len(jax.tree.leaves(view)[0]), num_classes))}
    if ":" not in name:
        raise ConfigError(
            f"{name!r} names no function and no ONNX file",
            where="cache.teacher",
            hint="package.module:Symbol, file.onnx, or package:NAME",
        )
    if kwargs:
        raise ConfigError(
            "arguments of an ONNX file, and a function is named",
            where="cache.teacher_kwargs",
            hint="leave them out",
        )
    return resolve("models", name, where="cache.teacher", trusted=trusted)


def of_view_alone(teacher: Callable[..., Any] | None) -> bool:
    """Returns whether a teacher reads only the view, so that evaluators may call it too."""
    if teacher is None:
        return False
    return not {"index", "epoch", "raw"} & set(inspect.signature(teacher).parameters)


def select_outputs(config: ConfigDict, models: Mapping[Role, Model]) -> dict[Role, Model]:
    """Returns the networks; those that are cached return only the stored outputs.

    Raises:
      ConfigError: a role that does not exist or learns, or outputs that cannot be stored so.
    """
    spec, selected = config.cache, dict(models)
    for role in spec.roles:
        if role not in models:
            raise ConfigError(
                f"no network {role!r}", where="cache.roles", hint=nearest(role, models)
            )
        if not spec.teacher and not config.roles[role].frozen:
            raise ConfigError(
                f"{role} learns, so its outputs change",
                where="cache.roles",
                hint=f"set roles.{role}.frozen, or leave it out",
            )
        selected[role] = cache.select_outputs(
            models[role], tuple(spec.outputs), role=role, where="cache.outputs"
        )
    if spec.top_k and tuple(spec.outputs) != ("logits",):
        raise ConfigError(
            f"the largest {spec.top_k} of {', '.join(spec.outputs)}",
            where="cache.top_k",
            hint="only logits can be stored with cache.top_k: cache.outputs=logits, or "
            "cache.top_k=0",
        )
    return selected


def make_plan(config: ConfigDict, *, epochs: int, **shapes: Any) -> cache.Plan:
    """Decides what to store in training over `epochs`; `shapes` as of the library's function.

    Raises:
      ConfigError: the view depends on the step or on how examples meet in a batch.
    """
    spec, paths = config.cache, {"transform": "cache.dir", "top_k": "cache.top_k"}
    try:
        return cache.make_plan(
            views=config.data.views or epochs,
            batch_size=config.batch_size,
            top_k=spec.top_k,
            rest=spec.rest,
            dtype=spec.dtype,
            **shapes,
        )
    except ConfigError as error:
        where = paths.get(error.where, error.where)
        raise ConfigError(error.what, where=where, hint=error.hint) from error


def make_key(
    config: ConfigDict,
    plan: cache.Plan,
    role: Role,
    source: Source,
    network: tuple[PyTree, PyTree] | None,
) -> dict[str, Any]:
    """Returns everything that determines the stored outputs, JSON-like.

    Seeds that differ in which labels are hidden or wrong share outputs.
    A function that replaces a network is identified only by its name, an ONNX file by its sha256.
    """
    data = config.data
    kwargs = config_lib.flatten(data.transform_kwargs)
    names, kind = tuple(data.train_transforms), data.teacher_view
    if data.teacher_transforms:
        names, kind = (*data.teacher_transforms, *data.teacher_shares), "clean"
    elif kind == "clean":
        names = (*data.eval_transforms, *data.teacher_shares)
    cards = {name: card for name, card in foreign.cards(config).items() if name in names}
    key = {
        "teacher": getattr(plan.teacher, "key", config.cache.teacher) or checksum(network),
        "data": corruption.inputs_of(source).provenance.sha256,
        "view": {
            "transforms": names,
            "kwargs": {k: v for k, v in kwargs.items() if k.split(".")[0] in names},
            "of": kind,
            "shared": tuple(data.teacher_shares),
            **({"cards": cards} if cards else {}),
        },
        "seed": config.seed if plan.by_seed else None,
        "outputs": tuple(config.cache.outputs),
        "top_k": plan.top_k,
        "dtype": plan.dtype,
        "precision": None if plan.teacher else config.precision,
    }
    if role in plan.networks:
        name, arguments = plan.networks[role]
        key["model"] = {"name": name, **arguments}
    return json.loads(json.dumps(key))


def prepare(
    config: ConfigDict,
    plan: cache.Plan,
    *,
    source: Source,
    frozen: Mapping[Role, tuple[PyTree, PyTree]],
    log_line: Callable[[str], None],
    **networks: Any,
) -> cache.TeacherOutputs:
    """Opens the cache of a run and fills missing chunks; arguments as of the library's function.

    Raises:
      ConfigError: the folder holds outputs for other inputs or networks.
      Preempted: a signal requested a stop; the chunks that were filled are kept.
    """
    folder = absolute(config.cache.dir.replace("{seed}", str(config.seed)), where="cache.dir")
    for role in plan.outputs:
        if not (folder / role / "key.json").exists():
            check_folder(folder / role, where="cache.dir")
            workdir.refuse_foreign(folder / role, "cache")
    try:
        return cache.prepare(
            folder,
            plan,
            keys={r: make_key(config, plan, r, source, frozen.get(r)) for r in plan.outputs},
            source=source,
            frozen=frozen,
            seed=config.seed,
            precision=config.precision,
            where="cache.dir",
            log_line=log_line,
            only_one=functools.partial(_only_one, log_line=log_line),
            stop=_asked_to_stop,
            **networks,
        )
    except cache.Stopped as error:
        raise environment.Preempted(f"stopped {error}") from None


def _asked_to_stop() -> bool:
    watch.alive()
    return environment.asked_to_stop()


@contextlib.contextmanager
def _only_one(folder: pathlib.Path, log_line: Callable[[str], None]) -> Iterator[None]:
    """Lets one run at a time fill a cache; others wait, since they need the same rows."""
    stack, reported = contextlib.ExitStack(), False

    def take() -> str:
        try:
            stack.enter_context(workdir.hold(folder, log_line=lambda line: None))
            return ""
        except workdir.InUse as error:
            return error.what

    with stack:
        while what := processes.from_first(take, where=str(folder / workdir.LOCK)):
            if not reported:
                log_line(f"waiting for teacher cache {folder}: {what}")
            reported = True
            processes.stop_if_asked("while another run filled the teacher cache")
            watch.alive()
            time.sleep(1)
        yield
