"""Imports go one way, and heavy or foreign packages stay where they belong."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "distill_jax"
ALLOWED = {
    "analysis": set(),
    "core": {"analysis"},
    "losses": {"core"},
    "weighting": {"core"},
    "objectives": {"core", "losses"},
    "models": {"core", "weights"},
    "data": {"core"},
    "evaluators": {"core"},
    "trainer": {"analysis", "core", "losses", "data", "models"},
    "weights": {"core"},
    "export": {"core", "models"},
    "_lazy": set(),
    "report": {"core", "evaluators", "trainer"},
    "configs": set(),
    "launch": set(),
    "run": {
        *("core", "losses", "weighting", "objectives", "models", "data", "evaluators"),
        *("analysis", "configs", "trainer", "contrib", "report", "export", "weights"),
    },
    "contrib": {"analysis", "core", "run"},
    "main": {"core", "run", "report"},
}
FILES = sorted(ROOT.rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "distill_jax" and len(parts) > 1 and layer != "__init__":
            assert parts[1] in {layer, "__version__", "_lazy", *ALLOWED[layer]}, (
                f"{layer} imports {name}"
            )
        if parts[:2] in (["flax", "linen"], ["flax", "nnx"]):
            assert layer == "models", f"{layer} imports {name}"
        assert parts[0] not in ("tensorflow", "torch", "clu"), f"{layer} imports {name}"


def test_core_is_pure():
    """No files, flags, clocks or consoles in the core and below it."""
    for path in (*(ROOT / "core").glob("*.py"), *(ROOT / "analysis").glob("*.py")):
        names = {name.split(".")[0] for name in imported(path)}
        assert not names & {"os", "sys", "time", "pathlib", "absl", "logging", "ml_collections"}
        assert "print(" not in path.read_text()


def test_the_report_stands_apart():
    """It knows runs by the files of their folders, and of what writes these their reader alone."""
    ours = {name for p in (ROOT / "report").glob("*.py") for name in module_level(p)}
    others = {name for name in ours if name.split(".")[1] not in ("report", "evaluators")}
    assert others <= {
        "distill_jax._lazy",
        "distill_jax.core.errors",
        "distill_jax.trainer.io.files",
    }


@pytest.mark.parametrize("path", sorted((ROOT / "trainer").rglob("*.py")), ids=lambda p: p.name)
def test_the_trainer_has_no_config_and_no_console(path):
    """Files are touched in `trainer/io` alone."""
    names = {name.split(".")[0] for name in imported(path)}
    assert not names & {"absl", "argparse", "ml_collections", "time", "signal"}
    assert "print(" not in path.read_text()
    if "io" not in path.relative_to(ROOT).parts:
        assert not names & {"os", "pathlib", "shutil", "tempfile", "orbax"}


HELP = """
import sys, distill_jax.main as m
try: m.main(['x', '--help'])
except SystemExit as e: assert not e.code
"""


@pytest.mark.parametrize(
    "code, printed",
    [(HELP, "usage"), ("import sys; from distill_jax.report import of_run, of_study", "")],
    ids=["help", "report"],
)
def test_what_needs_no_jax(code, printed):
    code += "\nassert not {'jax', 'tensorflow'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def module_level(path):
    """Yields the modules of this package that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:  # nothing within functions
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distill_jax"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("distill_jax"))


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def cycles(graph):
    """Returns the modules from which a path leads back to themselves."""
    found = []
    for start in graph:
        seen, left = set(), [*graph[start]]
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                left += graph.get(name, ())
        if start in seen:
            found.append(start)
    return found


def test_modules_import_each_other_in_no_circle():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    graph = {name: set(module_level(path)) - {name} for name, path in MODULES.items()}
    assert cycles(graph) == []


LIBRARY = (
    "analysis",
    "core",
    "losses",
    "weighting",
    "objectives",
    "models",
    "data",
    "evaluators",
    "trainer",
)
CONFIG_PATH = re.compile(
    r"\b(optim|roles|bilevel|lookahead|evaluators|eval|partition|cache)\.[a-z_{]"
    r"|\b(objective|weighting)\.(kwargs|name|loss_terms|control)\b"
    r"|\bdata\.(kwargs|held_out|train_transforms|eval_transforms|transform_kwargs|corrupt)\b"
)


def texts_of_errors(tree):
    """Yields line and text of strings in raised errors, and in what is given to checks as where."""
    for node in ast.walk(tree):
        inside = [node.exc] if isinstance(node, ast.Raise) and node.exc else []
        if isinstance(node, ast.keyword) and node.arg in ("where", "hint"):
            inside = [node.value]
        names = [getattr(x, "id", "") for x in node.targets] if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Assign) and {"where", "hint", "what", "WHERE"} & set(names):
            inside = [node.value]
        for part in inside:
            for child in ast.walk(part):
                if isinstance(child, ast.Constant) and isinstance(child.value, str):
                    yield child.lineno, child.value


@pytest.mark.parametrize("package", LIBRARY)
def test_errors_of_the_library_name_arguments_and_no_keys_of_a_config(package):
    found = [
        f"{path.name}:{line}: {text!r}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, text in texts_of_errors(ast.parse(path.read_text("utf-8")))
        if CONFIG_PATH.search(text)
    ]
    assert not found


def test_the_search_for_keys_of_a_config_finds_them():
    source = 'where = "roles.x"\nraise E("bad", where=f"optim.{k}", hint="set data.kwargs.a")\n'
    found = [text for _, text in texts_of_errors(ast.parse(source))]
    assert sum(bool(CONFIG_PATH.search(text)) for text in found) >= 3
