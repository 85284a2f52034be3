"""Samples documents from a trained language model into a token file, for distillation by sequences.

  python tools/generate_tokens.py --run=runs/lm --out=runs/generated.npy --end=256 \\
      --documents=2000 --steps=1000
  python -m distill_jax.main --config=configs/language/next_token.py --workdir=runs/student \\
      --config.data.name=token_file --config.data.kwargs.path=runs/generated.npy \\
      --config.data.kwargs.vocabulary=257 --config.data.kwargs.end=256

A student that is trained on the file learns the teacher's distribution of whole sequences (Kim and
Rush 2016, arXiv:1606.07947, section 3.2, with samples in place of the most probable sequence). Each
document begins behind an end token and is a function of the network, the seed and its number.
Chunks lie in a folder beside the file; a command that was interrupted goes on when it is repeated.
"""

import argparse
import hashlib
import json
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import distill_jax as dj
from distill_jax.core import sampling
from distill_jax.core.api import Model, Params
from distill_jax.core.errors import ArgumentError, ConfigError, UserError


def generate(
    model: Model,
    params: Params,
    out: pathlib.Path,
    *,
    documents: int,
    steps: int,
    end: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch: int = 64,
) -> dict[str, Any]:
    """Writes `out`, a `.npy` with documents of sampled tokens, an end token between them.

    Args:
      model: a network with `decode`.
      params: its parameters.
      out: the file; its chunks are in a folder of the same name with the suffix `.parts`.
      documents: number of documents.
      steps: largest number of tokens of a document.
      end: the token that ends a document.
      temperature: T of the softmax; 0 takes the most probable tokens, so that all are the same.
      top_k: number of most probable tokens to sample from; 0 samples from all tokens.
      seed: of the draws.
      batch: documents at a time; a draw does not depend on it.

    Returns:
      The settings, with the numbers of documents that have tokens, of those that ended, and of
      tokens.

    Raises:
      ArgumentError: the network cannot be sampled from, or an argument is invalid.
      ConfigError: the folder has chunks of other settings.
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    settings = {
        "network": digest.hexdigest(),
        **{"documents": documents, "steps": steps, "end": end, "temperature": temperature},
        **{"top_k": top_k, "seed": seed, "batch": batch},
    }
    if end < 0:
        raise ArgumentError(f"end is {end}", where="end", hint="the token between documents")
    folder = out.with_suffix(".parts")
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "settings.json"
    if record.exists() and json.loads(record.read_text()) != settings:
        raise ConfigError(
            "holds documents of other settings", where=str(folder), hint="another --out"
        )
    write(record, json.dumps(settings).encode())

    @jax.jit
    def draw(params: Params, index: jax.Array) -> sampling.Samples:
        return sampling.of_network(
            "network",
            model,
            params,
            {},
            jnp.full((len(index), 1), end, jnp.int32),
            None,
            batch={"index": index, "epoch": jnp.zeros_like(index)},
            key=jax.random.key(seed),
            steps=steps,
            temperature=temperature,
            top_k=top_k,
            end=end,
        )

    params = jax.device_put(params)
    for first in range(0, documents, batch):
        part = folder / f"{first:09d}.npy"
        if not part.exists():
            index = jnp.arange(first, first + batch, dtype=jnp.int32)
            samples = draw(params, index)
            tokens = np.where(samples.mask[:, 0] > 0, samples.tokens[:, 0], -1)[:, 1:]
            np.save(partial := part.with_suffix(".tmp.npy"), tokens[: documents - first])
            os.replace(partial, part)
    rows = [row for p in sorted(folder.glob("[0-9]*[0-9].npy")) for row in np.load(p)]
    texts = [row[(row >= 0) & (row != end)] for row in rows]
    texts = [text for text in texts if len(text)]
    if not texts:
        raise ConfigError("every document is empty", where=str(folder), hint="another --end")
    joined = np.concatenate([np.append(text, end) for text in texts])[:-1]
    kind = np.uint16 if joined.max() < 2**16 else np.int32
    np.save(partial := folder / "joined.tmp.npy", joined.astype(kind))
    os.replace(partial, out)
    ended = sum(int((row == end).any()) for row in rows)
    return {**settings, "kept": len(texts), "ended": ended, "tokens": sum(map(len, texts))}


def write(path: pathlib.Path, data: bytes) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_bytes(data)
    os.replace(partial, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="folder of a run, as `distill_jax.load` takes")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--end", type=int, required=True, help="token that ends a document")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    args = vars(parser.parse_args())
    for name in ("documents", "steps", "batch"):
        if args[name] < 1:
            parser.error(f"--{name} is {args[name]}; at least 1")
    try:
        network = dj.load(args.pop("run"))
        found = generate(network.model, network.params, args.pop("out"), **args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
