"""GRPO with a reward of steps: what a token is worth is what the steps that end there or later are worth.

    r_i,k   the reward of step k of response i; all steps of a prompt's G responses are one group
    A_i,t = Σ_{k: step k ends at t or later} (r_i,k − mean r) / (std r + 1e-4)     (Shao et al. 2024, §4.1.3)

A process reward model scores each step at the token that ends it (prm-steps:), so a right beginning is
paid although the answer is wrong. With --kind dr_grpo there is no division. The price of KL and all other
terms stand on the last token. The rest is train_grpo.py's: surrogate, weights of tokens, KL.

    python -m lab.train_grpo_steps                            # the sums of the built-in world
    python -m lab.train_grpo_steps --reward "prm-steps:out/demo/prm.pt + answer" --kind dr_grpo
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import train_grpo
from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, read_prompts
from nanoalign.logprobs import masked_sum, token_logprobs
from nanoalign.rewards import make_reward, on_last_token, total, unless_unfinished
from nanoalign.rollouts import rollout
from nanoalign.run import Run, already_finished
from nanoalign.steps import step_ends
from nanoalign.training import load_reference, make_optimizer, prepare, setup
from nanoalign.watch import Watch
from train_grpo import group_logprobs, group_scale, losses, token_weights


@dataclass(kw_only=True)
class Config(train_grpo.Config):
    init: str = "out/demo/solver.pt"
    reward: str = "prm-steps:out/demo/prm.pt"  # what to maximise, step by step (nanoalign/rewards.py)
    prompts: str = "out/demo/world/problems.jsonl"
    out: str = "out/demo/grpo-steps.pt"
    kind: str = "grpo"  # grpo, dr_grpo or dapo
    max_new_tokens: int = 64


def step_advantages(
    rewards: Tensor, ends: Tensor, group_size: int, kind: str = "grpo", penalty: Tensor | None = None
) -> Tensor:
    """Rewards (B, T) of the steps that end at ends (B, T) bool → advantages (B, T): a token's is the sum of
    the rewards of the steps that end there or later, less the mean of all steps of the group and, but for
    dr_grpo, over their standard deviation (Shao et al. 2024, §4.1.3).

    penalty (B, T): the price of KL, taken off the rewards, whose spread is the scale as in train_grpo.py.
    """
    B, T = rewards.shape
    counted = ends.reshape(-1, group_size * T)
    count = counted.sum(1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        values = values.reshape(-1, group_size * T)
        mean = masked_sum(values, counted)[:, None] / count
        return (values - mean).masked_fill(~counted, 0)

    advantages = centred(rewards if penalty is None else rewards - penalty)
    if kind != "dr_grpo":
        spread = (centred(rewards).square().sum(1) / (count[:, 0] - 1).clamp(min=1)).sqrt()
        scale = spread + 1e-4 if penalty is None else group_scale(spread)
        advantages = advantages / scale[:, None]
    return advantages.view(B, T).flip(1).cumsum(1).flip(1)


def main(config: Config) -> None:
    train_grpo.check_flags(config)
    if "prm-steps:" not in config.reward:
        raise UserError(f"--reward {config.reward} has no term of steps (prm-steps:…); take train_grpo.py.")
    if config.kind == "rloo":
        raise UserError("--kind rloo compares whole responses; take prm-min: in place of prm-steps:.")
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
    models, shown = ("policy", "reference", *reward.models), train_grpo.SHOWN
    run = Run(
        config, "grpo", policy, tokenizer, optimizer, order, made_from, models, held=watch.held, shown=shown
    )
    watch.begin(run)

    for step in run:
        # 1. Rollout: the policy answers each prompt of a batch G times.
        indices = order[step].repeat(G)  # (B,) a prompt's answers next to each other
        asked = [prompts[i] for i in indices]
        with autocast:
            drawn = rollout(policy, tokenizer, asked, seed=run.seed, group=G, **config.sampling)
        ids, scored = drawn.ids, drawn.scored  # (B, T)
        run.lap("generation_s")

        # 2. Score: the reward of each step, the log-probs of each token.
        with torch.no_grad(), autocast:
            score = reward([rows[i] for i in indices[drawn.rows]], drawn)  # (B, T)
            score = unless_unfinished(score, drawn, config.missing_eos_score)
            found = token_logprobs(policy, ids, scored, config.temperature, True, drawn.hidden(policy))
            ref_logp = drawn.logprobs(ref, config.temperature)
        drawn, scored, score, old_logp, entropy, ref_logp = drawn.together(scored, score, *found, ref_logp)
        ids, mask = drawn.ids, drawn.mask  # (B, T)
        kl = masked_sum(old_logp - ref_logp, mask)  # (B,) nats per response

        # 3. Compare: the steps of a group, and the price of KL, at each response's last.
        price = on_last_token(config.beta * kl, mask) if config.kl == "reward" else None
        last = on_last_token(torch.ones_like(kl), mask) > 0  # of a response that is cut short, too
        groups = total(score).view(-1, G)
        equal = groups.amax(1) == groups.amin(1)

        # 4. Advantages: a token's is that of the steps that it leads to.
        ends = step_ends(ids, mask, tokenizer) | last
        advantages = step_advantages(score, ends, G, config.kind, price)  # (B, T)
        run.lap("scoring_s")

        # 5. Update: epochs over minibatches of whole groups.
        lengths = order.lengths[indices] + scored.sum(-1).numpy()  # (B,) tokens
        first, weights = [], torch.zeros(scored.shape)
        for minibatch, pieces in run.minibatches(lengths, G):
            weights[minibatch] = token_weights(scored[minibatch], config.kind, config.max_new_tokens)
            for piece in pieces:
                T = lengths[piece].max()
                at = torch.from_numpy(piece).to(device, non_blocking=True)
                tensors = ids, mask, old_logp, ref_logp, advantages
                x, m, old, reference, a = (t[at, :T] for t in tensors)
                weight = weights[piece, :T].to(device, non_blocking=True)
                share = weight / weights[minibatch].sum()
                with autocast:
                    logp = group_logprobs(policy, x, scored[piece, :T], piece // G, config.temperature)
                found = losses(logp, old, reference, a, weight, share, m, config)
                run.backward(found["loss"], 1)
                run.add(**found)
                run.metrics.tokens += int(lengths[piece].sum())
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
