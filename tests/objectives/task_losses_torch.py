"""What PyTorch says of the losses of `losses.multilabel`, `regression` and `classification`.

    python tests/objectives/task_losses_torch.py

writes `task_losses.json` beside this file: values `[b]` and the gradient of their sum in the first
input, in float64, of the inputs of `inputs`. It needs NumPy and PyTorch alone.
"""

import json
import pathlib

import numpy as np

B, K = 7, 4
GAMMA, TEMPERATURE, DELTA = 1.5, 3.0, 0.7
PATH = pathlib.Path(__file__).with_suffix("").parent / "task_losses.json"


def inputs():
    """Returns the inputs of all losses, float64 by name; the same on every machine."""
    r = np.random.RandomState(7)
    return {
        "student": 2 * r.randn(B, K),
        "teacher": 3 * r.randn(B, K),
        "bits": (r.rand(B, K) < 0.4).astype(np.float64),
        "known": (r.rand(B, K) < 0.7).astype(np.float64),
        "label": np.arange(B) % K,
        "weights": r.rand(K) + 0.5,
        "target": r.randn(B, K),
        "scale": r.rand(K) + 0.5,
    }


def losses(torch):
    """Returns each loss `[b]` as a function of the student's outputs."""
    F = torch.nn.functional
    x = {name: torch.tensor(value) for name, value in inputs().items()}
    bits, known, label, weights = (x[n] for n in ("bits", "known", "label", "weights"))
    bce = F.binary_cross_entropy_with_logits

    def focal_of_bits(s):  # as torchvision.ops.sigmoid_focal_loss without alpha
        p = torch.sigmoid(s)
        right = p * bits + (1 - p) * (1 - bits)
        return (bce(s, bits, reduction="none") * (1 - right) ** GAMMA).mean(1)

    def focal(s):
        loss = F.cross_entropy(s, label, reduction="none")
        return (1 - torch.exp(-loss)) ** GAMMA * loss

    def distillation(s):
        p, q = torch.sigmoid(x["teacher"] / TEMPERATURE), torch.sigmoid(s / TEMPERATURE)
        two = lambda y: torch.stack([y, 1 - y], -1)  # noqa: E731
        kl = F.kl_div(torch.log(two(q)), two(p), reduction="none").sum(-1)
        return TEMPERATURE**2 * kl.mean(1)

    mean = lambda values: (values * known).sum(1) / known.sum(1).clamp(min=1)  # noqa: E731
    scaled, target = (lambda s: s / x["scale"]), x["target"] / x["scale"]
    return {
        "bce": lambda s: bce(s, bits, reduction="none").mean(1),
        "bce_known": lambda s: mean(bce(s, bits, reduction="none")),
        "bce_weighted": lambda s: bce(s, bits, reduction="none", pos_weight=weights).mean(1),
        "focal_of_bits": focal_of_bits,
        "binary_distillation": distillation,
        "focal": focal,
        "cross_entropy_weighted": lambda s: F.cross_entropy(
            s, label, weight=weights, reduction="none", label_smoothing=0.1
        ),
        "squared": lambda s: F.mse_loss(scaled(s), target, reduction="none").mean(1),
        "huber": lambda s: F.huber_loss(scaled(s), target, reduction="none", delta=DELTA).mean(1),
    }


def measure(torch):
    """Returns `{loss: {"value": [b], "gradient": [b, k]}}`."""
    found = {}
    for name, loss in losses(torch).items():
        student = torch.tensor(inputs()["student"], requires_grad=True)
        value = loss(student)
        value.sum().backward()
        found[name] = {"value": value.tolist(), "gradient": student.grad.tolist()}
    return found


if __name__ == "__main__":
    import torch

    text = json.dumps({"torch": torch.__version__, **measure(torch)}, indent=1)
    PATH.write_text(text + "\n", encoding="utf-8")
