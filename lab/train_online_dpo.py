"""Online DPO: the policy's own samples, paired and labelled by a reward, instead of a file of pairs.

Every --online-every steps the policy answers a batch of prompts twice. Of a prompt's answers a and b, a is
called the chosen one with probability σ(r_a − r_b), as Bradley and Terry's people would, so that DPO's
optimum π ∝ π_ref exp(r/β) is that of the reward r. Then the loss of train_dpo.py, on these pairs, each once.
(Guo et al. 2024, "Direct language model alignment from online AI feedback"; they resample at every step.)

    python -m lab.train_online_dpo                                  # the built-in world's reward model
    python -m lab.train_online_dpo --reward judge --beta 0.2 --out out/demo/online.pt

An answer that does not end loses to one that does; two alike, or two without an end, make no pair. Prompts
are those of --data's pairs, whose held-out rows it is evaluated on, as train_dpo.py is.

A healthy run: starts where train_dpo.py does (checked). Sampling two whole responses for a pair that is
learnt from once makes it the slowest of the preference methods (docs/methods.md).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanoalign import UserError, cli
from nanoalign.answers import check_answers
from nanoalign.checkpoint import load_policy
from nanoalign.data import (
    BatchOrder,
    Example,
    one_per_prompt,
    pair_examples,
    prompt_examples,
    questions,
    read_split,
    without_ties,
)
from nanoalign.logprobs import last_scored
from nanoalign.rewards import Reward, make_reward, total
from nanoalign.rollouts import respond, rollouts
from nanoalign.run import Flags, Run, already_finished
from nanoalign.seeds import derived_seed
from nanoalign.training import load_reference, make_optimizer, prepare, setup
from train_dpo import LOSSES, evaluate, measure, soft_labels

Pair = tuple[Example, Example]  # chosen, rejected


@dataclass(kw_only=True)
class Config(Flags):
    init: str = "out/demo/sft.pt"  # the checkpoint to start from, and the reference
    data: str = "out/demo/pairs.jsonl"  # pair rows: their prompts are answered
    reward: str = "out/demo/rm.pt"  # what labels the pairs: an expression (nanoalign/rewards.py)
    out: str = "out/demo/online.pt"  # the checkpoint to write; metrics go beside it
    online_every: int = 8  # steps between collections of fresh pairs
    loss: str = "dpo"  # dpo; cdpo or robust for labels that may be wrong; ipo; simpo
    beta: float = 0.0  # β: how strongly the policy is held to the reference; 0: the papers' 0.1, for simpo 2
    gamma: float = 1.0  # γ of simpo: the margin that is asked for
    label_smoothing: float = 0.1  # ε of cdpo and robust: the share of labels thought to be flipped
    sft_weight: float = 0.0  # α: weight of the chosen response's mean negative log-prob
    max_length: int = 128  # tokens of a held-out pair; longer ones are truncated, and counted
    max_new_tokens: int = 96  # length limit of a sampled response


# ---------------------------------------------------------------------------------------------- fresh pairs


@torch.no_grad()
def online_pairs(
    policy, rows: list[dict], prompts: list, reward: Reward, tokenizer, config: Config, seed: int
) -> list[Pair]:
    """Prompt rows and their ids → pairs of the policy's own samples, two to each, where they can be told
    apart."""
    examples, scores = [None] * (2 * len(prompts)), torch.zeros(2 * len(prompts))
    asked = [prompt for prompt in prompts for _ in range(2)]
    limit, into = config.max_new_tokens, lambda: (examples, scores)
    for indices, rollout in rollouts(policy, tokenizer, asked, limit, seed, into=into):
        score = total(reward([rows[i // 2] for i in indices], rollout))
        scores[indices] = torch.where(rollout.ended, score, -torch.inf).to(scores)
        ids, masks = rollout.ids.cpu().numpy(), rollout.mask.cpu().numpy()
        ends = (last_scored(rollout.mask) + 1).tolist()
        for i, row, mask, end in zip(indices, ids, masks, ends):
            examples[i] = row[:end], mask[:end]
    pairs = list(zip(examples[::2], examples[1::2]))
    first, second = scores.view(-1, 2).T
    differ = [a.shape != b.shape or (a != b).any() for (a, _), (b, _) in pairs]
    usable = torch.tensor(differ) & torch.maximum(first, second).isfinite()
    coin = torch.Generator().manual_seed(derived_seed(seed, "labels"))
    u = torch.rand(len(prompts), generator=coin)
    first_wins = (u < (first - second).sigmoid()).tolist()
    chosen_first = [(a, b) if wins else (b, a) for (a, b), wins in zip(pairs, first_wins)]
    return [pair for pair, good in zip(chosen_first, usable.tolist()) if good]


def longest(prompt: np.ndarray, config: Config) -> Example:
    """The longest example that can be collected for a prompt (ids)."""
    ids = np.pad(prompt, (0, config.max_new_tokens))
    return ids, np.arange(len(ids)) >= len(prompt)


class Collections:
    """The order of a run that makes its own pairs: `order[step]` are the step's of those collected last.

    prompts: their ids; `asked[n]` are those that collection n answers. A collection's pairs are dealt to
    --online-every steps. A rest of prompts too small for that joins the collection before it. Until the
    first there are pairs as long as any can be, for `memory.plan`.
    """

    def __init__(self, prompts: list, config: Config):
        size, self.every = config.batch_size * config.online_every, config.online_every
        lengths, least = [len(prompt) for prompt in prompts], min(size // 2, len(prompts))
        self.asked = BatchOrder(lengths, size, config.seed, pool=1, least=least)
        self.steps_per_epoch = self.asked.steps_per_epoch * self.every
        self.take([(longest(max(prompts, key=len), config),) * 2] * size)

    def take(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self.lengths = np.array([2 * max(len(ids) for ids, _ in pair) for pair in pairs])

    def __getitem__(self, step: int) -> np.ndarray:
        return np.arange(len(self.pairs))[step % self.every :: self.every]


def kept(pairs: list[Pair]) -> list:
    """Pairs as tensors, which a checkpoint can hold."""
    return [[tuple(map(torch.tensor, side)) for side in pair] for pair in pairs]


# ------------------------------------------------------------------------------------------------- a run


def check_flags(config: Config) -> None:
    if config.loss not in LOSSES:
        raise UserError(f"--loss {config.loss} is unknown; choose from {', '.join(LOSSES)}.")
    if config.online_every < 1 or config.max_new_tokens < 1:
        raise UserError("--online-every and --max-new-tokens must be at least 1.")


def main(config: Config) -> None:
    check_flags(config)
    loss = LOSSES[config.loss]
    config.beta = config.beta or loss.beta
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, chat=True)
    ref = load_reference(config, policy, tokenizer, device) if loss.reference else None
    reward = make_reward(config.reward, tokenizer, device, ref)

    rows, eval_rows = read_split(config, config.data, "pairs", 500)
    eval_rows = without_ties(eval_rows, "held-out")
    max_length = min(config.max_length, policy.config.context)
    eval_pairs, labelled = pair_examples(eval_rows, tokenizer, max_length, "held-out")
    eval_soft = soft_labels(labelled, device)
    shown, eval_prompts = questions(eval_rows, tokenizer, max_length)
    room = policy.config.context - config.max_new_tokens
    rows, prompts = prompt_examples(one_per_prompt(rows), tokenizer, room)
    check_answers(config.reward, rows)

    prepare(config, policy, ref, *reward.held)
    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    order = Collections(prompts, config)
    files = [Path(path).read_bytes() for path in reward.files]
    made_from = policy, order.pairs, prompts, files
    models, held = ("policy", *(["reference"] if ref else []), *reward.models), (ref, *reward.held)
    run = Run(config, "dpo", policy, tokenizer, optimizer, order, made_from, models, held=held)
    if "fresh" in run.state:  # the pairs collected last, of which some steps are still to come
        run.keep["fresh"] = run.state["fresh"]
        fresh = [[(ids.numpy(), mask.numpy()) for ids, mask in pair] for pair in run.state["fresh"]]
        order.take(fresh)

    for step in run:
        if step % config.online_every == 0:
            picked = order.asked[step // config.online_every]
            asked = [rows[i] for i in picked], [prompts[i] for i in picked]
            seed = derived_seed(config.seed, "collection", step // config.online_every)
            with autocast:
                order.take(online_pairs(policy, *asked, reward, tokenizer, config, seed))
            run.keep["fresh"] = kept(order.pairs)
        if not len(order[step]):
            count = len(order.asked[step // config.online_every])
            raise UserError(
                f"of {count} prompts only {len(order.pairs)} gave two different finished samples; "
                "raise --batch-size, or use another reward."
            )
        for batch, _ in run.pieces(order.pairs):
            sure = torch.ones(len(batch), device=device)
            with autocast:
                found = measure(policy, ref, batch, sure, tokenizer, config, device)
            run.backward(found["loss"])
            run.add(**found)
            run.metrics.tokens += sum(len(side[0]) for pair in batch for side in pair)
        if step == 0 and ref and not config.sft_weight:  # policy and reference are the same model: h = 0
            run.must_start_at(loss.start(config.beta), "L(0)")
        run.update()
        run.log()
        if run.looks:
            with autocast:
                result = evaluate(policy, ref, eval_pairs, eval_soft, eval_prompts, tokenizer, config, device)
                texts, _ = respond(policy, tokenizer, eval_prompts[:4], config.max_new_tokens, config.seed)
            run.show(result, shown[:4], texts)
    run.finish()


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
