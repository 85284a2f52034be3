"""Transformers over tokens by the name tables: stages against `transformers`, swaps, the way back.

The stored numbers are of `transformers`, for weights that both sides draw from names and shapes
(`language_nets.py`); `benchmarks/parity_language.py` makes them.
"""

import functools
import itertools
import json
import struct

import jax
import numpy as np
import pytest

from distill_jax import weights
from distill_jax.core.errors import ConfigError, UserError
from distill_jax.models import _layouts, pretrained, transformer
from distill_jax.run.paths import is_foreign
from distill_jax.weights import hugging_face, mapping
from distill_jax.weights.pretrained import open_pretrained
from tests.weights import language_nets as nets
from tests.weights import test_gguf

FAST = ("gpt2", "llama3", "bert_masked", "distilbert_classes", "clip_text")
"""One of each table; what is not among them differs by its config."""

ALL = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in nets.NETS]


@functools.cache
def stored(name):
    return nets.stored()["nets"][name]


@functools.cache
def tensors(name):
    return nets.drawn(name, stored(name)["shapes"])


def folder_of(name, tmp_path, arrays=None, **config):
    values = {k: v for k, v in {**stored(name)["config"], **config}.items() if v != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    weights.write_safetensors(tmp_path / "model.safetensors", arrays or tensors(name))
    return tmp_path


@functools.cache
def forward(arguments):
    """Returns a jitted function from parameters and inputs to outputs and the keys of blocks."""
    arguments = dict(arguments)
    module = transformer.Transformer(_layouts.architecture(arguments.pop("layout"), arguments))

    @jax.jit
    def run(params, x):
        outputs, state = module.apply(
            {"params": params},
            x,
            capture_intermediates=lambda module, _: module.name == "key",
            mutable=["intermediates"],
        )
        blocks = state["intermediates"].items()
        keys = {
            f"keys{int(block.removeprefix('block')) + 1}": inner["attention"]["key"]["__call__"][0]
            for block, inner in blocks
        }
        return {**outputs, **keys}

    return run


def outputs_of(name, net):
    arguments = {
        k: tuple(v.items()) if k == "rope_scaling" else v for k, v in net.arguments.items()
    }
    return forward(tuple(arguments.items()))(net.params, nets.inputs(name))


def distance(name, outputs):
    """Returns the largest difference to the stored numbers, in deviations of the stage."""
    worst = 0.0
    for stage, kept in stored(name)["stages"].items():
        numbers = nets.digest(name, stage, outputs[stage], kept["std"])
        worst = max(worst, float(np.abs(numbers - kept["digest"]).max()))
    return worst


@pytest.mark.parametrize("name", ALL)
def test_every_stage_is_that_of_transformers(name, tmp_path):
    net = pretrained.language_model(folder_of(name, tmp_path))
    assert net.report.tensors == len(stored(name)["shapes"]) and not net.report.kept
    assert distance(name, outputs_of(name, net)) < 1e-5


@pytest.mark.parametrize("name", nets.NETS)
def test_a_config_alone_gives_the_network(name, tmp_path):
    """Its class tells what tensors tell otherwise."""
    net = pretrained.language_model(folder_of(name, tmp_path))
    assert hugging_face.arguments_of(stored(name)["config"]) == net.arguments


@pytest.mark.parametrize("name", ["qwen2", "bert_classes", "clip_text"])
def test_the_door_of_all_weights_opens_them(name, tmp_path):
    """By `hf:<folder>` and by a GGUF file, as `init` of a role names them."""
    net = pretrained.language_model(folder_of(name, tmp_path))
    opened = open_pretrained(f"hf:{tmp_path}")
    assert is_foreign(f"hf:{tmp_path}") and opened.family.model == "transformer"
    assert opened.kwargs == net.arguments
    filled = opened.fill(net.params).params
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), filled, net.params))


def test_the_door_opens_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_of("llama", 500.0))
    assert is_foreign(str(path))
    opened = open_pretrained(str(path))
    assert opened.kwargs["heads"] == 6 and len(opened.provenance["sha256"]) == 64


def test_clip_is_its_text_tower_where_that_is_named():
    config = {"model_type": "clip"}
    assert not hugging_face.is_language(config)
    assert hugging_face.is_language(config, "clip_text/transformers")


def swapped(name, pair):
    arrays = dict(tensors(name))
    arrays[pair[0]], arrays[pair[1]] = arrays[pair[1]], arrays[pair[0]]
    return arrays


def check_swaps(name, tmp_path, chosen):
    """A tensor in the place of another of its shape moves a stage by more than parity allows."""
    net = pretrained.language_model(folder_of(name, tmp_path))
    by_shape: dict[tuple, list[str]] = {}
    for tensor, shape in stored(name)["shapes"].items():
        by_shape.setdefault(tuple(shape), []).append(tensor)
    pairs = [p for names in by_shape.values() for p in itertools.combinations(names, 2)]
    family = hugging_face.family_of(net.config)
    prefix = hugging_face.read(tmp_path)
    short = dict(zip(sorted(tensors(name)), sorted(tensors(name)), strict=True))
    for full in short:
        fits = [n for n in prefix.weights if full == n or full.endswith(f".{n}")]
        short[full] = max(fits, key=len)
    for pair in chosen(pairs):
        arrays = {short[full]: array for full, array in swapped(name, pair).items()}
        params = mapping.apply_map(arrays, family, net.params, sizes=net.arguments).params
        outputs = outputs_of(name, net._replace(params=params))
        assert distance(name, outputs) > 1e-3, pair


@pytest.mark.parametrize("name", ["gpt2", "clip_text"])
def test_a_swap_of_two_tensors_is_noticed(name, tmp_path):
    random = np.random.default_rng(0)
    check_swaps(name, tmp_path, lambda pairs: random.permutation(np.array(pairs))[:20].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.NETS)
def test_every_swap_of_two_tensors_is_noticed(name, tmp_path):
    check_swaps(name, tmp_path, list)


@pytest.mark.parametrize("name", nets.NETS)
def test_the_way_back(name, tmp_path):
    """What is written has the names, shapes and values of what was read, and is read again."""
    source = folder_of(name, tmp_path)
    net = pretrained.language_model(source)
    pretrained.save_hugging_face(tmp_path / "back", net.params, net.arguments)
    back = weights.read(tmp_path / "back")
    assert set(back) == set(tensors(name))
    for tensor, array in tensors(name).items():
        np.testing.assert_array_equal(back[tensor], array)
    again = pretrained.language_model(tmp_path / "back")
    assert again.arguments == net.arguments
    with pytest.raises(weights.WeightsError, match="already"):
        pretrained.save_hugging_face(tmp_path / "back", net.params, net.arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.NETS)
def test_transformers_reads_what_is_written(name, tmp_path):
    torch, transformers = (pytest.importorskip(m) for m in ("torch", "transformers"))
    net = pretrained.language_model(folder_of(name, tmp_path))
    pretrained.save_hugging_face(tmp_path / "back", net.params, net.arguments)
    cls = getattr(transformers, net.config["architectures"][0])
    model, info = cls.from_pretrained(
        tmp_path / "back", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    names = {"tokens": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
    given = {names[k]: torch.tensor(x).long() for k, x in nets.inputs(name).items()}
    with torch.no_grad():
        answer = model.eval()(**given, output_hidden_states=True)
    std = stored(name)["stages"]["block1"]["std"]
    numbers = nets.digest(name, "block1", answer.hidden_states[1].numpy(), std)
    assert np.abs(numbers - stored(name)["stages"]["block1"]["digest"]).max() < 1e-5


def test_shards_and_sixteen_bits(tmp_path):
    """An index with two shards in bfloat16 is read to float32."""
    (tmp_path / "config.json").write_text(json.dumps(stored("llama")["config"]))
    halves = [{}, {}]
    where = {}
    for i, (name, array) in enumerate(tensors("llama").items()):
        halves[i % 2][name] = array.astype(weights.common.BFLOAT16)
        where[name] = f"model-{i % 2}.safetensors"
    for i, half in enumerate(halves):
        weights.write_safetensors(tmp_path / f"model-{i}.safetensors", half)
    index = json.dumps({"weight_map": where})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    net = pretrained.language_model(tmp_path)
    kernel = net.params["block1"]["attention"]["key"]["kernel"]
    wanted = tensors("llama")["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(kernel, wanted.astype(weights.common.BFLOAT16).astype("f4").T)
    assert net.report.dtypes == {"bfloat16": len(where)}


def test_copies_of_tied_tensors_are_compared(tmp_path):
    arrays = dict(tensors("gpt2"))
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"]
    net = pretrained.language_model(folder_of("gpt2", tmp_path, arrays))
    assert "lm_head.weight" in net.report.ignored
    arrays["lm_head.weight"] = arrays["lm_head.weight"] + 1
    with pytest.raises(weights.WeightsError, match="should be 'wte"):
        pretrained.language_model(folder_of("gpt2", tmp_path, arrays))


def test_pooling_of_sentence_transformers(tmp_path):
    folder = folder_of("bert", tmp_path)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [{"type": "sentence_transformers.models.Normalize"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    net = pretrained.language_model(folder)
    assert net.arguments["pool"] == "mean" and net.arguments["normalize"]
    assert "pooler" not in net.params and "pooler.dense.weight" in net.report.ignored
    pooling["pooling_mode_max_tokens"] = True
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(weights.WeightsError, match="pools by"):
        pretrained.language_model(folder)


def test_classifiers_are_replaced(tmp_path):
    folder = folder_of("bert_classes", tmp_path)
    with pytest.raises(weights.WeightsError, match='head="replace"'):
        pretrained.language_model(folder, num_classes=3)
    net = pretrained.language_model(folder, num_classes=3, head="replace")
    assert net.params["classifier"]["kernel"].shape == (48, 3)
    assert net.report.replaced == ("classifier/bias", "classifier/kernel")


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
}


def gguf_of(name, theta, skip=""):
    """A file as llama.cpp converts it: its names, and rows of queries and keys in pairs."""
    config, infos, data = stored(name)["config"], [], b""
    for full, array in tensors(name).items():
        short = full.removesuffix(".weight").replace("model.layers.", "blk.")
        for theirs, ours in GGUF_NAMES.items():
            short = short.replace(theirs, ours)
        for part, heads in (("attn_q", 6), ("attn_k", 2)):
            if part in short:
                pairs = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2)
                array = pairs.reshape(array.shape)
        infos.append(test_gguf.info(f"{short}.weight", array.shape, 0, len(data)))
        data += array.tobytes() + b"\0" * (-array.nbytes % 32)
    numbers = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "rope.dimension_count": config["head_dim"],
    }
    floats = {"attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "rope.freq_base": theta}
    entries = [test_gguf.entry("general.architecture", 8, test_gguf.text("llama"))]
    entries += [
        test_gguf.entry(f"llama.{key}", 4, int(value).to_bytes(4, "little"))
        for key, value in numbers.items()
        if key != skip
    ]
    entries += [
        test_gguf.entry(f"llama.{key}", 6, np.float32(value).tobytes())
        for key, value in floats.items()
    ]
    return test_gguf.gguf(entries, infos, data)


@pytest.mark.parametrize(
    ("name", "theta"), [("llama", 500.0), pytest.param("smollm", 1e5, marks=pytest.mark.slow)]
)
def test_gguf_is_the_folder(name, theta, tmp_path):
    (tmp_path / "x.gguf").write_bytes(gguf_of(name, theta))
    net = pretrained.language_model(tmp_path / "x.gguf")
    assert distance(name, outputs_of(name, net)) < 1e-5


def test_gguf_without_a_size(tmp_path):
    (tmp_path / "x.gguf").write_bytes(gguf_of("llama", 500.0, skip="block_count"))
    with pytest.raises(weights.WeightsError, match=r"has no llama\.block_count"):
        pretrained.language_model(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("gpt2", {"model_type": "gpt3"}, "did you mean 'gpt2'"),
        ("gpt2", {"model_type": "absent"}, "model_type is 'None'"),
        ("gpt2", {"model_type": "llama"}, "has no num_attention_heads"),
        ("bert", {"model_type": "clip_text_model"}, "without the tensor 'embeddings.token_emb"),
        ("gpt2", {"n_head": "absent"}, "has no n_head"),
        ("gpt2", {"n_head": "6"}, "n_head is '6'"),
        ("gpt2", {"n_head": 5}, "5 heads do not divide"),
        ("gpt2", {"n_layer": 3}, "have no tensor: 'block2"),
        ("gpt2", {"n_layer": 1}, "have no place: 'h.1"),
        ("gpt2", {"n_layer": 10**9}, "depth is 1000000000"),
        ("gpt2", {"activation_function": "gelo"}, "did you mean 'gelu'"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ("llama", {"num_key_value_heads": 4}, "cannot share the keys of 4"),
        ("llama", {"sliding_window": 8}, "sliding_window is 8"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters are"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "no scaling of rotary positions"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
    ],
)
def test_configs_that_do_not_fit(name, config, match, tmp_path):
    with pytest.raises(UserError, match=match):
        pretrained.language_model(folder_of(name, tmp_path, **config))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1, "a": 2}'])
def test_configs_that_are_no_configs(text, tmp_path):
    folder = folder_of("gpt2", tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(weights.WeightsError, match=r"config\.json"):
        pretrained.language_model(folder)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"layout": "gpt2", "positions": "rope"}, None),
        ({"layout": "gpt2", "epsilon": 1e-6, "causal": False}, "causal"),
        ({"layout": "llama", "norm": "layer"}, None),
    ],
)
def test_networks_that_transformers_does_not_know(arguments, where):
    sizes = {"vocabulary": 8, "width": 4, "depth": 1, "heads": 2, "max_length": 8}
    model = transformer.make(**sizes, **arguments)
    like = jax.ShapeDtypeStruct((1, 2), "int32")
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0), like)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    with pytest.raises(UserError) as error:
        pretrained.to_hugging_face(params, {**sizes, **arguments})
    if where:
        assert isinstance(error.value, ConfigError) and error.value.where == where


def test_tokenizers(tmp_path):
    """Of a folder, and of a GGUF file: bytes by pairs, digits one by one, control tokens whole."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<end>", "1", "2", "a", "b", "ab", "\u0120", "\u0120ab"]
    entries = [
        test_gguf.entry("tokenizer.ggml.model", 8, test_gguf.text("gpt2")),
        test_gguf.entry("tokenizer.ggml.pre", 8, test_gguf.text("smollm")),
    ]
    for key, texts in (("tokens", words), ("merges", ["a b", "\u0120 ab"])):
        data = struct.pack("<IQ", 8, len(texts)) + b"".join(map(test_gguf.text, texts))
        entries.append(test_gguf.entry(f"tokenizer.ggml.{key}", 9, data))
    kinds = struct.pack("<IQ8i", 5, 8, 3, *(1,) * 7)
    entries.append(test_gguf.entry("tokenizer.ggml.token_type", 9, kinds))
    (tmp_path / "x.gguf").write_bytes(test_gguf.gguf(entries))
    found = hugging_face.tokenizer(tmp_path / "x.gguf")
    assert found.encode("ab ab12<end>").ids == [5, 7, 1, 2, 0]
    assert found.decode([5, 7, 1, 2]) == "ab ab12"
    found.save(str(tmp_path / "tokenizer.json"))
    again = hugging_face.tokenizer(tmp_path)
    assert isinstance(again, tokenizers.Tokenizer) and again.encode("ab").ids == [5]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(weights.WeightsError, match="is no tokenizer"):
        hugging_face.tokenizer(tmp_path)


def test_a_tokenizer_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        hugging_face.tokenizer(tmp_path)
