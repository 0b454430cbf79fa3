"""Proximal policy optimisation against a reward, held to a reference by a KL penalty.

    R_t = −β (log π(y_t|…) − log π_ref(y_t|…)) + [t is last] r(x, y)       (Ziegler et al. 2019, eq. 2)
    A_t = Σ_l (γλ)^l δ_{t+l},   δ_t = R_t + γ V_{t+1} − V_t                (Schulman et al. 2016, eq. 16)
    L_π = mean max(−A ρ, −A clip(ρ, 1−ε, 1+ε)),   ρ_t = π(y_t|…)/π_old(y_t|…)     (… 2017, eq. 7)
    L_V = ½ mean max((V−G)², (clip(V, V_old−ε, V_old+ε)−G)²)

A is whitened over the batch in L_π; the returns G = A + V_old use it as it was.

Four models: the policy, the reference (a frozen copy), the reward, and the critic V, which starts from the
reward model with its head set to zero. V_t is what the critic expects before token t: read at position t − 1.

    python train_ppo.py                                                    # the built-in world
    python train_ppo.py --reward judge --out out/demo/ppo-judge.pt         # without a proxy in between
    python train_ppo.py --reward "out/demo/rm.pt - 0.02*length" --kl-target 2 --kl-horizon 500
    python train_ppo.py --init out/sft.pt --reward out/rm.pt --prompts hh.jsonl --lr 1e-6

A healthy run: ratio 1 and approxkl 0 at the first minibatch (checked), KL rising from 0 to where β holds it
(0.7 nats in the demo), explained variance above 0, the end-token rate near 1. `score` is what is trained
on, --missing-eos-score in it; the held-out `reward` has none. A reward that rises while a second opinion
(`--watch`) falls is reward hacking: docs/reward-hacking.md.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, read_prompts
from nanoalign.logprobs import token_logprobs, within
from nanoalign.rewards import make_reward, on_last_token, unless_unfinished
from nanoalign.rollouts import rollout
from nanoalign.run import Run, already_finished
from nanoalign.training import load_critic, load_reference, make_optimizer, prepare, setup
from nanoalign.watch import OnPolicy, Watch

SHOWN = ("score", "kl", "beta", "ended", "length", "explained_variance")
SHOWN += ("generation_s", "scoring_s", "update_s")


@dataclass(kw_only=True)
class Config(OnPolicy):
    init: str = "out/demo/sft.pt"  # the checkpoint to start from
    reference: str = ""  # the checkpoint that KL is measured to; empty: --init
    reward: str = "out/demo/rm.pt"  # what to maximise (nanoalign/rewards.py)
    critic: str = ""  # where the critic starts; empty: the reward model, or --init
    shared_critic: bool = False  # a value head on the policy's trunk instead
    prompts: str = "out/demo/world/prompts.jsonl"  # prompt rows
    out: str = "out/demo/ppo.pt"  # the checkpoint to write; metrics go beside it
    beta: float = 0.2  # β: the price of a nat of KL; at first, if adaptive
    kl_target: float = 0.0  # sequence KL that β is steered to; 0: β is fixed
    kl_horizon: float = 10_000.0  # responses over which the adaptive β moves
    gamma: float = 1.0  # γ: discount per token
    lam: float = 0.95  # λ of the advantage estimate
    clip_ratio: float = 0.2  # ε of the policy's ratio
    clip_value: float = 0.2  # ε of the value
    vf_coef: float = 0.1  # weight of the value loss


# ------------------------------------------------------------------------------------------ the method


def shape_rewards(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Score (B,), log-probs (B, T) → reward per token (B, T): the KL penalty everywhere in mask, the score on
    the last response token itself (Ziegler et al. 2019, eq. 2); a dense score (B, T) stays where it is."""
    penalty = (-beta * (logp - ref_logp)).masked_fill(~mask, 0)
    return penalty + (on_last_token(score, mask) if score.dim() == 1 else score)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma=1.0, lam=0.95) -> tuple[Tensor, Tensor]:
    """Rewards and values (B, T) → advantages, returns (B, T), 0 outside mask (Schulman et al. 2016, eq. 16).

    The mask of a row is one run of positions; after its last one the value is 0. The sum over l is a product
    with the matrix W[s, t] = (γλ)^(s−t), s ≥ t, in float64 where the device has it.
    """
    precise = torch.float32 if mask.device.type == "mps" else torch.float64
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    following = F.pad(values[:, 1:], (0, 1))  # V_{t+1}
    delta = (rewards + gamma * following - values).masked_fill(~mask, 0)
    at = torch.arange(mask.shape[1], device=mask.device)
    distance = at[:, None] - at  # s − t
    weight = (gamma * lam) ** distance.clamp(min=0).to(precise)
    weight = torch.where(distance >= 0, weight, 0.0)
    advantages = (delta.to(precise) @ weight).to(values.dtype).masked_fill(~mask, 0)
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, T) → mean 0 and variance 1 over mask; 0 outside it. What lies outside has no influence."""
    count = mask.sum()
    mean = x.masked_fill(~mask, 0).sum() / count
    centred = (x - mean).masked_fill(~mask, 0)
    return centred * torch.rsqrt(centred.square().sum() / count + 1e-8)


def mean_over(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x (B, T) over all of mask, a scalar."""
    return x.masked_fill(~mask, 0).sum(-1).sum() / mask.sum()


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """Log-probs and advantages (B, T) → the clipped surrogate, mean over mask (PPO paper, eq. 7)."""
    ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
    clipped = within(ratio, 1 - clip, 1 + clip)
    return mean_over(torch.maximum(-advantages * ratio, -advantages * clipped), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip=0.2) -> Tensor:
    """Values and returns (B, T) → half the larger squared error of the value and of the value kept within
    `clip` of the old one, mean over mask (lm-human-preferences)."""
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    kept = old_values + within(values - old_values, -clip, clip)
    return 0.5 * mean_over(torch.maximum((values - returns) ** 2, (kept - returns) ** 2), mask)


def adapt_beta(beta: float, kl: float, target: float, responses: int, horizon: float) -> float:
    """The proportional controller of Ziegler et al. 2019, §2.2: β rises while KL is above its target."""
    return beta * (1 + min(0.2, max(-0.2, kl / target - 1)) * responses / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(returns − values) / Var(returns) over mask: 1 for a perfect critic, 0 for a constant."""
    return 1 - (returns - values)[mask].var() / returns[mask].var().clamp(min=1e-8)


# ----------------------------------------------------------------------------------------------- a run


def forward(policy, critic, ids, mask, temperature, entropy=False, seen=None, read=None):
    """ids (B, T), mask (B, T) → log-probs (with `entropy`: and entropies), and values, (B, T) each.

    The critic is a model of its own, whose reader saw (B, T, 3), or a linear head on the policy's trunk.
    read(model): its hidden states (B, T, D), if not all rows go through it at once.
    """
    read = read or (lambda model, **more: model.hidden(ids, **more))
    hidden = read(policy)
    logp = token_logprobs(policy, ids, mask, temperature, entropy, hidden)
    values = critic(hidden) if isinstance(critic, nn.Linear) else critic.score(read(critic, seen=seen))
    return logp, F.pad(values[:, :-1], (1, 0))  # V_t is read at position t − 1


def losses(logp, old_logp, values, old_values, advantages, returns, mask, config) -> dict:
    """Of a minibatch, (B, T) each → means over mask: "loss", its parts, and what else is logged."""
    pg_loss = policy_loss(logp, old_logp, advantages, mask, config.clip_ratio)
    vf_loss = value_loss(values, old_values, returns, mask, config.clip_value)
    log_ratio, clip = (logp - old_logp).detach(), config.clip_ratio
    ratio = log_ratio.masked_fill(~mask, 0).exp()
    beyond = (ratio - ratio.clamp(1 - clip, 1 + clip)) * advantages > 0  # no gradient
    moved = (values - old_values).detach().abs() > config.clip_value
    return {
        "loss": pg_loss + config.vf_coef * vf_loss,
        "policy_loss": pg_loss,
        "value_loss": vf_loss,
        "ratio": mean_over(ratio, mask),
        "approxkl": mean_over(0.5 * log_ratio.square(), mask),
        "clip_fraction": mean_over(beyond.float(), mask),
        "value_clip_fraction": mean_over(moved.float(), mask),
    }


def main(config: Config) -> None:
    if config.kl_target and not (config.beta > 0 and config.kl_horizon >= config.batch_size):
        raise UserError("--kl-target needs --beta above 0 and --kl-horizon of a batch or more.")
    if not (0 < config.gamma <= 1 and 0 <= config.lam <= 1):
        raise UserError("--gamma must be in (0, 1] and --lam in [0, 1].")
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, chat=True)
    ref = load_reference(config, policy, tokenizer, device)
    reward = make_reward(config.reward, tokenizer, device, ref)
    start = config.critic or (reward.models or [config.init])[0]
    frozen = [ref, *(model.gpt for model in reward.held)] if config.lora else []
    critic = load_critic("" if config.shared_critic else start, policy, tokenizer, device, ref, frozen)
    light = config.shared_critic or any(critic.gpt.embed.weight is m.embed.weight for m in frozen)
    (rows, prompts), held_out = read_prompts(config, tokenizer, policy.config.context)
    watch = Watch(config, (policy, ref, tokenizer), held_out, reward, autocast)

    trained = nn.ModuleList((policy, critic))  # one optimiser, one gradient norm
    prepare(config, policy, *watch.held, critic)
    optimizer = make_optimizer(trained, config.lr, config.weight_decay, eps=1e-5)
    order = BatchOrder([*map(len, prompts)], config.batch_size, config.seed, pool=1)
    made_from = policy, ref, critic, prompts, reward.files
    models = "policy", "reference", "critic" + " (a head)" * light, *reward.models
    options = {"trained": trained, "held": watch.held, "shown": SHOWN}
    run = Run(config, "ppo", policy, tokenizer, optimizer, order, made_from, models, **options)
    beta = run.state.get("beta", config.beta)
    run.keeps("critic", critic)
    watch.begin(run)

    for step in run:
        # 1. Rollout: the policy answers a batch of prompts.
        indices = order[step]
        asked = [prompts[i] for i in indices]
        with autocast:
            drawn = rollout(policy, tokenizer, asked, seed=run.seed, **config.sampling)
        ids, scored = drawn.ids, drawn.scored
        run.lap("generation_s")

        # 2. Score: the reward of each response, its tokens' log-probs and values.
        with torch.no_grad(), autocast:
            score = reward([rows[i] for i in indices[drawn.rows]], drawn)  # (B,), or dense (B, T)
            score = unless_unfinished(score, drawn, config.missing_eos_score)
            seen = drawn.read_by(getattr(critic, "reader", None))
            found = forward(policy, critic, ids, scored, config.temperature, True, seen, drawn.hidden)
            ref_logp = drawn.logprobs(ref, config.temperature)
        known = scored, score, *found[0], found[1], ref_logp, seen
        drawn, scored, score, old_logp, entropy, old_values, ref_logp, seen = drawn.together(*known)
        ids, mask = drawn.ids, drawn.mask  # (B, T)
        kl = (old_logp - ref_logp).sum(-1)  # (B,) nats per response

        # 3. Shape: the score and the price of KL, token by token.
        rewards = shape_rewards(score, old_logp, ref_logp, mask, beta)

        # 4. Advantages, whitened for the policy; returns for the critic.
        advantages, returns = gae(rewards, old_values, mask, config.gamma, config.lam)
        advantages = whiten(advantages, mask)
        run.lap("scoring_s")

        # 5. Update: epochs over minibatches, in pieces of rows alike in length.
        ends = order.lengths[indices] + scored.sum(-1).numpy()  # (B,) tokens
        first, highest = [], []
        for minibatch, pieces in run.minibatches(ends):
            tokens = int(scored[minibatch].sum())
            for piece in pieces:
                T = ends[piece].max()
                at = torch.from_numpy(piece).to(device, non_blocking=True)
                tensors = ids, old_logp, old_values, advantages, returns, mask
                x, old, old_v, a, g, m = (tensor[at, :T] for tensor in tensors)
                own, read = scored[piece, :T], None if seen is None else seen[at, :T]
                with autocast:
                    logp, v = forward(policy, critic, x, own, config.temperature, seen=read)
                found = losses(logp, old, v, old_v, a, g, m, config)
                share = int(own.sum()) / tokens
                run.backward(share * found["loss"], 1)
                run.add(**{name: share * value for name, value in found.items()})
                run.metrics.tokens += int(ends[piece].sum())
                log_ratio = (logp - old).detach().masked_fill(~m, 0)
                highest.append(log_ratio.max())
                if not run.count:
                    first.append(log_ratio[m])
            if not run.count and step == run.first:
                run.must_be_on_policy(torch.cat(first), kl, mask)
            run.update()
            run.count += 1
        run.lap("update_s")

        row = run.log(
            **watch.describe(drawn, asked, score, kl, entropy),
            beta=beta,
            explained_variance=explained_variance(old_values, returns, mask),
            ratio_max=run.largest(torch.stack(highest)).exp(),
            ratio_error=run.largest(torch.cat(first).exp().sub(1).abs()),
        )
        watch.warn(row)
        if config.kl_target:
            beta = adapt_beta(beta, kl.mean().item(), config.kl_target, len(ids), config.kl_horizon)
        run.keep["beta"] = beta
        if run.looks:
            watch.look()
    watch.table()
    run.finish(history=watch.history)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
