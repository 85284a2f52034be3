"""Self-supervised losses against those of public libraries: values and gradients, in float64.

For development only, where PyTorch and lightly are there; two tests want a further library. Where
a library scales otherwise or does something else, the test says what and asserts it.
"""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses import clustering, contrastive, isotropy, noncontrastive
from distill_jax.objectives import _queue
from tests import harness
from tests.reference import draw, unit


def library(name):
    """Imports a library without what it warns of on import; skips where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


torch = library("torch")
theirs = library("lightly.loss")
F = torch.nn.functional

B, D = 6, 5
ONES = np.ones(B)


def agree(ours, other, *inputs, tight=1e-5):
    """Compares scalars, and their gradients in all inputs."""
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    want = other(*tensors)
    want.backward()
    with jax.enable_x64(True):
        fn = jax.jit(jax.value_and_grad(ours, argnums=tuple(range(len(inputs)))))
        value, grads = fn(*map(jnp.asarray, inputs))
        np.testing.assert_allclose(value, want.item(), rtol=tight)
        for grad, x in zip(grads, tensors, strict=True):
            assert np.abs(grad).max() > 1e-3
            np.testing.assert_allclose(grad, x.grad.numpy(), rtol=tight, atol=1e-8)


def nets_of(outputs):
    """Networks by role; those that are not named say what they see."""

    def nets(role, *inputs, train=False, stop_gradient_params=False):
        del train, stop_gradient_params
        if role in outputs:
            return outputs[role](*inputs), {}
        return {"embedding": inputs[0], "output": inputs[0]}, {}

    return nets


def terms_of(method, batch, memory=None, step=0, **outputs):
    """Terms of an objective and their weighted sum."""
    batch = {"mask": jnp.ones(B), **{name: jnp.asarray(x) for name, x in batch.items()}}
    terms = method.loss(nets_of(outputs), batch, memory or {}, jnp.int32(step))
    total = sum(terms.coef.get(name, 1.0) * x.mean() for name, x in terms.values.items())
    return total, terms


def views_loss(name, *, label=None, outputs=None, **kwargs):
    """The loss of a method as a function of views `[b, v, d]`, the networks being identities."""
    method = harness.make_objective(name, **kwargs)
    more = {} if label is None else {"label": label}
    return lambda z: terms_of(method, {"views": z, **more}, **(outputs or {}))[0]


def test_simclr():
    other = theirs.NTXentLoss(temperature=0.3)
    agree(views_loss("simclr", temperature=0.3), lambda z: other(z[:, 0], z[:, 1]), draw(B, 2, D))


def test_moco_and_its_queue():
    """Theirs begins with random vectors as negatives, ours with none; a full queue is alike.

    A batch that reaches the end of the queue loses its last keys there; here they go on at its
    beginning, so that a queue needs not be a multiple of the batch.
    """
    other = theirs.NTXentLoss(temperature=0.3, memory_bank_size=(10, D)).double()
    bank, batches = other.memory_bank.bank.numpy().copy(), draw(2, B, D, seed=1)
    method = harness.make_objective("moco", temperature=0.3, queue=10, dim=D)

    def memory(bank):
        return {"keys": jnp.asarray(bank), "next": jnp.int32(0), "filled": jnp.int32(10)}

    def ours(q):
        views = jnp.stack([q, jnp.asarray(batches[0])], 1)
        return terms_of(method, {"views": views}, memory(bank))[0]

    agree(ours, lambda q: other(q, torch.tensor(batches[0])), draw(B, D))
    other(torch.tensor(draw(B, D), requires_grad=True), torch.tensor(batches[1]))
    with jax.enable_x64(True):
        found = memory(bank)
        for k in batches:
            found = _queue.enqueue(found, contrastive.normalize(jnp.asarray(k)), jnp.ones(B))
    keys, kept = np.asarray(found["keys"]), other.memory_bank.bank.numpy()
    np.testing.assert_allclose(keys[2:], kept[2:], rtol=1e-6)
    first, second = map(unit, batches)
    np.testing.assert_allclose(kept[:2], first[:2], rtol=1e-6)
    np.testing.assert_allclose(keys[:2], second[4:], rtol=1e-6)
    assert (int(found["next"]), int(other.memory_bank.bank_ptr)) == (2, 0)


def test_moco_v3():
    """InfoNCE of `pytorch_metric_learning` with keys as references; 2 tau in both directions.

    Labels of queries and keys are two tensors: with one it would leave out a query's own key.
    """
    losses = library("pytorch_metric_learning.losses")
    keys, own = draw(B, 2, D, seed=1), torch.arange(B)
    other, k = losses.NTXentLoss(temperature=0.3), torch.tensor(keys)

    def both(q):
        ways = [other(q[:, i], own, ref_emb=k[:, 1 - i], ref_labels=own.clone()) for i in (0, 1)]
        return 2 * 0.3 * sum(ways)

    said = {"target_projector": lambda x: {"output": jnp.asarray(keys).reshape(x.shape)}}
    agree(views_loss("moco_v3", outputs=said, temperature=0.3), both, draw(B, 2, D))


def test_sup_con():
    """`pytorch_metric_learning`, as lightly has none; every class has two examples or more."""
    losses = library("pytorch_metric_learning.losses")
    label = np.array([0, 1, 0, 2, 1, 2])
    other, repeated = losses.SupConLoss(temperature=0.3), torch.tensor(np.repeat(label, 2))
    agree(
        views_loss("supcon", temperature=0.3, label=label),
        lambda z: other(z.reshape(2 * B, D), repeated),
        draw(B, 2, D),
    )


def test_byol():
    """Theirs is the mean of both directions of `-cos`; the paper's squares are 4 + 4 of it."""
    p, t = draw(B, 2, D), torch.tensor(draw(B, 2, D, seed=1))
    other = theirs.NegativeCosineSimilarity()

    def mean(p):
        return 0.5 * (other(p[:, 0], t[:, 1]) + other(p[:, 1], t[:, 0]))

    said = {"target_projector": lambda x: {"output": jnp.asarray(t.numpy()).reshape(x.shape)}}
    agree(views_loss("byol", outputs=said), lambda p: 4 + 4 * mean(p), p)


def test_simsiam():
    """The gradient goes through the predictor alone."""
    w = draw(D, D, seed=2)
    other = theirs.NegativeCosineSimilarity()

    def mean(z):
        p, z = z @ torch.tensor(w), z.detach()
        return 0.5 * (other(p[:, 0], z[:, 1]) + other(p[:, 1], z[:, 0]))

    said = {"predictor": lambda x: {"output": x @ jnp.asarray(w)}}
    agree(views_loss("simsiam", outputs=said), mean, draw(B, 2, D))


def test_barlow_twins():
    """Both divide by the biased deviation, of a variance that 1e-5 is added to."""
    z = draw(B, 2, D) * np.array([1e-2, 0.3, 1, 2, 5])
    other = theirs.BarlowTwinsLoss(lambda_param=0.3)
    agree(views_loss("barlow_twins", trade_off=0.3), lambda z: other(z[:, 0], z[:, 1]), z)


def test_vicreg():
    """The default weights are the same, and what they go with: the mean over features of the
    squared difference, half of both hinges, unbiased variances and covariances."""
    z = draw(B, 2, D) * np.array([1e-2, 0.3, 1, 2, 5])
    other = theirs.VICRegLoss()
    agree(views_loss("vicreg"), lambda z: other(z[:, 0], z[:, 1]), z)


def test_dino_and_its_centre():
    """Two steps: both use the centre from before the step, and move it by all whole views."""
    other = theirs.DINOLoss(output_dim=D, center_momentum=0.8).double()
    method = harness.make_objective("dino", num_prototypes=D, centre_decay=0.8)
    memory = {"centre": jnp.zeros(D)}
    for seed in range(2):
        t, s, small = (0.3 * draw(B, n, D, seed=seed + 2 * n) for n in (2, 2, 3))
        said = {"target_prototypes": lambda x, t=t: {"output": jnp.asarray(t).reshape(x.shape)}}

        def run(s, small, said=said, memory=memory):
            return terms_of(method, {"views": s, "local_views": small}, memory, **said)

        def loss(s, small, t=t):
            whole = list(torch.tensor(t).unbind(1))
            return other(whole, [*s.unbind(1), *small.unbind(1)])

        agree(lambda s, small, run=run: run(s, small)[0], loss, s, small)
        with jax.enable_x64(True):
            memory = run(s, small)[1].memory
        np.testing.assert_allclose(memory["centre"], other.center[0, 0].numpy(), rtol=1e-5)


def test_warm_up_of_dinos_temperature():
    """Theirs has steps, the first in epoch 0 and the last in epoch e - 1; ours goes on within
    epochs and ends with epoch e."""
    epochs, per_epoch = 5, 8
    other = theirs.DINOLoss(
        output_dim=D,
        warmup_teacher_temp=0.02,
        teacher_temp=0.06,
        warmup_teacher_temp_epochs=epochs,
    )
    method = harness.make_objective(
        "dino",
        num_prototypes=D,
        first_temperature=0.02,
        temperature=0.06,
        temperature_warmup=f"{epochs} epochs",
        steps_per_epoch=float(per_epoch),
    )
    at = np.arange(epochs) * per_epoch * epochs / (epochs - 1)
    found = [method.temperature_at(step) for step in at]
    np.testing.assert_allclose(found, other.teacher_temp_schedule.numpy(), rtol=1e-6)


def test_patches_of_ibot():
    """Masked patches alone, those of an image sharing its weight; one without any counts as 0."""
    other = theirs.IBOTPatchLoss(output_dim=D, center_momentum=0.8).double()
    hidden = np.random.RandomState(0).rand(B, 2, 3) < 0.5
    hidden[0], weights = False, hidden.reshape(B, 6).astype(float)
    weights[0] = 0
    assert len(set(weights.sum(1))) > 2
    centre = np.zeros(D)
    for seed in range(2):
        s, t = 0.3 * draw(B, 6, D, seed=seed), 0.3 * draw(B, 6, D, seed=seed + 2)

        def ours(s, t=t, centre=centre):
            targets = clustering.centred_softmax(
                jnp.asarray(t), jnp.asarray(centre), temperature=0.04
            )
            return clustering.masked_entropy(targets, s, weights, temperature=0.1).mean()

        def loss(s, t=t):
            mask = torch.tensor(hidden)
            return other(torch.tensor(t)[mask.reshape(B, 6)], s[mask.reshape(B, 6)], mask)

        agree(ours, loss, s)
        with jax.enable_x64(True):
            centre = clustering.move_centre(
                jnp.asarray(centre), jnp.asarray(t), jnp.asarray(weights), decay=0.8
            )
        np.testing.assert_allclose(centre, other.center.value[0].numpy(), rtol=1e-5)


def test_koleo():
    """Theirs adds its 1e-8 to each component of the difference, too. That shows in equal rows
    alone, where its gradient explodes and ours is zero."""
    other = theirs.KoLeoLoss()

    def ours(x):
        return noncontrastive.koleo(x, jnp.ones(len(x))).mean()

    agree(ours, other, draw(B, D))
    x = torch.tensor(np.repeat(draw(1, D), 3, axis=0), requires_grad=True)
    want = other(x)
    want.backward()
    np.testing.assert_allclose(want.item(), -math.log(1e-8 * (math.sqrt(D) + 1)), rtol=1e-6)
    assert x.grad.abs().max() > 1e5
    with jax.enable_x64(True):
        value, grad = jax.value_and_grad(ours)(jnp.asarray(x.detach().numpy()))
    np.testing.assert_allclose(value, -math.log(1e-8), rtol=1e-6)
    assert not np.any(grad)


def test_sinkhorn():
    """Without gradient in both. Theirs overflows in float32 where logits are above 4.4, at the
    temperature of 0.05, as a network without normalization may give them."""
    module = library("lightly.loss.swav_loss")
    logits = 0.3 * draw(B, D)
    with jax.enable_x64(True):
        found = jax.jit(clustering.sinkhorn)(jnp.asarray(logits), jnp.ones(B), temperature=0.05)
    want = module.sinkhorn(torch.tensor(logits), iterations=3, epsilon=0.05)
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-5, atol=1e-12)
    large = np.float32(logits + 5)
    assert not module.sinkhorn(torch.tensor(large)).isfinite().all()
    shifted = jax.jit(clustering.sinkhorn)(jnp.asarray(large), jnp.ones(B), temperature=0.05)
    np.testing.assert_allclose(shifted, want.numpy(), rtol=1e-3, atol=1e-6)


def test_lejepa():
    """On the same directions, which both draw anew in each step."""
    other = theirs.LeJEPALoss(lambda_param=0.3, sigreg_num_vectors=8).double()
    key = jax.random.fold_in(jax.random.key(0), 4)
    a = torch.tensor(np.asarray(isotropy.random_directions(key, width=D, count=8))).double()
    other.sigreg._generate_unit_vectors = lambda *_, **__: a
    method = harness.make_objective("lejepa", trade_off=0.3, directions=8, spread=0.0)

    def ours(z, small):
        return terms_of(method, {"views": z, "local_views": small}, step=4)[0]

    def loss(z, small):
        return other(global_proj=z.transpose(0, 1), local_proj=small.transpose(0, 1))

    agree(ours, loss, draw(B, 2, D), draw(B, 3, D, seed=1))


def masks(t):
    """Two tokens that are kept and two sets of two to be predicted, of t tokens."""
    r = np.random.RandomState(0)
    rows = np.array([r.permutation(t) for _ in range(B)])
    hidden = np.array([[i not in row[:2] for i in range(t)] for row in rows])
    return {"keep": rows[:, :2], "targets": rows[:, 2:6].reshape(B, 2, 2), "hidden": hidden}


def test_mae():
    """lightly's patches and their standardization, by the unbiased variance, and PyTorch's mean of
    squares."""
    utils = library("lightly.models.utils")
    images, found = draw(B, 6, 6, 2), masks(9)
    found["targets"] = found["targets"].reshape(B, 1, 4)
    method = harness.make_objective("mae", norm_pix=True)
    encoded = {"tokens": jnp.zeros((B, 2, 3)), "embedding": jnp.zeros((B, 3))}

    def ours(said):
        return terms_of(
            method,
            {"input": images, **found},
            student=lambda *_: encoded,
            decoder=lambda *_: {"output": said[:, None]},
        )[0]

    def loss(said):
        patches = utils.patchify(torch.tensor(images).permute(0, 3, 1, 2), 2)
        true = utils.get_at_index(patches, torch.tensor(found["targets"][:, 0]))
        return torch.nn.MSELoss()(said, utils.normalize_mean_var(true))

    agree(ours, loss, draw(B, 4, 8, seed=1))


def test_ijepa():
    """lightly's choice of tokens, and PyTorch's layer normalization and smooth L1. The former adds
    1e-5 to the variance by default; here it is 1e-6, as for all standardized targets."""
    utils = library("lightly.models.utils")
    whole, found = draw(B, 8, D), masks(8)
    method = harness.make_objective("ijepa")

    def ours(said):
        return terms_of(
            method,
            {"input": whole, **found},
            student=lambda *_: {"tokens": jnp.zeros((B, 2, D))},
            target=lambda x: {"tokens": x},
            predictor=lambda *_: {"output": said},
        )[0]

    def loss(said):
        true = F.layer_norm(torch.tensor(whole), (D,), eps=1e-6)
        true = utils.apply_masks(true, list(torch.tensor(found["targets"]).unbind(1)))
        return torch.nn.SmoothL1Loss()(said.transpose(0, 1).flatten(0, 1), true)

    agree(ours, loss, 2 * draw(B, 2, 2, D, seed=1))


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_pairs_of_modalities(name):
    """`open_clip`, as lightly has none; it wants vectors of length one, and the scale itself."""
    other = getattr(library("open_clip.loss"), name)()
    x, y, scale, bias = draw(B, D), draw(B, D, seed=1), np.array(3.0), np.array(-2.0)
    learned = (scale,) if name == "ClipLoss" else (scale, bias)
    ours = contrastive.clip_contrast if name == "ClipLoss" else contrastive.sigmoid_contrast

    def mean(x, y, *learned):
        rows = (jnp.broadcast_to(value[None], (B,)) for value in learned)
        return ours(x, y, jnp.ones(B), *rows).mean()

    def loss(x, y, *learned):
        return other(F.normalize(x), F.normalize(y), *learned)

    agree(mean, loss, x, y, *learned)
