"""A GGUF file is read as transformers reads it: the same logits, the same tokens."""

import os

import numpy as np
import pytest
import torch

from lab.gguf_import import read, read_model, read_tokenizer
from nanoalign import UserError

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

HEADS, KV_HEADS, WIDTH, LAYERS = 6, 2, 48, 3
TURNS = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Air scatters blue light.\n"},
    {"role": "user", "content": "And red at night?"},
]


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter stores the rows of q and k: (x₀, x_{d/2}, x₁, …)."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, theirs, tied: bool, scramble=neighbours) -> None:
    """A Llama of transformers' as a GGUF file, by llama.cpp's own writer."""
    writer, config = gguf.GGUFWriter(str(path), "llama"), theirs.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, x in tensors.items():
        if name == "lm_head.weight" and tied:
            continue
        x = scramble(x, HEADS) if "q_proj" in name else scramble(x, KV_HEADS) if "k_proj" in name else x
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(tied: bool):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=WIDTH, intermediate_size=80, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=64,
        rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 100.0, "rope_type": "default"},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return theirs


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_logits_of_a_gguf_file_are_those_of_the_model_in_it(tied, tmp_path):
    theirs, ids = llama(tied), torch.randint(101, (3, 64))
    write(tmp_path / "model.gguf", theirs, tied)
    ours = read_model(*read(str(tmp_path / "model.gguf")))
    assert ours.config.tied == tied and ours.config.norm_eps == 1e-5
    expected = theirs(ids).logits
    assert 0.5 < expected.std() < 5 and (ours(ids) - expected).abs().max() <= 1e-4
    write(tmp_path / "odd.gguf", theirs, tied, scramble=lambda x, heads: x)  # the test would see it
    assert (read_model(*read(str(tmp_path / "odd.gguf")))(ids) - expected).abs().max() > 0.1


def test_a_gguf_file_that_is_none_or_lacks_a_part_is_one_sentence(tmp_path):
    (tmp_path / "text.gguf").write_text("no GGUF at all")
    with pytest.raises(UserError, match=r"text\.gguf cannot be read as GGUF"):
        read(str(tmp_path / "text.gguf"))
    write(tmp_path / "model.gguf", llama(True), True)
    fields, tensors = read(str(tmp_path / "model.gguf"))
    with pytest.raises(UserError, match=r"'mamba'.*only 'llama'"):
        read_model({**fields, "general.architecture": "mamba"}, tensors)
    with pytest.raises(UserError, match=r"rope\.scaling"):
        read_model({**fields, "llama.rope.scaling.type": "yarn"}, tensors)
    with pytest.raises(UserError, match=r"no field llama\.block_count"):
        read_model({k: v for k, v in fields.items() if "block_count" not in k}, tensors)
    with pytest.raises(UserError, match=r"no tensor 'blk\.1\.ffn_up\.weight'"):
        read_model(fields, {k: v for k, v in tensors.items() if k != "blk.1.ffn_up.weight"})
    with pytest.raises(UserError, match=r"rope_freqs\.weight, for which"):
        read_model(fields, {**tensors, "rope_freqs.weight": torch.ones(4)})


@torch.no_grad()
def test_the_published_file_gives_transformers_tokens_and_logits():
    """Of words alone: digits and spaces transformers cuts by GPT-2's rule, not by the file's."""
    path = os.environ.get("NANOALIGN_GGUF", "")
    if not os.path.exists(path):
        pytest.skip("NANOALIGN_GGUF names no file: `make real` fetches SmolLM2-135M-Instruct.Q4_1.gguf")
    folder, name = os.path.split(path)
    words = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    fields, tensors = read(path)
    ours, tokenizer = read_model(fields, tensors), read_tokenizer(fields)
    del tensors
    expected = words.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.prompt(TURNS).tolist() == expected
    ids = torch.tensor(expected)[None]
    assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-3
