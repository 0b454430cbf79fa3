"""LoRA against peft: DPO of trl's own trainer with peft's adapters, on the same weights, adapters and rows.

Both take the base, the policy with its adapters off, as the reference. The adapters are not at their start,
where B = 0 and A has no gradient, but anywhere.
"""

import math
import re

import pytest
import torch
from test_losses import agree, draw, make_trainer, preference_share, table
from test_models import CONTEXT, V, from_llama

from lab.bench.peers import from_gpt2
from nanoalign.lora import adapters, add, matrices, merge, without
from nanoalign.model import GPT, GPTConfig

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

RANK, ALPHA, D = 3, 5.0, 48
GPT2 = GPTConfig(V, CONTEXT, 3, D, 6, norm="layernorm", positions="learned", mlp="gelu", bias=True)
LLAMA = GPTConfig(V, CONTEXT, 3, D, 6, 2, mlp_width=80, tied=False)
NAMES = {
    "gpt2": {
        "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out", "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    },
    "llama": {
        "self_attn.q_proj": "attention.qkv", "self_attn.k_proj": "attention.qkv",
        "self_attn.v_proj": "attention.qkv", "self_attn.o_proj": "attention.out", "mlp.gate_proj": "mlp.up",
        "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
    },
}  # fmt: skip


@pytest.fixture
def exact(double, monkeypatch):
    """Whoever asks for fp32 gets float64, so that rounding cannot hide a difference."""
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setenv("CI", "1")
    datasets.disable_progress_bars()


def twins(family: str):
    """(transformers' model, nanoalign's) with the same random weights, in float64, without dropout."""
    torch.manual_seed(0)
    if family == "gpt2":
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        shape = {"vocab_size": V, "n_positions": CONTEXT, "n_embd": D, "n_layer": 3, "n_head": 6, **off}
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    else:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        ))  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    ours = GPT(GPT2 if family == "gpt2" else LLAMA)
    mapped = (from_gpt2 if family == "gpt2" else from_llama)(theirs.base_model.state_dict())
    ours.load_state_dict({**mapped, "head.weight": theirs.lm_head.weight})
    return theirs, ours


def lora_config(family: str):
    return peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[name.split(".")[1] for name in NAMES[family]],
        fan_in_fan_out=family == "gpt2", lora_dropout=0.0, task_type="CAUSAL_LM",
    )  # fmt: skip


def parts(tensors: dict) -> dict:
    """peft's adapters, or their gradients, by the name of nanoalign's matrix: the parts it is made of."""
    found, names = {}, NAMES["gpt2"] | NAMES["llama"]
    for name, value in tensors.items():
        if at := re.search(r"\.(\d+)\.(\w+\.\w+)\.lora_(A|B)\.default", name):
            found.setdefault(f"blocks.{at[1]}.{names[at[2]]}.{at[3]}", []).append(value)
    return found


@torch.no_grad()
def scatter(model, one_a: bool):
    """Adapters anywhere; one_a: the same A for q, k and v, and for gate and up."""
    torch.manual_seed(1)
    for name, values in parts(dict(model.named_parameters())).items():
        for value in values:
            value.normal_(std=0.1)
        for value in values if one_a and name.endswith("A") else ():
            value.copy_(values[0])


def mirrored(ours, theirs):
    """peft's adapters in nanoalign's model: one A, and the rows of B as the rows of its matrix stand."""
    add(ours, RANK, ALPHA)
    with torch.no_grad():
        for name, values in parts(dict(theirs.named_parameters())).items():
            ours.get_parameter(name).copy_(values[0] if name.endswith("A") else torch.cat(values))
    return ours


def trained(trainer) -> tuple[float, dict]:
    """trainer.train() → the loss of its optimiser step, and the gradients of the adapters."""
    losses, grads, training_step = [], {}, trainer.training_step

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            assert got and all("lora_" in name for name in got)
            grads.update(got)

    trainer.training_step = lambda *args: losses.append(training_step(*args)) or losses[-1]
    trainer.add_callback(Look())
    trainer.train()
    return sum(losses).item(), parts(grads)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dpo_with_adapters_has_the_loss_and_the_gradients_of_pefts(exact, tmp_path, family, loss):
    """Of a GPT-2, whose q, k and v peft has in one matrix as well, exactly the same adapters. Of a Llama peft
    has an A for each of q, k and v, and of gate and up: where these are equal the function is nanoalign's,
    and the gradient of its A is the sum of theirs."""
    theirs, ours = twins(family)
    rows = draw(2)
    data, given = table(rows, "prompt", "chosen", "rejected"), {"peft_config": lora_config(family)}
    trainer = make_trainer("DPO", theirs, data, tmp_path, given=given, beta=0.3, loss_type=loss)
    scatter(trainer.model, one_a=family == "llama")
    mirrored(ours, trainer.model)
    assert trainer.ref_model is None
    found, grads = trained(trainer)
    due = {name: sum(g) if name.endswith("A") else torch.cat(g) for name, g in grads.items()}
    assert due.keys() == adapters(ours).keys() and abs(found - math.log(2)) > 1e-2
    name = "dpo" if loss == "sigmoid" else loss
    agree((found, due), ours, preference_share(ours, without(ours), rows, loss=name, beta=0.3))


def test_merged_weights_are_pefts(exact):
    theirs, ours = twins("gpt2")
    theirs = peft.get_peft_model(theirs, lora_config("gpt2"))
    scatter(theirs, one_a=False)
    merge(mirrored(ours, theirs))
    for name, due in from_gpt2(theirs.merge_and_unload().base_model.state_dict()).items():
        torch.testing.assert_close(ours.state_dict()[name], due, atol=1e-12, rtol=0, msg=name)


def test_adapters_start_as_pefts_do():
    """B at 0, and A uniform in ±1/√in: the same bounds and the same spread, from other random numbers."""
    theirs = peft.get_peft_model(twins("gpt2")[0], peft.LoraConfig(
        r=300, lora_alpha=1, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
    ))  # fmt: skip
    found = parts(dict(theirs.named_parameters()))
    for (name, own), layer in zip(
        adapters(add(GPT(GPT2), 300, 1.0)).items(), [x for x in matrices(GPT(GPT2)) for _ in "AB"]
    ):
        [due] = found[name]
        assert own.shape == due.shape
        if name.endswith("B"):
            assert not own.any() and not due.any()
        else:
            bound = 1 / math.sqrt(layer.in_features)
            assert own.abs().max() <= bound and due.abs().max() <= bound
            assert own.std().item() == pytest.approx(due.std().item(), rel=0.02)
