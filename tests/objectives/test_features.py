"""Methods on features: losses against NumPy loops and PyTorch, and what objectives add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import main
from distill_jax.core import means, state, steps
from distill_jax.core.api import Model
from distill_jax.core.errors import CheckpointError, ConfigError
from distill_jax.data import loader
from distill_jax.losses import features
from distill_jax.objectives import ab, factor_transfer, fitnet, fsp, review_kd, simkd
from distill_jax.run import build, flags
from tests import harness
from tests.reference import draw

# Transcriptions, one example at a time: maps are [h, w, c].


def attention_distance(student, teacher):
    maps = []
    for x in (student, teacher):
        h, w, c = x.shape
        q = [sum(x[i, j, k] ** 2 for k in range(c)) / c for i in range(h) for j in range(w)]
        norm = sum(value**2 for value in q) ** 0.5
        maps.append([value / norm for value in q])
    return sum((a - b) ** 2 for a, b in zip(*maps, strict=True)) / len(maps[0])


def gaussian_nll(mean, target, variance):
    h, w, c = target.shape
    total = 0.0
    for k in range(c):
        for i in range(h):
            for j in range(w):
                total += np.log(variance[k]) + (target[i, j, k] - mean[i, j, k]) ** 2 / variance[k]
    return 0.5 * total / (h * w * c)


def flow_distance(student, teacher, second):
    gram = []
    for x in (student, teacher):
        h, w, c = x.shape
        products = np.zeros((c, second.shape[-1]))
        for i in range(h):
            for j in range(w):
                products += np.outer(x[i, j], second[i, j])
        gram.append(products / (h * w))
    return ((gram[0] - gram[1]) ** 2).mean()


def boundary_distance(student, teacher, margin):
    total = 0.0
    for s, t in zip(student.ravel(), teacher.ravel(), strict=True):
        on = 1.0 if t > 0 else 0.0
        total += (on * max(margin - s, 0.0) + (1 - on) * max(margin + s, 0.0)) ** 2
    return total / student.size


def factor_distance(student, teacher):
    s, t = (x.ravel() / np.linalg.norm(x) for x in (student, teacher))
    return sum(abs(a - b) for a, b in zip(s, t, strict=True)) / s.size


def hierarchical_distance(student, teacher):
    h = min(student.shape[:2])
    total, weights, weight = ((student - teacher) ** 2).mean(), 1.0, 1.0
    for level in (4, 2, 1):
        if level >= h:
            continue
        pooled = [pool(x, level) for x in (student, teacher)]
        weight /= 2
        weights += weight
        total += weight * ((pooled[0] - pooled[1]) ** 2).mean()
    return total / weights


def pool(x, level):
    """Bins from floor(i n / level) to ceil((i + 1) n / level)."""
    h, w, c = x.shape
    out = np.zeros((level, level, c))
    for i in range(level):
        for j in range(level):
            rows = slice(i * h // level, -(-(i + 1) * h // level))
            columns = slice(j * w // level, -(-(j + 1) * w // level))
            out[i, j] = x[rows, columns].mean((0, 1))
    return out


VARIANCE = np.array([0.3, 1.0, 5.0])
SECOND = draw(2, 3, 3, 2, seed=2)

CASES = {
    "attention": (features.attention_distance, attention_distance, 3),
    "nll": (
        lambda m, t: features.gaussian_nll(t, m, jnp.asarray(VARIANCE).reshape(1, 1, 1, -1)),
        lambda m, t: gaussian_nll(m, t, VARIANCE),
        3,
    ),
    "boundary": (
        lambda s, t: features.boundary_distance(s, t, margin=1.0),
        lambda s, t: boundary_distance(s, t, 1.0),
        3,
    ),
    "factor": (features.factor_distance, factor_distance, 3),
    **{
        f"hierarchical{size}": (features.hierarchical_distance, hierarchical_distance, size)
        for size in (1, 3, 5, 8)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_against_loops(name):
    ours, reference, size = CASES[name]
    student, teacher = draw(2, size, size, 3), draw(2, size, size, 3, seed=1)
    want = np.array([reference(s, t) for s, t in zip(student, teacher, strict=True)])
    with jax.enable_x64(True):
        grad, value = first_gradient(lambda s: ours(s, jnp.asarray(teacher)), student)
        np.testing.assert_allclose(value, want, rtol=1e-9)
    np.testing.assert_array_equal(grad[1], 0.0)
    np.testing.assert_allclose(
        grad[0], slope(lambda s: reference(s, teacher[0]), student[0]), rtol=1e-5, atol=1e-8
    )


def first_gradient(losses, x):
    """The gradient of the first of several losses `[b]`, and all of them."""
    return jax.jit(jax.grad(lambda x: (losses(x)[0], losses(x)), has_aux=True))(jnp.asarray(x))


def slope(f, x, step=1e-6):
    """The gradient of `f` by central differences."""
    found = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * step
            ends.append(f(moved))
        found[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def test_flow_against_loops():
    student, teacher = draw(2, 3, 3, 4), draw(2, 3, 3, 4, seed=1)

    def ours(s):
        flows = [features.flow(x, jnp.asarray(SECOND)) for x in (s, jnp.asarray(teacher))]
        return features.mean_square(flows[0] - flows[1])

    with jax.enable_x64(True):
        grad, value = first_gradient(ours, student)
    rows = list(zip(student, teacher, SECOND, strict=True))
    np.testing.assert_allclose(value, [flow_distance(*row) for row in rows], rtol=1e-9)
    want = slope(lambda x: flow_distance(x, teacher[0], SECOND[0]), student[0])
    np.testing.assert_allclose(grad[0], want, rtol=1e-5, atol=1e-8)


def torch_losses(torch):
    """The same losses for maps [b, c, h, w], as batch means."""
    F = torch.nn.functional

    def attention(s, t):
        def at(x):
            return F.normalize(x.pow(2).mean(1).flatten(1))

        return (at(s) - at(t)).pow(2).mean()

    def nll(m, t):
        variance = torch.tensor(VARIANCE).view(1, -1, 1, 1)
        return torch.nn.GaussianNLLLoss()(m, t, variance.expand_as(m))

    def boundary(s, t):
        return torch.where(t > 0, F.relu(1.0 - s), F.relu(1.0 + s)).pow(2).mean()

    def factor(s, t):
        return F.l1_loss(F.normalize(s.flatten(1)), F.normalize(t.flatten(1)))

    def hierarchical(s, t):
        loss, weight, total = F.mse_loss(s, t), 1.0, 1.0
        for level in (4, 2, 1):
            if level < s.shape[2]:
                weight /= 2
                pooled = [F.adaptive_avg_pool2d(x, level) for x in (s, t)]
                loss, total = loss + weight * F.mse_loss(*pooled), total + weight
        return loss / total

    return {
        "attention": attention,
        "nll": nll,
        "boundary": boundary,
        "factor": factor,
        **dict.fromkeys(("hierarchical3", "hierarchical5", "hierarchical8"), hierarchical),
    }


def test_values_and_gradients_against_pytorch():
    torch = pytest.importorskip("torch")
    for name, reference in torch_losses(torch).items():
        ours, _, size = CASES[name]
        student, teacher = draw(4, size, size, 3), draw(4, size, size, 3, seed=1)
        s, t = (torch.tensor(x).permute(0, 3, 1, 2) for x in (student, teacher))
        s.requires_grad_(True)
        loss = reference(s, t)
        loss.backward()
        with jax.enable_x64(True):
            grad, value = first_gradient(
                lambda x: ours(x, jnp.asarray(teacher)).mean(keepdims=True),  # noqa: B023
                student,
            )
        np.testing.assert_allclose(value[0], loss.item(), rtol=1e-5, err_msg=name)
        want = s.grad.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-9, err_msg=name)


def test_dead_maps_have_finite_gradients():
    zero, other = jnp.zeros((1, 2, 2, 3)), jnp.asarray(draw(1, 2, 2, 3))
    for loss in (features.attention_distance, features.factor_distance):
        grad, _ = first_gradient(lambda x: loss(x, other), zero)  # noqa: B023
        assert np.isfinite(grad).all()


def test_tokens_and_vectors_are_maps():
    tokens = jnp.asarray(draw(2, 9, 4))
    with_class = jnp.concatenate([jnp.full((2, 1, 4), 7.0), tokens], axis=1)
    for x in (tokens, with_class):
        np.testing.assert_array_equal(features.as_map(x, where=""), tokens.reshape(2, 3, 3, 4))
    assert features.as_map(jnp.ones((2, 4)), where="").shape == (2, 1, 1, 4)
    with pytest.raises(ConfigError, match="6 tokens form no square"):
        features.as_map(jnp.ones((2, 6, 4)), where="")
    with pytest.raises(ConfigError, match="is no map"):
        features.as_map(jnp.ones(2), where="")


def test_the_larger_map_is_averaged():
    large, small = draw(2, 4, 6, 3), draw(2, 2, 2, 3)
    want = [[large[:, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((1, 2)) for j in (0, 1)]
            for i in (0, 1)]  # fmt: skip
    want = np.asarray(want).transpose(2, 0, 1, 3)
    for first, second in ((large, small), (small, large)):
        found = features.match_sizes(jnp.asarray(first), jnp.asarray(second), where="")
        for x, like in zip(found, (first, second), strict=True):
            np.testing.assert_allclose(x, want if like is large else small, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="4x6 and 3x3"):
        features.match_sizes(jnp.ones((1, 4, 6, 3)), jnp.ones((1, 3, 3, 3)), where="")


def infer(objective, **kwargs):
    """Shapes of an objective on the tiny networks."""
    models = {role: harness.role_model(role) for role in objective.roles}
    return state.infer_shapes(objective, {**models, **kwargs}, harness.make_batch())


@pytest.mark.parametrize(
    "objective, match",
    [
        (fsp.make(), "the student's features are"),
        (fsp.make(student_stages=("stage1",), teacher_stages=("stage1",)), "two stages"),
        (ab.make(student_stages=("stage1_pre",)), "1 stages of the student and 2"),
        (fitnet.make(student_stage="stage9"), "no output 'stage9'"),
    ],
)
def test_stages_that_do_not_fit_are_refused(objective, match):
    with pytest.raises(ConfigError, match=match):
        infer(objective)


def test_wrong_connectors_are_refused():
    with pytest.raises(ConfigError, match="no variance"):
        infer(harness.make_objective("vid"), posterior=harness.role_model("regressor"))

    def narrow(params, model_state, x, like, *, train, rngs):
        return {"output1": x[..., :3]}, model_state

    with pytest.raises(ConfigError, match="student's features are"):
        infer(fitnet.make(), regressor=Model(lambda key, *x: ({}, {}), narrow))
    with pytest.raises(ConfigError, match="returns no output1, only output"):
        infer(
            fitnet.make(),
            regressor=Model(lambda key, *x: ({}, {}), lambda p, m, *x, **_: ({"output": x[0]}, m)),
        )


@pytest.mark.parametrize(
    "make, kwargs",
    [
        (ab.make, {"margin": 0.0}),
        (factor_transfer.make, {"reconstruction_weight": -1.0}),
        (review_kd.make, {"warmup": -1.0}),
        (simkd.make, {"regression_weight": -1.0}),
    ],
)
def test_hyperparameters_are_checked(make, kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        make(**kwargs)


def ask(name, **kwargs):
    """Terms of an objective on a batch, outputs of its student and teacher, and the setup."""
    made = harness.setup(name, kwargs=kwargs)
    batch = harness.make_batch()

    @jax.jit
    def run(key, frozen):
        current = made.init(key)
        nets = steps.bind_networks(made.models, current, frozen, key=jax.random.key(1))
        student, _ = nets("student", batch["input"], train=True)
        teacher, _ = nets("teacher", batch["input"])
        terms = made.objective.loss(nets, batch, {}, jnp.int32(0))
        found = {}
        if "regressor" in made.models:
            ends = [features.as_map(x["embedding"], where="") for x in (student, teacher)]
            found, _ = nets("regressor", *ends)
        return terms, student, teacher, found

    return *jax.device_get(run(jax.random.key(0), made.frozen)), made


def test_attention_is_summed_over_stages():
    terms, student, teacher, _, _ = ask("attention_transfer")
    want = [
        sum(attention_distance(student[n][i], teacher[n][i]) for n in ("stage1", "stage2"))
        for i in range(16)
    ]
    np.testing.assert_allclose(terms.values["attention"], want, rtol=1e-4)
    assert terms.coef == {"attention": 1000.0, "cross_entropy": 1.0}


def test_flows_join_consecutive_stages():
    terms, student, teacher, _, _ = ask("fsp")
    want = []
    for i in range(16):
        flows = [
            np.einsum("hwc,hwd->cd", outputs["stage1"][i], outputs["stage2"][i]) / 9
            for outputs in (student, teacher)
        ]
        want.append(((flows[0] - flows[1]) ** 2).mean())
    np.testing.assert_allclose(terms.values["fsp"], want, rtol=1e-4)


def test_boundaries_are_those_before_the_activation():
    """A student far above zero errs where the teacher is below, by its distance and the margin."""
    objective = ab.make(margin=0.5)
    student, teacher = jnp.full((2, 1, 1, 3), 9.0), jnp.asarray(draw(2, 1, 1, 3))
    outputs = [{"stage1": -x, "stage1_pre": x} for x in (student, teacher)]

    def nets(role, own, like, *, train):
        assert (role, train) == ("regressor", True)
        return {"output1": own}, {}

    found = objective.loss_terms(nets, *outputs, {}, {}, jnp.int32(0)).values["boundary"]  # type: ignore
    want = np.where(np.asarray(teacher) > 0, 0.0, 9.5**2).mean((1, 2, 3))
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("step, share", [(0, 1 / 8), (3, 4 / 8), (7, 1.0), (90, 1.0)])
def test_the_weight_of_a_review_grows(step, share):
    objective = review_kd.make(weight=3.0, warmup="2 epochs", steps_per_epoch=4.0)
    outputs = {"stage1": jnp.zeros((2, 1, 1, 3))}

    def nets(role, own, like, *, train):
        return {"output1": own}, {}

    found = objective.loss_terms(nets, outputs, outputs, {}, {}, jnp.int32(step))  # type: ignore
    np.testing.assert_allclose(found.coef["review"], 3 * share, rtol=1e-6)


def test_a_paraphraser_learns_from_its_reconstruction_alone():
    made, batch = harness.setup("factor_transfer"), harness.make_batch()
    cases = ({"weight": 0.0, "label_weight": 0.0}, {}, {"reconstruction_weight": 0.0})
    objectives = [harness.make_objective("factor_transfer", **kwargs) for kwargs in cases]

    @jax.jit
    def gradients(key, frozen):
        current = made.init(key)

        def losses(paraphraser):
            moved = current.replace(params={**current.params, "paraphraser": paraphraser})
            nets = steps.bind_networks(made.models, moved, frozen, key=jax.random.key(1))
            terms = [objective.loss(nets, batch, {}, jnp.int32(0)) for objective in objectives]
            return [means.mean_loss(x, batch["mask"])[0] for x in terms]

        return jax.jacrev(losses)(current.params["paraphraser"])

    alone, both, fixed = jax.device_get(gradients(jax.random.key(0), made.frozen))
    assert any(np.any(g) for g in jax.tree.leaves(alone))
    assert harness.max_relative(alone, both) < 1e-5
    assert all(not np.any(g) for g in jax.tree.leaves(fixed))


def test_a_frozen_paraphraser_keeps_its_state():
    objective = factor_transfer.make(reconstruction_weight=0.0)
    found = infer(objective).terms
    assert set(found.state) == {"student", "translator"}
    assert "reconstruction" not in found.values


def test_softmax_regression_asks_the_teachers_classifier():
    terms, _, teacher, found, made = ask("srrl", weight=2.0, regression_weight=3.0)
    found = found["output1"][:, 0, 0]
    head = jax.device_get(made.frozen["teacher_head"][0])
    logits = found @ head["kernel"] + head["bias"][None]
    want = ((logits - teacher["logits"]) ** 2).mean(1)
    np.testing.assert_allclose(terms.values["regression"], want, rtol=1e-4)
    want = ((found - teacher["embedding"]) ** 2).mean(1)
    np.testing.assert_allclose(terms.values["feature"], want, rtol=1e-4)
    assert (terms.coef["feature"], terms.coef["regression"]) == (2.0, 3.0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    command = ["distill-jax", "--config=configs/distill/supervised.py:smoke"]
    command += ["--config.total=4", "--config.eval.every=4"]
    assert main.main([*command, f"--workdir={workdir}"]) == 0
    return workdir


def reuse(teacher, *overrides, head="student/Dense_0"):
    """A config in which the student takes over the classifier of a run."""
    return flags.parse(
        [
            "distill-jax",
            "--config=configs/distill/kd.py:smoke",
            "--workdir=unused",
            "--config.objective.name=simkd",
            f"--config.roles.teacher.init={teacher}",
            "--config.roles.regressor.model=regressor",
            "--config.roles.regressor.kwargs.kernel_sizes=(1, 3, 1)",
            f"--config.roles.teacher_head.init={teacher}#{head}",
            "--config.roles.teacher_head.frozen=True",
            "--config.evaluators.classification.role=prediction",
            *overrides,
        ]
    ).config


HEAD = "--config.roles.teacher_head.model=linear_head"


@pytest.mark.xdist_group("features_teacher")
def test_a_classifier_is_taken_over_from_a_run(teacher):
    config = reuse(teacher, HEAD)
    experiment = build.build(config)
    frozen = build.frozen_networks(experiment, config)
    current = build.initial_state(experiment, jax.random.key(0), config)
    batch = next(iter(loader.eval_batches(experiment.dataset.test, batch_size=8)))
    predicted = experiment.predict(current, frozen, batch)
    transform = build.make_transform(experiment.config, experiment.dataset, train=False)

    @jax.jit
    def ask(current, frozen, batch):
        nets = steps.bind_networks(experiment.models, current, frozen, key=jax.random.key(0))
        image = transform(jax.random.key(0), batch, jnp.int32(0))["input"]
        own, like = (nets(role, image)[0] for role in ("student", "teacher"))
        found, _ = nets("regressor", own["stage3"], like["stage3"])
        return like, nets("teacher_head", like["embedding"])[0], found

    like, answer, found = ask(current, frozen, batch)
    np.testing.assert_allclose(answer["logits"], like["logits"], rtol=1e-4, atol=1e-5)
    kernel, bias = (np.asarray(frozen["teacher_head"][0][n]) for n in ("kernel", "bias"))
    want = np.asarray(found["output1"]).mean((1, 2)) @ kernel + bias
    np.testing.assert_allclose(predicted["prediction"]["logits"], want, rtol=1e-3, atol=1e-4)


@pytest.mark.xdist_group("features_teacher")
def test_mistakes_in_taking_over_are_refused(teacher):
    with pytest.raises(ConfigError, match="the model of this part must be named"):
        build.build(reuse(teacher))
    for head, match in (("student/Dense_1", "has no layer 'Dense_1'.*\n.*Dense_0"),
                        ("student/Conv_0", "another structure")):  # fmt: skip
        config = reuse(teacher, HEAD, head=head)
        experiment = build.build(config)
        with pytest.raises(CheckpointError, match=match):
            build.frozen_networks(experiment, config)
