"""Commands and snippets of the documentation, as a reader sees them.

What looks like a command of this project and cannot be read as one is an error, so that no command
of the documents goes untested because it is written in another way.
"""

import ast
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from distill_jax.run import flags

ROOT = pathlib.Path(__file__).parents[1]

PAGES = ("README.md", "CONTRIBUTING.md", "launch/README.md", "docs/*.md", "docs/results/*.md")
HEADERS = ("configs/*.py", "configs/*/*.py", "launch/*.py", "benchmarks/*.py", "examples/*.py")
SCRIPTS = ("launch/*.sh",)

_COMMAND = re.compile(
    r"(?:[A-Z_]+=\S* )*(?:make [a-z-]+$|launch/\w+\.sh |sbatch |"
    r"(?:\S*/)?(?:python3?|pip|pytest|distill-jax[\w-]*)(?: |$))"
)
_OURS = re.compile(r"distill_jax\.main\b|distill-jax\b|\bpytest |\bpython3? |--config=|--workdir=")
_FILE = re.compile(r"^(?:\d+\. )?`((?:distill_jax|tests)/[\w/]+\.py)`(?::|$)", re.M)


class Command(NamedTuple):
    """A command: where it stands, its environment, and its words."""

    where: str
    environment: dict[str, str]
    words: tuple[str, ...]

    @property
    def args(self) -> list[str] | None:
        """The arguments of a command that runs this program, None of another."""
        name = self.words[0].rpartition("/")[2]
        if name.startswith("python") and self.words[1:3] == ("-m", "distill_jax.main"):
            return list(self.words[3:])
        return list(self.words[1:]) if name == "distill-jax" else None


def files(patterns: tuple[str, ...]) -> list[pathlib.Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def commands() -> list[Command]:
    """Returns every command of the documents, in their order."""
    return [command for name, text in texts() for command in read(name, text)]


def texts() -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each document."""
    for path in files(PAGES):
        yield str(path.relative_to(ROOT)), path.read_text()
    for path in files(HEADERS):
        yield str(path.relative_to(ROOT)), ast.get_docstring(ast.parse(path.read_text())) or ""
    example = flags.usage().partition("example:\n")[2].partition("\n\n")[0]
    yield "--help", example
    for path in files(SCRIPTS):
        comments = [
            line[2:] if line.startswith("# ") else ""
            for line in path.read_text().splitlines()
            if line.startswith("#") and not line.startswith(("#!", "#SBATCH"))
        ]
        yield str(path.relative_to(ROOT)), "\n".join(comments)


def read(name: str, text: str) -> list[Command]:
    """Returns the commands of a document.

    Raises:
      ValueError: it has something of this project that is not read as a command.
    """
    found: list[Command] = []
    for line, source in _lines(text):
        if _COMMAND.match(source):
            found.append(_command(f"{name}:{line}", source))
        elif _OURS.search(source):
            raise ValueError(f"{name}:{line}: not read as a command: {source}")
    return found


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields number and content of the lines of code, continued ones joined, and of inline code."""
    lines, fenced = text.splitlines(), False
    i = 0
    while i < len(lines):
        line, number = lines[i], i + 1
        i += 1
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if fenced or re.match(r"\s{2,}\S", line):
            whole = _uncommented(line)
            while whole.endswith(("\\", "|")) and i < len(lines):
                whole = whole.removesuffix("\\").rstrip() + " " + _uncommented(lines[i])
                i += 1
            if not whole.startswith(("-", "*", "`")) and "`" not in whole:
                yield number, whole
                line = line.partition(" # ")[2]  # what the comment names
        spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", line)
        yield from ((number, span) for span in spans)


def _uncommented(line: str) -> str:
    return re.sub(r"(^|\s+)# .*", "", line.strip())


def _command(where: str, source: str) -> Command:
    words = shlex.split(source.partition(" | ")[0])
    environment = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        key, _, value = words.pop(0).partition("=")
        environment[key] = value
    return Command(where, environment, tuple(words))


def python_blocks(name: str) -> list[str]:
    """Returns the fenced Python of a page, without its indentation."""
    text = (ROOT / name).read_text()
    found = []
    for match in re.finditer(r"^( *)```python\n(.*?)^ *```", text, re.M | re.S):
        lines = match[2].splitlines()
        found.append("\n".join(line.removeprefix(match[1]) for line in lines) + "\n")
    return found


def named_blocks(name: str) -> dict[str, str]:
    """Returns the fenced Python of a page that follows the name of its file, by that name."""
    text = (ROOT / name).read_text()
    blocks = python_blocks(name)
    starts = [match.start() for match in re.finditer(r"^ *```python\n", text, re.M)]
    found = {}
    for block, start in zip(blocks, starts, strict=True):
        found[_FILE.findall(text, 0, start)[-1]] = block
    assert len(found) == len(blocks)
    return found
