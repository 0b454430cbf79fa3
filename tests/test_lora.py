"""LoRA: (α/r) B A beside every matrix of the blocks, and a reference that is the same model without it."""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from runs import WORLD

from nanoalign.generate import Rollout, generate
from nanoalign.logprobs import token_logprobs
from nanoalign.lora import adapters, add, matrices, merge, restore, without
from nanoalign.model import GPT, GPTConfig
from nanoalign.packing import packed_hidden
from nanoalign.rollouts import sample_kl
from nanoalign.scalar import ScalarGPT, share_reader
from nanoalign.training import compile_hidden, freeze, make_optimizer, optimizer_step, prepare

LLAMA = GPTConfig(vocab_size=23, context=24, layers=2, width=24, heads=4, kv_heads=2, mlp_width=20)
GPT2 = replace(LLAMA, kv_heads=4, norm="layernorm", positions="learned", mlp="gelu", bias=True)
QWEN3 = replace(LLAMA, qkv_bias=True, qk_norm=True, head_dim=10, tied=False)
SHAPES = {"llama": LLAMA, "gpt2": GPT2, "qwen3": QWEN3}
RANK, ALPHA = 3, 5.0


def some(config=LLAMA, seed=0, kind=GPT):
    """A model that is far from uniform, in which every weight matters."""
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model


def adapted(config=LLAMA, seed=0, kind=GPT):
    """The same with adapters that have been trained."""
    return shaken(add(some(config, seed, kind), RANK, ALPHA))


@torch.no_grad()
def shaken(model):
    for layer in matrices(model):
        layer.B.normal_(std=0.3)
    return model


@torch.no_grad()
def by_hand(model, plain):
    """Its adapters in a plain model of the same base: to each W, column by row, α/r times b aᵀ."""
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k[-2:] not in (".A", ".B")})
    trunk, weights = getattr(plain, "gpt", plain), model.state_dict()
    for i, block in enumerate(trunk.blocks):
        for layer, name in (
            (block.attention.qkv, "attention.qkv"), (block.attention.out, "attention.out"),
            (block.mlp.up, "mlp.up"), (block.mlp.down, "mlp.down"),
        ):  # fmt: skip
            [A] = [x for key, x in weights.items() if key.endswith(f"blocks.{i}.{name}.A")]
            [B] = [x for key, x in weights.items() if key.endswith(f"blocks.{i}.{name}.B")]
            assert A.shape == (RANK, layer.in_features) and B.shape == (layer.out_features, RANK)
            for k in range(RANK):
                layer.weight += ALPHA / RANK * B[:, k, None] * A[None, k]
    return plain


def tokens(rows=3, length=9, seed=1, vocab=23):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("kind", [GPT, ScalarGPT])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_with_adapters_is_one_whose_matrices_have_their_products_added(double, shape, kind):
    model = adapted(SHAPES[shape], kind=kind)
    plain, ids = by_hand(model, kind(SHAPES[shape])), tokens()
    base = without(model)
    torch.testing.assert_close(model(ids), plain(ids), atol=1e-11, rtol=0)
    assert (base(ids) - plain(ids)).abs().max() > 0.1


@pytest.mark.parametrize("kind", [GPT, ScalarGPT])
@pytest.mark.parametrize("shape", SHAPES)
def test_merged_it_is_a_plain_model_with_those_weights(double, shape, kind):
    model, ids = adapted(SHAPES[shape], kind=kind), tokens()
    plain, due = by_hand(model, kind(SHAPES[shape])), model(ids)
    assert merge(model) is model
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, weights in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weights, atol=1e-13, rtol=0, msg=name)
    torch.testing.assert_close(model(ids), due, atol=1e-11, rtol=0)
    assert {type(layer) for layer in matrices(model)} == {torch.nn.Linear} and not adapters(model)
    assert all(weight.requires_grad for weight in model.parameters())
    copy.deepcopy(model)(ids).sum().backward()


def test_a_scalar_model_that_is_merged_keeps_its_reader_frozen():
    model = merge(add(ScalarGPT.from_policy(some(), reader=True), RANK, ALPHA))
    assert not any(weight.requires_grad for weight in model.reader.parameters())
    assert all(weight.requires_grad for weight in model.gpt.parameters())


def test_the_gradients_of_an_adapter_are_those_of_its_formula(double):
    """Of L = Σ g · y: ∂L/∂B = α/r gᵀ (x Aᵀ), ∂L/∂A = α/r (g B)ᵀ x, ∂L/∂x = g (W + α/r B A)."""
    for layer in matrices(adapted(GPT2)):
        x, g = torch.randn(7, layer.in_features, requires_grad=True), torch.randn(7, layer.out_features)
        (layer(x) * g).sum().backward()
        scale = ALPHA / RANK
        torch.testing.assert_close(layer.B.grad, scale * g.t() @ (x @ layer.A.t()))
        torch.testing.assert_close(layer.A.grad, scale * (g @ layer.B).t() @ x)
        torch.testing.assert_close(x.grad, g @ (layer.weight + scale * layer.B @ layer.A))
        assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_policy_is_the_base_to_the_last_bit(shape):
    base, ids = some(SHAPES[shape]), tokens()
    due = base(ids)
    model = add(base, RANK, ALPHA)
    assert model is base and torch.equal(model(ids), due)


def test_a_is_uniform_within_one_over_the_root_of_its_inputs_and_another_in_each_matrix():
    model = add(some(replace(LLAMA, width=48, mlp_width=64)), 400, 1.0)
    for layer in matrices(model):
        most = 1 / math.sqrt(layer.in_features)
        assert 0.999 * most < layer.A.abs().max() <= most and layer.A.mean().abs() < 0.02 * most
        assert layer.A.var().item() == pytest.approx(most**2 / 3, rel=0.03)
        assert not layer.B.any()
    first = [layer.A[:5, :5] for layer in matrices(model)]
    assert len({x.sum().item() for x in first}) == len(first)


@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_are_all_that_is_trained_of_a_policy(shape):
    model = add(some(SHAPES[shape]), RANK, ALPHA)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == adapters(model).keys() == {
        f"blocks.{i}.{name}.{x}" for i in range(2) for x in "AB"
        for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }  # fmt: skip
    due = sum(RANK * (layer.in_features + layer.out_features) for layer in matrices(model))
    assert sum(x.numel() for x in adapters(model).values()) == due
    assert not adapters(some(SHAPES[shape])) and not adapters(without(model))


@pytest.mark.parametrize("reader", [False, True])
def test_of_a_scalar_model_the_head_is_trained_as_well_and_what_reads_the_reader(reader):
    model = add(ScalarGPT.from_policy(some(), reader), RANK, ALPHA)
    heads = {"score.weight", "score.bias", *["read_in.weight"] * reader}
    kept = adapters(model)
    assert {name for name in kept if not name.endswith((".A", ".B"))} == heads
    assert kept.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not adapters(ScalarGPT.from_policy(some(), reader))


def test_what_adapters_gives_is_all_that_restore_needs():
    model, other, ids = adapted(), add(some(), RANK, ALPHA), tokens()
    assert not torch.equal(model(ids), other(ids))
    restore(other, adapters(model))
    assert torch.equal(model(ids), other(ids))
    names = list(adapters(model))
    for wrong in (
        {name: adapters(model)[name] for name in names[1:]},
        {**adapters(model), "blocks.0.mlp.gate.A": torch.zeros(1)},
        {**adapters(model), names[0]: torch.zeros(RANK + 1, 24)},
        {},
    ):
        with pytest.raises(RuntimeError):
            restore(other, wrong)
    plain = some(seed=1)
    restore(plain, some().state_dict())
    assert torch.equal(plain(ids), some()(ids))
    with pytest.raises(RuntimeError):
        restore(plain, adapters(model))


# ------------------------------------------------------------------------------------------ the reference


def descend(model, steps=3):
    optimizer = make_optimizer(model, 0.05)
    for _ in range(steps):
        token_logprobs(model, tokens()).sum().neg().backward()
        optimizer_step(model, optimizer, 0.05, 1.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("before", [True, False], ids=["made before the adapters", "made after them"])
def test_the_reference_stays_the_base_while_the_policy_learns_and_takes_no_memory(shape, before):
    policy = some(SHAPES[shape])
    base, ids = copy.deepcopy(policy), tokens()
    if before:
        ref = without(policy)
        add(policy, RANK, ALPHA)
    else:
        ref = without(add(policy, RANK, ALPHA))
    descend(policy)
    assert torch.equal(ref(ids), base(ids)) and not torch.allclose(policy(ids), base(ids), atol=0.1)
    assert not any(weight.requires_grad for weight in ref.parameters()) and not ref.training
    places = {weight.data_ptr() for weight in policy.state_dict().values()}
    assert {weight.data_ptr() for weight in (*ref.parameters(), *ref.buffers())} <= places | {
        buffer.data_ptr() for buffer in policy.buffers()
    }
    assert ref.state_dict().keys() == base.state_dict().keys()


def test_the_reference_stands_wherever_a_reference_stands(monkeypatch):
    """In packed rows, behind a cache, as a key, in --compile, as a reader, in the KL of samples."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    shape = replace(LLAMA, vocab_size=WORLD.vocab_size)
    policy = some(shape)
    base = freeze(copy.deepcopy(policy))
    scalar = freeze(ScalarGPT.from_policy(base, reader=True))
    ref = without(add(policy, RANK, ALPHA))
    flags = type("Flags", (), {"lora": 0, "checkpointing": True, "compile": True, "shard": False})
    prepare(flags, policy, ref)
    shaken(policy)

    ids = tokens(vocab=1000)
    mask = torch.arange(9).expand(3, -1) >= 4
    ids[:, :4] = ids[0, :4]
    packed = packed_hidden(ref, ids, mask, [3])
    torch.testing.assert_close(packed[mask], base.hidden(ids)[mask])
    torch.testing.assert_close(token_logprobs(ref, ids, mask), token_logprobs(base, ids, mask))
    extra = 0.1 * torch.randn(3, 9, 24)
    torch.testing.assert_close(ref.hidden(ids, extra=extra), base.hidden(ids, extra=extra))

    prompts, lengths = ids[:, :5], torch.tensor([5, 3, 4])
    drawn, due = (generate(model, prompts, lengths, 8, None, WORLD.pad, seed=3) for model in (ref, base))
    assert torch.equal(drawn.ids, due.ids)
    torch.testing.assert_close(drawn.logp, due.logp)
    asked = [row.numpy() for row in prompts]
    kl = sample_kl(policy, ref, WORLD, asked, 8, 0)
    torch.testing.assert_close(kl, sample_kl(policy, base, WORLD, asked, 8, 0))
    assert kl.abs().max() > 0.1 and sample_kl(ref, base, WORLD, asked, 8, 0).abs().max() < 1e-4

    share_reader(scalar, ref)
    assert scalar.reader is ref
    rollout = Rollout(ids, mask, torch.zeros(ids.shape), torch.ones(3, dtype=torch.bool))
    seen = rollout.read_by(ref)
    assert rollout.read_by(scalar.reader) is seen and rollout.read_by(policy) is not seen
    torch.testing.assert_close(rollout.logprobs(ref, 1.0), token_logprobs(base, ids, mask))


def test_a_compiled_policy_has_a_reference_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    policy, ids = adapted(), tokens()
    base = without(policy)(ids)
    compile_hidden(policy)
    torch.testing.assert_close(without(policy)(ids), base)
    assert not torch.allclose(policy(ids), base, atol=0.1)


def test_a_model_whose_activations_are_recomputed_has_the_same_gradients():
    ids, found = tokens(), []
    for checkpointing in (False, True):
        model = adapted()
        model.checkpointing = checkpointing
        model(ids).square().mean().backward()
        found.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    assert len(found[0]) == 16 and all(map(torch.equal, *found))


# --------------------------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_kept_in_bf16_change_no_number_where_products_are_in_bf16(shape):
    ids, found = tokens(), []
    for bf16 in (False, True):
        model = shaken(add(some(SHAPES[shape]), RANK, ALPHA, bf16))
        torch.manual_seed(2)
        shaken(model)
        ref = without(model)
        with torch.autocast("cpu", torch.bfloat16):
            logp = token_logprobs(model, ids)
            with torch.no_grad():
                found.append([logp, token_logprobs(ref, ids)])
        logp.sum().backward()
        found[-1] += [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(map(torch.equal, *found)) and not torch.equal(found[0][0], found[0][1])
    kept = {name: weight.dtype for name, weight in model.named_parameters()}
    in_bf16 = {name for name, dtype in kept.items() if dtype == torch.bfloat16}
    assert in_bf16 == {f"{name[:-2]}.weight" for name in adapters(model)}
    assert {*kept.values()} == {torch.float32, torch.bfloat16}
    before = sum(layer.weight.numel() for layer in matrices(model))
    assert sum(layer.weight.nbytes for layer in matrices(ref)) == 2 * before


def test_merged_they_are_the_rounded_matrices_and_the_product_in_fp32():
    model = shaken(add(some(), RANK, ALPHA, bf16=True))
    due = [layer.weight.float() + ALPHA / RANK * layer.B @ layer.A for layer in matrices(model)]
    for layer, weight in zip(matrices(merge(model)), due):
        assert layer.weight.dtype == torch.float32
        torch.testing.assert_close(layer.weight, weight, atol=1e-6, rtol=0)
