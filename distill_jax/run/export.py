"""Writes a trained network for other programs, with a parity card beside each file."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.errors import ExportError, UserError, nearest
from distill_jax.core.partition import named_leaves
from distill_jax.evaluators._features import spread
from distill_jax.export import card as card_lib
from distill_jax.export import onnx_model
from distill_jax.export.int8 import to_int8
from distill_jax.export.onnx_model import to_onnx
from distill_jax.export.program import Program, require
from distill_jax.export.stablehlo import PLATFORMS, to_stablehlo
from distill_jax.export.tflite import to_tflite
from distill_jax.report import sharing
from distill_jax.run import build, foreign, paths, workdir
from distill_jax.run import config as config_lib
from distill_jax.run.load import EXPORTED, Network, load
from distill_jax.trainer.io.files import RESULT_PARTS, read_json, replacing
from distill_jax.trainer.io.paths import NetworkRef, check_folder
from distill_jax.weights import safetensors

FILES: Mapping[str, str] = {
    "stablehlo": "model.stablehlo",
    "onnx": "model.onnx",
    "onnx_int8": "model.int8.onnx",
    "tflite": "model.tflite",
    "safetensors": EXPORTED["weights"],
}
"""File of each format."""

DEFAULT = ("stablehlo", "onnx", "safetensors")

_CALIBRATION = 512
"""Most training examples by which int8 is calibrated."""

_SIZE = 64
"""Examples of a batch in which files are compared."""

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]


def export(
    network: Network,
    folder: str | os.PathLike,
    *,
    formats: Sequence[str] = DEFAULT,
    outputs: Sequence[str] = (),
    preprocessing: bool = True,
    weights: str = "inside",
    examples: int = 1000,
) -> pathlib.Path:
    """Exports a network; arguments, result and errors are those of `Network.export`."""
    target = pathlib.Path(folder).absolute()
    for name in formats:
        if name not in FILES:
            raise UserError(f"unknown format {name!r}", where="formats", hint=nearest(name, FILES))
    if not formats:
        raise UserError("no format is named", where="formats", hint=nearest("", FILES))
    if weights not in ("inside", "apart"):
        raise UserError(f"weights are {weights!r}", where="weights", hint="'inside' or 'apart'")
    formats = [name for name in FILES if name in formats]
    if weights == "apart" and "stablehlo" in formats and "safetensors" not in formats:
        formats.append("safetensors")
    check_folder(target, where="folder")
    workdir.refuse_foreign(target, "export")
    program = make_program(network, outputs=outputs, preprocessing=preprocessing)
    dataset, missing = _dataset(network)
    about = _about(network, dataset, missing)
    about |= sharing.scrubbed({name: about[name] for name in ("data", "teacher")}, target)
    program = dataclasses.replace(
        program, metadata={name: json.dumps(about[name]) for name in about}
    )
    files = _serialize(network, program, dataset, formats, about, weights, missing, target)
    with jax.default_device(jax.devices("cpu")[0]):
        tested = _examples(network, dataset, "test", examples, preprocessing)
        cards = {
            name: _card(name, files[FILES[name]], program, tested, weights) | {"about": about}
            for name in formats
        }
    for name in formats:
        files[f"{FILES[name]}.card.json"] = json.dumps(cards[name], indent=1).encode()
    files["README.md"] = card_lib.markdown(cards, about).encode()
    with workdir.claim(target, "export", with_peers=False):
        for name, data in files.items():
            with replacing(target / name) as path:
                path.write_bytes(data)
    for found in cards.values():
        if found["warning"]:
            warnings.warn(str(found["warning"]), stacklevel=3)
    return target


def export_run(
    folder: pathlib.Path, *, role: str = "", trusted: frozenset[str], **options: Any
) -> str:
    """Exports a network of a run into its folder `export`; returns the cards as a page.

    Args:
      folder: of the run.
      role: the network, by default the student.
      trusted: as `trust` of `load`.
      **options: see `Network.export`.
    """
    network = load(folder, role=role or None, trust=trusted)
    place = folder / ("export" if network.role == "student" else f"export-{network.role}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are on the page
        export(network, place, **options)
    return f"{(place / 'README.md').read_text('utf-8')}\nwritten to {place}"


def make_program(
    network: Network, *, outputs: Sequence[str] = (), preprocessing: bool = True
) -> Program:
    """Returns a trained network as it is exported, in float32.

    Columns of a table that has none of a kind are no input.

    Args:
      network: the network.
      outputs: their names; by default `probabilities`, of a regression `logits`, else `embedding`,
        else all.
      preprocessing: whether the inputs are raw.

    Raises:
      UserError: it has no such output.
    """
    raw = network.input
    is_table = "shape" not in raw
    specs = {
        name: jax.ShapeDtypeStruct(tuple(spec["shape"]), np.dtype(spec["dtype"]))
        for name, spec in (raw if is_table else {"input": raw}).items()
    }
    one = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in specs.items()}
    prepared = jax.eval_shape(network.preprocess, one if is_table else one["input"])
    if not preprocessing:
        is_table = isinstance(prepared, Mapping)
        found: Any = prepared if is_table else {"input": prepared}
        specs = {n: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for n, x in found.items()}
    empty = {name: spec for name, spec in specs.items() if 0 in spec.shape}
    specs = {name: spec for name, spec in specs.items() if name not in empty}

    def forward(weights: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        b = jax.tree.leaves(inputs)[0].shape[0]
        absent = {name: jnp.zeros((b, *x.shape), x.dtype) for name, x in empty.items()}
        x = {**inputs, **absent} if is_table else inputs["input"]
        x = network.preprocess(x) if preprocessing else x
        return network.forward(weights["params"], weights["state"], x, precision="float32")

    weights = {"params": network.params, "state": network.state}
    batch = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in specs.items()}
    known = jax.eval_shape(forward, weights, batch)
    first = "logits" if network.task == "regression" else "probabilities"
    usual = next((name for name in (first, "embedding") if name in known), None)
    names = tuple(outputs) or ((usual,) if usual else tuple(known))
    for name in names:
        if name not in known:
            raise UserError(f"no output {name!r}", where="outputs", hint=nearest(name, known))
    return Program(
        function=lambda weights, inputs: {n: forward(weights, inputs)[n] for n in names},
        weights=weights,
        inputs=specs,
    )


def _serialize(
    network: Network,
    program: Program,
    dataset: Any,
    formats: Sequence[str],
    about: Mapping[str, Any],
    weights: str,
    missing: str,
    target: pathlib.Path,
) -> dict[str, bytes]:
    """Returns the files of all formats by name, for the folder `target`."""
    files: dict[str, bytes] = {}
    if "onnx" in formats or "onnx_int8" in formats:
        model = to_onnx(program)
        require("onnxruntime", extra="export", what="the parity card of onnx")
        if "onnx" in formats:
            files[FILES["onnx"]] = model
        if "onnx_int8" in formats:
            preprocessing = dict(program.inputs) == dict(make_program(network).inputs)
            inputs = _examples(network, dataset, "train", _CALIBRATION, preprocessing)
            if inputs is None:
                raise ExportError(
                    f"there are no training examples for its calibration: {missing}",
                    where="formats: onnx_int8",
                    hint="put the data where the run read them",
                )
            files[FILES["onnx_int8"]] = to_int8(model, _batches(inputs))
    if "tflite" in formats:
        require("ai_edge_litert", extra="tflite", what="the parity card of tflite")
        files[FILES["tflite"]] = to_tflite(program)
    if "stablehlo" in formats:
        files[FILES["stablehlo"]] = to_stablehlo(program, weights=weights)
    if "safetensors" in formats:
        data = b"".join(safetensors.parts(program.named_weights, dict(program.metadata)))
        files[FILES["safetensors"]] = data
        described = _config(network, data, about)
        described |= sharing.scrubbed({n: described[n] for n in ("inputs", "config")}, target)
        files[EXPORTED["config"]] = json.dumps(described, indent=1).encode()
    return files


def _config(network: Network, data: bytes, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata that `load` needs besides the weights, and information for readers."""
    meta = network.meta
    return {
        "format": EXPORTED["format"],
        "role": network.role,
        "step": network.step,
        "sha256": hashlib.sha256(data).hexdigest(),
        "classes": list(network.classes),
        "about": about,
        "signature": meta["signature"],
        "inputs": meta.get("inputs"),
        "config": json.loads(config_lib.to_json(network.config)),
    }


# Data.


def _dataset(network: Network) -> tuple[Any, str]:
    """Returns the data of the run, or None and why they cannot be had."""
    try:
        return build.load_dataset(network.config, trusted=network.trusted), ""
    except UserError as error:
        return None, error.what


def _examples(
    network: Network, dataset: Any, split: str, most: int, preprocessing: bool
) -> dict[str, np.ndarray] | None:
    """Returns inputs `{name: [n, ...]}` spread over a part of the data, None where it has none."""
    source = getattr(dataset, split, None)
    if source is None or not len(source) or most < 1:
        return None
    inputs = source.read(spread(len(source), min(most, len(source))))["input"]
    if not preprocessing:
        inputs = jax.device_get(jax.jit(network.preprocess)(inputs))
    inputs = dict(inputs) if isinstance(inputs, Mapping) else {"input": inputs}
    return {name: np.asarray(x) for name, x in inputs.items() if 0 not in x.shape[1:]}


def _batches(inputs: Mapping[str, np.ndarray], size: int = _SIZE) -> list[dict[str, np.ndarray]]:
    n = len(next(iter(inputs.values())))
    return [{k: x[i : i + size] for k, x in inputs.items()} for i in range(0, n, size)]


# Cards.


def _about(network: Network, dataset: Any, missing: str) -> dict[str, Any]:
    """Returns where a network comes from."""
    config, spec = network.config, network.meta["signature"]["networks"][network.role]
    count = sum(int(np.prod(x.shape)) for x in named_leaves(network.params).values())
    data = {}
    for split in ("train", "test") if dataset is not None else ():
        data[split] = getattr(dataset, split).provenance._asdict()
    if dataset is None:
        why = f"licence not known: {missing}"
        data["train"] = {"name": config.data.name, "n": "?", "licence": why}
    checksums = (network.meta.get("inputs") or {}).get("networks", {})
    teachers = []
    for role, other in config.roles.items():
        if other.init and role != network.role:
            found = {"role": role, "init": other.init, "sha256": checksums.get(role)}
            teachers.append(found | _of_teacher(other.init))
    return {
        "title": f"{spec['model']} ({network.role}) trained by {config.objective.name}",
        "network": f"{spec['model']}, {count:,} parameters, step {network.step}",
        "transforms": [str(name) for name in config.data.eval_transforms],
        "classes": list(network.classes),
        "trained_in": config.precision,
        "data": data,
        "teacher": teachers,
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("distill_jax", "jax", "onnx", "onnxruntime")},
    }


def _of_teacher(init: str) -> dict[str, Any]:
    """Returns data and licence of the run that trained a network, where it can be read."""
    if paths.is_foreign(init):
        return foreign.licence(init)
    try:
        path = NetworkRef.parse(init, where="init").path / "result.json"
        found = read_json(path, optional=RESULT_PARTS)["provenance"]["train"]
        return {"data": found["name"], "licence": found.get("licence", "")}
    except (UserError, KeyError, TypeError):
        return {}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _card(name: str, data: bytes, program: Program, tested: Any, weights: str) -> dict[str, Any]:
    """Returns the parity card of a file."""
    found: dict[str, Any] = {
        "file": FILES[name],
        "format": name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "inputs": {
            n: {"shape": ["b", *x.shape], "dtype": str(x.dtype)} for n, x in program.inputs.items()
        },
        "parity": {"examples": 0, "max_error": {}, "top1_agreement": None},
        "warning": "",
    }
    if name.startswith("onnx"):
        found |= {"opset": onnx_model.OPSET, "ir_version": onnx_model.IR_VERSION}
    if name == "stablehlo":
        found |= {"platforms": PLATFORMS, "weights": weights}
    if name == "safetensors" or tested is None:
        return found
    run = _RUNNERS[name](data, program, weights)
    batches = _batches(tested)
    function = jax.jit(program.function)
    held = jax.device_put(program.weights)
    reference: Run = lambda x: jax.device_get(function(held, dict(x)))  # noqa: E731
    wanted, given = (_collect(f, batches) for f in (reference, run))
    n = len(next(iter(tested.values())))
    found["parity"] = {"examples": n, **card_lib.compare(wanted, given)}
    one = {name: x[:1] for name, x in tested.items()}
    with _one_core() as cores:
        found["latency_ms"] = {"cores": cores, **_latency(run, reference, one)}
    found["warning"] = card_lib.warning(found)
    return found


def _collect(run: Run, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    parts = [run(batch) for batch in batches]
    return {name: np.concatenate([np.asarray(p[name]) for p in parts]) for name in parts[0]}


def _latency(run: Run, reference: Run, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns median milliseconds of one example, of both in turns."""
    times: dict[str, list[float]] = {"file": [], "jax": []}
    calls = {"file": run, "jax": reference}
    for call in calls.values():
        call(inputs)
    began = time.perf_counter()
    while len(times["jax"]) < 5 or time.perf_counter() - began < 0.5:
        for name, call in calls.items():
            start = time.perf_counter()
            call(inputs)
            times[name].append(1e3 * (time.perf_counter() - start))
        if len(times["jax"]) == 200:
            break
    medians = {name: statistics.median(x) for name, x in times.items()}
    return {"batch": 1, **medians, "rounds": len(times["jax"])}


@contextlib.contextmanager
def _one_core() -> Iterator[int]:
    """Keeps all threads of this process on one core, where the system can; yields the cores.

    The pool of XLA:CPU has a thread for each core, which no option of a program changes.
    """
    before: dict[int, set[int]] = {}
    cores = os.cpu_count() or 1
    if sys.platform == "linux":
        core = min(os.sched_getaffinity(0))
        for task in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(OSError):
                before[task] = os.sched_getaffinity(task)
                os.sched_setaffinity(task, {core})
        cores = 1
    try:
        yield cores
    finally:
        for task, allowed in before.items():
            with contextlib.suppress(OSError):  # the thread has ended
                os.sched_setaffinity(task, allowed)


# Files called as their users call them.


def _run_onnx(data: bytes, program: Program, weights: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda x: dict(zip(names, session.run(names, dict(x)), strict=True))


def _run_stablehlo(data: bytes, program: Program, weights: str) -> Run:
    exported = jax.export.deserialize(bytearray(data))
    front = (program.named_weights,) if weights == "apart" else ()
    front = jax.device_put(front)
    call = jax.jit(exported.call)
    return lambda inputs: jax.device_get(call(*front, dict(inputs)))


def _run_tflite(data: bytes, program: Program, weights: str) -> Run:
    from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-not-found]

    runner = Interpreter(model_content=data, num_threads=1).get_signature_runner()

    def run(inputs: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        n = len(next(iter(inputs.values())))
        rows = [runner(**{k: x[i : i + 1] for k, x in inputs.items()}) for i in range(n)]
        return {name: np.concatenate([np.array(row[name]) for row in rows]) for name in rows[0]}

    return run


_RUNNERS = {
    "onnx": _run_onnx,
    "onnx_int8": _run_onnx,
    "stablehlo": _run_stablehlo,
    "tflite": _run_tflite,
}
