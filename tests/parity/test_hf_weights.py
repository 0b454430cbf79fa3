"""Folders of transformers' models read by us, and ours read by transformers: the same function, both ways."""

import json

import pytest
import torch

from nanoalign import hf_weights as hf
from nanoalign.generate import generate
from nanoalign.model import GPT, GPTConfig
from nanoalign.scalar import ScalarGPT

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.parity

V, CONTEXT, END, PAD = 101, 48, 1, 0
SIZE = {
    "vocab_size": V, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip
GPT2_SIZE = {"vocab_size": V, "n_positions": CONTEXT, "n_embd": 48, "n_layer": 2, "n_head": 6}
LLAMA3 = {  # an old context of 32 and a small θ: fast, medium and slow frequencies are all among the four
    "rope_theta": 100.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS = {  # name: class, config
    "gpt2": ("GPT2", {**GPT2_SIZE, "layer_norm_epsilon": 1e-4}),
    "gpt2-inner": ("GPT2", {**GPT2_SIZE, "n_inner": 100, "reorder_and_upcast_attn": True}),
    "gpt2-untied": ("GPT2", {**GPT2_SIZE, "tie_word_embeddings": False}),
    "llama": ("Llama", {**SIZE, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "llama-tied": ("Llama", {**SIZE, "tie_word_embeddings": True}),
    "llama-rope": ("Llama", {**SIZE, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-head": ("Llama", {**SIZE, "head_dim": 20, "num_key_value_heads": 6}),
    "mistral": ("Mistral", {**SIZE, "sliding_window": None, "head_dim": 12}),
    "mistral-window": ("Mistral", {**SIZE, "sliding_window": CONTEXT}),
    "qwen2": ("Qwen2", {**SIZE, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2-untied": ("Qwen2", SIZE),
    "qwen3": ("Qwen3", {**SIZE, "head_dim": 20, "rope_parameters": {"rope_theta": 1e6}}),
}  # fmt: skip


def causal(family: str):
    return getattr(transformers, family + ("LMHeadModel" if family == "GPT2" else "ForCausalLM"))


@torch.no_grad()
def random_model(name: str, seed: int = 0):
    """Weights large enough that every part of the model matters, biases and norms too."""
    torch.manual_seed(seed)
    family, settings = MODELS[name]
    model = causal(family)(getattr(transformers, f"{family}Config")(**settings, eos_token_id=END)).eval()
    for parameter in model.parameters():
        parameter += 0.15 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=["fp32", "bf16 in shards"])
def precision(request):
    """The dtype of a folder, and how large a file of it may be."""
    return (torch.float32, "1GB") if request.param == "fp32" else (torch.bfloat16, "20KB")


def tensors_of(folder) -> dict:
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.load_file(file).items()}


@torch.no_grad()
def logits(model, ids):
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


IDS = torch.randint(V, (3, CONTEXT), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_and_what_is_written_back_is_what_was_read(
    name, precision, tmp_path
):
    dtype, size = precision
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    random_model(name).to(dtype).save_pretrained(theirs, max_shard_size=size)
    assert (len(list(theirs.glob("*.safetensors"))) > 2) == (dtype == torch.bfloat16)
    model = hf.load_folder(theirs)
    expected = logits(causal(MODELS[name][0]).from_pretrained(theirs, dtype=torch.float32).eval(), IDS)
    assert 0.3 < expected.std() < 10
    assert (logits(model, IDS) - expected).abs().max() <= 1e-4
    hf.save_folder(model, back, dtype, shard_bytes=20_000 if dtype == torch.bfloat16 else 10**9)
    a, b = tensors_of(theirs), tensors_of(back)
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
    assert (len(list(back.glob("*.safetensors"))) > 2) == (dtype == torch.bfloat16)
    again = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()
    assert (logits(again, IDS) - expected).abs().max() <= 1e-4


OURS = {  # models of ours, as a stage leaves them
    "gpt2": GPTConfig(
        V, CONTEXT, 2, 48, 6, norm="layernorm", positions="learned", mlp="gelu", bias=True
    ),
    "llama": GPTConfig(V, CONTEXT, 2, 48, 6, 2, mlp_width=80, tied=False),
    "llama-rope": GPTConfig(V, CONTEXT, 2, 48, 6, 2, rope_theta=100.0, rope_scaling=(8.0, 1.0, 4.0, 32.0)),
    "qwen2": GPTConfig(V, CONTEXT, 2, 48, 6, 2, qkv_bias=True, rope_theta=1e6),
    "qwen3": GPTConfig(V, CONTEXT, 2, 48, 6, 2, head_dim=20, qk_norm=True, norm_eps=1e-6),
}  # fmt: skip


@torch.no_grad()
def our_model(name: str, kind=GPT):
    torch.manual_seed(2)
    model = kind(OURS[name]).eval()
    for parameter in model.parameters():
        parameter += 0.15 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", OURS)
def test_transformers_answers_greedily_as_our_model_does(name, tmp_path):
    model = our_model(name)
    hf.save_folder(model, tmp_path, config_extra={"eos_token_id": END, "pad_token_id": PAD})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == theirs.config.architectures[0]
    lengths = torch.tensor([3, 9, 14, 14])
    prompts = torch.randint(2, V, (4, 14), generator=torch.Generator().manual_seed(3))
    drawn = generate(model, prompts, lengths, 30, END, PAD, temperature=0.0, seed=0)
    for row, length in enumerate(lengths.tolist()):
        answer = theirs.generate(prompts[row : row + 1, :length], max_new_tokens=30, do_sample=False)[0]
        assert answer[length:].tolist() == drawn.ids[row][drawn.mask[row]].tolist()


def test_without_ids_of_special_tokens_transformers_invents_none(tmp_path):
    hf.save_folder(our_model("llama"), tmp_path)  # the default of its LlamaConfig is to end at token 2
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.bos_token_id is config.eos_token_id is config.pad_token_id is None


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_a_reward_model_gives_the_scores_that_its_folder_gives(name, tmp_path, capsys):
    model = our_model(name, ScalarGPT)
    bias = model.score.bias.add_(0.3).item()
    hf.save_folder(model, tmp_path, shard_bytes=20_000, config_extra={"pad_token_id": PAD})
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == theirs.config.architectures[0]
    assert (theirs.config.num_labels, theirs.config.score_bias) == (1, bias)
    assert f"{bias:.6g}" in capsys.readouterr().out
    lengths = torch.tensor([5, 17, CONTEXT])
    ids = IDS.clamp(min=2).masked_fill(torch.arange(CONTEXT) >= lengths[:, None], PAD)
    scores = theirs(ids, attention_mask=(ids != PAD).long()).logits.squeeze(1)
    expected = model(ids).gather(1, lengths[:, None] - 1).squeeze(1)
    assert expected.std() > 0.1
    assert (scores + theirs.config.score_bias - expected).abs().max() <= 1e-4


def as_transformers_4(config: dict) -> dict:
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config |= {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    config |= {"rope_scaling": {"type": rope["rope_type"], **rope} if "factor" in rope else None}
    return config | {"torch_dtype": config.pop("dtype")}


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("gpt2")])
def test_the_config_is_the_same_in_the_words_of_transformers_4_and_5(name, tmp_path):
    random_model(name).save_pretrained(tmp_path)
    five = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in five and "rope_theta" not in five
    expected, four = hf.read_config(five, "five"), as_transformers_4(five)
    assert hf.read_config(four, "four") == expected
    (tmp_path / "config.json").write_text(json.dumps(four))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)  # so it is how they are read there as well
    assert theirs.rope_parameters.items() >= five["rope_parameters"].items()


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_a_config_is_silent_about_is_what_transformers_takes_it_for(family):
    size = GPT2_SIZE if family == "GPT2" else {**SIZE, "num_attention_heads": 64, "hidden_size": 1024}
    said = {name: size[name] for name in size if name != "num_key_value_heads"}
    window = {"sliding_window": None} if family == "Mistral" else {}
    theirs = getattr(transformers, f"{family}Config")(**said, **window)
    ours = hf.read_config({"model_type": family.lower(), **said, **window}, "config.json")
    assert ours.tied == theirs.tie_word_embeddings
    if family == "GPT2":
        assert (ours.mlp_width, ours.norm_eps) == (4 * 48, theirs.layer_norm_epsilon)
        return
    assert (ours.norm_eps, ours.kv_heads) == (theirs.rms_norm_eps, theirs.num_key_value_heads)
    assert ours.head_dim == getattr(theirs, "head_dim", 1024 // 64)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_a_mistral_config_that_says_no_window_has_one(tmp_path):
    long = {**SIZE, "max_position_embeddings": 8192}
    window = transformers.MistralConfig(**long).sliding_window
    with pytest.raises(hf.UserError, match=f"sliding_window of {window} tokens"):
        hf.read_config({"model_type": "mistral", **long}, "config.json")


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_a_folder_of_the_trunk_alone_is_read_as_gpt2s_on_the_hub_is(name, tmp_path):
    """Names without their first part; in GPT-2's, the causal masks as well."""
    model = random_model(name)
    model.base_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.load_file(file)
    assert not [key for key in tensors if key.startswith(("transformer.", "model."))]
    if name == "gpt2":
        mask = torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.uint8).tril()
        tensors |= {f"h.{i}.attn.bias": mask.clone() for i in range(2)}
        tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4 - i) for i in range(2)}
    else:
        tensors |= {f"layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    safetensors.save_file(tensors, file)
    assert (logits(hf.load_folder(tmp_path), IDS) - logits(model, IDS)).abs().max() <= 1e-4


def test_of_a_hub_weights_config_and_tokenizer_are_downloaded_and_neither_code_nor_pickles():
    """By the filter of huggingface_hub itself."""
    utilities = pytest.importorskip("huggingface_hub.utils")
    wanted = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", hf.INDEX,
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
    ]  # fmt: skip
    other = [
        "modeling_mine.py", "pytorch_model.bin", "model.pth", "README.md", "onnx/model.onnx",
        "consolidated.safetensors", "original/model.safetensors", "model.Q4_K_M.gguf", ".gitattributes",
        "onnx/config.json", "tf_model.h5", "training_args.bin",
    ]  # fmt: skip
    patterns = {"allow_patterns": hf.WANTED, "ignore_patterns": hf.UNWANTED}
    assert [*utilities.filter_repo_objects(wanted + other, **patterns)] == wanted


def test_a_model_of_the_hub_without_a_network_is_one_sentence(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("hf:nobody/nothing", "hf:a/b/c", "hf:"):
        with pytest.raises(hf.UserError, match=f"^{name} cannot be downloaded: .+"):
            hf.resolve(name)
