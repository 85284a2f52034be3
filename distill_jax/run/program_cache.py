"""The persistent compilation cache of several CPU devices: only programs that are safe to read.

XLA:CPU runs the operations of a program concurrently, and devices that wait in different
collectives wait for ever. In a program that was just compiled, collectives share a resource that
orders them. A program that is read back gets a resource for each loop, branch and call of its own
(openxla/xla, `thunk_proto_serdes.cc`), so that their collectives are unordered. What still
orders them is data: a collective that needs the result of another cannot begin before it.
"""

import functools
import re
from typing import Any

_COMPUTATION = re.compile(r"(ENTRY )?%?[\w.\-]+ \(.*\{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\((.*)")
_NAME = re.compile(r"%([\w.\-]+)")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "recv",
    "reduce-scatter",
    "send",
)


def is_ordered(hlo: str) -> bool:
    """Whether data alone order the collectives of a program, if it has any.

    Args:
      hlo: text of the optimized module, with `%` before names.
    """
    entry, before, last = False, {}, None
    for line in hlo.splitlines():
        line = line.strip()
        if start := _COMPUTATION.fullmatch(line):
            entry = start[1] is not None
        if not (found := _INSTRUCTION.match(line)):
            continue
        name, operation, rest = found.groups()
        is_collective = operation.startswith(_COLLECTIVES)
        if not entry:
            if is_collective:
                return False
            continue
        # The newest collective that a value needs, and with a chain so far, all before it.
        needed = [before[x] for x in _NAME.findall(rest.split("), ")[0]) if x in before]
        position = max(needed, default=-1)
        if is_collective:
            if last is not None and position != last:
                return False
            last = position = position + 1
        before[name] = position
    return True


@functools.cache
def write_ordered_only() -> bool:
    """Lets JAX write only programs that are ordered; returns whether it could.

    JAX has no public way to choose what is written.
    """
    try:
        from jax._src import compilation_cache

        write = compilation_cache.put_executable_and_time
    except (ImportError, AttributeError):
        return False

    def write_if_ordered(key: str, name: str, executable: Any, *rest: Any, **named: Any) -> None:
        if all(is_ordered(module.to_string()) for module in executable.hlo_modules()):
            write(key, name, executable, *rest, **named)

    compilation_cache.put_executable_and_time = write_if_ordered
    return True
