"""Transformers over tokens: names of `transformers` without the prefix of the base model, and GGUF.

`weights.hugging_face` removes the prefix ("transformer.", "model.", "bert.", ...) and tells the
arguments of the network from `config.json`; shapes alone do not tell the number of heads.
"""

from collections.abc import Mapping
from typing import Any

from distill_jax.weights.mapping import Family, MappingError, Rule, Specs

_QKV = tuple(f"block{{i}}/attention/{name}" for name in ("query", "key", "value"))


def _unknown(specs: Specs) -> Mapping[str, Any]:
    raise MappingError(
        "names and shapes do not tell the heads of a transformer",
        hint="weights.hugging_face.read, which reads its config.json",
    )


def _in_a_pair(specs: Specs) -> Mapping[str, Any]:
    # A file of CLIP may be read for its image tower, which this must not stand in the way of.
    raise ValueError


GPT2 = Family(
    name="gpt2/transformers",
    model="transformer",
    signature=("wte.weight", "h.0.attn.c_attn.weight"),
    rules=(
        Rule("wte", "token_embedding", "embedding"),
        Rule("wpe", "position_embedding", "embedding"),
        Rule("h.{i}.ln_1", "block{i}/attention_norm", "norm"),
        # Conv1D keeps its kernel as [in, out].
        Rule("h.{i}.attn.c_attn", _QKV, "linear_io"),
        Rule("h.{i}.attn.c_proj", "block{i}/attention/out", "linear_io"),
        Rule("h.{i}.ln_2", "block{i}/mlp_norm", "norm"),
        Rule("h.{i}.mlp.c_fc", "block{i}/mlp/up", "linear_io"),
        Rule("h.{i}.mlp.c_proj", "block{i}/mlp/down", "linear_io"),
        Rule("ln_f", "final_norm", "norm"),
        Rule("lm_head", "head", "embedding"),
    ),
    describe=_unknown,
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    tied={"lm_head.weight": "wte.weight"},
)

LLAMA = Family(
    name="llama/transformers",
    model="transformer",
    signature=("embed_tokens.weight", "layers.0.mlp.gate_proj.weight"),
    rules=(
        Rule("embed_tokens", "token_embedding", "embedding"),
        Rule("layers.{i}.input_layernorm", "block{i}/attention_norm", "norm"),
        Rule("layers.{i}.self_attn.q_proj", "block{i}/attention/query", "linear"),
        Rule("layers.{i}.self_attn.k_proj", "block{i}/attention/key", "linear"),
        Rule("layers.{i}.self_attn.v_proj", "block{i}/attention/value", "linear"),
        Rule("layers.{i}.self_attn.o_proj", "block{i}/attention/out", "linear"),
        Rule("layers.{i}.post_attention_layernorm", "block{i}/mlp_norm", "norm"),
        Rule("layers.{i}.mlp.{x=up|gate|down}_proj", "block{i}/mlp/{x}", "linear"),
        Rule("norm", "final_norm", "norm"),
        Rule("lm_head", "head", "embedding"),
    ),
    describe=_unknown,
    ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\..*inv_freq",),
    tied={"lm_head.weight": "embed_tokens.weight"},
)

LLAMA_GGUF = Family(
    name="llama/gguf",
    model="transformer",
    signature=("token_embd.weight", "blk.0.ffn_gate.weight"),
    rules=(
        Rule("token_embd", "token_embedding", "embedding"),
        Rule("blk.{i}.attn_norm", "block{i}/attention_norm", "norm"),
        Rule("blk.{i}.attn_q.weight", "block{i}/attention/query/kernel", "rotary_heads"),
        Rule("blk.{i}.attn_k.weight", "block{i}/attention/key/kernel", "rotary_groups"),
        Rule("blk.{i}.attn_v", "block{i}/attention/value", "linear"),
        Rule("blk.{i}.attn_output", "block{i}/attention/out", "linear"),
        Rule("blk.{i}.ffn_norm", "block{i}/mlp_norm", "norm"),
        Rule("blk.{i}.ffn_{x=up|gate|down}", "block{i}/mlp/{x}", "linear"),
        Rule("output_norm", "final_norm", "norm"),
        Rule("output", "head", "embedding"),
    ),
    describe=_unknown,
    ignored=(r"rope_freqs\.weight",),
    tied={"output.weight": "token_embd.weight"},
)

_BERT_LAYER = "encoder.layer.{i}"
BERT = Family(
    name="bert/transformers",
    model="transformer",
    signature=("embeddings.word_embeddings.weight", "encoder.layer.0.intermediate.dense.weight"),
    rules=(
        Rule("embeddings.word_embeddings", "token_embedding", "embedding"),
        Rule("embeddings.position_embeddings", "position_embedding", "embedding"),
        Rule("embeddings.token_type_embeddings", "type_embedding", "embedding"),
        Rule("embeddings.LayerNorm", "embedding_norm", "norm"),
        Rule(
            f"{_BERT_LAYER}.attention.self.{{x=query|key|value}}",
            "block{i}/attention/{x}",
            "linear",
        ),
        Rule(f"{_BERT_LAYER}.attention.output.dense", "block{i}/attention/out", "linear"),
        Rule(f"{_BERT_LAYER}.attention.output.LayerNorm", "block{i}/attention_norm", "norm"),
        Rule(f"{_BERT_LAYER}.intermediate.dense", "block{i}/mlp/up", "linear"),
        Rule(f"{_BERT_LAYER}.output.dense", "block{i}/mlp/down", "linear"),
        Rule(f"{_BERT_LAYER}.output.LayerNorm", "block{i}/mlp_norm", "norm"),
        Rule("pooler.dense", "pooler", "linear"),
        Rule("cls.predictions.transform.dense", "head_dense", "linear"),
        Rule("cls.predictions.transform.LayerNorm", "head_norm", "norm"),
        Rule("cls.predictions.bias", "head_bias"),
        Rule("classifier", "classifier", "linear"),
    ),
    describe=_unknown,
    head=("classifier",),
    ignored=(r"embeddings\.(position|token_type)_ids", r"cls\.seq_relationship\..*", r"pooler\..*"),
    tied={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)

_DISTIL_LAYER = "transformer.layer.{i}"
DISTILBERT = Family(
    name="distilbert/transformers",
    model="transformer",
    signature=("embeddings.word_embeddings.weight", "transformer.layer.0.ffn.lin1.weight"),
    rules=(
        Rule("embeddings.word_embeddings", "token_embedding", "embedding"),
        Rule("embeddings.position_embeddings", "position_embedding", "embedding"),
        Rule("embeddings.LayerNorm", "embedding_norm", "norm"),
        Rule(f"{_DISTIL_LAYER}.attention.q_lin", "block{i}/attention/query", "linear"),
        Rule(f"{_DISTIL_LAYER}.attention.k_lin", "block{i}/attention/key", "linear"),
        Rule(f"{_DISTIL_LAYER}.attention.v_lin", "block{i}/attention/value", "linear"),
        Rule(f"{_DISTIL_LAYER}.attention.out_lin", "block{i}/attention/out", "linear"),
        Rule(f"{_DISTIL_LAYER}.sa_layer_norm", "block{i}/attention_norm", "norm"),
        Rule(f"{_DISTIL_LAYER}.ffn.lin1", "block{i}/mlp/up", "linear"),
        Rule(f"{_DISTIL_LAYER}.ffn.lin2", "block{i}/mlp/down", "linear"),
        Rule(f"{_DISTIL_LAYER}.output_layer_norm", "block{i}/mlp_norm", "norm"),
        Rule("vocab_transform", "head_dense", "linear"),
        Rule("vocab_layer_norm", "head_norm", "norm"),
        Rule("vocab_projector.bias", "head_bias"),
        Rule("pre_classifier", "pooler", "linear"),
        Rule("classifier", "classifier", "linear"),
    ),
    describe=_unknown,
    head=("classifier",),
    ignored=(r"embeddings\.position_ids",),
    tied={"vocab_projector.weight": "embeddings.word_embeddings.weight"},
)

CLIP_TEXT = Family(
    name="clip_text/transformers",
    model="transformer",
    signature=("embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"),
    rules=(
        Rule("embeddings.token_embedding", "token_embedding", "embedding"),
        Rule("embeddings.position_embedding", "position_embedding", "embedding"),
        Rule("encoder.layers.{i}.layer_norm1", "block{i}/attention_norm", "norm"),
        Rule("encoder.layers.{i}.self_attn.q_proj", "block{i}/attention/query", "linear"),
        Rule("encoder.layers.{i}.self_attn.k_proj", "block{i}/attention/key", "linear"),
        Rule("encoder.layers.{i}.self_attn.v_proj", "block{i}/attention/value", "linear"),
        Rule("encoder.layers.{i}.self_attn.out_proj", "block{i}/attention/out", "linear"),
        Rule("encoder.layers.{i}.layer_norm2", "block{i}/mlp_norm", "norm"),
        Rule("encoder.layers.{i}.mlp.fc1", "block{i}/mlp/up", "linear"),
        Rule("encoder.layers.{i}.mlp.fc2", "block{i}/mlp/down", "linear"),
        Rule("final_layer_norm", "final_norm", "norm"),
        Rule("text_projection", "projection", "linear"),
    ),
    describe=_in_a_pair,
    head=("projection",),
    ignored=(
        r"embeddings\.position_ids",
        r"(vision_model|visual_projection)\..*",
        r"logit_scale",
    ),
)

FAMILIES = (GPT2, LLAMA, LLAMA_GGUF, BERT, DISTILBERT, CLIP_TEXT)
