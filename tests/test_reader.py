"""A scalar model with a reader sees what a frozen language model makes of each token, and nothing else."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import WORLD

import train_rm
from nanoalign import generate
from nanoalign.checkpoint import load_scalar, save
from nanoalign.data import collate
from nanoalign.generate import Rollout
from nanoalign.logprobs import likelihoods, token_logprobs
from nanoalign.model import GPT, GPTConfig
from nanoalign.packing import packed_hidden
from nanoalign.rewards import make_reward, model_reward
from nanoalign.scalar import ScalarGPT, response_scores, share_reader
from nanoalign.training import freeze

TINY = GPTConfig(vocab_size=13, context=16, layers=2, width=24, heads=4, mlp_width=32)


def policy_of(config=TINY, seed=0) -> GPT:
    """Far from uniform."""
    torch.manual_seed(seed)
    policy = GPT(config)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            weight.mul_(1 if "norm" in name else 5)
    return policy


def reading_model(config=TINY, seed=0) -> ScalarGPT:
    return ScalarGPT.from_policy(policy_of(config, seed), reader=True)


def rollout_of(policy, rows=4, length=9, prompt=3) -> Rollout:
    ids = torch.randint(policy.config.vocab_size, (rows, length))
    mask = (torch.arange(length) >= prompt).expand(rows, -1).clone()
    return Rollout(ids, mask, torch.zeros(ids.shape), torch.ones(rows, dtype=torch.bool))


def by_hand(policy, ids):
    """log p, H and their sum from all logits, one position at a time."""
    logits, found = policy(ids).double(), torch.zeros(*ids.shape, 3, dtype=torch.float64)
    for b in range(ids.shape[0]):
        for t in range(1, ids.shape[1]):
            p = logits[b, t - 1].softmax(-1)
            entropy = -(p * p.log()).sum()
            found[b, t] = torch.stack((p[ids[b, t]].log(), entropy, p[ids[b, t]].log() + entropy))
    return found


@pytest.mark.parametrize("config", [TINY, replace(TINY, tied=False)], ids=["tied", "untied"])
def test_what_is_read_is_log_p_entropy_and_their_sum_and_nothing_of_the_first_token(config):
    policy, ids = policy_of(config), torch.randint(13, (3, 7))
    seen = likelihoods(policy, ids)
    assert seen.shape == (3, 7, 3) and not seen.requires_grad and not seen[:, 0].any()
    torch.testing.assert_close(seen.double(), by_hand(policy, ids).detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(likelihoods(policy, ids, policy.hidden(ids)), seen)


def test_what_is_read_is_mapped_and_added_to_the_embeddings():
    model, ids = reading_model(), torch.randint(13, (2, 6))
    plain = copy.deepcopy(model)
    plain.reader = plain.read_in = None
    extra = by_hand(model.reader, ids).float() @ model.read_in.weight.t()
    plain.gpt.embed.register_forward_hook(lambda module, args, out: out + extra)
    torch.testing.assert_close(model(ids), plain(ids), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        model.read_in.weight.zero_()
    torch.testing.assert_close(model(ids), ScalarGPT.forward(without(model), ids))


def without(model):
    plain = copy.deepcopy(model)
    plain.reader = plain.read_in = None
    return plain


def test_the_reader_is_the_policy_as_it_was_whatever_is_trained():
    policy = policy_of()
    model = ScalarGPT.from_policy(policy, reader=True)
    before, ids = copy.deepcopy(model.reader.state_dict()), torch.randint(13, (4, 8))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert "read_in.weight" in trained and not any(name.startswith("reader.") for name in trained)
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    model(ids).square().sum().backward()
    optimizer.step()
    after = model.reader.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(model.gpt.embed.weight, policy.embed.weight)
    assert all(torch.equal(before[name], weight) for name, weight in policy.state_dict().items())


def test_no_score_depends_on_what_comes_later_or_on_padding():
    model, ids = reading_model(), torch.randint(13, (1, 10))
    other = ids.clone()
    other[0, 6:] = (ids[0, 6:] + 1) % 13
    torch.testing.assert_close(model(ids)[:, :6], model(other)[:, :6])
    torch.testing.assert_close(model(ids[:, :6]), model(ids)[:, :6])


def test_the_map_has_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    model, ids = reading_model().double(), torch.randint(13, (2, 5))
    model(ids).sin().sum().backward()
    step = 1e-6
    for place in [(0, 0), (7, 1), (23, 2)]:
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                model.read_in.weight[place] += sign * step
                sides.append(model(ids).sin().sum().item())
                model.read_in.weight[place] -= sign * step
        slope = (sides[0] - sides[1]) / (2 * step)
        assert model.read_in.weight.grad[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_responses_packed_behind_their_prompt_are_read_as_they_are_alone():
    model = reading_model()
    torch.manual_seed(1)
    prompt, responses = torch.randint(13, (4,)), [torch.randint(13, (n,)) for n in (3, 5, 2)]
    examples = [(torch.cat((prompt, own)).numpy(), np.arange(4 + len(own)) >= 4) for own in responses]
    ids, mask = collate(examples, 0)
    scores = response_scores(model, ids, mask, packed_hidden(model, ids, mask, [3]))
    alone = torch.stack([model(torch.tensor(own)[None])[0, -1] for own, _ in examples])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)


def test_a_reader_that_is_the_reference_is_one_model_in_memory_and_another_is_not():
    model, ref = reading_model(), freeze(policy_of())
    share_reader(model, ref)
    assert model.reader is ref
    for stranger in (policy_of(seed=1), policy_of(replace(TINY, layers=1))):
        own = reading_model()
        mine = own.reader
        share_reader(own, freeze(stranger))
        assert own.reader is mine
    share_reader(without(model), ref)
    share_reader(own, None)
    assert own.reader is mine


def test_a_rollout_is_read_once_by_all_who_share_a_reader_and_by_the_reference(monkeypatch):
    read_by = []
    monkeypatch.setattr(
        generate, "likelihoods", lambda reader, *given: read_by.append(reader) or likelihoods(reader, *given)
    )
    models, ref = [reading_model(), reading_model()], freeze(policy_of())
    for model in models:
        share_reader(model, ref)
    drawn, rewards = rollout_of(ref), list(map(model_reward, models))
    scores = [reward([], drawn) for reward in rewards]
    assert read_by == [ref]
    for model, score in zip(models, scores):
        torch.testing.assert_close(score, response_scores(model, drawn.ids, drawn.mask))
    direct = token_logprobs(ref, drawn.ids, drawn.mask)
    torch.testing.assert_close(drawn.logprobs(ref, 1.0), direct)
    drawn.read[ref] = drawn.read[ref] + 1  # only where it holds is it used
    torch.testing.assert_close(drawn.logprobs(ref, 1.0), direct + drawn.mask)
    hot = token_logprobs(ref, drawn.ids, drawn.mask, 2.0)
    torch.testing.assert_close(drawn.logprobs(ref, 2.0), hot)
    other = freeze(policy_of(seed=1))
    own = token_logprobs(other, drawn.ids, drawn.mask)
    torch.testing.assert_close(drawn.logprobs(other, 1.0), own)
    assert read_by == [ref]


class Seen(torch.nn.Module):
    """A model that remembers the shapes of what it is given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shapes = model, []

    def hidden(self, ids, **more):
        self.shapes.append(tuple(ids.shape))
        return self.model.hidden(ids, **more)


def ragged(policy, ends=(9, 4, 7, 5, 8), prompt=3, size=2) -> Rollout:
    """Rows that end at different places, two at a time; what lies beyond is no token of theirs."""
    ids = torch.randint(policy.config.vocab_size, (len(ends), max(ends)))
    at, ends = torch.arange(max(ends)), torch.tensor(ends)[:, None]
    mask = (at >= prompt) & (at < ends)
    return Rollout(ids, mask, torch.zeros(ids.shape), torch.ones(len(ends), dtype=torch.bool), size=size)


def test_rows_alike_in_length_are_read_together_without_the_padding_they_do_not_need(double):
    drawn = ragged(policy := policy_of())
    hidden = drawn.hidden(seen := Seen(policy))
    assert seen.shapes == [(2, 5), (2, 8), (1, 9)]
    for row, ids, last in zip(hidden, drawn.ids, (8, 3, 6, 4, 7)):
        torch.testing.assert_close(row[: last + 1], policy.hidden(ids[None, : last + 1])[0])
    assert hidden.shape == (5, 9, policy.config.width)
    drawn.size = 0
    drawn.hidden(seen)
    assert seen.shapes[3:] == [(5, 9)]


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_scores_and_log_probs_do_not_depend_on_how_many_rows_are_read_together(double, size):
    model, ref = reading_model(), freeze(policy_of())
    drawn = ragged(ref, size=size)
    alone = [Rollout(*(x[b : b + 1, :T] for x in (drawn.ids, drawn.mask, drawn.logp)), drawn.ended[b : b + 1])
             for b, T in enumerate((9, 4, 7, 5, 8))]  # fmt: skip
    score = torch.cat([response_scores(model, one.ids, one.mask) for one in alone])
    torch.testing.assert_close(model_reward(model)([], drawn), score)
    logp = torch.cat([token_logprobs(ref, one.ids, one.mask).sum(-1) for one in alone])
    torch.testing.assert_close(drawn.logprobs(ref, 1.0).sum(-1), logp)
    seen = drawn.read_by(ref)
    for row, one in zip(seen, alone):
        T = one.ids.shape[1]
        torch.testing.assert_close(row[:T], by_hand(ref, one.ids)[0])
        assert not row[T:].any()


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_keeps_its_reader(tmp_path, tied):
    config = replace(TINY, vocab_size=WORLD.vocab_size, tied=tied)
    model, path = ScalarGPT.from_policy(policy_of(config), reader=True), tmp_path / "rm.pt"
    save(path, model, tokenizer=WORLD, config=train_rm.Config(), chat=False, stage="rm", step=1,
         normalisation={"mean": 0.0, "std": 1.0})  # fmt: skip
    loaded, *_ = load_scalar(path)
    ids = torch.randint(WORLD.vocab_size, (2, 7))
    torch.testing.assert_close(loaded(ids), model(ids), atol=0, rtol=0)
    assert not any(weight.requires_grad for weight in loaded.reader.parameters())
    drawn = rollout_of(model.reader)
    reward = make_reward(str(path), WORLD, "cpu", freeze(policy_of(config)))
    expected = response_scores(model, drawn.ids, drawn.mask)
    torch.testing.assert_close(reward([{}] * 4, drawn), expected)
