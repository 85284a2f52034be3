"""Arithmetic chains: rows, disjoint parts, an exact parser, the evaluator of what is written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distill_jax as dj
from distill_jax.core import chains, sampling
from distill_jax.core.errors import ConfigError
from distill_jax.data import arithmetic_chains, checks
from distill_jax.data.transforms import tokens
from distill_jax.evaluators import exact_answer
from distill_jax.models import transformer
from distill_jax.objectives.next_token import NextToken

SMALL = {"steps": (1, 3), "largest": 30, "n_train": 200, "n_test": 60, "distracted": 0.5}


def rows_of(part):
    return part.read(np.arange(len(part)))


def texts(rows):
    for row, mask in zip(rows["input"]["tokens"], rows["input"]["loss_mask"], strict=True):
        cut = int(mask.argmax())
        assert row[0] == chains.END
        yield chains.decode(row[1:cut]), chains.decode(row[cut:])


def test_every_row_is_a_question_and_its_solution():
    dataset, _ = checks.open_dataset(arithmetic_chains.make(**SMALL))
    assert dataset.vocabulary == chains.VOCABULARY and not dataset.classes
    seen: dict[str, set] = {}
    for name, part in dataset.parts.items():
        rows = rows_of(part)
        for i, (question, solution) in enumerate(texts(rows)):
            problem = chains.parse(question)
            # Oracle: Python's own arithmetic on the text.
            own = [c for c in split(question[:-2]) if c[0] == question[-2]]
            value = int(own[0][1:])
            lines = ""
            for clause in own[1:]:
                after = eval(f"{value}{clause[1:]}")
                lines += f"{value}{clause[1:]}={after};"
                value = after
                assert 0 <= value <= SMALL["largest"]
            assert solution == lines and problem.values[-1] == value
            assert len(problem.changes) == rows["label"][i]
            assert len(split(question[:-2])) - len(own) == rows["distracted"][i]
            assert chains.decode(rows["prompt"][i][rows["start"][i] + 1 :]) == question
            assert (rows["prompt"][i][: rows["start"][i] + 1] == chains.END).all()
            assert chains.decode(rows["solution"][i]) == solution
            seen.setdefault(name, set()).add(problem)
        real = rows["input"]["segments"] == 0
        assert (
            rows["input"]["loss_mask"].sum(1) == (rows["solution"] != chains.END).sum(1) + 1
        ).all()
        assert (rows["input"]["tokens"][~real] == chains.END).all()
        if name != "train":
            assert 0.4 < rows["distracted"].mean() < 0.6
    assert [len(found) for found in seen.values()] == [180, 20, 60]
    assert len(set.union(*seen.values())) == 260


def split(body):
    found = []
    for character in body:
        if character.isalpha():
            found.append(character)
        else:
            found[-1] += character
    return found


def test_it_is_a_function_of_the_seed():
    one, same = (rows_of(arithmetic_chains.make(**SMALL).train) for _ in range(2))
    other = rows_of(arithmetic_chains.make(**SMALL, seed=1).train)
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(one), dict(same)))
    assert (one["solution"] != other["solution"]).any()


@pytest.mark.parametrize(
    ("kwargs", "where"),
    [
        ({"steps": ()}, "steps"),
        ({"steps": (0,)}, "steps"),
        ({"steps": (1, 12)}, "steps"),
        ({"largest": 0}, "largest"),
        ({"largest": 3}, "n_train"),
        ({"distracted": 1.5}, "distracted"),
        ({"held_out": 1.0}, "held_out"),
        ({"n_test": 0}, "n_test"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, where):
    for make in (arithmetic_chains.make, arithmetic_chains.spec):
        with pytest.raises(ConfigError, match=where):
            make(**{**SMALL, **kwargs})


PROBLEM = chains.Problem(42, (-12, 7))


@pytest.mark.parametrize(
    ("text", "answer", "correct", "steps", "sums", "lines"),
    [
        ("42-12=30;30+7=37;", 37, True, (True, True), 2, 2),
        ("42-12=31;31+7=38;", 38, False, (False, False), 1, 2),
        ("42-12=31;30+7=37;", 37, True, (False, True), 1, 2),
        ("42-12=30;", 30, False, (True, False), 1, 1),
        ("42-12=30;30+7=37", None, False, (True, False), 1, 1),
        ("042-12=30;", None, False, (False, False), 0, 0),
        ("42-12=30;30+7=37;37+0=37;", 37, True, (True, True), 3, 3),
        ("", None, False, (False, False), 0, 0),
    ],
)
def test_the_verdict_on_a_solution(text, answer, correct, steps, sums, lines):
    assert chains.verify(PROBLEM, text) == chains.Verdict(answer, correct, steps, sums, lines)
    if correct:
        assert not chains.verify(PROBLEM, text, ended=False).correct


def test_questions_are_parsed_exactly():
    text = chains.question(PROBLEM, "b", (1, "d", 5))
    assert text == "b42d+5b-12b+7b?" and chains.parse(text) == PROBLEM
    assert chains.solution(PROBLEM) == "42-12=30;30+7=37;"
    for wrong in ("b42b-12", "b42b-12c?", "b+42b?", "b42b12b?", "b042b?", "42-12?", "b4x2b?", "?"):
        with pytest.raises(ValueError, match="'"):
            chains.parse(wrong)


def test_the_transform_leaves_the_question_out():
    rows = rows_of(arithmetic_chains.make(**SMALL).train)
    batch = {"input": rows["input"]}
    for whole in (False, True):
        made = tokens.make_next_token(whole=whole)(jax.random.key(0), batch, jnp.int32(0))
        real = rows["input"]["segments"][:, 1:] == 0
        wanted = real if whole else real & (rows["input"]["loss_mask"][:, 1:] == 1)
        np.testing.assert_array_equal(made["target_mask"], wanted.astype(np.float32))


def test_written_solutions_are_scored():
    rows = rows_of(arithmetic_chains.make(**SMALL).test)
    names = ("prompt", "start", "distracted")
    right = exact_answer.scores(rows["solution"], *(rows[n] for n in names))
    assert set(right) == {
        *("accuracy", "accuracy_1_steps", "accuracy_3_steps", "accuracy_distracted"),
        *("step_accuracy", "sums_right"),
    }
    assert set(right.values()) == {1.0}
    wrong = np.full_like(rows["solution"], chains.END)
    assert exact_answer.scores(wrong, *(rows[n] for n in names))["accuracy"] == 0
    swapped = rows["solution"].copy()
    swapped[::2] = rows["solution"][1::2]
    swapped[1::2] = rows["solution"][::2]
    found = exact_answer.scores(swapped, *(rows[n] for n in names))
    assert found["accuracy"] < 0.2 and found["sums_right"] == 1


def test_a_network_writes_its_most_probable_tokens():
    dataset = arithmetic_chains.make(**SMALL)
    net = transformer.make(vocabulary=dataset.vocabulary, width=16, depth=1, heads=2)
    trainer = dj.Trainer(
        NextToken(), student=net, optimizer=optax.sgd(0.1), transform=tokens.make_next_token()
    )
    part = dataset.test.read(np.arange(8))
    more = {"index": np.arange(8, dtype=np.int32), "epoch": np.zeros(8, np.int32)}
    batch = {**part, **more, "mask": np.ones(8, np.float32)}
    state = trainer.init(jax.random.key(0), batch)
    found = trainer.evaluate(state, [batch], {"exact_answer": exact_answer.make(new_tokens=5)})
    assert set(found) >= {"accuracy", "accuracy_distracted"}
    params, p = state.train.params["student"], part["prompt"].shape[1]

    class Nets:
        def sample(self, role, prompt, start, **options):
            keys = sampling.keys_of(jax.random.key(0), batch)
            return sampling.sample(net.decode, params, prompt, keys, start=start, **options)

    nets: Any = Nets()
    measure = exact_answer.make(new_tokens=5).measure
    made = jax.jit(lambda: measure(nets, batch, jnp.int32(0)))()
    ids = np.concatenate([part["prompt"], made["written"]], axis=1)
    seen = (np.arange(ids.shape[1])[None] >= part["start"][:, None]).astype(np.float32)
    view = {"tokens": ids, "mask": seen}
    forward = jax.jit(lambda x: net.apply(params, {}, x, train=False, rngs={})[0]["logits"])
    wanted = np.argmax(forward(view), -1)[:, p - 1 : -1]
    for written, most in zip(np.asarray(made["written"]), wanted, strict=True):
        ends = np.flatnonzero(written == chains.END)
        stop = ends[0] + 1 if len(ends) else 5
        np.testing.assert_array_equal(written[:stop], most[:stop])
