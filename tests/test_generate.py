"""Sampled log-probs are the recomputed ones, and a row's mask holds what that row wrote and nothing else."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from nanoalign import UserError, compiler
from nanoalign.generate import bucket, decode, decoder, generate, sample, truncate
from nanoalign.logprobs import token_logprobs
from nanoalign.model import GPT, GPTConfig, KVCache
from nanoalign.rollouts import respond, rollout, rollouts, sample_kl
from nanoalign.tokenizer import get_tokenizer

END, PAD, V = 8, 9, 10
LLAMA = GPTConfig(V, context=24, layers=2, width=16, heads=4, kv_heads=2, mlp_width=16)
GPT2 = replace(LLAMA, kv_heads=4, norm="layernorm", positions="learned", mlp="gelu", bias=True)
PARTS = "ids", "mask", "logp", "ended"  # of a rollout
family = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


def lively(config: GPTConfig, seed: int = 0, spread: float = 0.3) -> GPT:
    """A float64 model whose distributions are far from uniform."""
    torch.manual_seed(seed)
    model = GPT(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model


def ragged(*lengths: int, pad_id: int = PAD, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random prompts, right-padded, without end tokens → ids (B, P), lengths (B,)."""
    ids = torch.randint(END, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor(lengths)
    return ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], pad_id), lengths


@torch.no_grad()
def greedy_by_hand(model, prompt: list[int], max_new_tokens: int, end_id: int | None) -> list[int]:
    """One row, no cache, no padding: the whole sequence again for every token."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + max_new_tokens, model.config.context):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == end_id:
            break
    return ids[len(prompt) :]


# ---- the sampled log-probs are the recomputed ones


@family
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize(
    "truncation", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.8}], ids=str
)
def test_sampled_logprobs_equal_recomputed_ones(config, temperature, truncation):
    """So the ratio is 1 on the policy's own samples: same temperature, untruncated, whatever the prompt."""
    model, (prompts, lengths) = lively(config), ragged(*[3, 7, 1, 20] * 8)
    out = generate(model, prompts, lengths, 12, END, PAD, temperature=temperature, seed=1, **truncation)
    recomputed = token_logprobs(model, out.ids, out.mask, temperature)
    # sampling works on fp32 logits
    torch.testing.assert_close(out.logp, recomputed.float(), rtol=0, atol=16 * torch.finfo(torch.float32).eps)
    assert out.mask.sum(-1)[3] <= 4 and out.mask.sum(-1).unique().numel() > 1  # 20 + 4 fill the context
    assert out.logp[out.mask].max() < -1e-3 and (out.logp[~out.mask] == 0).all()


@torch.no_grad()
def test_greedy_logprobs_are_those_at_temperature_one():
    model, (prompts, lengths) = lively(LLAMA), ragged(3, 7, 1)
    out = generate(model, prompts, lengths, 12, END, PAD, temperature=0)
    expected = token_logprobs(model, out.ids, out.mask).float()
    torch.testing.assert_close(out.logp, expected, rtol=0, atol=16 * torch.finfo(torch.float32).eps)


# ---- ids and masks


def assert_rows(out, prompts: list[list[int]], responses: list[list[int]], end_id: int | None):
    """Prompt, response, padding; the mask true on the response alone; no column that only pads."""
    assert out.responses() == responses
    assert out.ids.shape[1] == max(len(p) + len(r) for p, r in zip(prompts, responses))
    for b, (prompt, response) in enumerate(zip(prompts, responses)):
        used = len(prompt) + len(response)
        assert out.ids[b].tolist() == prompt + response + [PAD] * (out.ids.shape[1] - used)
        assert out.mask[b].nonzero().flatten().tolist() == list(range(len(prompt), used))
        assert out.ended[b] == (response[-1] == end_id)


@family
@pytest.mark.parametrize("with_end", [True, False])
@pytest.mark.parametrize("max_new_tokens", [1, 6, 40])  # 40: every row ends by itself or meets the context
def test_greedy_with_a_cache_equals_running_the_whole_sequence_again(config, max_new_tokens, with_end):
    model, (ids, lengths) = lively(config), ragged(3, 20, 1, 23, 5, 11, 7, 2)
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths)]
    # as end token, one that the first row does write midway
    end_id = greedy_by_hand(model, prompts[0], 6, None)[3] if with_end else None
    expected = [greedy_by_hand(model, p, max_new_tokens, end_id) for p in prompts]
    out = generate(model, ids, lengths, max_new_tokens, end_id, PAD, temperature=0)
    assert_rows(out, prompts, expected, end_id)


def test_rows_stop_at_their_end_token_at_max_new_tokens_or_at_the_context():
    model, (ids, lengths) = lively(LLAMA, spread=0.1), ragged(*[2, 22, 9] * 40)
    out = generate(model, ids, lengths, 8, END, PAD, seed=0)
    stops = set()
    for row, mask, n, ended in zip(out.ids, out.mask, lengths, out.ended):
        response, used = row[mask].tolist(), int(n + mask.sum())
        assert mask.tolist() == [n <= t < used for t in range(len(row))]
        assert (row[used:] == PAD).all()
        assert END not in response[:-1] and ended == (response[-1] == END)
        assert ended or len(response) == 8 or used == LLAMA.context
        stops.add("end" if ended else len(response))
    assert stops == {"end", 8, 2}  # the context leaves a prompt of 22 room for 2


def test_an_end_token_in_the_prompt_does_not_stop_a_row():
    model, (ids, lengths) = lively(LLAMA), ragged(*range(1, 13))
    ids[torch.arange(12), (lengths - 1) // 2] = END  # inside
    ids[::2][torch.arange(6), lengths[::2] - 1] = END  # and in every other row as the last token too
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths)]
    expected = [greedy_by_hand(model, p, 5, END) for p in prompts]
    assert max(map(len, expected)) > 1
    assert_rows(generate(model, ids, lengths, 5, END, PAD, temperature=0), prompts, expected, END)


def test_the_pad_id_is_a_token_like_any_other_where_the_model_writes_it():
    model, (ids, lengths) = lively(LLAMA), ragged(*[2, 5] * 20)
    with torch.no_grad():
        model.head.weight.zero_()  # tied: every embedding too, so that all tokens are equally likely
    out = generate(model, ids, lengths, 15, END, PAD, seed=0)
    written = out.responses()
    assert any(PAD in response for response in written)
    assert all(len(r) == 15 or r[-1] == END for r in written)


@family
def test_a_greedy_row_depends_on_neither_the_other_rows_nor_the_padding(config):
    model, (ids, lengths) = lively(config, seed=3), ragged(3, 1, 9, 6)
    together = generate(model, ids, lengths, 10, END, PAD, temperature=0)
    padded, _ = ragged(3, 1, 9, 6, pad_id=0)
    padded = torch.cat((padded, padded.new_full((4, 3), 5)), dim=1)
    elsewhere = generate(model, padded, lengths, 10, END, PAD, temperature=0)
    assert torch.equal(elsewhere.ids, together.ids) and torch.equal(elsewhere.mask, together.mask)
    for b, n in enumerate(lengths):
        alone = generate(model, ids[b : b + 1, :n], lengths[b : b + 1], 10, END, PAD, temperature=0)
        assert alone.responses() == together.responses()[b : b + 1]
        logp = together.logp[b][together.mask[b]]
        torch.testing.assert_close(alone.logp[alone.mask], logp, rtol=0, atol=1e-6)


# ---- the distribution sampled from


def support(probabilities: list[float], top_k: int = 0, top_p: float = 1.0) -> list[int]:
    logits = torch.tensor([probabilities], dtype=torch.float64).log() + 3.0  # any constant
    kept = truncate(logits, top_k, top_p)
    where = kept[0].isfinite()
    assert torch.equal(kept[0, where], logits[0, where])  # what stays, stays as it was
    return where.nonzero().flatten().tolist()


def test_truncation_keeps_exactly_the_k_likeliest_and_the_smallest_nucleus():
    p = [0.125, 0.5, 0.0625, 0.25, 0.0625]  # likeliest first: 1, 3, 0, then 2 and 4
    assert support(p) == support(p, top_k=5) == support(p, top_k=99) == [0, 1, 2, 3, 4]
    assert support(p, top_k=1) == [1]
    assert support(p, top_k=3) == [0, 1, 3]
    assert support(p, top_p=0.01) == support(p, top_p=0.49) == [1]
    assert support(p, top_p=0.51) == support(p, top_p=0.74) == [1, 3]
    assert support(p, top_p=0.76) == support(p, top_p=0.87) == [0, 1, 3]
    assert support(p, top_p=0.99) == [0, 1, 2, 3, 4]
    # the nucleus is of the distribution that top_k leaves: 4/7, 2/7, 1/7
    assert support(p, top_k=3, top_p=0.56) == [1]
    assert support(p, top_k=3, top_p=0.86) == [0, 1, 3]


def test_each_row_is_truncated_by_itself():
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
    kept = truncate(logits, 2, 1.0).isfinite()
    assert kept.tolist() == [[False, True, True], [True, False, True]]
    assert truncate(logits, 0, 0.1).isfinite().tolist() == [[False, False, True], [True, False, False]]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("kept", [6, 3], ids=lambda k: f"top_k={k}")
def test_sampling_frequencies_match_the_softmax(temperature, kept):
    n, logits = 20_000, torch.tensor([1.0, 0.8, 0.3, 0.0, -0.2, -1.0])  # likeliest first
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    tokens, logp = sample(logits.expand(n, 6), u, temperature, kept, 1.0)
    p = (logits[:kept].double() / temperature).softmax(-1)
    counts = tokens.bincount(minlength=6)
    chi_square = ((counts[:kept] - n * p) ** 2 / (n * p)).sum().item()
    assert counts[kept:].sum() == 0
    assert chi_square < {6: 20.5, 3: 13.8}[kept]  # the 99.9% quantile with kept − 1 degrees of freedom
    expected = (logits.double() / temperature).log_softmax(-1)[tokens]  # of all six
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("one", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_keeping_one_token_is_greedy(one):
    model, (ids, lengths) = lively(LLAMA, seed=3), ragged(3, 7, 1)
    greedy = generate(model, ids, lengths, 10, END, PAD, temperature=0)
    assert torch.equal(generate(model, ids, lengths, 10, END, PAD, seed=0, **one).ids, greedy.ids)


def test_a_seed_decides_the_sample_and_leaves_the_global_generator_alone():
    model, (ids, lengths) = lively(LLAMA), ragged(3, 7, 1)

    def run(seed):
        return generate(model, ids, lengths, 10, None, PAD, seed=seed).ids

    torch.manual_seed(5)
    before, first = torch.get_rng_state(), run(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)
    torch.manual_seed(5)
    unseeded = run(None)
    assert not torch.equal(run(None), unseeded)  # without a seed the global generator moves on …
    torch.manual_seed(5)
    assert torch.equal(run(None), unseeded)  # … and decides


# ---- errors


def test_a_prompt_as_long_as_the_context_is_a_user_error():
    model = lively(LLAMA)
    assert generate(model, *ragged(23), 5, END, PAD).mask.sum() == 1
    with pytest.raises(UserError, match="24 tokens leaves no room"):
        generate(model, *ragged(24, 3), 5, END, PAD)


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}],
    ids=str,
)
def test_sampling_arguments_out_of_range_are_a_user_error(bad):
    with pytest.raises(UserError, match="cannot sample with"):
        generate(lively(LLAMA), *ragged(3), **{"max_new_tokens": 4, "end_id": END, "pad_id": PAD, **bad})


# ---- many prompts

TOKENS = SimpleNamespace(end=END, pad=PAD)  # all that rollouts need of a tokenizer


def as_prompts(*lengths: int) -> list[np.ndarray]:
    return [row[:n].numpy() for row, n in zip(*ragged(*lengths))]


def test_rollouts_cover_every_prompt_once_and_say_which():
    model, prompts = lively(LLAMA, seed=3), as_prompts(5, 1, 9, 3, 3, 8, 2)
    seen = []
    for rows, out in rollouts(model, TOKENS, prompts, 6, seed=0, batch_size=3, temperature=0):
        expected = [greedy_by_hand(model, prompts[i].tolist(), 6, END) for i in rows]
        assert_rows(out, [prompts[i].tolist() for i in rows], expected, END)
        seen += rows
    assert sorted(seen) == list(range(7))


def test_a_rollout_answers_in_the_order_asked():
    model, prompts = lively(LLAMA, seed=3), as_prompts(5, 1, 9, 3, 3, 8, 2)
    prompts[4] = prompts[0]  # asked twice
    asked = [prompt.tolist() for prompt in prompts]
    out = rollout(model, TOKENS, prompts, 6, seed=0, temperature=0)
    assert_rows(out, asked, [greedy_by_hand(model, prompt, 6, END) for prompt in asked], END)
    sampled = rollout(model, TOKENS, prompts, 6, seed=4, temperature=0.7)
    [(order, drawn)] = rollouts(model, TOKENS, prompts, 6, seed=4, temperature=0.7)
    assert order != sorted(order)
    for row, i in enumerate(order):
        n = len(prompts[i])
        assert sampled.ids[i, :n].tolist() == asked[i]
        for name in PARTS:
            assert torch.equal(getattr(sampled, name)[i], getattr(drawn, name)[row])


@family
def test_a_prompt_sampled_many_times_is_read_once_and_answered_as_if_read_each_time(config, monkeypatch):
    model, (ids, lengths), of = lively(config), ragged(3, 7, 5), torch.tensor([2, 0, 0, 1, 2, 2])
    once = generate(model, ids, lengths, 9, END, PAD, of, seed=3)
    each = generate(model, ids[of], lengths[of], 9, END, PAD, seed=3)
    assert torch.equal(once.ids, each.ids) and torch.equal(once.mask, each.mask)
    torch.testing.assert_close(once.logp, each.logp)
    read, hidden = [], GPT.hidden
    monkeypatch.setattr(
        GPT, "hidden", lambda self, ids, *a, **k: read.append(ids.shape) or hidden(self, ids, *a, **k)
    )
    short, long = as_prompts(3, 5)
    [_] = rollouts(model, TOKENS, [short, long, short, short], 2, seed=0)
    assert read[0] == (2, 5)


@family
def test_dropping_finished_rows_never_changes_a_sample(config, monkeypatch):
    model, (ids, lengths) = lively(config), ragged(*(3, 7, 5, 2) * 5)

    def run(keep):
        sizes, hidden = [], GPT.hidden
        with monkeypatch.context() as patch:
            patch.setattr("nanoalign.generate.KEEP", keep)
            patch.setattr(
                GPT, "hidden", lambda self, x, *a, **k: sizes.append(len(x)) or hidden(self, x, *a, **k)
            )
            return generate(model, ids, lengths, 14, END, PAD, seed=5), sizes

    (dropped, sizes), (kept, all_sizes) = run(0.9), run(0.0)
    assert set(all_sizes) == {20} and sizes[-1] < 18 and sizes == sorted(sizes, reverse=True)
    assert torch.equal(dropped.ids, kept.ids) and torch.equal(dropped.mask, kept.mask)
    assert torch.equal(dropped.ended, kept.ended)
    torch.testing.assert_close(dropped.logp, kept.logp)


def test_a_token_without_probability_is_never_sampled():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]).expand(3, 5)
    tokens, _ = sample(logits, torch.tensor([0.0, 0.1, 1 - 2.0**-24]), 1.0, 0, 1.0)  # the ends of [0, 1)
    assert tokens.tolist() == [1, 1, 3]


@torch.no_grad()
def test_every_shape_of_a_batch_has_one_graph_for_all_temperatures_however_many_there_are(monkeypatch):
    """Of one code dynamo makes as many as its limit, and runs what comes after eager; a backend counts."""
    made, compile = [], torch.compile
    backend = lambda graph, inputs: made.append(len(inputs)) or graph.forward  # noqa: E731
    counted = lambda function, dynamic, mode: compile(function, dynamic=dynamic, backend=backend)  # noqa: E731
    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(compiler, "_works", True)
    torch._dynamo.reset()
    decoder.cache_clear()
    model = lively(replace(LLAMA, layers=1))
    for number, rows in enumerate((2, 4), start=1):
        u, token = torch.rand(rows, generator=torch.Generator().manual_seed(rows)), torch.arange(rows) % V
        for temperature in (1.0, 0.5):  # compiled, and taken again
            cache = KVCache(model.config, rows, 8, u.device, torch.float64)
            at = token, cache, torch.zeros_like(token), 8, u
            with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
                step = decoder(rows, 8, False, 0, 1.0)
                found = step(model, *at, (torch.tensor(temperature), 0, 1.0))
            for ours, eager in zip(found, decode(model, *at, (temperature, 0, 1.0))):
                torch.testing.assert_close(ours, eager)
            assert len(made) == number and compiler._works
    decoder.cache_clear()
    torch._dynamo.reset()


@family
@pytest.mark.parametrize("many", [False, True])
def test_a_batch_that_is_filled_up_to_a_power_of_two_is_answered_as_it_is_without(config, many, monkeypatch):
    """As on a GPU, also the first batch, which nobody has left yet."""
    model, (ids, lengths), end = lively(config, seed=3), ragged(3, 7, 5, 2, 6), END if many else None
    of = torch.tensor([2, 0, 0, 1, 2, 2, 4, 3, 3, 1, 0, 2, 4]) if many else None
    sizes, hidden = [], GPT.hidden

    def spy(self, x, *args, **more):
        sizes.append(len(x))
        return hidden(self, x, *args, **more)

    plain = generate(model, ids, lengths, 14, end, PAD, of, seed=5)
    monkeypatch.setattr("nanoalign.generate.bucket", lambda rows, device_type: bucket(rows, "cuda"))
    monkeypatch.setattr(GPT, "hidden", spy)
    filled = generate(model, ids, lengths, 14, end, PAD, of, seed=5)
    for ours, theirs in zip(vars(filled).values(), vars(plain).values()):
        torch.testing.assert_close(ours, theirs)
    assert set(sizes[1:]) == ({16, 8} if many else {8})


@family
@torch.no_grad()
def test_keys_and_values_are_kept_in_the_dtype_of_the_autocast_in_force(config, monkeypatch):
    """Half the memory, nothing is cast at every token, and no token changes: they came in that dtype."""
    model, (ids, lengths) = lively(config).float(), ragged(*(3, 7, 5, 2) * 5)
    made, out = [], []

    def take(config, rows, slots, device, dtype):
        made.append(dtype)
        return KVCache(config, rows, slots, device, torch.float32 if len(made) == 2 else dtype)

    monkeypatch.setattr("nanoalign.generate.take_cache", take)
    with torch.autocast("cpu", torch.bfloat16):
        out = [generate(model, ids, lengths, 14, END, PAD, seed=5) for _ in range(2)]
    generate(model, ids, lengths, 2, END, PAD, seed=5)
    assert made == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(torch.equal(*(getattr(drawn, name) for drawn in out)) for name in PARTS)


@pytest.mark.gpu
def test_decoding_by_cuda_graphs_equals_the_cpu():
    model, (ids, lengths) = lively(LLAMA).float(), ragged(*(3, 7, 5, 2) * 5)
    expected = generate(model, ids, lengths, 14, END, PAD, temperature=0)
    got = generate(model.cuda(), ids.cuda(), lengths.cuda(), 14, END, PAD, temperature=0)
    assert torch.equal(got.ids.cpu(), expected.ids) and torch.equal(got.mask.cpu(), expected.mask)


def test_batches_of_equal_prompts_are_sampled_independently():
    first, second = rollouts(lively(LLAMA), TOKENS, as_prompts(3) * 16, 10, seed=0, batch_size=8)
    assert first[1].responses() != second[1].responses()
    assert len({tuple(r) for r in first[1].responses()}) > 4


def test_respond_returns_texts_in_the_prompts_order():
    world = get_tokenizer("world")
    config = replace(LLAMA, vocab_size=world.vocab_size, context=48)
    model = lively(config, seed=1)
    questions = ["How many apples are there in the basket?", "Hi", "Who are you?", "Tell me a story", "Yes"]
    prompts = [world.prompt([{"role": "user", "content": q}]) for q in questions]
    texts, ended = respond(model, world, prompts, 8, seed=0, batch_size=2, temperature=0)
    alone = [greedy_by_hand(model, p.tolist(), 8, world.end) for p in prompts]
    assert texts == [world.decode_response(a) for a in alone] and len(set(texts)) == 5
    assert ended == [a[-1] == world.end for a in alone]


def test_the_kl_of_a_model_with_itself_is_zero():
    model = lively(LLAMA)
    kl = sample_kl(model, model, TOKENS, as_prompts(5, 1, 9, 3), 10, seed=0)
    assert kl.shape == (4,)
    torch.testing.assert_close(kl.double(), torch.zeros(4).double(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_sampled_kl_estimates_the_enumerated_one():
    policy, ref, prompt = lively(LLAMA, 0), lively(LLAMA, 1), as_prompts(3)[0]
    sequences = [[a] if a == END else [a, b] for a in range(V) for b in range(V if a != END else 1)]
    exact = total = 0.0
    for response in sequences:  # every response of at most two tokens
        ids = torch.tensor([[*prompt, *response]])
        logp, ref_logp = (
            model(ids).log_softmax(-1)[0, 2:-1].gather(-1, ids[0, 3:, None]).sum() for model in (policy, ref)
        )
        exact, total = exact + logp.exp() * (logp - ref_logp), total + logp.exp()
    assert total.item() == pytest.approx(1, abs=1e-12)
    estimates = sample_kl(policy, ref, TOKENS, [prompt] * 2000, 2, seed=0).double()
    error = estimates.std() / 2000**0.5
    assert abs(estimates.mean() - exact) < 4 * error < exact / 3
