"""Policy gradients without a critic: what a response is worth is judged by the other answers to its prompt.

G responses y_1 … y_G are drawn to each prompt and scored; the group is the baseline.

    A_i = (r_i − mean r) / (std r + 1e-4)    grpo, dapo   (DeepSeekMath: Shao et al. 2024, §4.1; DAPO)
    A_i = r_i − mean r                       dr_grpo      (Liu et al. 2025)
    A_i = r_i − mean_{j≠i} r_j               rloo         (Ahmadian et al. 2024, eq. 8)
    L = Σ w max(−A ρ, −A clip(ρ, 1−ε_low, 1+ε_high)),   ρ = π(y_t|…)/π_old(y_t|…)

What a token weighs, of B responses in the optimiser step: grpo 1/(B |y|), a mean over each response, then
over responses; dr_grpo 1/(B L_max), which does not favour short right and long wrong answers; dapo 1/Σ|y|, a
mean over all tokens, with ε_high 0.28 so that unlikely tokens can rise; rloo takes a whole response as one
action: one ratio per response, 1/B.

KL(π ‖ π_ref) comes off the reward, r − β log π(y)/π_ref(y), which leads to π* ∝ π_ref exp(r/β) exactly; or,
with `--kl k3`, it is a term of the loss, β Σ w k_t, as in GRPO's paper, and leads elsewhere (docs/oracle.md).
Two models, policy and reference, besides the reward.

    python train_grpo.py                                         # the built-in world, its reward model
    python train_grpo.py --kind rloo --group-size 4 --out out/demo/rloo.pt
    python train_grpo.py --init out/demo/solver.pt --reward answer --watch "" --max-new-tokens 64 --beta 0.01
        \\ --prompts out/demo/world/problems.jsonl --out out/demo/sums.pt            # a verifiable reward

A reward of steps (prm-steps:out/demo/prm.pt) makes A_i,t: the sum of the normalised rewards of the steps that
end at t or later (DeepSeekMath, §4.1.3).

Deviations: KL is in the reward by default, and β the same for all kinds (the papers have 0 or 0.04), so that
they can be compared. DAPO's dynamic sampling is left out: groups without spread are counted (equal_groups),
not redrawn.

A healthy run: ratio 1 and approxkl 0 at the first minibatch (checked), a rising score, an end-token rate near
1, equal_groups well below 1. In the demo the score goes from 0 to 0.8 of the reward model's standard
deviations at a KL of 1.5, and responses grow from 14 to 17 tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import CHAT, finish, load_policy, resume, save_partial
from nanoalign.data import BatchOrder, micro_batches, prompt_examples, split_rows, thin
from nanoalign.generate import rollouts
from nanoalign.logprobs import last_scored, masked_sum, token_logprobs
from nanoalign.rewards import on_last_token, reward_files, total, unless_unfinished
from nanoalign.rows import read_rows
from nanoalign.steps import step_ends
from nanoalign.training import (
    CleanStop,
    Stopwatch,
    already_finished,
    fingerprint,
    learning_rate,
    load_reference,
    make_optimizer,
    optimizer_step,
    prepare,
    setup,
)  # fmt: skip
from nanoalign.watch import Watch, watched_rewards

KINDS = ("grpo", "dr_grpo", "dapo", "rloo")
SHOWN = ("score", "kl", "ended", "length", "equal_groups", "generation_s", "scoring_s", "update_s")
UPDATE = ("approxkl", "clip_fraction", "ratio", "kl_loss", "loss")


@dataclass
class Config:
    init: str = "out/demo/sft.pt"  # the checkpoint to start from
    reference: str = ""  # the checkpoint that KL is measured to; empty: --init
    reward: str = "out/demo/rm.pt"  # what to maximise: an expression of nanoalign/rewards.py
    watch: str = "judge"  # other rewards to report on held-out samples: "judge, out/demo/rm.pt"; "" for none
    prompts: str = "out/demo/world/prompts.jsonl"  # prompt rows
    eval_data: str = ""  # held-out prompts; empty: every twentieth
    out: str = "out/demo/grpo.pt"  # the checkpoint to write; metrics go beside it
    kind: str = "grpo"  # grpo, dr_grpo, dapo or rloo
    group_size: int = 8  # G: responses per prompt
    steps: int = 25  # iterations: rollout, then epochs over it
    batch_size: int = 128  # responses per iteration
    epochs: int = 2  # passes over each iteration's responses
    minibatch: int = 64  # responses per optimiser step
    micro_batch: int = 0  # responses per forward and backward pass; 0: the whole minibatch at once
    beta: float = 0.2  # β: the price of a nat of KL
    kl: str = "reward"  # what β multiplies: log π/π_ref off the reward, or k1, k2 or k3 as a term of the loss
    clip_low: float = 0.2  # ε_low: how far a ratio may fall
    clip_high: float = 0.0  # ε_high: how far it may rise; 0: the paper's (dapo 0.28, others 0.2)
    missing_eos_score: float = -1.0  # the score of a response without an end token
    max_new_tokens: int = 48  # length limit of a response; L_max of dr_grpo
    temperature: float = 1.0  # of sampling, and of every log-prob
    top_k: int = 0  # sample from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    lr: float = 1e-4  # peak learning rate
    warmup: int = 5  # iterations of linear warmup, then a cosine to a tenth
    clip: float = 1.0  # gradient norm
    eval_every: int = 5  # iterations between held-out evaluations with samples
    eval_prompts: int = 128  # how many held-out prompts to answer then
    save_every: int = 10  # iterations between saves of X.partial.pt, from which --resume continues
    seed: int = 0  # of prompts, samples and minibatches
    device: str = "auto"  # auto, cpu, cuda, …
    compile: bool = False  # torch.compile the forward pass
    share_prompts: bool = True  # read a group's prompt once; no gain where responses are much longer
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    resume: bool = False  # continue X.partial.pt where it stopped, bit for bit
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


# ------------------------------------------------------------------------------------------ the method


def group_advantages(scores: Tensor, group_size: int, kind: str = "grpo") -> Tensor:
    """Scores (B,), a prompt's G responses next to each other → advantages (B,), as defined above."""
    if group_size < 2:
        raise ValueError(f"a group needs at least 2 responses to be its own baseline, not {group_size}.")
    groups = scores.view(-1, group_size)  # (B / G, G)
    groups = groups - groups[:, :1]  # so that equal scores are exactly 0, rounding or not
    centred = groups - groups.mean(1, keepdim=True)
    if kind == "rloo":  # r_i − (G mean − r_i) / (G − 1)
        centred = centred * (group_size / (group_size - 1))
    elif kind != "dr_grpo":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    return centred.flatten()


def step_advantages(rewards: Tensor, ends: Tensor, group_size: int, kind: str = "grpo") -> Tensor:
    """Rewards (B, T) of the steps that end at ends (B, T) bool → advantages (B, T): a token's is the sum of
    the rewards of the steps that end there or later, less the mean of all steps of the group and, but for
    dr_grpo, over their standard deviation (Shao et al. 2024, §4.1.3)."""
    B, T = rewards.shape
    values, counted = rewards.view(-1, group_size * T), ends.reshape(-1, group_size * T)
    count = counted.sum(1, keepdim=True)
    centred = (values - masked_sum(values, counted)[:, None] / count).masked_fill(~counted, 0)
    if kind != "dr_grpo":
        centred = centred / ((centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    return centred.view(B, T).flip(1).cumsum(1).flip(1)


def token_weights(mask: Tensor, kind: str, max_new_tokens: int) -> Tensor:
    """mask (B, T) of a whole optimiser step → what each token's loss weighs in it (B, T), 0 outside mask."""
    B, lengths = len(mask), mask.sum(-1, keepdim=True)
    if kind == "dr_grpo":
        return mask / (B * max_new_tokens)
    return mask / lengths.sum() if kind == "dapo" else mask / (B * lengths)


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, kind: str, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Log-probs (B, T), advantages (B,) or (B, T) → the clipped surrogate and the ratio of each token (B, T).

    Outside mask the ratio is 1. With kind "rloo" all tokens of a response have its ratio, and so its loss.
    """
    log_ratio = (logp - old_logp).masked_fill(~mask, 0)
    if kind == "rloo":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(logp).masked_fill(~mask, 0)
    ratio, a = log_ratio.exp(), advantages if advantages.dim() == 2 else advantages[:, None]
    return torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high)), ratio


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Log-probs of samples from the policy → an estimate of KL(policy ‖ reference) per token (Schulman 2020).

    As a loss, k1 has no gradient in expectation, k2 has the true one of each next token, k3 another.
    """
    d = ref_logp - logp
    return {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - 1 - d}[kind]


# -------------------------------------------------------------------------------------------------- a run


def group_logprobs(model, ids: Tensor, mask: Tensor, group: np.ndarray, config, entropy: bool = False):
    """`token_logprobs` of responses; group (B,), ascending: the number of each one's prompt."""
    _, sizes = np.unique(group, return_counts=True)
    hidden = model.packed_hidden(ids, mask, sizes.tolist()) if config.share_prompts else None
    return token_logprobs(model, ids, mask, config.temperature, entropy, hidden)


def update_stats(logp, old_logp, advantages, mask, ratio, kl_loss, loss, share, config) -> Tensor:
    """What is logged of a minibatch, in the order of UPDATE; sums that add up over micro-batches.

    advantages (B, T) or (B, 1); share (B, T): the tokens' weights, scaled to add up to 1 over the minibatch.
    """
    with torch.no_grad():
        beyond = (ratio - ratio.clamp(1 - config.clip_low, 1 + config.clip_high)) * advantages > 0
        approxkl = 0.5 * (logp - old_logp).masked_fill(~mask, 0).square()
        means = [masked_sum(x * share, mask).sum() for x in (approxkl, beyond.float(), ratio)]
        return torch.stack((*means, kl_loss, loss))


def check_start(log_ratio: Tensor, kl: Tensor, step: int, config: Config, device) -> None:
    """What theory says of the first minibatch: the policy that updates is the policy that sampled."""
    approxkl, off = 0.5 * log_ratio.square().mean().item(), log_ratio.exp().sub(1).abs().max().item()
    same = step == 0 and not config.reference
    distance = kl.abs().max().item() if same else 0.0
    moment = "step-0 check" if step == 0 else "first minibatch"
    print(f"{moment}: ratio 1, off by at most {off:.1e}, approxkl {approxkl:.1e}, KL at most {distance:.1e}")
    # the mean over tokens, because in bf16 a single one may differ by a few per cent between batch shapes
    tolerance = 1e-3 if device.type == "cuda" else 1e-6
    if not (approxkl <= tolerance and distance <= 100 * tolerance):  # NaN fails as well
        raise UserError("the ratio must start at 1 and the KL at 0: log-probs come from two different paths.")


def check_flags(config: Config) -> None:
    if config.kind not in KINDS:
        raise UserError(f"--kind {config.kind} is unknown; choose from {', '.join(KINDS)}.")
    if config.kl not in ("reward", "k1", "k2", "k3") or (config.kind == "rloo" and "k" in config.kl):
        raise UserError(
            f"--kl {config.kl} is not for --kind {config.kind}; choose reward, or (not rloo) k1, k2 or k3."
        )
    if config.group_size < 2:
        raise UserError(
            "--group-size must be at least 2: a response is compared with the others of its group."
        )
    if config.batch_size % config.group_size or config.minibatch % config.group_size:
        raise UserError(
            f"--batch-size {config.batch_size} and --minibatch {config.minibatch} must be multiples of "
            f"--group-size {config.group_size}."
        )
    if config.temperature <= 0:
        raise UserError("--temperature must be positive: a greedy policy has no gradient.")
    if min(config.steps, config.epochs, config.minibatch, config.eval_prompts) < 1:
        raise UserError("--steps, --epochs, --minibatch and --eval-prompts must be at least 1.")
    if config.kind == "rloo" and "prm-steps:" in config.reward:
        raise UserError("--kind rloo compares whole responses; take prm-min: in place of prm-steps:.")
    config.clip_high = config.clip_high or (0.28 if config.kind == "dapo" else 0.2)


def main(config: Config) -> None:
    check_flags(config)
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, CHAT)
    ref = load_reference(config.reference, policy, tokenizer, device)
    rewards = watched_rewards(config.reward, config.watch, tokenizer, device)

    rows = read_rows(config.prompts, "prompts", config.skip_bad_rows)
    rows, eval_rows = split_rows(rows, config.eval_data, "prompts", config.skip_bad_rows)
    room = policy.config.context - config.max_new_tokens
    rows, prompts = prompt_examples(rows, tokenizer, room)
    eval_rows, eval_prompts = prompt_examples(thin(eval_rows, config.eval_prompts), tokenizer, room)
    sampling = {
        "max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size,
        "temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p,
    }  # fmt: skip

    optimizer = make_optimizer(policy, config.lr, eps=1e-5)
    prepare(config, policy, ref)
    G = config.group_size
    order = BatchOrder([len(ids) for ids in prompts], config.batch_size // G, config.seed, pool=1)
    files = [Path(path).read_bytes() for path in reward_files(config.reward)]
    data = fingerprint(policy.embed.weight, ref.embed.weight, *prompts, *files)
    state = resume(config, policy, optimizer, stage="grpo", data=data)
    first_step = state["step"]
    metrics = cli.Metrics(config, config.steps, device, first_step, SHOWN)
    metrics.models("policy", "reference", *reward_files(config.reward))
    watch = Watch(eval_rows, eval_prompts, rewards, state.get("history", []), seed=config.seed, **sampling)
    stop = CleanStop()

    def look(step: int) -> None:
        with autocast:
            watch.look(step, policy, ref, tokenizer, metrics)

    if first_step == 0:
        look(0)
    for step in range(first_step, config.steps):
        clock = Stopwatch(device)
        # Rollout: the policy answers each prompt of a batch G times; a prompt's answers stay together.
        indices = order[step].repeat(G)
        with autocast:
            seed = config.seed + 10_000 * (step + 1)
            asked = [prompts[i] for i in indices]
            [(by_length, rollout)] = rollouts(policy, tokenizer, asked, seed=seed, **sampling)
        batch, ids, mask = [rows[indices[i]] for i in by_length], rollout.ids, rollout.mask
        scored = mask.cpu()  # for counting without waiting for a GPU
        generation_s = clock.lap()

        # Score: the reward of each whole response, the log-probs of policy and reference; compare in groups.
        with torch.no_grad(), autocast:
            score = unless_unfinished(rewards["score"](batch, rollout), rollout, config.missing_eos_score)
            group = np.arange(len(ids)) // G
            old_logp, entropy = group_logprobs(policy, ids, scored, group, config, entropy=True)
            ref_logp = group_logprobs(ref, ids, scored, group, config)
        kl = masked_sum(old_logp - ref_logp, mask)  # (B,) nats per response
        penalty = config.beta * kl if config.kl == "reward" else torch.zeros_like(kl)
        if score.dim() == 1:
            advantages = group_advantages(score - penalty, G, config.kind)
        else:
            ends = step_ends(ids, mask, tokenizer) | (on_last_token(torch.ones_like(kl), mask) > 0)
            advantages = step_advantages(score - on_last_token(penalty, mask), ends, G, config.kind)
        advantages = advantages if advantages.dim() == 2 else advantages[:, None].expand_as(mask)
        scoring_s = clock.lap()

        # Update: epochs over shuffled minibatches.
        lr = learning_rate(step, config.steps, config.lr, config.warmup)
        ends = (last_scored(scored) + 1).numpy()  # (B,) tokens of prompt and response
        update, updates = torch.zeros(len(UPDATE), device=device), 0
        for epoch in range(config.epochs):
            groups = np.arange(len(indices)).reshape(-1, G)
            shuffle = np.random.default_rng((config.seed, step, epoch)).permutation(groups)
            for minibatch in micro_batches(shuffle.flatten(), config.minibatch):
                # micro-batches of whole groups, or of rows alike in length
                minibatch = minibatch[np.argsort(minibatch if config.share_prompts else ends[minibatch])]
                weights = token_weights(scored[minibatch], config.kind, config.max_new_tokens)
                weights, at, first = weights.to(device, non_blocking=True), 0, []
                for micro in micro_batches(minibatch, config.micro_batch):
                    T, picked = int(ends[micro].max()), torch.from_numpy(micro).to(device, non_blocking=True)
                    x, m, old, reference = (t[picked, :T] for t in (ids, mask, old_logp, ref_logp))
                    a, weight = advantages[picked, :T], weights[at : at + len(micro), :T]
                    with autocast:
                        logp = group_logprobs(policy, x, scored[micro, :T], group[micro], config)
                    loss, ratio = policy_loss(logp, old, a, m, config.kind, config.clip_low, config.clip_high)
                    loss, kl_loss = masked_sum(loss * weight, m).sum(), torch.zeros((), device=device)
                    if config.kl != "reward":
                        kl_loss = masked_sum(kl_estimate(logp, reference, config.kl) * weight, m).sum()
                        loss = loss + config.beta * kl_loss
                    loss.backward()
                    at += len(micro)
                    metrics.tokens += int(ends[micro].sum())
                    share = weight / weights.sum()
                    update += update_stats(
                        logp, old, a, m, ratio, kl_loss.detach(), loss.detach(), share, config
                    )
                    if updates == 0:
                        first.append((logp - old).detach()[m])
                if updates == 0:
                    log_ratio = torch.cat(first)
                    if step == first_step:
                        check_start(log_ratio, kl, step, config, device)
                grad_norm = optimizer_step(policy, optimizer, lr, config.clip)
                updates += 1
        update_s = clock.lap()

        lengths, groups = mask.sum(-1).float(), total(score).view(-1, G)
        done, stopping = step + 1, bool(stop)
        row = metrics.log(
            done,
            score=total(score).mean(), kl=kl.mean(), kl_error=kl.std(correction=0) / len(kl) ** 0.5,
            entropy=masked_sum(entropy, mask).sum() / mask.sum(), ended=rollout.ended.float().mean(),
            length=lengths.mean(), at_limit=(lengths >= config.max_new_tokens).float().mean(),
            equal_groups=(groups.amax(1) == groups.amin(1)).float().mean(),
            **dict(zip(UPDATE, update / updates)), ratio_error=log_ratio.exp().sub(1).abs().max(),
            grad_norm=grad_norm, lr=lr,
            generation_s=generation_s, scoring_s=scoring_s, update_s=update_s,
        )  # fmt: skip
        watch.warn(row)
        if done % config.eval_every == 0 or done == config.steps:
            look(done)
        if done % config.save_every == 0 or stopping:
            save_partial(
                config, policy, optimizer, stage="grpo", tokenizer=tokenizer, step=done, data=data,
                history=watch.history,
            )  # fmt: skip
        if stopping:
            stop.leave(config, done)
    watch.table()
    finish(config, policy, stage="grpo", tokenizer=tokenizer, step=config.steps, history=watch.history)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
