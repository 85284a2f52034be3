"""Command lines: what is understood, and a corpus of mistakes with what each must be told."""

import errno
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import time

import pytest

from distill_jax import main
from distill_jax.core.errors import UserError
from distill_jax.run import config as config_lib
from distill_jax.run import flags
from distill_jax.run.workdir import WRITTEN
from distill_jax.trainer.io import paths

GOOD = """
from distill_jax.run.config import base, role

def get_config(arg="full"):
    config = base()
    config.objective.name = "kd"
    config.objective.kwargs.temperature = 4.0
    config.roles.student = role("mlp", width=8)
    config.roles.teacher = role("mlp", width=32)
    config.roles.teacher.frozen = True
    config.roles.teacher.init = "runs/teacher"
    config.data.name, config.evaluators.calibration = "digits", {}
    config.total = "1 epoch" if arg == "short" else "30 epochs"
    return config
"""

# Ways of code to leave the program.
WAYS_OUT = (
    "raise SystemExit(0)",
    "raise SystemExit",
    "sys.exit('done')",
    "sys.exit()",
    "quit()",
    "raise KeyboardInterrupt",
    "raise KeyboardInterrupt()",
    "raise GeneratorExit",
    "__import__('argparse').ArgumentParser().parse_args(['--no_such'])",
)

# Config files that cannot be used: name -> text.
FILES = {
    "good": GOOD,
    "no_arg": GOOD.replace('arg="full"', "").replace('"1 epoch" if arg == "short" else ', ""),
    "needs_arg": GOOD.replace('arg="full"', "arg"),
    "raises": "def get_config():\n    return undefined_name\n",
    "raises_on_import": "import no_such_package\n\ndef get_config():\n    pass\n",
    "raises_below": (
        "import json\n\ndef read():\n    return json.loads('{')\n\n"
        "def get_config():\n    return read()\n"
    ),
    "os_error": "def get_config():\n    return open('/no/such/file')\n",
    "syntax": "def get_config():\n    return (\n",
    "misspelt": GOOD.replace("    return config", "    config.optim.lrr = 1\n    return config"),
    "mistyped": GOOD.replace("    return config", "    config.seed = 'a'\n    return config"),
    "refuses": (
        "from distill_jax.core.errors import ConfigError\n\ndef get_config(arg):\n"
        "    raise ConfigError(f'no variant {arg!r}', where='--config')\n"
    ),
    **{
        f"leaves_{i}": f"import sys\n\ndef get_config():\n    {way}\n"
        for i, way in enumerate(WAYS_OUT)
    },
    "leaves_on_import": "raise SystemExit\n",
    "no_function": "def make_config():\n    pass\n",
    "returns_none": "def get_config():\n    pass\n",
    "returns_dict": "def get_config():\n    return {}\n",
    "plain": (
        "from ml_collections import ConfigDict\n\n"
        "def get_config():\n    return ConfigDict({'seed': 1})\n"
    ),
    "unlocked": GOOD.replace("    return config", "    config.unlock()\n    return config"),
    "invalid": GOOD.replace('"digits"', '""'),
    "unit": GOOD.replace("    return config", "    config.total.epochs = 20.0\n    return config"),
    "unset": GOOD.replace(
        "    return config", "    config.eval.every['steps'] = 5\n    return config"
    ),
    "units": GOOD.replace(
        "    return config", "    config.total = {'epochs': 20}\n    return config"
    ),
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)


def parse(line):
    return flags.parse(["main", *line.split()])


BASE = "--config=good.py --workdir=run "

# (name, command line, what the message contains). Build-time mistakes are told in the same way.
CORPUS = [
    ("nothing", "", ["--workdir"]),
    ("no config", "--workdir=run", ["--config: no config is given", "--config=FILE"]),
    ("no workdir", "--config=good.py", ["--workdir: mode train needs a folder", "runs/NAME"]),
    ("study without workdir", "--config=good.py --mode=study", ["mode study needs a folder"]),
    ("eval without workdir", "--mode=eval", ["mode eval needs a folder"]),
    ("eval of nothing", "--config=good.py --mode=eval --workdir=run", ["does not exist"]),
    ("workdir is a file", "--config=good.py --workdir=file", ["file is a file", "name a folder"]),
    ("workdir in a file", "--config=good.py --workdir=file/x", ["file is a file"]),
    ("bad mode", BASE + "--mode=trian", ["--mode", "unknown mode 'trian'", "did you mean 'train'"]),
    ("mode without value", BASE + "--mode", ["--mode", "--help"]),
    ("unknown flag", BASE + "--wrkdir=x", ["--wrkdir: unknown flag", "did you mean 'workdir'"]),
    ("flag in a group", BASE + "--export.format=onnx", ["did you mean 'formats'"]),
    ("config key as flag", BASE + "--lr=1", ["--lr", "did you mean --config.optim.lr"]),
    ("nested key as flag", BASE + "--optim.lr=1", ["did you mean --config.optim.lr"]),
    ("misspelt config", BASE + "--confg.optim.lr=1", ["did you mean --config.optim.lr"]),
    ("not a flag", BASE + "optim.lr=1", ["optim.lr=1: not a flag", "--name=value"]),
    ("config twice", BASE + "--config=raises.py", ["--config: the flag is given twice"]),
    (
        "misspelt option",
        "--config=distill/kd:smokey --workdir=run",
        ["--config: unknown option 'smokey'", "did you mean 'smoke'"],
    ),
    ("config without value", "--workdir=run --config", ["--config: the flag has no value"]),
    ("config empty", "--workdir=run --config=", ["--config=: the flag has no value"]),
    ("override without value", BASE + "--config.seed", ["write --config.seed=VALUE"]),
    ("override of nothing", BASE + "--config.=3", ["--config.", "unknown flag"]),
    (
        "override before config",
        "--config.seed=1 --config=good.py --workdir=run",
        ["--config.seed=1: an override stands before", "put --config=FILE first"],
    ),
    ("no with value", BASE + "--noconfig.seed=1", ["write --config.KEY=false"]),
    # Config files.
    ("no such file", "--workdir=run --config=god.py", ["no such file: god.py", "'good.py'"]),
    ("no such folder", "--workdir=run --config=x/y.py", ["no such file: x/y.py", "no config in x"]),
    ("a folder", "--workdir=run --config=.", [". is a folder"]),
    (
        "an exception",
        "--workdir=run --config=raises.py",
        ["raises.py:2: NameError: name 'undefined_name'", "in: return undefined_name"],
    ),
    (
        "an exception on import",
        "--workdir=run --config=raises_on_import.py",
        ["raises_on_import.py:1: ModuleNotFoundError", "in: import no_such_package"],
    ),
    (
        "an exception in a library",
        "--workdir=run --config=raises_below.py",
        ["raises_below.py:4: JSONDecodeError", "in: return json.loads"],
    ),
    ("an os error", "--workdir=run --config=os_error.py", ["os_error.py:2: FileNotFoundError"]),
    ("a syntax error", "--workdir=run --config=syntax.py", ["syntax.py:2: SyntaxError"]),
    (
        "a misspelt key in the file",
        "--workdir=run --config=misspelt.py",
        ["misspelt.py:14: AttributeError", "Did you mean", '"lr"'],
    ),
    (
        "a mistyped value in the file",
        "--workdir=run --config=mistyped.py",
        ["mistyped.py:14: Type"],
    ),
    ("the file's own refusal", "--workdir=run --config=refuses.py:x", ["--config: no variant 'x'"]),
    (
        "no get_config",
        "--workdir=run --config=no_function.py",
        ["no_function.py: get_config is not defined", "did you mean 'make_config'"],
    ),
    ("returns None", "--workdir=run --config=returns_none.py", ["get_config returned NoneType"]),
    ("returns a dict", "--workdir=run --config=returns_dict.py", ["returned dict", "base()"]),
    ("a plain ConfigDict", "--workdir=run --config=plain.py", ["missing key", "base()"]),
    ("an argument too many", "--workdir=run --config=no_arg.py:x", ["no_arg.py:x", "drop ':x'"]),
    ("an argument missing", "--workdir=run --config=needs_arg.py", ["needs_arg.py:ARG"]),
    ("an invalid config", "--workdir=run --config=invalid.py", ["data.name: no name is set"]),
    # Overrides; tests/run/test_config.py has the rest of them.
    (
        "misspelt nested key",
        BASE + "--config.optim.lrr=1",
        ["optim.lrr: unknown config key 'lrr'", "did you mean 'lr'", "weight_decay"],
    ),
    ("misspelt group", BASE + "--config.optin.lr=1", ["optin", "did you mean 'optim'"]),
    ("wrong type", BASE + "--config.optim.lr=abc", ["optim.lr: 'abc' is not of type float"]),
    ("a group", BASE + "--config.optim=adam", ["optim: a group cannot be replaced", "optim.name"]),
    ("an unlocked config", BASE.replace("good", "unlocked") + "--config.sed=1", ["'seed'"]),
    ("invalid value", BASE + "--config.precision=fp16", ["precision", "did you mean 'bfloat16'"]),
    (
        "a unit in a file",
        "--workdir=run --config=unit.py",
        ["unit.py:14", 'config.total = "20 epochs"'],
    ),
    ("a unit of none", "--workdir=run --config=unset.py", ['write config.eval.every = "5 steps"']),
    ("units in a file", "--workdir=run --config=units.py", ['total="20 epochs"', "one value"]),
    (
        "a unit as a key",
        BASE + "--config.total.epochs=20",
        ["total.epochs: a duration is one value", 'write --config.total="20 epochs"'],
    ),
    ("a wrong unit", BASE + "--config.total=1eopch", ["total: '1eopch'", "did you mean 'epochs'"]),
]


@pytest.mark.parametrize(("line", "expected"), [c[1:] for c in CORPUS], ids=[c[0] for c in CORPUS])
def test_mistakes_are_told_in_one_message(line, expected):
    with pytest.raises(UserError) as error:
        parse(line)
    message = str(error.value)
    for text in expected:
        assert text in message
    assert "Traceback" not in message and len(message.splitlines()) <= 4
    assert error.value.exit_code == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be made or written to"):
        parse("--config=good.py --workdir=closed/run")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC])
def test_a_workdir_without_permission(monkeypatch, number):
    def refuse(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(paths.tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match=f"cannot be made or written to: {os.strerror(number)}"):
        parse("--config=good.py --workdir=run")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG])
def test_a_workdir_that_cannot_be_looked_up(monkeypatch, number):
    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(paths.os, "lstat", refuse)
        with pytest.raises(UserError, match=f"--workdir: .*/run .*: {os.strerror(number)}"):
            flags._workdir("run", "train")


@pytest.mark.parametrize("mode", ["train", "study", "eval"])
def test_a_folder_where_a_file_is_written_is_refused_at_the_door(tmp_path, mode):
    (tmp_path / "run" / WRITTEN[mode][0]).mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder, where a file is written"):
        parse(f"--config=good.py --workdir=run --mode={mode}")


@pytest.mark.parametrize("flag", ["--undefok=foo", "--flagfile=foo", "-undefok"])
def test_flags_of_absl_itself_are_unknown(flag):
    with pytest.raises(UserError, match="unknown flag"):
        parse(f"--config=good.py --workdir=run {flag}")


def test_a_full_command_line(tmp_path):
    line = "--config=good.py:short --workdir=runs/a --config.optim.lr=0.5 --config.mesh.data -1"
    line += " --noconfig.roles.teacher.frozen --mode train --config.objective.kwargs.temperature=2"
    found = parse(line)
    assert found.mode == "train" and found.config_spec == "good.py:short"
    assert found.workdir == tmp_path / "runs" / "a" and not found.workdir.exists()
    assert found.config.total == "1 epoch" and found.config.optim.lr == 0.5
    assert found.config.mesh.data == -1 and found.config.roles.teacher.frozen is False
    assert found.config.objective.kwargs.temperature == 2.0
    assert found.config.is_locked
    assert list(found.overrides.items()) == [
        ("optim.lr", "0.5"),
        ("mesh.data", "-1"),
        ("roles.teacher.frozen", "false"),
        ("objective.kwargs.temperature", "2"),
    ]


def test_a_config_that_was_left_unlocked_is_locked():
    line = "--config=unlocked.py --workdir=run --config.objective.kwargs.new=1"
    config = parse(line + " --config.roles.student.kwargs.depth=3").config
    assert config.objective.kwargs.new == 1 and config.roles.student.kwargs.depth == 3
    for group in (config, config.optim, config.roles.student):
        assert group.is_locked


def test_the_last_of_two_overrides_wins():
    assert parse(BASE + "--config.seed=1 --config.seed=2").config.seed == 2


def test_values_may_hold_equals_signs_and_spaces():
    argv = ["main", *BASE.split(), "--config.objective.kwargs.note=a=b c"]
    assert flags.parse(argv).config.objective.kwargs.note == "a=b c"


def test_parsing_has_no_memory(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--config.optim.lrr=1"])
    assert parse(BASE + "--config.seed=1").config.seed == 1
    assert parse(BASE).config.seed == 0


@pytest.mark.parametrize("spec", ["good.py:smoke", "good.py:short,smoke", "no_arg.py:smoke"])
def test_smoke_is_one_change_of_any_config(spec):
    config = parse(f"--workdir=run --config={spec} --config.seed=1").config
    assert (config.total, config.eval.every, config.batch_size) == ("12 steps", "6 steps", 32)
    assert config.data.name == "synthetic" and config.objective.name == "kd"
    assert config.seed == 1


def test_smoke_takes_a_part_of_data_of_your_own(tmp_path):
    (tmp_path / "own.py").write_text(GOOD.replace('"digits"', '"mine:data"'))
    config = parse("--workdir=run --config=own.py:smoke").config
    assert (config.data.name, config.data.at_most) == ("mine:data", 256)


def test_smoke_of_a_study_keeps_its_arms_and_shortens_them(tmp_path):
    arms = {
        "a": {"total": "500 steps", "batch_size": 256, "cache": {"dir": "runs/c/seed{seed}"}},
        "b": {"objective": {"kwargs": {"queue": 4096, "warmup": "20 epochs", "temperature": 2.0}}},
        "c": {"data": {"held_out": 0.0, "name": "digits"}, "bilevel": {"warmup": "1 epoch"}},
    }
    change = (
        f"    config.study.arms = {arms}\n    config.study.seeds = (3, 4, 5)\n    return config"
    )
    (tmp_path / "study.py").write_text(GOOD.replace("    return config", change))
    study = flags.load("study.py:smoke").study
    assert study.seeds == (3, 4)
    assert study.arms.a.to_dict() == {"batch_size": 32, "cache": {"dir": "runs/c/seed{seed}_smoke"}}
    assert study.arms.b.objective.kwargs.to_dict() == {
        "queue": 96,
        "warmup": "2 steps",
        "temperature": 2.0,
    }
    assert study.arms.c.bilevel.warmup == "3 steps" and study.arms.c.data.held_out == 0.0


def test_an_edited_config_file_is_read_again(tmp_path):
    assert parse(BASE).config.total == "30 epochs"
    (tmp_path / "good.py").write_text(GOOD.replace("30", "40"))
    assert parse(BASE).config.total == "40 epochs"
    assert not (tmp_path / "__pycache__").exists()


def test_describe_needs_no_workdir():
    assert parse("--config=good.py --mode=describe").workdir is None


@pytest.mark.parametrize("mode", ["eval", "describe"])
def test_the_config_of_a_run_is_read_where_none_is_given(tmp_path, mode):
    (tmp_path / "run").mkdir()
    config = parse(BASE + "--config.seed=5").config
    (tmp_path / "run" / "config.json").write_text(config_lib.to_json(config))
    found = parse(f"--mode={mode} --workdir=run --config.eval.batch_size=10")
    assert found.config.seed == 5 and found.config.eval.batch_size == 10
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match=r"run: holds no config.json\n"):
        parse(f"--mode={mode} --workdir=run")


def test_help_is_short_fast_and_free_of_jax(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for mode in flags.MODES:
        assert f"  {mode}" in text
    assert "--config.optim.lr" in text and len(text.splitlines()) < 44
    script = """
        import sys
        from distill_jax.run import flags
        try:
            flags.parse(["main", "--help"])
        finally:
            heavy = {"jax", "numpy", "flax", "optax", "tensorflow", "orbax"} & set(sys.modules)
            assert not heavy, heavy
    """
    start = time.perf_counter()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(flags.__file__))))
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=root)
    assert time.perf_counter() - start < 5.0


def test_every_override_in_the_help_works():
    usage = re.sub(r'="(\d+) (\w+)"', r"=\1\2", flags.usage())  # a shell takes the quotes away
    shown = [word for word in usage.split() if word.startswith("--config.")]
    values = [word.rstrip("\\") for word in shown if "KEY" not in word]
    assert len(values) >= 8
    selection = [word for word in values if ".eval." in word]
    assert parse(BASE + " ".join(selection)).config.eval.mode == "min"
    for word in set(values) - set(selection):
        study = " --config.study.arms.a.batch_size=64" if ".study." in word else ""
        parse(BASE + word + study)


@pytest.mark.parametrize("i", range(len(WAYS_OUT)))
def test_a_config_cannot_leave_the_program(i, capsys):
    assert main.main(["", f"--config=leaves_{i}.py", "--workdir=run"]) == 2
    err = capsys.readouterr().err
    kinds = ("SystemExit", "KeyboardInterrupt", "GeneratorExit")
    assert any(f"leaves_{i}.py:4: {kind}: " in err for kind in kinds), err
    assert main.main(["", "--config=leaves_on_import.py", "--workdir=run"]) == 2
    err = capsys.readouterr().err
    assert "error: leaves_on_import.py:1: SystemExit: \n  in: raise SystemExit" in err


def test_ctrl_c_is_not_taken_for_a_mistake_of_the_config():
    """Raised by the signal inside the config, it ends the program as anywhere else."""
    text = GOOD.replace("    config = base()", "    import signal\n    signal.raise_signal(2)")
    pathlib.Path("interrupted.py").write_text(text)
    with pytest.raises(KeyboardInterrupt):
        parse("--config=interrupted.py --workdir=run")


@pytest.mark.parametrize("start", [("-m", "distill_jax.main"), ("bin/distill-jax",)])
def test_modules_of_the_current_folder_are_found_by_each_start(start, tmp_path):
    """The console script has its own folder first on the path, `python -m` the current one."""
    pathlib.Path("mine.py").write_text("")
    pathlib.Path("with_own_code.py").write_text("import mine\n" + GOOD)
    (tmp_path / "bin").mkdir()
    pathlib.Path("bin/distill-jax").write_text("from distill_jax.main import run\nrun()\n")
    line = [sys.executable, *start, "--config=with_own_code.py", "--workdir=x", "--config.seed=a"]
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(flags.__file__).parents[2])}
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "'a' is not of type int" in done.stderr, done.stderr
