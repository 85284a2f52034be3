"""Time of single convolutions beside PyTorch's: forward, input gradient, kernel gradient.

    python benchmarks/convolutions.py --out benchmarks/results/convolutions.json

The layers are those of the ConvNet on two views of 128 images of 28x28 and of the ResNet-20 on 128
images of 32x32. Each side runs in a process of its own; times are the median processor time of a
call in ms, meant for one core (`taskset -c 1`). "lax" is the standard convolution in the package's
place, "torch_channels_last" PyTorch with that layout of memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import _record

LAYERS = (
    # images, height and width, channels, outputs, kernel, stride
    (256, 28, 1, 16, 3, 1),
    (256, 14, 16, 32, 3, 1),
    (256, 7, 32, 64, 3, 1),
    (128, 32, 3, 16, 3, 1),
    (128, 32, 16, 16, 3, 1),
    (128, 32, 16, 32, 3, 2),
    (128, 16, 32, 32, 3, 1),
    (128, 16, 32, 64, 3, 2),
    (128, 8, 64, 64, 3, 1),
    (128, 32, 16, 32, 1, 2),
)
VARIANTS = ("ours", "lax", "torch", "torch_channels_last")
PASSES = ("forward", "input_gradient", "kernel_gradient")


def median_ms(call, repeats):
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return round(1e3 * statistics.median(times), 2)


def of_jax(layer, repeats, *, standard):
    import jax
    from jax import lax

    from distill_jax.models import convolution
    from distill_jax.run import environment

    environment.keep_freed_memory()
    b, n, c, d, k, stride = layer
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (b, n, n, c))
    kernel = jax.random.normal(keys[1], (k, k, c, d))

    def ours(x, kernel):
        return convolution.conv2d(x, kernel, stride=stride)

    def lax_conv(x, kernel):
        pads, names = [(k // 2, k // 2)] * 2, ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=names)

    conv = lax_conv if standard else ours
    g = jax.random.normal(keys[2], jax.eval_shape(conv, x, kernel).shape)
    calls = (
        (jax.jit(conv), (x, kernel)),
        (jax.jit(lambda g, w: jax.linear_transpose(lambda x: conv(x, w), x)(g)[0]), (g, kernel)),
        (jax.jit(lambda x, g: jax.linear_transpose(lambda w: conv(x, w), kernel)(g)[0]), (x, g)),
    )
    return [median_ms(lambda f=f, a=a: f(*a).block_until_ready(), repeats) for f, a in calls]


def of_torch(layer, repeats, *, channels_last):
    import torch

    b, n, c, d, k, s = layer
    x, kernel = torch.randn(b, c, n, n), torch.randn(d, c, k, k)
    if channels_last:
        x, kernel = (a.to(memory_format=torch.channels_last) for a in (x, kernel))
    g = torch.randn_like(torch.nn.functional.conv2d(x, kernel, stride=s, padding=k // 2))

    def backward(*wanted):
        geometry = ([s, s], [k // 2, k // 2], [1, 1], False, [0, 0], 1)
        torch.ops.aten.convolution_backward(g, x, kernel, None, *geometry, wanted)

    calls = (
        lambda: torch.nn.functional.conv2d(x, kernel, stride=s, padding=k // 2),
        lambda: backward(True, False, False),
        lambda: backward(False, True, False),
    )
    return [median_ms(call, repeats) for call in calls]


def serve(variant, repeats):
    for layer in LAYERS:
        if variant.startswith("torch"):
            times = of_torch(layer, repeats, channels_last=variant == "torch_channels_last")
        else:
            times = of_jax(layer, repeats, standard=variant == "lax")
        print(json.dumps(times), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", default="")
    parser.add_argument("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.repeats)
    command = [sys.executable, __file__, "--repeats", str(options.repeats), "--serve"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    workers = {}
    for name in VARIANTS:
        done = subprocess.run([*command, name], env=env, text=True, capture_output=True, check=True)
        workers[name] = [json.loads(line) for line in done.stdout.splitlines()]
    layers = {}
    for i, layer in enumerate(LAYERS):
        b, n, c, d, k, stride = layer
        name = f"{b}x{n}x{n}x{c} to {d}, kernel {k}, stride {stride}"
        layers[name] = {v: dict(zip(PASSES, workers[v][i], strict=True)) for v in VARIANTS}
    report = {
        "versions": _record.versions("jax", "jaxlib", "torch"),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "layers": layers,
    }
    _record.write(report, options.out, show=True)
    return None


if __name__ == "__main__":
    main()
