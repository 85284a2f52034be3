"""A convolution that is fast on CPU, exact and closed under differentiation.

XLA:CPU gives a convolution to YNNPACK if its types, its sizes and the order of its axes allow, and
is several times slower otherwise. The forms here are chosen so that they do. Forward convolutions
with few channels take two or more neighbouring pixels as one (`_wide`). The input gradient is a
forward convolution with the flipped kernel. The kernel gradient is a convolution of the images with
the output gradients, with the batch as channels, or a product of two matrices, patches by output
gradients; both are summed over a few images at a time, so that operands stay in cache. Kernels of
one pixel and images smaller than their kernel are one product of matrices.

Both maps are bilinear primitives that are each other's transposes, so that every mix of forward
and reverse differentiation works; they lower to ordinary operations, so that sharding does too.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from distill_jax.core.api import Array

_PATCH_BYTES = 4 * 2**20
"""Bound on the patches of one product; larger ones leave the cache and cost page faults."""

_GRADIENT_BYTES = 2**18
"""Bound on the output gradients of one convolution in a kernel gradient. They are read again for
every few of its rows."""

_FEW = 36
"""Kernel entries for one output up to which eight times as many bytes are no slower."""

_MIN_CHANNELS = 17
"""Least number of input or output channels of the convolutions that XLA gives to YNNPACK."""

_MAX_WIDE = 8
"""Most neighbouring pixels that are taken as one."""

_UNROLLED = 8
"""Most groups of channels that are convolutions of their own."""

_GROUPS = 8
"""Most parts of a batch whose kernel gradients are added at the end, not on the way, on up to so
many devices; more devices have a part each."""

portable = jax.make_user_context(default_value=False)
"""`with portable(True):` makes `conv2d` trace one standard convolution whatever the machine, for
programs that leave this process."""


def conv2d(x: Array, kernel: Array, *, stride: int = 1, groups: int = 1) -> Array:
    """Cross-correlates images with a kernel, padded by half of the kernel on every side.

    Args:
      x: `[b, h, w, c]`.
      kernel: `[kh, kw, c / groups, d]` of the dtype of `x` and of odd height and width.
      stride: step between outputs along height and width.
      groups: parts into which `c` and `d` are cut; part i of `d` sees part i of `c` alone. `c`
        groups with `c` outputs are a depthwise convolution.

    Returns:
      `[b, ceil(h / stride), ceil(w / stride), d]`.

    Raises:
      ValueError: the channels do not divide into the groups.
    """
    if x.shape[-1] != groups * kernel.shape[2] or kernel.shape[3] % groups:
        raise ValueError(f"kernel {kernel.shape}, {groups} groups, input {x.shape}")
    if portable.value or jax.default_backend() != "cpu":
        return _conv(x, kernel, stride=stride, groups=groups)
    if groups == 1:
        return _conv_p.bind(x, kernel, stride=stride)
    if groups == x.shape[-1] == kernel.shape[3]:
        return _depthwise(x, kernel, stride=stride)
    if groups > _UNROLLED:
        return _grouped(x, kernel, stride=stride, groups=groups)
    parts = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    return jnp.concatenate([_conv_p.bind(*part, stride=stride) for part in parts], -1)


def conv2d_same(x: Array, kernel: Array, *, stride: int = 1, groups: int = 1) -> Array:
    """Cross-correlates images with a kernel under TensorFlow's "SAME" padding.

    Each axis gets as few zeros as `ceil(n / stride)` outputs need, and the odd one at the end. With
    a stride, windows then begin elsewhere than those of `conv2d`: zeros in front move the latter
    there, and its first outputs, which see them, are dropped. Arguments are those of `conv2d`.
    """
    pads, cuts = [(0, 0)], [slice(None)]
    for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True):
        outputs = -(-n // stride)
        low = max((outputs - 1) * stride + k - n, 0) // 2
        skipped = -(-(k // 2 - low) // stride)
        front = stride * skipped - (k // 2 - low)
        length = stride * (skipped + outputs - 1) + 1  # of an axis with as many outputs
        pads.append((front, max(0, length - front - n)))
        cuts.append(slice(skipped, skipped + outputs))
    if any(map(any, pads)):
        x = jnp.pad(x, [*pads, (0, 0)])
    return conv2d(x, kernel, stride=stride, groups=groups)[tuple(cuts)]


def _conv(x: Array, kernel: Array, *, stride: int, groups: int = 1) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(k // 2, k // 2) for k in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _forward(x: Array, kernel: Array, *, stride: int) -> Array:
    (kh, kw, c, d), (b, h, w, _) = kernel.shape, x.shape
    if max(kh, kw) > 1 and min(h, w) >= max(kh, kw):
        pixels = -(-_MIN_CHANNELS // d)
        wide = stride == 1 and kh % 2 == kw % 2 == 1 and pixels <= min(w, _MAX_WIDE)
        if c < _MIN_CHANNELS and pixels > 1 and wide and _in_ynnpack(x.dtype):
            x, kernel = _even_channels(x, kernel)
            return _wide(x, kernel, pixels=pixels + pixels % 2)
        if d < 64 and _in_ynnpack(x.dtype):
            x, kernel = _even_channels(x, kernel)
        return _conv(x, kernel, stride=stride)
    x = jnp.pad(x, ((0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))
    rows, columns = ((n + 2 * (k // 2) - k) // stride + 1 for n, k in ((h, kh), (w, kw)))
    patches = [
        x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
        for i in range(kh)
        for j in range(kw)
    ]
    left = jnp.concatenate(patches, -1).reshape(-1, kh * kw * c)
    return (left @ kernel.reshape(-1, d)).reshape(b, rows, columns, d)


def _in_ynnpack(dtype: Any) -> bool:
    """Whether XLA gives convolutions of this type to YNNPACK."""
    return dtype in (jnp.float32, jnp.float64)


def _even_channels(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Adds a channel of zeros to an odd number above one: YNNPACK takes two to four times less."""
    if x.shape[-1] == 1 or x.shape[-1] % 2 == 0:
        return x, kernel
    return (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1))),
        jnp.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 0))),
    )


def _wide(x: Array, kernel: Array, *, pixels: int) -> Array:
    """Convolves with stride 1, with `pixels` neighbours in a row as channels of the output.

    The window is that of all of them, with zeros where a neighbour does not see it: some more
    operations, but in a convolution with enough channels.
    """
    (kh, kw, _, d), (b, h, w, _) = kernel.shape, x.shape
    columns = -(-w // pixels)
    shifts = [(i, pixels - 1 - i) for i in range(pixels)]
    kernels = [jnp.pad(kernel, ((0, 0), shift, (0, 0), (0, 0))) for shift in shifts]
    out = lax.conv_general_dilated(
        x,
        jnp.concatenate(kernels, -1),
        (1, pixels),
        [(kh // 2, kh // 2), (kw // 2, columns * pixels - w + kw - 1 - kw // 2)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return out.reshape(b, h, columns * pixels, d)[:, :, :w]


def _grouped(x: Array, kernel: Array, *, stride: int, groups: int) -> Array:
    """Multiplies the patches of each group with its kernels, all groups in one product."""
    (kh, kw, c, d), (b, h, w, _) = kernel.shape, x.shape
    rows, columns = (-(-n // stride) for n in (h, w))
    x = jnp.pad(x, ((0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))
    x = x.reshape(*x.shape[:3], groups, c)
    ends = stride * (rows - 1) + 1, stride * (columns - 1) + 1
    patches = [
        x[:, i : i + ends[0] : stride, j : j + ends[1] : stride]
        for i in range(kh)
        for j in range(kw)
    ]
    left = jnp.concatenate(patches, -1)
    right = kernel.reshape(kh * kw * c, groups, d // groups)
    return jnp.einsum("bhwgc,cgd->bhwgd", left, right).reshape(b, rows, columns, d)


def _depthwise(x: Array, kernel: Array, *, stride: int) -> Array:
    """Sums shifted images times one row of the kernel: XLA:CPU loops over single channels."""
    kh, kw = kernel.shape[:2]
    rows, columns = (stride * (-(-n // stride) - 1) + 1 for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))
    shifts = [
        x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j].reshape(1, 1, 1, -1)
        for i in range(kh)
        for j in range(kw)
    ]
    return functools.reduce(jnp.add, shifts)


def _kernel_gradient_by_lax(x: Array, g: Array, *, stride: int, size: tuple[int, int]) -> Array:
    kernel = jax.ShapeDtypeStruct((*size, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda k: _conv(x, k, stride=stride), kernel)(g)[0]


def _parts_of_batch(b: int, devices: int) -> int:
    """Returns how many parts of `b` rows are summed apart, a multiple of `devices` if that can be.

    Parts that cross the borders between devices would gather the rows of others.
    """
    least = devices if b % devices == 0 else 1
    most = max(_GROUPS, devices)
    return max(n for n in range(least, most + 1, least) if b % n == 0)


def _kernel_gradient(x: Array, g: Array, *, stride: int, size: tuple[int, int]) -> Array:
    """Returns the gradient `[kh, kw, c, d]` for inputs `x` and output gradients `g`."""
    images = _images_as_channels(x, g, size)
    if images and jax.device_count() == 1:  # over a sharded batch, each part would be one sum
        return _kernel_gradient_by_conv(x, g, stride=stride, size=size, images=images)
    return _kernel_gradient_by_patches(x, g, stride=stride, size=size)


def _images_as_channels(x: Array, g: Array, size: tuple[int, int]) -> int:
    """Returns how many images one convolution takes in `_kernel_gradient_by_conv`; 0 for none."""
    (b, h, w, c), (_, *g_size, d) = x.shape, g.shape
    if max(size) == 1 or min(h, w) < max(size) or not _in_ynnpack(x.dtype):
        return 0
    kernel = size[0] * size[1] * c * d * x.dtype.itemsize
    few = size[0] * size[1] * c <= _FEW
    bound = 8 * _GRADIENT_BYTES if few else max(_GRADIENT_BYTES, kernel // 4)
    bound //= g_size[0] * g_size[1] * d * x.dtype.itemsize
    images = max((n for n in range(1, min(b, bound) + 1) if b % n == 0), default=0)
    return images if images >= 4 and max(images, d) >= _MIN_CHANNELS else 0


def _kernel_gradient_by_conv(
    x: Array, g: Array, *, stride: int, size: tuple[int, int], images: int
) -> Array:
    """Convolves the images with the output gradients, `images` of them at a time as channels."""
    (b, h, w, c), (_, gh, gw, d) = x.shape, g.shape
    pads = [
        (k // 2, stride * (m - 1) + k - n - k // 2)
        for n, m, k in zip((h, w), (gh, gw), size, strict=True)
    ]

    def add(i: Array, total: Array) -> Array:
        part, outer = (lax.dynamic_slice_in_dim(a, i * images, images) for a in (x, g))
        return total + lax.conv_general_dilated(
            part.transpose(3, 1, 2, 0),
            outer.transpose(1, 2, 0, 3),
            (1, 1),
            pads,
            rhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    total = lax.fori_loop(0, b // images, add, jnp.zeros((c, *size, d), x.dtype))
    return total.transpose(1, 2, 0, 3)


def _kernel_gradient_by_patches(x: Array, g: Array, *, stride: int, size: tuple[int, int]) -> Array:
    """Multiplies patches by output gradients.

    With stride 1 the shifts along the height are made on the side of `g`: the product of `kw`
    shifts of `x` and `kh` of `g` has the shape `[kw c, kh d]`, nearer to a square than
    `[kh kw c, d]`, and copies less. The batch is cut into `groups`, and a loop takes a few images
    of each, so that a batch that is sharded over devices is cut where it is sharded. Where the
    patches of the whole batch stay in cache, one product makes no sums to be added. Images are
    padded before a barrier: fused with the padding, XLA copies patches number by number.
    """
    (b, _, _, c), (_, h, w, d) = x.shape, g.shape
    kh, kw = size
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    split = kh if stride == 1 else 1
    image = (h + split - 1) * w * (kh * kw // split * c + split * d) * x.dtype.itemsize
    whole = b * image <= _PATCH_BYTES
    groups = 1 if whole else _parts_of_batch(b, jax.device_count())
    each = b // groups
    bound = max(1, _PATCH_BYTES // (groups * image))
    images = max(n for n in range(1, min(each, bound) + 1) if each % n == 0)
    rows = x.reshape(groups, each // images, images, *x.shape[1:])
    g_rows = g.reshape(groups, each // images, images, h, w, d)

    def add(i: Array, total: Array) -> Array:
        inner = lax.dynamic_index_in_dim(rows, i, 1, keepdims=False)
        inner = jnp.pad(inner, ((0, 0), (0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))
        inner = lax.optimization_barrier(inner)
        outer = lax.dynamic_index_in_dim(g_rows, i, 1, keepdims=False)
        columns = [slice(j, j + stride * (w - 1) + 1, stride) for j in range(kw)]
        if split > 1:
            left = [inner[:, :, :, column] for column in columns]
            outer = jnp.pad(outer, ((0, 0), (0, 0), (kh - 1, kh - 1), (0, 0), (0, 0)))
            outer = lax.optimization_barrier(outer)
            right = [outer[:, :, kh - 1 - i : h + 2 * (kh - 1) - i] for i in range(kh)]
        else:
            kernel_rows = [slice(i, i + stride * (h - 1) + 1, stride) for i in range(kh)]
            left = [inner[:, :, row, column] for row in kernel_rows for column in columns]
            right = [outer]
        left, right = (
            jnp.concatenate(parts, -1).reshape(groups, -1, sum(p.shape[-1] for p in parts))
            for parts in (left, right)
        )
        return total + lax.dot_general(
            left, right, (((1,), (1,)), ((0,), (0,))), preferred_element_type=dtype
        )

    shape = (groups, kh // split * kw * c, split * d)
    total = lax.fori_loop(0, each // images, add, jnp.zeros(shape, dtype)).sum(0)
    total = total.reshape(kh // split, kw, c, split, d).transpose(0, 3, 1, 2, 4)
    return total.reshape(kh, kw, c, d).astype(x.dtype)


def _input_gradient(g: Array, kernel: Array, *, stride: int, like: Any) -> Array:
    """Returns the gradient of the shape of `like` for output gradients `g`.

    With a stride, row `stride * y + p` of the gradient meets rows `y + t` of `g` through the kernel
    rows `p + kh // 2 - stride * t` alone: one small convolution computes all phases p as channels,
    which are then interleaved. Zeros between the rows of `g` would cost `stride ** 2` times more.
    """
    (kh, kw, c, _), (b, h, w, _) = kernel.shape, g.shape
    if stride == 1:
        out = _conv_p.bind(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), stride=1)
        return _middle(out, like.shape)
    if kh == kw == 1:
        high = [n - (stride * (m - 1) + 1) for n, m in zip(like.shape, g.shape, strict=True)]
        config = [(0, 0, 0), (0, high[1], stride - 1), (0, high[2], stride - 1), (0, 0, 0)]
        out = _conv_p.bind(g, kernel.swapaxes(2, 3), stride=1)
        return lax.pad(out, jnp.zeros((), g.dtype), config)
    (rows, top), (columns, left) = (_phases(k, stride) for k in (kh, kw))
    kernel = jnp.einsum("tpi,uqj,ijcd->tudpqc", rows, columns, kernel).astype(g.dtype)
    kernel = kernel.reshape(*kernel.shape[:3], stride * stride * c)
    out = _conv_p.bind(g, kernel, stride=1)[:, top : top + h, left : left + w]
    out = out.reshape(b, h, w, stride, stride, c).transpose(0, 1, 3, 2, 4, 5)
    return out.reshape(b, h * stride, w * stride, c)[:, : like.shape[1], : like.shape[2]]


def _middle(x: Array, shape: tuple[int, ...]) -> Array:
    """Drops as much at both ends of height and width as exceeds the shape (even kernels)."""
    top, left = (x.shape[1] - shape[1]) // 2, (x.shape[2] - shape[2]) // 2
    return x[:, top : top + shape[1], left : left + shape[2]]


def _phases(size: int, stride: int) -> tuple[np.ndarray, int]:
    """Returns which kernel row each phase meets at each shift, and the first shift's row.

    Returns:
      zeros and ones `[shifts, stride, size]`, and where the convolution with as many rows as there
      are shifts, padded by half of them, has the output of row 0.
    """
    first, last = -((size - 1 - size // 2) // stride), (stride - 1 + size // 2) // stride
    t, p, i = np.ogrid[first : last + 1, :stride, :size]
    return (i == p + size // 2 - stride * t).astype(np.float32), first + len(t) // 2


def _primitive(name: str, run: Callable[..., Array], reference: Callable[..., Array]) -> Primitive:
    primitive = Primitive(name)

    def abstract(*args: Any, **params: Any) -> Any:
        out = jax.eval_shape(functools.partial(reference, **params), *args)
        return ShapedArray(out.shape, out.dtype)

    def batch(args: Any, axes: Any, **params: Any) -> tuple[Array, int]:
        return jax.vmap(functools.partial(reference, **params), in_axes=axes)(*args), 0

    primitive.def_impl(lambda *args, **params: jax.jit(functools.partial(run, **params))(*args))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    batching.primitive_batchers[primitive] = batch
    return primitive


_conv_p = _primitive("conv2d", _forward, _conv)
_kernel_p = _primitive("conv2d_kernel_gradient", _kernel_gradient, _kernel_gradient_by_lax)


ad.defbilinear(
    _conv_p,
    lambda g, x, kernel, *, stride: _input_gradient(g, kernel, stride=stride, like=x.aval),
    lambda g, x, kernel, *, stride: _kernel_p.bind(x, g, stride=stride, size=kernel.aval.shape[:2]),
)
ad.defbilinear(
    _kernel_p,
    lambda t, x, g, *, stride, size: _input_gradient(g, t, stride=stride, like=x.aval),
    lambda t, x, g, *, stride, size: _conv_p.bind(x, t, stride=stride),
)
