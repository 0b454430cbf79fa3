"""Direct preference optimisation: fit the policy itself to preferences, without a reward model.

    h = (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x))      token sums
    dpo    L = −log σ(βh)                          (Rafailov et al. 2023, eq. 7)
    cdpo   L = −(1−ε) log σ(βh) − ε log σ(−βh)     labels flip with probability ε (Mitchell 2023)
    robust L = (−(1−ε) log σ(βh) + ε log σ(−βh)) / (1−2ε)       the same, unbiased (Chowdhury et al. 2024)
    ipo    L = (h̄ − 1/(2β))²                       h̄ of per-token means (Azar et al. 2023, eq. 17)
    simpo  L = −log σ(β (m_w − m_l) − γ)           m the mean log-prob; no reference (Meng et al. 2024, eq. 6)

A soft label p (a row's "probability") makes each loss p L(w, l) + (1−p) L(l, w), expected over the label.
The implicit reward of a response is β (log π − log π_ref); the optimum of dpo is π ∝ π_ref exp(r/β) for the
reward r that explains the preferences best. With --sft-weight α, −α m_w is added (RPO: Pang et al. 2024).

    python train_dpo.py                                             # the built-in world
    python train_dpo.py --loss simpo --gamma 0.5 --out out/demo/simpo.pt
    python train_dpo.py --online out/demo/rm.pt --out out/demo/online.pt        # pairs from the policy itself
    python train_dpo.py --data hh.jsonl --init out/sft.pt --out out/dpo.pt --lr 1e-5

Deviations: IPO takes per-token means where its paper takes sums, so that a long response is not a strong
one; its β is therefore per token. SimPO's γ is subtracted as it is: not the ratio γ/β that the paper tunes.

A healthy run: dpo, cdpo and robust start at ln 2, ipo at 1/(4β²) (checked); the accuracy rises above one
half, the margin grows. The log-prob of the chosen responses usually *falls*, only less than that of the
rejected: watch logp_chosen and logp_rejected. In the demo held-out accuracy reaches 64 % at a KL of 1.1.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import CHAT, finish, load_policy, resume, save_partial, write
from nanoalign.data import (
    BatchOrder,
    collate,
    micro_batches,
    one_per_prompt,
    pair_examples,
    prompt_examples,
    split_rows,
    without_ties,
)
from nanoalign.generate import respond, rollouts, sample_kl
from nanoalign.logprobs import last_scored, masked_sum, token_logprobs
from nanoalign.rewards import make_reward, reward_files, total
from nanoalign.rows import read_rows
from nanoalign.training import (
    CleanStop,
    already_finished,
    fingerprint,
    freeze,
    learning_rate,
    make_optimizer,
    optimizer_step,
    prepare,
    setup,
)  # fmt: skip

LOSSES = ("dpo", "cdpo", "robust", "ipo", "simpo")
LOGGED = ("loss", "reward_chosen", "reward_rejected", "accuracy", "logp_chosen", "logp_rejected")


@dataclass
class Config:
    init: str = "out/demo/sft.pt"  # the checkpoint to start from, and the reference
    data: str = "out/demo/pairs.jsonl"  # pair rows: prompt, chosen and rejected, or HH transcripts
    eval_data: str = ""  # held-out pairs; empty: every twentieth prompt's
    out: str = "out/demo/dpo.pt"  # the checkpoint to write; metrics go beside it
    loss: str = "dpo"  # dpo; cdpo or robust for labels that may be wrong; ipo; simpo
    beta: float = 0.0  # β: how strongly the policy is held to the reference; 0: the papers' 0.1, for simpo 2
    gamma: float = 1.0  # γ of simpo: the margin that is asked for
    label_smoothing: float = 0.1  # ε of cdpo and robust: the share of labels thought to be flipped
    sft_weight: float = 0.0  # α: weight of the chosen response's mean negative log-prob
    online: str = ""  # a reward (nanoalign/rewards.py): it labels pairs of fresh samples for data's prompts
    online_every: int = 8  # steps between collections of fresh pairs
    cache_reference: str = ""  # a file for the reference's log-probs: computed once, read by later runs
    max_length: int = 128  # tokens of prompt and response; longer pairs are truncated, and counted
    max_new_tokens: int = 96  # length limit of a sampled response
    epochs: float = 1.0  # passes over the data
    steps: int = 0  # optimiser steps; 0: what --epochs comes to
    batch_size: int = 32  # pairs per optimiser step
    micro_batch: int = 0  # pairs per forward pass; 0: the whole batch at once
    micro_tokens: int = 0  # tokens per forward pass at most, padding included; 0: no limit
    lr: float = 2e-4  # peak learning rate
    warmup: int = 20  # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.0  # on matrices
    clip: float = 1.0  # gradient norm
    log_every: int = 10  # steps between metrics
    eval_every: int = 100  # steps between held-out evaluations with samples
    save_every: int = 100  # steps between saves of X.partial.pt, from which --resume continues
    seed: int = 0  # of data order and samples
    device: str = "auto"  # auto, cpu, cuda, …
    compile: bool = False  # torch.compile the forward pass
    share_prompts: bool = True  # a pair's prompt goes through the model once, not with either response
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    resume: bool = False  # continue X.partial.pt where it stopped, bit for bit
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sequence log-probs (B,), summed over response tokens → loss (B,).

    Rafailov et al. 2023, eq. 7; with label_smoothing ε > 0 conservative DPO (Mitchell 2023, eq. 3).
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def robust_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """As dpo_loss, but its mean over labels flipped with probability ε is the loss of the clean labels.

    Chowdhury et al. 2024, eq. 12.
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    clean, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """Mean log-probs per response token (B,) → loss (B,), least at a margin of 1/(2β).

    Azar et al. 2023, eq. 17.
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (h - 1 / (2 * beta)) ** 2


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Mean log-probs per response token (B,) → loss (B,) (Meng et al. 2024, eq. 6). γ is not divided by β."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def preference_loss(
    config, logps, ref_logps, tokens, probability: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob sums of both sides (2, B), the reference's, their lengths → loss, implicit rewards (B,).

    The losses differ in what they call a response's log-prob, and in the shape that they put on the margin.
    probability (B,): that the "chosen" side is the better one.
    """

    def hard(chosen, rejected, ref_chosen, ref_rejected):  # the loss of a label that is certain
        if config.loss == "ipo":
            return ipo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta)
        if config.loss == "simpo":
            return simpo_loss(chosen, rejected, config.beta, config.gamma)
        kind = robust_dpo_loss if config.loss == "robust" else dpo_loss
        epsilon = config.label_smoothing if config.loss in ("cdpo", "robust") else 0.0
        return kind(chosen, rejected, ref_chosen, ref_rejected, config.beta, epsilon)

    if config.loss in ("ipo", "simpo"):
        logps, ref_logps = logps / tokens, ref_logps / tokens
    as_labelled, swapped = hard(*logps, *ref_logps), hard(*logps.flip(0), *ref_logps.flip(0))
    loss = probability * as_labelled + (1 - probability) * swapped
    return loss, *(config.beta * (logps - ref_logps))


def soft_labels(rows: list[dict], device) -> Tensor:
    """Pair rows → the probability (N,) that the chosen side is the better one; 1 where a row names none."""
    return torch.tensor([row.get("probability", 1.0) for row in rows], device=device)


def pair_logprobs(model, batch, tokenizer, device, share: bool = False) -> Tensor:
    """Pairs → summed response log-probs of the chosen and of the rejected (2, B), in one forward pass.

    share: in which each prompt is read once, not with either response.
    """
    ids, mask = collate([side for pair in batch for side in pair], tokenizer.pad)  # (2B, T)
    ids = ids.to(device, non_blocking=True)
    hidden = model.packed_hidden(ids, mask, [2] * len(batch)) if share else None
    return masked_sum(token_logprobs(model, ids, mask, hidden=hidden), mask).view(-1, 2).T


def response_tokens(batch, device) -> Tensor:
    """Pairs → the number of response tokens of the chosen and of the rejected (2, B)."""
    counts = [[int(mask.sum()) for _, mask in side] for side in zip(*batch)]
    return torch.tensor(counts, dtype=torch.float32).to(device, non_blocking=True)


@torch.no_grad()
def online_pairs(policy, rows, prompts, reward, tokenizer, config: Config, seed: int) -> list:
    """Prompts → pairs of the policy's own samples, two to each.

    a is chosen with probability σ(r_a − r_b), as Bradley and Terry's people would, so that DPO's optimum is
    that of the reward. An unfinished response loses to a finished one; two alike make no pair.
    """
    examples, scores = [None] * (2 * len(prompts)), torch.zeros(2 * len(prompts))
    asked = [prompt for prompt in prompts for _ in range(2)]
    for indices, rollout in rollouts(policy, tokenizer, asked, config.max_new_tokens, seed):
        score = total(reward([rows[i // 2] for i in indices], rollout))
        scores[indices] = torch.where(rollout.ended, score, -torch.inf).to(scores)
        ends = (last_scored(rollout.mask) + 1).tolist()
        for i, ids, mask, end in zip(indices, rollout.ids.cpu().numpy(), rollout.mask.cpu().numpy(), ends):
            examples[i] = ids[:end], mask[:end]
    first, second = scores.view(-1, 2).T
    a_wins = (
        torch.rand(len(prompts), generator=torch.Generator().manual_seed(seed)) < (first - second).sigmoid()
    )
    differ = [a.shape != b.shape or (a != b).any() for (a, _), (b, _) in zip(examples[::2], examples[1::2])]
    usable = torch.tensor(differ) & torch.maximum(first, second).isfinite()
    pairs = zip(examples[::2], examples[1::2], a_wins.tolist(), usable.tolist())
    return [(a, b) if wins else (b, a) for a, b, wins, good in pairs if good]


@torch.no_grad()
def reference_logprobs(ref, examples, tokenizer, config: Config, device, autocast) -> Tensor:
    """The reference's log-probs of each chosen and rejected response (N, 2), from the cache if it exists.

    The cache is keyed by the reference's weights and by every token and mask: a stale one is an error.
    """
    key = fingerprint(
        device.type,
        *ref.state_dict().values(),
        *(part for pair in examples for side in pair for part in side),
    )
    path = Path(config.cache_reference)
    if path.exists():
        try:
            cache = torch.load(path, weights_only=True)
            cached_key, logp = cache["key"], cache["logp"]
        except Exception:
            raise UserError(f"{path} is not a cache of reference log-probs: delete it.") from None
        if cached_key != key:
            raise UserError(
                f"{path} is of another reference, other pairs or another --max-length: delete it."
            )
        print(f"reference: log-probs of {len(logp):,} pairs read from {path}")
        return logp.to(device)
    progress, logp = cli.Progress("reference", len(examples)), []
    for start in range(0, len(examples), config.batch_size):
        batch = examples[start : start + config.batch_size]
        with autocast:
            logp.append(pair_logprobs(ref, batch, tokenizer, device).T)
        progress.advance(len(batch))
    write(path, {"key": key, "logp": torch.cat(logp).cpu()})
    return torch.cat(logp)


@torch.no_grad()
def evaluate(policy, ref, examples, soft, prompts, tokenizer, config: Config, device, autocast) -> dict:
    """Held-out loss and accuracy, and the KL to the reference (if any) on the policy's own samples."""
    losses, hits = [], []
    for start in range(0, len(examples), config.batch_size):
        batch = examples[start : start + config.batch_size]
        with autocast:
            logps = pair_logprobs(policy, batch, tokenizer, device)
            ref_logps = pair_logprobs(ref, batch, tokenizer, device) if ref else torch.zeros_like(logps)
        tokens = response_tokens(batch, device)
        p = soft[start : start + config.batch_size]
        loss, reward_chosen, reward_rejected = preference_loss(config, logps, ref_logps, tokens, p)
        losses.append(loss)
        hits.append((reward_chosen > reward_rejected).float())
    result = {"eval_loss": torch.cat(losses).mean().item(), "eval_accuracy": torch.cat(hits).mean().item()}
    if ref:
        with autocast:
            kl = sample_kl(policy, ref, tokenizer, prompts, config.max_new_tokens, config.seed)
        result["eval_kl"] = kl.mean().item()
    return result


def check_start(loss: float, config: Config, device) -> None:
    """Policy and reference are the same model, so h = 0."""
    due = 1 / (2 * config.beta) ** 2 if config.loss == "ipo" else math.log(2)
    print(f"step-0 check: loss {loss:.6f}, {'1/(4β²)' if config.loss == 'ipo' else 'ln 2'} = {due:.6f}")
    if not abs(loss - due) <= (1e-2 if device.type == "cuda" else 1e-4) * max(1, due):  # bf16 or fp32
        raise UserError(f"the loss must start at {due:.6f}: policy and reference disagree.")


def check_flags(config: Config) -> None:
    if config.loss not in LOSSES:
        raise UserError(f"--loss {config.loss} is unknown; choose from {', '.join(LOSSES)}.")
    if config.cache_reference and (config.online or config.loss == "simpo"):
        raise UserError("--cache-reference is for fixed pairs and a loss with a reference.")
    if config.online_every < 1 or config.max_new_tokens < 1:
        raise UserError("--online-every and --max-new-tokens must be at least 1.")
    config.beta = config.beta or (2.0 if config.loss == "simpo" else 0.1)


def main(config: Config) -> None:
    check_flags(config)
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, CHAT)
    ref = None if config.loss == "simpo" else freeze(copy.deepcopy(policy))
    reward = make_reward(config.online, tokenizer, device) if config.online else None

    rows = read_rows(config.data, "pairs", config.skip_bad_rows)
    rows, eval_rows = split_rows(rows, config.eval_data, "pairs", config.skip_bad_rows)
    max_length = min(config.max_length, policy.config.context)
    eval_examples, kept = pair_examples(without_ties(eval_rows)[:500], tokenizer, max_length)
    eval_soft = soft_labels(kept, device)
    shown = one_per_prompt(eval_rows)[:128]
    prompts = [tokenizer.prompt(row["prompt"])[-max_length // 2 :] for row in shown]
    if reward:
        rows, ids = prompt_examples(
            one_per_prompt(rows), tokenizer, policy.config.context - config.max_new_tokens
        )
        lengths, size = [len(prompt) for prompt in ids], config.batch_size * config.online_every
        order = BatchOrder(lengths, size, config.seed, pool=1, least=min(size // 2, len(ids)))
        steps, material = order.steps_per_epoch * config.online_every, ids
    else:
        examples, kept = pair_examples(rows, tokenizer, max_length)
        soft = soft_labels(kept, device)
        order = BatchOrder([max(len(c[0]), len(r[0])) for c, r in examples], config.batch_size, config.seed)
        steps, material = order.steps_per_epoch, [part for pair in examples for side in pair for part in side]
        material.append(soft)
    steps = config.steps or max(1, round(config.epochs * steps))
    cached = None
    if config.cache_reference:
        cached = reference_logprobs(ref, examples, tokenizer, config, device, autocast)

    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    prepare(config, policy, ref)
    files = [Path(path).read_bytes() for path in reward_files(config.online)]
    data = fingerprint(policy.embed.weight, *material, *files)
    state = resume(config, policy, optimizer, stage="dpo", data=data)
    first_step = state["step"]
    if "fresh" in state:  # the pairs collected last, of which some steps are still to come
        examples = [[(ids.numpy(), mask.numpy()) for ids, mask in pair] for pair in state["fresh"]]
    metrics = cli.Metrics(config, steps, device, first_step)
    metrics.models("policy", *(["reference"] if ref else []), *reward_files(config.online))
    stop = CleanStop()

    for step in range(first_step, steps):
        if reward:
            collection, turn = divmod(step, config.online_every)
            if turn == 0:
                picked = order[collection]
                asked, about = [ids[i] for i in picked], [rows[i] for i in picked]
                seed = config.seed + 10_000 * (collection + 1)
                with autocast:
                    examples = online_pairs(policy, about, asked, reward, tokenizer, config, seed)
            indices = np.arange(len(examples))[turn :: config.online_every]
            if not len(indices):
                raise UserError(
                    f"of {len(order[collection])} prompts only {len(examples)} gave two different finished "
                    "samples; raise --batch-size, or use another reward."
                )
        else:
            indices = order[step]
        pairs = len(indices)  # of the whole optimiser step
        sums = torch.zeros(len(LOGGED), device=device)
        lengths = [2 * max(len(ids) for ids, _ in examples[i]) for i in indices]
        for micro in micro_batches(indices, config.micro_batch, lengths, config.micro_tokens):
            batch = [examples[i] for i in micro]
            where = torch.from_numpy(micro).to(device, non_blocking=True)
            p = 1.0 if reward else soft[where]  # (B,)
            with autocast:
                logps = pair_logprobs(policy, batch, tokenizer, device, config.share_prompts)
                if cached is not None:
                    ref_logps = cached[where].T
                elif ref:
                    with torch.no_grad():
                        ref_logps = pair_logprobs(ref, batch, tokenizer, device, config.share_prompts)
                else:
                    ref_logps = torch.zeros_like(logps)
            tokens = response_tokens(batch, device)
            loss, reward_chosen, reward_rejected = preference_loss(config, logps, ref_logps, tokens, p)
            if config.sft_weight:
                means = config.sft_weight * logps / tokens
                loss = loss - p * means[0] - (1 - p) * means[1]
            (loss.sum() / pairs).backward()
            with torch.no_grad():
                right = (reward_chosen > reward_rejected).float()
                values = (loss, reward_chosen, reward_rejected, right, *logps)
                sums += torch.stack([value.sum() for value in values])
            metrics.tokens += sum(len(side[0]) for pair in batch for side in pair)
        if step == 0 and ref and not config.sft_weight:
            check_start(sums[0].item() / pairs, config, device)
        lr = learning_rate(step, steps, config.lr, config.warmup)
        grad_norm = optimizer_step(policy, optimizer, lr, config.clip)

        done, stopping = step + 1, bool(stop)
        save_now = done % config.save_every == 0 or stopping
        if done % config.log_every == 0 or done in (1, steps) or save_now:
            mean = dict(zip(LOGGED, sums / pairs))
            margin = mean["reward_chosen"] - mean["reward_rejected"]
            metrics.log(done, **mean, margin=margin, grad_norm=grad_norm, lr=lr)
        if done % config.eval_every == 0 or done == steps:
            result = evaluate(
                policy, ref, eval_examples, eval_soft, prompts, tokenizer, config, device, autocast
            )
            metrics.note(step=done, **result)
            print("  held-out " + "  ".join(f"{k.removeprefix('eval_')} {v:.3f}" for k, v in result.items()))
            with autocast:
                texts = respond(policy, tokenizer, prompts[:4], config.max_new_tokens, config.seed)[0]
            for row, text in zip(shown, texts):
                print(f"  {row['prompt'][-1]['content'][:80]!r} → {text!r}")
        if save_now:
            fresh = {}
            if reward:
                as_tensors = [[tuple(map(torch.tensor, side)) for side in pair] for pair in examples]
                fresh["fresh"] = as_tensors
            save_partial(
                config, policy, optimizer, stage="dpo", tokenizer=tokenizer, step=done, data=data, **fresh
            )
        if stopping:
            stop.leave(config, done)
    finish(config, policy, stage="dpo", tokenizer=tokenizer, step=steps)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
