"""Proximal policy optimisation against a reward, held to a reference by a KL penalty.

    R_t = −β (log π(y_t|…) − log π_ref(y_t|…)) + [t is last] r(x, y)       (Ziegler et al. 2019, eq. 2)
    A_t = Σ_l (γλ)^l δ_{t+l},   δ_t = R_t + γ V_{t+1} − V_t                (Schulman et al. 2016, eq. 16)
    L_π = mean max(−A ρ, −A clip(ρ, 1−ε, 1+ε)),   ρ_t = π(y_t|…)/π_old(y_t|…)     (… 2017, eq. 7)
    L_V = ½ mean max((V−G)², (clip(V, V_old−ε, V_old+ε)−G)²)

A is whitened over the batch in L_π; the returns G = A + V_old use it as it was.

Four models: the policy, the reference (a frozen copy), the reward, and the critic V, which starts from the
reward model with its head set to zero. V_t is what the critic expects before token t: read at position t − 1.

    python train_ppo.py                                                   # the built-in world
    python train_ppo.py --reward judge --out out/demo/ppo-judge.pt         # without a proxy in between
    python train_ppo.py --reward "out/demo/rm.pt - 0.02*length" --kl-target 2 --kl-horizon 500
    python train_ppo.py --init out/sft.pt --reward out/rm.pt --prompts hh.jsonl --watch "" --lr 1e-6

A healthy run: ratio 1 and approxkl 0 at the first minibatch (checked), KL rising from 0 to where β holds it
(1 to 2 nats in the demo), explained variance above 0, the end-token rate near 1. A score that rises while a
second opinion (`--watch`) falls is reward hacking: docs/reward-hacking.md.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import (
    CHAT,
    finish,
    load,
    load_policy,
    load_scalar,
    resume,
    save_partial,
)
from nanoalign.data import BatchOrder, micro_batches, prompt_examples, split_rows, thin
from nanoalign.generate import rollouts
from nanoalign.logprobs import last_scored, masked_sum, token_logprobs
from nanoalign.model import ScalarGPT, ScalarHead
from nanoalign.rewards import on_last_token, reward_files, total, unless_unfinished
from nanoalign.rows import read_rows
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

SHOWN = (
    "score",
    "kl",
    "beta",
    "ended",
    "length",
    "explained_variance",
    "generation_s",
    "scoring_s",
    "update_s",
)
UPDATE = (
    "approxkl", "clip_fraction", "value_clip_fraction", "ratio", "ratio_max", "ratio_error",
    "policy_loss", "value_loss", "loss",
)  # fmt: skip


@dataclass
class Config:
    init: str = "out/demo/sft.pt"  # the checkpoint to start from
    reference: str = ""  # the checkpoint that KL is measured to; empty: --init
    reward: str = "out/demo/rm.pt"  # what to maximise: an expression of nanoalign/rewards.py
    watch: str = "judge"  # other rewards to report on held-out samples: "judge, out/demo/rm.pt"; "" for none
    critic: str = ""  # the checkpoint the critic starts from; empty: the first one in --reward, else --init
    shared_critic: bool = False  # no critic model, but a value head on the policy's trunk
    prompts: str = "out/demo/world/prompts.jsonl"  # prompt rows
    eval_data: str = ""  # held-out prompts; empty: every twentieth
    out: str = "out/demo/ppo.pt"  # the checkpoint to write; metrics go beside it
    steps: int = 25  # iterations: rollout, then epochs over it
    batch_size: int = 128  # responses per iteration
    epochs: int = 2  # passes over each iteration's responses
    minibatch: int = 64  # responses per optimiser step
    micro_batch: int = 0  # responses per forward and backward pass; 0: the whole minibatch at once
    beta: float = 0.2  # β: the price of a nat of KL; the starting value if adaptive
    kl_target: float = 0.0  # sequence KL that an adaptive β steers to; 0: β stays fixed
    kl_horizon: float = 10_000.0  # responses over which the adaptive β moves
    kl_loss: str = ""  # k1, k2 or k3: β times this KL estimate in the loss, none in the reward
    gamma: float = 1.0  # γ: discount per token
    lam: float = 0.95  # λ of the advantage estimate
    clip_ratio: float = 0.2  # ε of the policy's ratio
    clip_value: float = 0.2  # ε of the value
    vf_coef: float = 0.1  # weight of the value loss
    whiten_rewards: bool = False  # scale the rewards to variance 1, keeping their mean
    missing_eos_score: float = -1.0  # the score of a response without an end token
    max_new_tokens: int = 48  # length limit of a response
    temperature: float = 1.0  # of sampling, and of every log-prob
    top_k: int = 0  # sample from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    lr: float = 2e-4  # peak learning rate
    warmup: int = 5  # iterations of linear warmup, then a cosine to a tenth
    clip: float = 1.0  # gradient norm, of policy and critic together
    eval_every: int = 5  # iterations between held-out evaluations with samples
    eval_prompts: int = 128  # how many held-out prompts to answer then
    save_every: int = 10  # iterations between saves of X.partial.pt, from which --resume continues
    seed: int = 0  # of prompts, samples and minibatches
    device: str = "auto"  # auto, cpu, cuda, …
    compile: bool = False  # torch.compile the forward pass
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    resume: bool = False  # continue X.partial.pt where it stopped, bit for bit
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


# ------------------------------------------------------------------------------------------ the method


def shape_rewards(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Score (B,), log-probs (B, T) → reward per token (B,T): the KL penalty everywhere in mask, and the score
    on the last response token itself (Ziegler et al. 2019, eq. 2); a dense score (B, T) stays where it is."""
    rewards = (-beta * (logp - ref_logp)).masked_fill(~mask, 0)
    return rewards + (on_last_token(score, mask) if score.dim() == 1 else score)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Rewards and values (B, T) → advantages, returns (B, T), 0 outside mask (Schulman et al. 2016, eq. 16).

    The mask of a row is one run of positions; after its last one the value is 0. The sum over l is a product
    with the matrix W[s, t] = (γλ)^(s−t), s ≥ t, in float64 where the device has it.
    """
    T, precise = mask.shape[1], torch.float32 if mask.device.type == "mps" else torch.float64
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    following = F.pad(values[:, 1:], (0, 1))  # V_{t+1}
    delta = (rewards + gamma * following - values).masked_fill(~mask, 0).to(precise)
    distance = torch.arange(T, device=mask.device)[:, None] - torch.arange(T, device=mask.device)
    weight = torch.where(distance >= 0, (gamma * lam) ** distance.clamp(min=0).to(precise), 0.0)
    advantages = (delta @ weight).to(values.dtype).masked_fill(~mask, 0)
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, keep_mean: bool = False) -> Tensor:
    """x (B, T) → mean 0 and variance 1 over mask; 0 outside it. What lies outside has no influence."""
    count = mask.sum()
    mean = x.masked_fill(~mask, 0).sum() / count
    centred = (x - mean).masked_fill(~mask, 0)
    scaled = centred * torch.rsqrt(centred.square().sum() / count + 1e-8)
    return (scaled + mean).masked_fill(~mask, 0) if keep_mean else scaled


def mean_over(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x (B, T) over all of mask, a scalar."""
    return masked_sum(x, mask).sum() / mask.sum()


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """Log-probs and advantages (B, T) → the clipped surrogate, mean over mask (PPO paper, eq. 7)."""
    ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
    return mean_over(torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """Values and returns (B, T) → half the larger squared error of the value and of the value kept within
    `clip` of the old one, mean over mask (lm-human-preferences)."""
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    kept = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * mean_over(torch.maximum((values - returns) ** 2, (kept - returns) ** 2), mask)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Log-probs of samples from the policy → an estimate of KL(policy ‖ reference) per token (Schulman 2020).

    As a loss, k1 has no gradient in expectation, k2 has the true one on-policy, k3 another.
    """
    d = ref_logp - logp
    return {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - 1 - d}[kind]


def adapt_beta(beta: float, kl: float, target: float, responses: int, horizon: float) -> float:
    """The proportional controller of Ziegler et al. 2019, §2.2: β rises while KL is above its target."""
    return beta * (1 + min(0.2, max(-0.2, kl / target - 1)) * responses / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(returns − values) / Var(returns) over mask: 1 for a perfect critic, 0 for a constant."""
    return 1 - (returns - values)[mask].var() / returns[mask].var().clamp(min=1e-8)


# ----------------------------------------------------------------------------------------------- models


def load_critic(config: Config, policy, tokenizer, device) -> nn.Module:
    """The value model, its head set to zero: at first it expects nothing."""
    if config.shared_critic:
        critic = head = ScalarHead(policy.config.width).to(device)
    else:
        path = config.critic or (reward_files(config.reward) or [config.init])[0]
        if load(path)["stage"] in ("rm", "prm"):
            critic, own, _ = load_scalar(path, device, ("rm", "prm"))
        else:
            trunk, own, _ = load_policy(path, device)
            critic = ScalarGPT.from_policy(trunk)
        if own.name != tokenizer.name:
            raise UserError(
                f"the critic {path} reads tokens of {own.name!r}, not the policy's {tokenizer.name!r}."
            )
        print(f"critic: starts from {path}")
        head = critic.score
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return critic


def forward(policy, critic: nn.Module, ids: Tensor, mask: Tensor, temperature: float, entropy: bool = False):
    """ids (B, T), mask (B, T) → log-probs (with `entropy`: and entropies), and values, (B, T) each.

    The critic is a model of its own, or a linear head on the policy's trunk.
    """
    hidden = policy.hidden(ids)
    logp = token_logprobs(policy, ids, mask, temperature, entropy, hidden)
    values = critic(ids) if isinstance(critic, ScalarGPT) else critic(hidden)
    return logp, F.pad(values[:, :-1], (1, 0))  # V_t is read at position t − 1


def update_stats(logp, old_logp, values, old_values, advantages, mask, pg_loss, vf_loss, loss, config):
    """What is logged of a minibatch, in the order of UPDATE."""
    with torch.no_grad():
        ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
        beyond = ratio - ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
        return torch.stack((
            mean_over(0.5 * (logp - old_logp).square(), mask),
            mean_over((beyond * advantages > 0).float(), mask),  # where the clip takes the gradient away
            mean_over(((values - old_values).abs() > config.clip_value).float(), mask),
            mean_over(ratio, mask),
            ratio.max(),
            (ratio - 1).abs().max(),
            pg_loss, vf_loss, loss,
        ))  # fmt: skip


def check_start(stats: Tensor, kl: Tensor, step: int, config: Config, device) -> None:
    """What theory says of the first minibatch: the policy that updates is the policy that sampled."""
    approxkl, _, _, ratio, _, ratio_error, *_ = stats.tolist()
    same = step == 0 and not config.reference
    distance = kl.abs().max().item() if same else 0.0
    moment, off = "step-0 check" if step == 0 else "first minibatch", f"off 1 by at most {ratio_error:.1e}"
    print(
        f"{moment}: ratio {ratio:.6f}, {off}, approxkl {approxkl:.1e}" + same * f", KL at most {distance:.1e}"
    )
    # the mean over tokens, because in bf16 a single one may differ by a few per cent between batch shapes
    tolerance = 1e-3 if device.type == "cuda" else 1e-6
    if not (approxkl <= tolerance and distance <= 100 * tolerance):  # NaN fails as well
        raise UserError("the ratio must start at 1 and the KL at 0: log-probs come from two different paths.")


# -------------------------------------------------------------------------------------------------- a run


def check_flags(config: Config) -> None:
    if config.kl_loss not in ("", "k1", "k2", "k3"):
        raise UserError(f"--kl-loss {config.kl_loss} is unknown; choose k1, k2 or k3, or leave it out.")
    if config.temperature <= 0:
        raise UserError("--temperature must be positive: a greedy policy has no gradient.")
    if min(config.steps, config.epochs, config.minibatch, config.eval_prompts) < 1:
        raise UserError("--steps, --epochs, --minibatch and --eval-prompts must be at least 1.")
    if config.kl_target and not (config.beta > 0 and config.kl_horizon >= config.batch_size):
        raise UserError(
            "an adaptive β (--kl-target) needs a --beta above 0 and a --kl-horizon of at least one batch."
        )
    if not (0 < config.gamma <= 1 and 0 <= config.lam <= 1):
        raise UserError("--gamma must be in (0, 1] and --lam in [0, 1].")


def main(config: Config) -> None:
    check_flags(config)
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, CHAT)
    ref = load_reference(config.reference, policy, tokenizer, device)
    critic = load_critic(config, policy, tokenizer, device)
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

    trained = nn.ModuleList((policy, critic))  # one optimiser, one gradient norm
    optimizer = make_optimizer(trained, config.lr, eps=1e-5)
    prepare(config, policy, ref, getattr(critic, "gpt", None))
    order = BatchOrder([len(ids) for ids in prompts], config.batch_size, config.seed, pool=1)
    files = [Path(path).read_bytes() for path in reward_files(config.reward)]
    data = fingerprint(policy.embed.weight, ref.embed.weight, *critic.state_dict().values(), *prompts, *files)
    state = resume(config, policy, optimizer, stage="ppo", data=data)
    first_step, beta = state["step"], state.get("beta", config.beta)
    if "critic" in state:
        critic.load_state_dict(state["critic"])
    metrics = cli.Metrics(config, config.steps, device, first_step, SHOWN)
    metrics.models(
        "policy", "reference", "critic" + " (a head)" * config.shared_critic, *reward_files(config.reward)
    )
    watch = Watch(eval_rows, eval_prompts, rewards, state.get("history", []), seed=config.seed, **sampling)
    stop = CleanStop()

    def look(step: int) -> None:
        with autocast:
            watch.look(step, policy, ref, tokenizer, metrics)

    if first_step == 0:
        look(0)
    for step in range(first_step, config.steps):
        clock = Stopwatch(device)
        # Rollout: the policy answers a batch of prompts.
        indices = order[step]
        with autocast:
            seed = config.seed + 10_000 * (step + 1)
            asked = [prompts[i] for i in indices]
            [(by_length, rollout)] = rollouts(policy, tokenizer, asked, seed=seed, **sampling)
        batch, ids, mask = [rows[indices[i]] for i in by_length], rollout.ids, rollout.mask
        scored = mask.cpu()  # for counting without waiting for a GPU
        generation_s = clock.lap()

        # Score: the reward of each whole response, the log-probs of policy and reference, the values.
        with torch.no_grad(), autocast:
            score = unless_unfinished(rewards["score"](batch, rollout), rollout, config.missing_eos_score)
            (old_logp, entropy), old_values = forward(policy, critic, ids, scored, config.temperature, True)
            ref_logp = token_logprobs(ref, ids, scored, config.temperature)
        kl = masked_sum(old_logp - ref_logp, mask)  # (B,) nats per response

        # Shape the rewards, estimate advantages, whiten them.
        token_rewards = shape_rewards(score, old_logp, ref_logp, mask, 0.0 if config.kl_loss else beta)
        if config.whiten_rewards:
            token_rewards = whiten(token_rewards, mask, keep_mean=True)
        advantages, returns = gae(token_rewards, old_values, mask, config.gamma, config.lam)
        advantages = whiten(advantages, mask)
        scoring_s = clock.lap()

        # Update: epochs over shuffled minibatches.
        lr = learning_rate(step, config.steps, config.lr, config.warmup)
        ends = (last_scored(scored) + 1).numpy()  # (B,) tokens of prompt and response
        stats, updates = [], 0
        for epoch in range(config.epochs):
            shuffle = np.random.default_rng((config.seed, step, epoch)).permutation(len(indices))
            for minibatch in micro_batches(shuffle, config.minibatch):
                tokens = int(scored[minibatch].sum())  # of the whole optimiser step
                minibatch = minibatch[np.argsort(ends[minibatch])]  # micro-batches of rows alike in length
                for micro in micro_batches(minibatch, config.micro_batch):
                    T, picked = int(ends[micro].max()), torch.from_numpy(micro).to(device, non_blocking=True)
                    tensors = (ids, mask, old_logp, ref_logp, old_values, advantages, returns)
                    x, m, old, reference, old_v, a, g = (tensor[picked, :T] for tensor in tensors)
                    with autocast:
                        logp, v = forward(policy, critic, x, scored[micro, :T], config.temperature)
                    pg_loss = policy_loss(logp, old, a, m, config.clip_ratio)
                    vf_loss = value_loss(v, old_v, g, m, config.clip_value)
                    loss = pg_loss + config.vf_coef * vf_loss
                    if config.kl_loss:
                        loss = loss + beta * mean_over(kl_estimate(logp, reference, config.kl_loss), m)
                    share = int(scored[micro].sum()) / tokens
                    (share * loss).backward()
                    metrics.tokens += int(ends[micro].sum())
                    stats.append(
                        (share, update_stats(logp, old, v, old_v, a, m, pg_loss, vf_loss, loss, config))
                    )
                if updates == 0:
                    first = torch.stack([values for _, values in stats]).amax(0)
                    if step == first_step:
                        check_start(first, kl, step, config, device)
                grad_norm = optimizer_step(trained, optimizer, lr, config.clip)
                updates += 1
        update_s = clock.lap()

        lengths = mask.sum(-1).float()
        shares = torch.tensor([share for share, _ in stats], device=device)
        stacked = torch.stack([values for _, values in stats])  # (micro-batches, len(UPDATE))
        update = dict(zip(UPDATE, (shares @ stacked) / updates))
        update["ratio_max"] = stacked[:, UPDATE.index("ratio_max")].max()
        update["ratio_error"] = first[UPDATE.index("ratio_error")]  # of the first minibatch: must be 0
        done, stopping = step + 1, bool(stop)
        row = metrics.log(
            done,
            score=total(score).mean(), kl=kl.mean(), kl_error=kl.std(correction=0) / len(kl) ** 0.5,
            beta=beta,
            entropy=mean_over(entropy, mask), ended=rollout.ended.float().mean(), length=lengths.mean(),
            at_limit=(lengths >= config.max_new_tokens).float().mean(),
            explained_variance=explained_variance(old_values, returns, mask),
            **update, grad_norm=grad_norm, lr=lr,
            generation_s=generation_s, scoring_s=scoring_s, update_s=update_s,
        )  # fmt: skip
        watch.warn(row)
        if config.kl_target:
            beta = adapt_beta(beta, row["kl"], config.kl_target, len(indices), config.kl_horizon)
        if done % config.eval_every == 0 or done == config.steps:
            look(done)
        if done % config.save_every == 0 or stopping:
            save_partial(
                config, policy, optimizer, stage="ppo", tokenizer=tokenizer, step=done, data=data,
                critic=critic.state_dict(), beta=beta, history=watch.history,
            )  # fmt: skip
        if stopping:
            stop.leave(config, done)
    watch.table()
    finish(config, policy, stage="ppo", tokenizer=tokenizer, step=config.steps, history=watch.history)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
