"""Vision transformers (Dosovitskiy et al. 2021) with pre-normalization and learned positions.

Also DeiT's distillation token (Touvron et al. 2021, arXiv:2012.12877) and the layer scale and
registers of DINOv2 (Darcet et al. 2024, arXiv:2309.16588), and the image tower of CLIP (Radford et
al. 2021, arXiv:2103.00020).
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core import ranges, tokens
from distill_jax.core.api import Array, Model, Outputs
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.models import _attention
from distill_jax.models.adapters import from_linen
from distill_jax.models.layers import Dense, DropPath, LayerNorm, gelu


class Size(NamedTuple):
    """Width of the tokens, number of blocks and attention heads."""

    width: int
    depth: int
    heads: int


VARIANTS = {
    "micro": Size(96, 6, 3),
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
}

GELUS = {
    "tanh": gelu,
    "exact": functools.partial(jax.nn.gelu, approximate=False),
    "quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
"""Forms of the GELU (Hendrycks, Gimpel 2016, arXiv:1606.08415, section 2)."""

_xavier = nn.initializers.xavier_uniform()


class Attention(nn.Module):
    """Multi-head self-attention, `[b, t, d]` to `[b, t, d]`.

    The first kernel's columns are ordered by head, then query, key and value, so that a split of
    them over devices gives each whole heads (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

    Attributes:
      heads: number of heads.
      implementation: one of `_attention.IMPLEMENTATIONS`.
    """

    heads: int
    implementation: str = "plain"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, t, d = x.shape
        qkv = Dense(3 * d, kernel_init=_xavier)(x).reshape(b, t, self.heads, 3, d // self.heads)
        # Parameters are made in float32, which cuDNN does not take.
        if self.implementation != "plain" and not self.is_initializing():
            how = {"causal": False, "implementation": self.implementation}
            q, k, v = jnp.moveaxis(qkv, 3, 0)  # each [b, t, heads, d / heads]
            mixed = _attention.fused(q, k, v, None, **how)
            return Dense(d, kernel_init=_xavier)(mixed.reshape(b, t, d))
        q, k, v = jnp.moveaxis(qkv, (3, 2), (0, 2))  # each [b, heads, t, d / heads]
        scores = jnp.einsum("bhqc,bhkc->bhqk", q * (d // self.heads) ** -0.5, k)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bhkc->bhqc", weights, v)
        return Dense(d, kernel_init=_xavier)(mixed.swapaxes(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on a normalized residual branch."""

    heads: int
    mlp_ratio: int
    dropout: float
    drop_path: float
    layer_scale: float = 0.0
    gelu: str = "tanh"
    epsilon: float = 1e-6
    attention: str = "plain"

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def residual(x, branch, gain):
            if self.layer_scale:
                first = nn.initializers.constant(self.layer_scale)
                scale = self.param(gain, first, x.shape[-1:])
                branch *= scale.reshape(1, 1, -1).astype(branch.dtype)
            if self.dropout:
                branch = nn.Dropout(self.dropout)(branch, deterministic=not train)
            if self.drop_path:
                branch = DropPath(self.drop_path)(branch, train=train)
            return x + branch

        attention = Attention(self.heads, self.attention)
        x = residual(x, attention(LayerNorm(self.epsilon)(x)), "gain1")
        y = Dense(self.mlp_ratio * x.shape[-1], kernel_init=_xavier)(LayerNorm(self.epsilon)(x))
        y = Dense(x.shape[-1], kernel_init=_xavier)(GELUS[self.gelu](y))
        return residual(x, y, "gain2")


class ViT(nn.Module):
    """The network of `make`."""

    num_classes: int
    size: Size
    patch_size: int
    pool: str
    mlp_ratio: int
    dropout: float
    drop_path: float
    positions: str
    mask_token: bool
    tubelet: int
    distilled: bool
    registers: int
    layer_scale: float
    gelu: str
    class_position: bool
    epsilon: float
    patch_bias: bool
    pre_norm: bool
    projection: int
    attention: str
    remat: bool

    @nn.compact
    def __call__(
        self, x: Array, keep: Array | None = None, mask: Array | None = None, train: bool = False
    ) -> Outputs:
        width, depth, heads = self.size
        p, u = self.patch_size, self.tubelet
        grid = tokens.grid_of(x.shape[1:], patch_size=p, tubelet=u)
        outputs = {}
        x = tokens.patchify(x, patch_size=p, tubelet=u)
        embed = Dense(width, kernel_init=_xavier, use_bias=self.patch_bias, name="patches")
        x = outputs["patches"] = embed(x)
        normal = nn.initializers.normal(0.02)
        if self.mask_token:
            hidden = self.param("mask_token", normal, (1, 1, width)).astype(x.dtype)
            x = x if mask is None else jnp.where(mask[:, :, None], hidden, x)
        elif mask is not None:
            raise ArgumentError(
                "patches are to be masked, and the network has no token to put in their place",
                where="mask_token",
                hint="set mask_token to true",
            )
        names = [*["cls"] * (self.pool == "cls"), *["distilled"] * self.distilled]
        front = [self._token(name, x) for name in names]
        located = self.class_position
        x = jnp.concatenate([*front, x], axis=1) if located else x
        if self.positions == "learned":
            known = self.get_variable("params", "positions", x)
            if known.shape[1] != x.shape[1]:
                raise ArgumentError(
                    f"positions of {known.shape[1]} tokens were learned, not of {x.shape[1]}",
                    where="positions",
                    hint="fourier, which views of several sizes can share, or views of one size",
                )
            x += self.param("positions", normal, (1, *x.shape[1:])).astype(x.dtype)
        else:
            fixed = tokens.fourier_positions(grid, width)
            x += jnp.pad(fixed, ((len(front) * located, 0), (0, 0)))[None].astype(x.dtype)
        x = x if located else jnp.concatenate([*front, x], axis=1)
        first = len(front)
        if self.registers:
            token = self._token("registers", x, self.registers)
            x = jnp.concatenate([x[:, :first], token, x[:, first:]], axis=1)
            first += self.registers
        if self.pre_norm:
            x = LayerNorm(self.epsilon, name="pre_norm")(x)
        if keep is not None:
            x = jnp.concatenate([x[:, :first], tokens.take(x[:, first:], keep)], axis=1)
        if self.dropout:
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        kind = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for index in range(depth):
            rate = self.drop_path * index / max(1, depth - 1)
            block = kind(
                heads,
                self.mlp_ratio,
                self.dropout,
                rate,
                self.layer_scale,
                self.gelu,
                self.epsilon,
                self.attention,
                name=f"Block_{index}",
            )
            x = block(x, train)
            outputs[f"block{index + 1}"] = x
        for stage in range(1, 4):
            outputs[f"stage{stage}"] = outputs[f"block{math.ceil(stage * depth / 3)}"]
        ends = [outputs[f"block{i + 1}"][:, first:] for i in range(max(0, depth - 4), depth)]
        outputs["last_blocks"] = jnp.concatenate([y.mean(1) for y in ends], axis=1)
        x = outputs["tokens"] = LayerNorm(self.epsilon)(x)
        pooled = x[:, 0] if self.pool == "cls" else x[:, self.registers :].mean(1)
        if self.projection:
            last = Dense(self.projection, _xavier, use_bias=False, name="projection")
            outputs["pooled"], pooled = pooled, last(pooled)
        outputs["embedding"] = pooled
        if self.num_classes:
            outputs["logits"] = Dense(self.num_classes)(pooled)
        if self.num_classes and self.distilled:
            head = Dense(self.num_classes, name="head_distilled")
            outputs["class_logits"] = outputs["logits"]
            outputs["distilled_logits"] = head(x[:, 1])
            outputs["logits"] = (outputs["class_logits"] + outputs["distilled_logits"]) / 2
        return outputs

    def _token(self, name: str, x: Array, number: int = 1) -> Array:
        """Returns learned tokens for every example of `x`, `[b, number, d]`."""
        token = self.param(name, nn.initializers.zeros, (1, number, x.shape[-1])).astype(x.dtype)
        return jnp.broadcast_to(token, (x.shape[0], number, x.shape[-1]))


def make(
    *,
    num_classes: int,
    variant: str = "tiny",
    patch_size: int = 4,
    width: int = 0,
    depth: int = 0,
    heads: int = 0,
    mlp_ratio: int = 4,
    pool: str = "cls",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    positions: str = "learned",
    mask_token: bool = False,
    tubelet: int = 2,
    distilled: bool = False,
    registers: int = 0,
    layer_scale: float = 0.0,
    gelu: str = "tanh",
    class_position: bool = True,
    epsilon: float = 1e-6,
    patch_bias: bool = True,
    pre_norm: bool = False,
    projection: int = 0,
    attention: str = "plain",
    remat: bool = False,
) -> Model:
    """Returns a vision transformer for images `[b, h, w, c]`; learned positions fix their size.

    Clips `[b, f, h, w, c]` are cut into patches of `tubelet` frames. Two further inputs may follow:
    `keep`, int `[b, n]`, for masked methods: these patches alone are encoded, with the positions
    that they have in the whole; and `mask`, bool `[b, t]`: where it is true the patch is replaced
    by a learned token before its position is added (BEiT, Bao et al. 2021, arXiv:2106.08254,
    section 2.3).

    Endpoints: `patches` `[b, t, d]` before the first block, `block<i>` of every block, `stage1` to
    `stage3` (the blocks at a third, two thirds and the end), `last_blocks` `[b, 4 d]`, the means
    over patches of the last four blocks (all, if there are fewer) side by side, like the class
    tokens that DINO is probed on (Caron et al. 2021, arXiv:2104.14294, appendix F), `tokens`
    (normalized), `embedding` and `logits`; with a projection also `pooled`, the input of the
    projection to `embedding`.

    Args:
      num_classes: k; 0 leaves the last layer and `logits` out, for a head that is another network.
      variant: "micro", "tiny", "small", "base" or "large".
      patch_size: side of a patch in pixels.
      width: size of a token, in place of the variant's; 0 keeps it.
      depth: number of blocks, in place of the variant's; 0 keeps it.
      heads: number of attention heads, in place of the variant's; 0 keeps it.
      mlp_ratio: hidden width of the perceptrons over the token width.
      pool: "cls" (a class token) or "mean" (over all tokens).
      dropout: rate on the embedded patches and on every residual branch.
      drop_path: rate of the last block's stochastic depth, growing linearly from 0.
      positions: "learned", or "fourier": fixed sines and cosines along each side.
      mask_token: whether there is a token for masked patches.
      tubelet: frames of a patch of a clip.
      distilled: whether there is a second class token with its own last layer; `logits` are
        then the mean of `class_logits` and `distilled_logits`.
      registers: number of additional tokens without a patch, beside the class token.
      layer_scale: first gain of each channel of the branches, 0 for none.
      gelu: "tanh", "exact" as in networks that were trained in PyTorch, or CLIP's "quick".
      class_position: whether class tokens have positions too.
      epsilon: of the layer norms.
      patch_bias: whether embedded patches have a bias.
      pre_norm: whether tokens are normalized before the first block, as in CLIP.
      projection: width of a linear map of the pooled token to `embedding`, which the last layer
        then reads; 0 for none.
      attention: "plain", or "xla" or "cudnn" of `jax.nn.dot_product_attention`; "cudnn" is for GPUs
        and 16-bit types, and has no forward derivative, which the bilevel step needs.
      remat: whether blocks are computed again in the backward pass, to save memory.

    Raises:
      ArgumentError: an unknown variant, pool, attention or kind of positions, or a width that the
        heads do not divide; when the network is first called, also sides that patches do not
        divide.
    """
    ranges.counts(num_classes=num_classes, width=width, heads=heads)
    ranges.within(f"[0, {ranges.DEEPEST}]", whole=True, depth=depth)
    ranges.sizes(patch_size=patch_size, mlp_ratio=mlp_ratio, tubelet=tubelet)
    ranges.rates(dropout=dropout, drop_path=drop_path)
    ranges.counts(registers=registers, projection=projection)
    ranges.within("[0, 1000]", layer_scale=layer_scale)
    ranges.within("(0, 1]", epsilon=epsilon)
    if gelu not in GELUS:
        raise ArgumentError(f"no GELU {gelu!r}", where="gelu", hint=nearest(gelu, GELUS))
    if distilled and pool != "cls":
        raise ArgumentError("needs a class token", where="distilled", hint='pool="cls"')
    if variant not in VARIANTS:
        raise ArgumentError(
            f"no vision transformer {variant!r}", where="variant", hint=nearest(variant, VARIANTS)
        )
    if pool not in ("cls", "mean"):
        raise ArgumentError(
            f"no pooling {pool!r}", where="pool", hint=nearest(pool, ("cls", "mean"))
        )
    if positions not in (kinds := ("learned", "fourier")):
        raise ArgumentError(
            f"no positions {positions!r}", where="positions", hint=nearest(positions, kinds)
        )
    if attention not in (kinds := _attention.IMPLEMENTATIONS):
        raise ArgumentError(
            f"no attention {attention!r}", where="attention", hint=nearest(attention, kinds)
        )
    published = VARIANTS[variant]
    size = Size(width or published.width, depth or published.depth, heads or published.heads)
    if size.width % size.heads:
        raise ArgumentError(
            f"{size.heads} heads do not divide a width of {size.width}",
            where="heads",
            hint=f"divisors: {tokens.divisors(size.width)}",
        )
    return from_linen(
        ViT(
            num_classes,
            size,
            patch_size,
            pool,
            mlp_ratio,
            dropout,
            drop_path,
            positions,
            mask_token,
            tubelet,
            distilled,
            registers,
            layer_scale,
            gelu,
            class_position,
            epsilon,
            patch_bias,
            pre_norm,
            projection,
            attention,
            remat,
        )
    )
