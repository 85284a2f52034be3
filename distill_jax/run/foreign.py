"""Networks of other libraries as the start of a role: `roles.*.init` names their weights.

`file.safetensors` (or another format of `weights.read`), `hf:<folder>` and `package:<name>`. If
`roles.*.model` is left out, it is read from the file. `paths.is_foreign` distinguishes these names
from runs.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from distill_jax.core.api import PyTree
from distill_jax.core.errors import ConfigError, UserError, nearest
from distill_jax.data.transforms.registry import CARD
from distill_jax.run.config import TRANSFORMS, ConfigDict
from distill_jax.run.paths import FOLDER, PACKAGE, is_foreign
from distill_jax.trainer.io.paths import NetworkRef
from distill_jax.trainer.io.step_folder import read_meta
from distill_jax.trainer.io.step_index import find_step
from distill_jax.weights import packages, pretrained
from distill_jax.weights.packages import PACKAGES


@functools.lru_cache(maxsize=8)
def _open(init: str, stamp: Any) -> pretrained.Pretrained:
    return pretrained.open_pretrained(init)


def opened(init: str, *, where: str) -> pretrained.Pretrained:
    """Opens the weights, once for each state of the file.

    Raises:
      ConfigError: they are absent, damaged or of no known network.
    """
    place = pathlib.Path(init.removeprefix(FOLDER)).expanduser()
    try:
        stamp = place.stat().st_mtime_ns if place.exists() else None
        return _open(init, stamp)
    except UserError as error:
        what = f"{error.where}: {error.what}" if error.where else error.what
        raise ConfigError(what, where=where, hint=error.hint) from error


def spec(
    init: str, kwargs: Mapping[str, Any], *, frozen: bool, where: str
) -> tuple[str, dict[str, Any]]:
    """Returns model and arguments of a role that names no model.

    A network that learns has the classes of the data, a frozen one those that it was trained on.

    Args:
      init: `roles.*.init`.
      kwargs: of the config, which override those in the file.
      frozen: whether the network stays as it is.
      where: the config path.
    """
    found = opened(init, where=where)
    file_kwargs = dict(found.kwargs)
    if not frozen:
        file_kwargs.pop("num_classes", None)
    return found.family.model, {**file_kwargs, **kwargs}


def read(
    init: str, model: str | None, like: tuple[PyTree, PyTree], *, frozen: bool, where: str
) -> tuple[PyTree, PyTree]:
    """Fills a network with the weights.

    The last layer is read if the network has one of the same shape, and left out if it has none. If
    a network that learns has other classes, the last layer keeps its initial values.

    Args:
      init: `roles.*.init`.
      model: `roles.*.model`, None if it is read from the file.
      like: parameters and state: arrays, or shapes for a frozen network.
      frozen: whether the network stays as it is.
      where: the config path.

    Raises:
      ConfigError: the weights do not fit the network.
    """
    found = opened(init, where=where)
    if model and model != found.family.model:
        raise ConfigError(
            f"holds weights of {found.family.model} ({found.family.name}), not of {model}",
            where=where,
            hint=f"{where.removesuffix('init')}model=, which leaves it to the file",
        )
    heads = ("keep",) if frozen else ("keep", "replace")
    heads = heads if found.family.head and set(found.family.head) & set(like[0]) else ("drop",)
    for head in heads:
        try:
            mapped = found.fill(*like, head=head)
            return mapped.params, mapped.state
        except UserError as error:
            if head == heads[-1]:
                raise ConfigError(error.what, where=where, hint=error.hint) from error
    raise AssertionError(heads)


def cards(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Returns the arguments of the transforms `card:<role>` of a config, by name.

    The card is that of the weights in `roles.<role>.init`, or, if they are a run's, the one that
    this run used for the same network.

    Raises:
      ConfigError: there is no such role, or its weights have no card.
    """
    found = {}
    for key in TRANSFORMS:
        for name in config.data[key]:
            if name.startswith(CARD) and name not in found:
                found[name] = _card(config, name.removeprefix(CARD), where=f"data.{key}")
    return found


def _card(config: ConfigDict, role: str, *, where: str) -> dict[str, Any]:
    if role not in config.roles:
        raise ConfigError(f"no role {role!r}", where=where, hint=nearest(role, config.roles))
    init = config.roles[role].init or ""
    if init.startswith(PACKAGE):  # known without the package
        card = packages.package(init.removeprefix(PACKAGE)).card
    elif is_foreign(init):
        card = opened(init, where=f"roles.{role}.init").card
    elif init:
        origin = NetworkRef.parse(init, where=f"roles.{role}.init")
        meta = read_meta(find_step(origin.path, where=f"roles.{role}.init"))
        kept = meta.get("signature", {}).get("cards") or {}
        if arguments := kept.get(f"{CARD}{origin.role}"):
            return dict(arguments)
        card = None
    else:
        card = None
    if card is None:
        raise ConfigError(
            f"the weights of {role} have no card, which says how images are prepared",
            where=where,
            hint='"prepare" with data.transform_kwargs.prepare.size, mean and std; cards come with '
            "hf: folders and packages",
        )
    return card.as_arguments()


def class_names(config: ConfigDict, role: str) -> tuple[str, ...]:
    """Returns the names of a network's own classes, empty where its weights have none."""
    init, where = config.roles[role].init or "", f"roles.{role}.init"
    if is_foreign(init):
        return opened(init, where=where).classes
    if not init:
        return ()
    signature = read_meta(find_step(NetworkRef.parse(init, where=where).path, where=where))
    return tuple(signature.get("signature", {}).get("classes", ()))


def checksum(init: str, *, where: str) -> str | None:
    """Returns the checksum of the file or files that would be read, or None if they are gone."""
    if init.startswith(PACKAGE):
        return opened(init, where=where).provenance["sha256"]
    place = pathlib.Path(init.removeprefix(FOLDER)).expanduser()
    return pretrained.checksum(place) if place.exists() else None


def licence(init: str) -> dict[str, str]:
    """Returns what is known about the data and the licence of weights, for a card."""
    entry = PACKAGES.get(init.removeprefix(PACKAGE)) if init.startswith(PACKAGE) else None
    return {"data": entry.origin, "licence": entry.licence} if entry else {}
