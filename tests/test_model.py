"""The model is causal, decodes with a cache as it does without, and every config field does what it says."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nanoalign import UserError
from nanoalign.model import (
    GPT,
    PRESETS,
    GPTConfig,
    KVCache,
    parameter_count,
    preset,
    rope_angles,
    rotate,
)
from nanoalign.scalar import ScalarGPT

TINY = GPTConfig(vocab_size=13, context=12, layers=2, width=24, heads=4, mlp_width=32)
FAMILIES = {
    "gpt2": replace(TINY, norm="layernorm", positions="learned", mlp="gelu", bias=True),
    "llama": replace(TINY, kv_heads=2, tied=False),
    "qwen2": replace(TINY, kv_heads=1, qkv_bias=True),
    "qwen3": replace(TINY, kv_heads=2, head_dim=10, qk_norm=True),
    "llama3": replace(TINY, rope_scaling=(8.0, 1.0, 4.0, 8.0)),
}
family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
EXACT = {"rtol": 0, "atol": 1e-12}  # float64: values of order 1, a few thousand roundings of 1e-16


def lively(config: GPTConfig, seed: int = 0) -> GPT:
    """A float64 model with weights large enough that attention is far from uniform and no bias is zero."""
    torch.manual_seed(seed)
    model = GPT(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def random_ids(*shape: int, vocab: int = TINY.vocab_size) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))


@family
def test_changing_a_token_never_changes_what_came_before_it(config):
    model, ids = lively(config), random_ids(2, 9)
    before = model.hidden(ids)
    for t in range(9):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % config.vocab_size
        after = model.hidden(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], **EXACT)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-6  # and all that follows does see it


@family
def test_cached_decoding_of_ragged_rows_equals_the_plain_forward(config):
    model, full = lively(config), random_ids(3, 10)
    lengths, P, steps = torch.tensor([3, 6, 1]), 6, 4
    expected = model.hidden(full)
    prompts = torch.where(torch.arange(P) < lengths[:, None], full[:, :P], 12)  # what pads does not matter
    cache = KVCache(config, 3, P + steps, "cpu", torch.float64)
    prefill = model.hidden(prompts, torch.arange(P).expand(3, P), cache=cache)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(prefill[b, :n], expected[b, :n], **EXACT)
    rows = torch.arange(3)
    for t in range(steps):
        position = lengths + t
        written = torch.arange(P + t + 1) <= position[:, None, None, None]
        step = model.hidden(full[rows, position, None], position[:, None], written, cache)
        torch.testing.assert_close(step[:, 0], expected[rows, position], **EXACT)


def test_grouped_keys_equal_full_attention_with_repeated_keys_and_values():
    grouped = lively(replace(TINY, kv_heads=2, qkv_bias=True))
    full = GPT(replace(TINY, kv_heads=4, qkv_bias=True)).double()
    state = grouped.state_dict()
    for name in [n for n in state if ".qkv." in n]:
        q, k, v = state[name].unflatten(0, (-1, TINY.head_dim)).split((4, 2, 2))
        state[name] = torch.cat((q, k[[0, 0, 1, 1]], v[[0, 0, 1, 1]])).flatten(0, 1)
    full.load_state_dict(state)
    ids = random_ids(2, 8)
    torch.testing.assert_close(full.hidden(ids), grouped.hidden(ids), **EXACT)


# ---- positions


def test_rotated_dot_products_depend_on_the_distance_only():
    d, T, theta = 8, 12, 10_000.0
    q, k = torch.randn(2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = rope_angles(GPTConfig(context=T, width=d, heads=1, rope_theta=theta)).double()
    cos, sin = angles.cos(), angles.sin()
    scores = rotate(q.expand(1, 1, T, d), cos, sin)[0, 0] @ rotate(k.expand(1, 1, T, d), cos, sin)[0, 0].T
    # RoFormer eq. 16: Re Σ_j q_j k_j* exp(i (m − n) θ_j), over complex pairs
    distance = torch.arange(T)[:, None] - torch.arange(T)
    frequency = torch.tensor([theta ** (-2 * j / d) for j in range(d // 2)], dtype=torch.float64)
    pairs = torch.complex(q[:4], q[4:]) * torch.complex(k[:4], k[4:]).conj()
    expected = (pairs * torch.exp(1j * distance[..., None] * frequency)).sum(-1).real
    # angles come rounded to fp32: off by up to T·2⁻²⁴ each
    torch.testing.assert_close(scores, expected, rtol=0, atol=2 * T * 2**-24 * pairs.abs().sum().item())
    assert scores[0].std() > 0.1  # and they do depend on it


def test_rope_scaling_stretches_slow_frequencies_and_leaves_fast_ones_alone():
    config = replace(PRESETS["llama-3.2-1b"], context=2)
    factor, low, high, old_context = config.rope_scaling
    plain, scaled = rope_angles(replace(config, rope_scaling=()))[1], rope_angles(config)[1]
    wavelength, ratio = 2 * torch.pi / plain, plain / scaled
    fast, slow = wavelength < old_context / high, wavelength > old_context / low
    assert (ratio[fast] == 1).all()
    torch.testing.assert_close(ratio[slow], torch.full_like(ratio[slow], factor))
    between = ratio[~fast & ~slow]
    assert len(between) > 1 and (between.diff() > 0).all() and between[0] > 1 and between[-1] < factor


def test_learned_positions_tell_identical_tokens_apart_and_act_from_their_position_on():
    model, same = lively(FAMILIES["gpt2"]), torch.full((1, 8), 5)
    before = model.hidden(same)
    assert torch.pdist(before[0]).min() > 1e-3
    with torch.no_grad():
        model.position.weight[4, 0] += 1.0
    moved = (model.hidden(same) - before).abs().amax(-1)[0]
    assert (moved[:4] <= 1e-12).all() and (moved[4:] > 1e-6).all()


def test_rotary_positions_add_nothing_to_the_residual_stream():
    hidden = lively(TINY).hidden(torch.full((1, 8), 5))  # attention over equal values is that value
    torch.testing.assert_close(hidden, hidden[:, :1].expand_as(hidden), **EXACT)


def test_rotary_attention_sees_distances_and_nothing_else():
    model, ids = lively(replace(TINY, layers=1)), random_ids(1, 7)
    here, further_on = model.hidden(ids), model.hidden(ids, positions=torch.arange(5, 12)[None])
    torch.testing.assert_close(further_on, here, rtol=0, atol=1e-5)  # angles are rounded to fp32
    swapped = model.hidden(ids[:, [1, 0, 2, 3, 4, 5, 6]])[:, -1]  # the same tokens at other distances
    assert (swapped - here[:, -1]).abs().max() > 1e-3


def test_a_sequence_longer_than_the_context_is_a_user_error():
    for config in FAMILIES.values():
        model = lively(config)
        assert model.hidden(random_ids(1, 12)).shape == (1, 12, 24)
        with pytest.raises(UserError, match=r"13 tokens.*context of 12"):
            model.hidden(random_ids(1, 13))


# ---- the fields


@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_norm_makes_attention_indifferent_to_the_scale_of_queries_and_keys(qk_norm):
    model, ids = lively(replace(TINY, kv_heads=2, qk_norm=qk_norm, norm_eps=1e-14)), random_ids(2, 8)
    before = model.hidden(ids)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight[: (4 + 2) * TINY.head_dim] *= 3.0  # queries and keys, not values
    assert torch.allclose(model.hidden(ids), before, rtol=0, atol=1e-10) == qk_norm


def test_biases_stand_where_the_config_says():
    def biased(**fields):
        names = [n for n, _ in GPT(replace(TINY, layers=1, **fields)).named_parameters()]
        return {n.removeprefix("blocks.0.") for n in names if n.endswith("bias")}

    assert biased() == set()
    assert biased(qkv_bias=True) == {"attention.qkv.bias"}
    assert biased(bias=True) == {"attention.qkv.bias", "attention.out.bias", "mlp.up.bias", "mlp.down.bias"}


def test_a_tied_head_shares_the_embedding_and_is_counted_once():
    tied, untied = GPT(replace(TINY, tied=True)), GPT(replace(TINY, tied=False))
    assert tied.head.weight.data_ptr() == tied.embed.weight.data_ptr()
    assert untied.head.weight.data_ptr() != untied.embed.weight.data_ptr()
    assert parameter_count(untied) - parameter_count(tied) == TINY.vocab_size * TINY.width


def test_logits_are_the_head_applied_to_the_hidden_states():
    model, ids = lively(FAMILIES["llama"]), random_ids(2, 7)
    expected = torch.einsum("btd,vd->btv", model.hidden(ids), model.head.weight)
    torch.testing.assert_close(model(ids), expected, **EXACT)


def test_initial_weights_are_gpt2s():
    model = GPT(replace(TINY, layers=8, width=96, head_dim=0, mlp_width=0, bias=True))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / 4 if residual else 0.02  # √(2·8) = 4
            assert parameter.std().item() == pytest.approx(std, rel=5 / parameter.numel() ** 0.5), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_a_scalar_model_gives_one_number_per_position_read_off_the_hidden_state():
    model = ScalarGPT(replace(TINY, tied=False))
    ids = random_ids(3, 7)
    assert model(ids).shape == (3, 7)
    expected = model.gpt.hidden(ids) @ model.score.weight[0] + model.score.bias
    torch.testing.assert_close(model(ids), expected)


def test_a_scalar_head_starts_at_one_over_root_d_plus_one_without_bias():
    torch.manual_seed(0)
    for width in (64, 4096):
        score = ScalarGPT(GPTConfig(vocab_size=2, context=2, layers=0, width=width, heads=1)).score
        assert score.weight.std().item() == pytest.approx((width + 1) ** -0.5, rel=4 / (2 * width) ** 0.5)
        assert score.bias.item() == 0


@pytest.mark.parametrize(
    "name, published",
    {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        "smollm2-135m": 134_515_008,
        "llama-3.2-1b": 1_235_814_400,
        "qwen2.5-0.5b": 494_032_768,
        "qwen3-0.6b": 596_049_920,
    }.items(),
)
def test_presets_have_their_published_parameter_count(name, published):
    with torch.device("meta"):
        assert parameter_count(GPT(preset(name))) == published


@pytest.mark.parametrize(
    "bad", [{"norm": "batchnorm"}, {"positions": "alibi"}, {"mlp": "relu"}, {"heads": 6, "kv_heads": 4}]
)
def test_a_bad_config_value_is_a_user_error(bad):
    with pytest.raises(UserError):
        GPTConfig(width=24, **bad)


def test_an_unknown_preset_is_a_user_error_that_lists_the_known_ones():
    with pytest.raises(UserError, match="gpt2-medium"):
        preset("gpt5")
    assert preset("gpt2", vocab_size=7).vocab_size == 7


@family
def test_recomputed_activations_give_the_same_gradients(config):
    torch.manual_seed(0)
    model, ids = GPT(config).double(), torch.randint(config.vocab_size, (3, 9))
    saved, gradients = [], []
    for model.checkpointing in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
        ):
            loss = model(ids).logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        saved.append(sum(kept))
    assert saved[1] < saved[0] / 2
    for plain, again in zip(*gradients):
        torch.testing.assert_close(again, plain)
