"""Random numbers: every purpose has its own."""

import numpy as np
import torch

from lab import train_online_dpo
from nanoalign import rollouts as rollouts_module
from nanoalign import run
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder
from nanoalign.generate import Rollout
from nanoalign.rollouts import rollouts
from nanoalign.seeds import derived_seed


def test_no_two_purposes_steps_or_runs_share_a_seed():
    purposes = [(purpose, step) for purpose in ("rollout", "labels", "order") for step in range(1000)]
    seeds = {derived_seed(seed, *purpose) for seed in range(3) for purpose in purposes}
    assert len(seeds) == 3 * len(purposes) and all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, "a", 1) == 4_757_247_737_403_457_943  # in every process, on every machine
    assert derived_seed(0, "a", 1) != derived_seed(0, "a", "1") != derived_seed(0, "a1")


def test_a_run_one_seed_further_draws_nothing_that_this_one_draws(base, monkeypatch):
    """Seeds that are counted up would: batch 256 of seed 0 would be batch 0 of seed 256."""
    policy, tokenizer, _ = load_policy(base)
    seen = []
    original = rollouts_module.uniform
    monkeypatch.setattr(rollouts_module, "uniform", lambda *given: seen.append(given[2]) or original(*given))
    for seed in (0, 1, 2):
        list(rollouts(policy, tokenizer, [np.array([1])] * 4, 1, seed, batch_size=1))
    assert len(set(seen)) == 12


def test_data_order_and_minibatches_of_one_seed_are_shuffled_independently():
    """numpy reads (seed, epoch) and (seed, epoch, 0) as the same entropy."""
    order = BatchOrder(np.ones(64), 64, seed=0)[0]

    class Config:
        seed, epochs, minibatch, micro_batch, micro_tokens = 0, 1, 64, 0, 0

    loop = object.__new__(run.Run)
    loop.config, loop.step = Config, 0
    [[piece, _]] = loop.minibatches(np.arange(64))
    assert sorted(piece) == list(range(64)) and list(piece) != list(order)


def test_an_online_label_is_no_token_s_random_number(monkeypatch):
    """The coin of prompt i was the number that drew a token of sample i: the label knew the text."""
    N, seed = 256, 5
    ids = torch.arange(2 * N)[:, None] % 7 + torch.arange(2)  # what is sampled does not matter here
    mask, logp = torch.ones(2 * N, 2, dtype=torch.bool), torch.zeros(2 * N, 2)
    drawn = Rollout(ids, mask, logp, torch.ones(2 * N, dtype=torch.bool))
    monkeypatch.setattr(train_online_dpo, "rollouts", lambda *_, **__: [(list(range(2 * N)), drawn)])
    no_reward = lambda rows, rollout: torch.zeros(len(rows))  # noqa: E731
    prompts, config = [np.array([1])] * N, train_online_dpo.Config(max_new_tokens=1)
    pairs = train_online_dpo.online_pairs(None, prompts, prompts, no_reward, None, config, seed)
    assert len(pairs) == N
    heads = torch.tensor([bool((pair[0][0] == ids[2 * i].numpy()).all()) for i, pair in enumerate(pairs)])
    for tokens in (seed, derived_seed(seed, "batch", 0)):  # the sampler's seed, then and now
        u = torch.rand(2 * N, generator=torch.Generator().manual_seed(tokens))
        for own in (u[:N], u[::2], u[1::2]):
            assert 0.35 < ((own < 0.5) == heads).double().mean() < 0.65
