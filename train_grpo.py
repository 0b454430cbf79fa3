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

KL(π ‖ π_ref) comes off the reward, r − β log π(y)/π_ref(y), which leads to π* ∝ π_ref exp(r/β) exactly; std
stays that of r, so that a group of equal rewards is pulled to the reference in proportion to β. Or, with
`--kl k3`, it is a term of the loss, β Σ w k_t, as in GRPO's paper, and leads elsewhere (docs/oracle.md).
Two models, policy and reference, besides the reward.

    python train_grpo.py                                         # the built-in world, its reward model
    python train_grpo.py --kind rloo --group-size 4 --out out/demo/rloo.pt
    python train_grpo.py --init out/demo/solver.pt --reward answer --max-new-tokens 64 --beta 0.01 \\
        --prompts out/demo/world/problems.jsonl --out out/demo/sums.pt             # a verifiable reward

Deviations: KL is in the reward by default, and β the same for all kinds (the papers have 0 or 0.04), so that
they can be compared. DAPO's dynamic sampling is left out: groups without spread are counted (equal_groups),
not redrawn.

A healthy run: ratio 1 and approxkl 0 at the first minibatch (checked), a rising score (what is trained on:
--missing-eos-score is in it, and not in the held-out `reward`), an end-token rate near 1, equal_groups well
below 1. In the demo the held-out reward rises by a quarter of a standard deviation at a KL of 0.3.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, read_prompts
from nanoalign.logprobs import masked_sum, token_logprobs, within
from nanoalign.packing import packed_hidden
from nanoalign.rewards import make_reward, unless_unfinished
from nanoalign.rollouts import rollout
from nanoalign.run import Run, already_finished
from nanoalign.training import load_reference, make_optimizer, prepare, setup
from nanoalign.watch import OnPolicy, Watch

KINDS = ("grpo", "dr_grpo", "dapo", "rloo")
SHOWN = ("score", "kl", "ended", "length", "equal_groups", "generation_s", "scoring_s", "update_s")


@dataclass(kw_only=True)
class Config(OnPolicy):
    init: str = "out/demo/sft.pt"  # the checkpoint to start from
    reference: str = ""  # the checkpoint that KL is measured to; empty: --init
    reward: str = "out/demo/rm.pt"  # what to maximise (nanoalign/rewards.py)
    prompts: str = "out/demo/world/prompts.jsonl"  # prompt rows
    out: str = "out/demo/grpo.pt"  # the checkpoint to write; metrics go beside it
    kind: str = "grpo"  # grpo, dr_grpo, dapo or rloo
    group_size: int = 8  # G: responses per prompt
    beta: float = 0.2  # β: the price of a nat of KL
    kl: str = "reward"  # what β multiplies: log π/π_ref off the reward, or k1, k2 or k3 in the loss
    clip_low: float = 0.2  # ε_low: how far a ratio may fall
    clip_high: float = 0.0  # ε_high: how far it may rise; 0: 0.28 for dapo, else 0.2
    lr: float = 1e-4


# ------------------------------------------------------------------------------------------ the method


def group_scale(spread: Tensor) -> Tensor:
    """The spreads of the groups' rewards (N,) → what their advantages, a price of KL among them, are divided
    by: its own spread; where that is less than a tenth of the others' mean, as of equal rewards, this mean;
    1 if no group has a spread."""
    some = spread > 1e-4  # less is rounding
    mean = spread.masked_fill(~some, 0).sum() / some.sum()  # NaN without any
    some = some & (spread > 0.1 * mean)
    return torch.where(some, spread, torch.where(some.any(), mean, 1.0)) + 1e-4


def group_advantages(
    scores: Tensor, group_size: int, kind: str = "grpo", penalty: Tensor | None = None
) -> Tensor:
    """Scores (B,), a prompt's G responses next to each other → advantages (B,), as defined above.

    penalty (B,): the price of KL in nats, β log π/π_ref, taken off the scores. It is compared within the
    group like them, but the spread stays theirs: divided by its own it would be noise of unit size where all
    scores are equal, whatever β is. Any positive scale leaves the optimum where it is.
    """
    if group_size < 2:
        raise ValueError(f"a group needs at least 2 responses to be its own baseline, not {group_size}.")
    groups = scores.view(-1, group_size)  # (B / G, G)
    groups = groups - groups[:, :1]  # equal scores are exactly 0, rounding or not
    worth = groups if penalty is None else groups - penalty.view_as(groups)
    centred = worth - worth.mean(1, keepdim=True)
    if kind == "rloo":  # r_i − (G mean − r_i) / (G − 1)
        centred = centred * (group_size / (group_size - 1))
    elif kind != "dr_grpo":
        spread = groups.std(1)
        scale = spread + 1e-4 if penalty is None else group_scale(spread)
        centred = centred / scale[:, None]
    return centred.flatten()


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
        whole = log_ratio.sum(-1, keepdim=True)
        log_ratio = whole.expand_as(logp).masked_fill(~mask, 0)
    ratio = log_ratio.exp()
    a = advantages if advantages.dim() == 2 else advantages[:, None]
    return torch.maximum(-a * ratio, -a * within(ratio, 1 - low, 1 + high)), ratio


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Log-probs of samples from the policy → an estimate of KL(policy ‖ reference) per token (Schulman 2020).

    As a loss, k1 has no gradient in expectation, k2 has the true one of each next token, k3 another.
    """
    d = ref_logp - logp
    return {"k1": -d, "k2": d.square() / 2, "k3": d.expm1() - d}[kind]


# -------------------------------------------------------------------------------------------------- a run


def group_logprobs(model, ids, mask, group: np.ndarray, temperature: float) -> Tensor:
    """`token_logprobs` of responses; group (B,), ascending: the number of each one's prompt, read once."""
    _, sizes = np.unique(group, return_counts=True)
    hidden = packed_hidden(model, ids, mask, sizes.tolist())
    return token_logprobs(model, ids, mask, temperature, hidden=hidden)


def losses(logp, old_logp, ref_logp, advantages, weight, share, mask, config) -> dict[str, Tensor]:
    """Responses, (B, T) or (B, 1) each → sums over their tokens: "loss", its KL, and what else is logged.

    weight: what a token weighs in the loss of its optimiser step; share: the same, to add up to 1.
    """
    low, high = config.clip_low, config.clip_high
    surrogate, ratio = policy_loss(logp, old_logp, advantages, mask, config.kind, low, high)
    loss = masked_sum(surrogate * weight, mask).sum()
    kl_loss = torch.zeros_like(loss)
    if config.kl != "reward":
        kl = kl_estimate(logp, ref_logp, config.kl)
        kl_loss = masked_sum(kl * weight, mask).sum()
        loss = loss + config.beta * kl_loss
    ratio, log_ratio = ratio.detach(), (logp - old_logp).detach()
    beyond = (ratio - ratio.clamp(1 - low, 1 + high)) * advantages > 0  # no gradient
    return {
        "loss": loss,
        "kl_loss": kl_loss,
        "ratio": masked_sum(ratio * share, mask).sum(),
        "approxkl": masked_sum(0.5 * log_ratio.square() * share, mask).sum(),
        "clip_fraction": masked_sum(beyond * share, mask).sum(),
    }


def check_flags(config: Config) -> None:
    kind, kl, G = config.kind, config.kl, config.group_size
    if kind not in KINDS:
        raise UserError(f"--kind {kind} is unknown; choose from {', '.join(KINDS)}.")
    if kl not in ("reward", "k1", "k2", "k3") or (kind == "rloo" and kl != "reward"):
        raise UserError(f"--kl {kl} is not for --kind {kind}; choose reward, or (not rloo) k1, k2 or k3.")
    if G < 2:
        raise UserError("--group-size must be at least 2: a response is compared with its group's others.")
    if config.batch_size % G or config.minibatch % G:
        sizes = f"--batch-size {config.batch_size} and --minibatch {config.minibatch}"
        raise UserError(f"{sizes} must be multiples of --group-size {G}.")
    config.clip_high = config.clip_high or (0.28 if kind == "dapo" else 0.2)


def main(config: Config) -> None:
    check_flags(config)
    if "prm-steps:" in config.reward:
        raise UserError("prm-steps: scores each step; take python -m lab.train_grpo_steps, or prm-min: here.")
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, chat=True)
    ref = load_reference(config, policy, tokenizer, device)
    reward = make_reward(config.reward, tokenizer, device, ref)
    (rows, prompts), held_out = read_prompts(config, tokenizer, policy.config.context)
    watch = Watch(config, (policy, ref, tokenizer), held_out, reward, autocast)

    prepare(config, policy, *watch.held)
    optimizer = make_optimizer(policy, config.lr, config.weight_decay, eps=1e-5)
    G = config.group_size
    order = BatchOrder([*map(len, prompts)], config.batch_size // G, config.seed, pool=1)
    made_from = policy, ref, prompts, reward.files
    models = "policy", "reference", *reward.models
    options = {"held": watch.held, "shown": SHOWN}
    run = Run(config, "grpo", policy, tokenizer, optimizer, order, made_from, models, **options)
    watch.begin(run)

    for step in run:
        # 1. Rollout: the policy answers each prompt of a batch G times.
        indices = order[step].repeat(G)  # (B,) a prompt's answers together
        asked = [prompts[i] for i in indices]
        with autocast:
            drawn = rollout(policy, tokenizer, asked, seed=run.seed, group=G, **config.sampling)
        ids, scored = drawn.ids, drawn.scored
        run.lap("generation_s")

        # 2. Score: the reward of each response, its tokens' log-probs.
        with torch.no_grad(), autocast:
            score = reward([rows[i] for i in indices[drawn.rows]], drawn)
            score = unless_unfinished(score, drawn, config.missing_eos_score)
            found = token_logprobs(policy, ids, scored, config.temperature, True, drawn.hidden(policy))
            ref_logp = drawn.logprobs(ref, config.temperature)
        drawn, scored, score, old_logp, entropy, ref_logp = drawn.together(scored, score, *found, ref_logp)
        ids, mask = drawn.ids, drawn.mask  # (B, T)
        kl = masked_sum(old_logp - ref_logp, mask)  # (B,) nats per response

        # 3. Compare: what the responses of a group are worth, and the price of KL.
        groups = score.view(-1, G)
        equal = groups.amax(1) == groups.amin(1)  # nothing is learnt of them but to stay near
        price = config.beta * kl if config.kl == "reward" else None

        # 4. Advantages: a response's is that of all its tokens.
        advantages = group_advantages(score, G, config.kind, price)[:, None]  # (B, 1)
        run.lap("scoring_s")

        # 5. Update: epochs over minibatches of whole groups.
        ends = order.lengths[indices] + scored.sum(-1).numpy()  # (B,) tokens
        first, weights = [], torch.zeros(scored.shape)
        for minibatch, pieces in run.minibatches(ends, G):
            weights[minibatch] = token_weights(scored[minibatch], config.kind, config.max_new_tokens)
            for piece in pieces:
                T = ends[piece].max()
                at = torch.from_numpy(piece).to(device, non_blocking=True)
                x, m, old, reference = (t[at, :T] for t in (ids, mask, old_logp, ref_logp))
                weight = weights[piece, :T].to(device, non_blocking=True)
                share = weight / weights[minibatch].sum()
                with autocast:
                    logp = group_logprobs(policy, x, scored[piece, :T], piece // G, config.temperature)
                found = losses(logp, old, reference, advantages[at], weight, share, m, config)
                run.backward(found["loss"], 1)
                run.add(**found)
                run.metrics.tokens += int(ends[piece].sum())
                if not run.count:
                    first.append((logp - old).detach()[m])
            if not run.count and step == run.first:
                run.must_be_on_policy(torch.cat(first), kl, mask)
            run.update()
            run.count += 1
        run.lap("update_s")

        row = run.log(
            **watch.describe(drawn, asked, score, kl, entropy),
            equal_groups=equal.float().mean(),
            ratio_error=run.largest(torch.cat(first).exp().sub(1).abs()),
        )
        watch.warn(row)
        if run.looks:
            watch.look()
    watch.table()
    run.finish(history=watch.history)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
