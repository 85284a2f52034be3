"""The side of `parity_language.py` that has PyTorch, transformers and gguf.

Called with a folder and, as JSON, what is to be done: "random" draws networks and stores what they
answer; "minilm" and "smollm" do so with real weights.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from tests.weights import language_nets as language

KEYS = ("k_proj", "key", "k_lin", "c_attn")
"""Modules that give keys, in the blocks of the families."""

FRONT = {"GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM"}
"""Classes whose last hidden state is behind the last norm."""


def stages_of(model, args):
    """Returns what a network answers by stage, and the keys of every block."""
    keys = []

    def keep(module, _, y):
        width = y.shape[-1] // 3
        keys.append(y[..., width : 2 * width] if type(module).__name__ == "Conv1D" else y)

    hooks = [
        module.register_forward_hook(keep)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in KEYS
    ]
    with torch.no_grad():
        answer = model(**args, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    first, *blocks = answer.hidden_states
    stages = {"embedded": first, **{f"block{i + 1}": x for i, x in enumerate(blocks)}}
    if type(model).__name__ in FRONT:
        stages["hidden"] = stages.pop(f"block{len(blocks)}")
    for name, ours in (("logits", "logits"), ("pooler_output", "embedding")):
        if getattr(answer, name, None) is not None:
            stages[ours] = getattr(answer, name)
    if getattr(answer, "text_embeds", None) is not None:
        stages |= {"embedding": answer.text_embeds, "hidden": answer.last_hidden_state}
    stages |= {f"keys{i + 1}": x for i, x in enumerate(keys)}
    return {name: x.numpy() for name, x in stages.items()}


def torch_inputs(given):
    names = {"tokens": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
    return {names[k]: torch.tensor(np.asarray(x)).long() for k, x in given.items()}


def random(folder):
    fixture = {"reference": versions(), "nets": {}}
    for net, (kind, values) in language.NETS.items():
        place = folder / net
        cls = getattr(transformers, kind)
        cls(cls.config_class(**values)).save_pretrained(place)
        file = place / "model.safetensors"
        shapes = {name: x.shape for name, x in sorted(load_file(file).items())}
        save_file(language.drawn(net, shapes), file, {"format": "pt"})
        model, info = cls.from_pretrained(
            place, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        stages = stages_of(model.eval(), torch_inputs(language.inputs(net)))
        exact = stages_of(model.double(), torch_inputs(language.inputs(net)))
        last = "logits" if "logits" in exact else "hidden" if "hidden" in exact else "block2"
        np.savez(folder / f"{net}.npz", **stages, **{f"float64 {last}": exact[last]})
        kept = {}
        for stage, x in stages.items():
            std = float(language.seen(net, x).std())
            numbers = language.digest(net, stage, x, std)
            kept[stage] = {"std": std, "digest": [round(float(n), 7) for n in numbers]}
        fixture["nets"][net] = {
            "config": json.loads((place / "config.json").read_text()),
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "stages": kept,
        }
    (folder / "language.json").write_text(json.dumps(fixture))


def minilm(folder, source):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{source}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_padding(length=32)
    texts = [
        "That is a happy person",
        "That is a happy dog",
        "That is a very happy person",
        "Today is a sunny day",
    ]
    encoded = tokenizer.encode_batch(texts)
    tokens = np.array([e.ids for e in encoded], np.int32)
    mask = np.array([e.attention_mask for e in encoded], np.float32)
    model = transformers.BertModel.from_pretrained(source, attn_implementation="eager").eval()
    stages = stages_of(model, torch_inputs({"tokens": tokens, "mask": mask}))
    np.savez(folder / "minilm.npz", tokens=tokens, mask=mask, **stages)


PASSAGE = (
    "The Sun is the star at the centre of the Solar System. It is a massive, nearly perfect "
    "sphere of hot plasma, heated by nuclear fusion reactions in its core, and it radiates the "
    "energy from its surface mainly as visible light and infrared radiation. It is by far the most "
    "important source of energy for life on Earth. The planets, asteroids and comets move around "
    "it."
)


def smollm(folder, source):
    path = pathlib.Path(source)
    model = transformers.LlamaForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    kept: dict = {}
    for name, text in (("capital", "The capital of Italy is"), ("passage", PASSAGE)):
        tokens = np.array([tokenizer(text, add_special_tokens=False)["input_ids"]], np.int32)
        with torch.no_grad():
            kept[f"{name}_logits"] = model(torch.tensor(tokens).long()).logits.numpy()
        kept[f"{name}_tokens"] = tokens
    prompt = torch.tensor(kept["capital_tokens"]).long()
    with torch.no_grad():
        greedy = model.generate(prompt, max_new_tokens=24, do_sample=False)
    kept["greedy"] = greedy.numpy().astype(np.int32)
    words = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    (folder / "words.json").write_text(json.dumps(words))
    with torch.no_grad():
        tokens = torch.tensor(kept["passage_tokens"]).long()
        kept["passage_float64"] = model.double()(tokens).logits.numpy()
    np.savez(folder / "smollm2.npz", **kept)


def versions():
    return {m.__name__: m.__version__ for m in (torch, transformers)}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    place = pathlib.Path(sys.argv[1])
    for name, argument in json.loads(sys.argv[2]).items():
        {"random": random, "minilm": minilm, "smollm": smollm}[name](place, *argument)
    (place / "versions.json").write_text(json.dumps(versions()))
