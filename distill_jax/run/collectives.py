"""What a compiled program exchanges between devices and holds in memory, from its own text."""

import collections
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# "%name = <shape> <kind>[-start](": no operand or quoted text stands before the kind.
_COLLECTIVE = re.compile(rf"^[^=]*= ([^%\"]*?) ({'|'.join(_KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations"
    r"|true_computation|false_computation)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: as HLO names it, without `-start`.
      nbytes: size of the whole arrays that a group exchanges: summed, gathered or scattered. For a
        permutation, the size that one device sends.
      group: devices that exchange data with each other.
      times: executions in one run of the program; loops of unknown length count once.
    """

    kind: str
    nbytes: int
    group: int
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a bandwidth-optimal algorithm, over all executions.

        `2 (n - 1) / n` of an all-reduce over n devices, `(n - 1) / n` of a gather, a scatter or an
        all-to-all (Patarasuk & Yuan 2009), all of a permutation.
        """
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.nbytes * self.times


def parse(hlo: str, *, devices: int) -> list[Collective]:
    """Returns the collectives of a compiled program.

    An asynchronous pair counts once, by its start. What stands in the body of a loop counts as
    often as the loop runs, where the compiler knows it; of branches each counts.

    Args:
      hlo: the text of an optimized HLO module.
      devices: that the program runs on.
    """
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if not line.startswith(" ") and (header := _COMPUTATION.match(line)):
            lines = bodies[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies.get(name, ()):
            trips = int(trip_count[1]) if (trip_count := _TRIPS.search(line)) else 1
            for several, one in _CALLED.findall(line):
                for callee in (several or one).split(","):
                    visit(callee.strip().lstrip("%"), count * trips)

    visit(entry, 1)
    return [
        _collective(match, line, devices)._replace(times=times[name])
        for name, body in bodies.items()
        if times[name]
        for line in body
        if (match := _COLLECTIVE.match(line))
    ]


def _collective(match: re.Match[str], line: str, devices: int) -> Collective:
    shape, kind, start = match.groups()
    if start and kind != "all-reduce":
        shape = _parts(shape)[1]  # (operands, results, contexts)
    group = _group_size(line, devices)
    nbytes = sum(_bits(kind, dims) for kind, dims in _ARRAY.findall(shape)) // 8
    return Collective(kind, nbytes * group if kind == "reduce-scatter" else nbytes, group)


def _bits(dtype: str, dims: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    digits = re.search(r"\d+", dtype)
    width = int(digits[0]) if digits else 8  # pred
    return width * math.prod(int(n) for n in dims.split(",") if n)


def _parts(shape: str) -> list[str]:
    """Splits "(a, (b, c), d)" at its top level."""
    parts, depth = [""], 0
    for char in shape.strip()[1:-1]:
        depth += char in "([{"
        depth -= char in ")]}"
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _group_size(line: str, devices: int) -> int:
    """Returns the size of the groups, in any of the spellings of XLA."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line):
        return pairs[1].count("{")
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        axes = re.findall(
            r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]
        )  # a part of an axis: (before)size
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    return devices


class Total(NamedTuple):
    """Collectives of one kind over groups of one size: executions, bytes exchanged, bytes sent."""

    count: int
    nbytes: int
    sent: float


def totals(collectives: Iterable[Collective]) -> dict[tuple[str, int], Total]:
    """Returns totals by kind and size of group, the largest first."""
    sums: dict[tuple[str, int], Total] = {}
    for one in collectives:
        key = (one.kind, one.group)
        count, nbytes, sent = sums.get(key, Total(0, 0, 0.0))
        sums[key] = Total(count + one.times, nbytes + one.nbytes * one.times, sent + one.sent)
    return dict(sorted(sums.items(), key=lambda item: -item[1].nbytes))


def of_compiled(compiled: Any) -> list[Collective]:
    """Returns the collectives of a `jax.stages.Compiled`."""
    shardings = jax.tree.leaves(compiled.input_shardings)
    devices = max((len(s.device_set) for s in shardings), default=1)
    return parse(compiled.as_text(), devices=devices)


def memory(compiled: Any) -> Mapping[str, int]:
    """Returns bytes on each device: arguments, outputs, outputs in place, temporaries, peak.

    Outputs in place reuse donated arguments. The peak is that of the program alone: arguments,
    outputs that are not in place, and temporaries.
    """
    analysis = compiled.memory_analysis()
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "in_place": analysis.alias_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
    }
    peak = parts["arguments"] + parts["outputs"] - parts["in_place"] + parts["temporary"]
    return {**parts, "peak": peak}
