"""Odds-ratio preference optimisation: imitation and preferences in one stage, from the base model.

    L = NLL(x, y_w) − λ log σ(log odds(y_w|x) − log odds(y_l|x))        (Hong et al. 2024, eqs. 6 and 7)
    odds(y|x) = p / (1 − p),   log p = m = the mean log-prob of the response's tokens

No reference model and no SFT stage before: the first part teaches the answer, the second that the rejected
one is less likely. As in the paper the NLL is the mean over prompt and response; `--nll response` leaves the
prompt out.

    python train_orpo.py                                            # the built-in world, from its base model
    python train_orpo.py --data hh.jsonl --init out/base.pt --out out/orpo.pt --lr 1e-4

A healthy run: nll falls as in SFT, odds_loss starts near ln 2 and falls more slowly, log_odds_ratio rises
above 0. The log-probs of *both* sides rise at first, because rejected answers are answers too. In the demo
nll goes from 2.3 to 0.5, odds_loss from 0.97 to 0.42 (held out 0.65), held-out accuracy to 63 %.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import CHAT, finish, load_policy, resume, save_partial
from nanoalign.data import (
    BatchOrder,
    collate,
    micro_batches,
    one_per_prompt,
    pair_examples,
    split_rows,
    without_ties,
)
from nanoalign.generate import respond
from nanoalign.logprobs import masked_mean, token_logprobs
from nanoalign.rows import read_rows
from nanoalign.training import (
    CleanStop,
    already_finished,
    fingerprint,
    learning_rate,
    make_optimizer,
    optimizer_step,
    prepare,
    setup,
)  # fmt: skip

LOGGED = ("loss", "nll", "odds_loss", "log_odds_ratio", "accuracy", "logp_chosen", "logp_rejected")


@dataclass
class Config:
    init: str = "out/demo/base.pt"  # the checkpoint to start from: the base model
    data: str = "out/demo/pairs.jsonl"  # pair rows: prompt, chosen and rejected, or HH transcripts
    eval_data: str = ""  # held-out pairs; empty: every twentieth prompt's
    out: str = "out/demo/orpo.pt"  # the checkpoint to write; metrics go beside it
    lam: float = 0.1  # λ: weight of the odds-ratio part
    nll: str = "all"  # imitate all of prompt and chosen response, as in the paper, or the response only
    max_length: int = 128  # tokens of prompt and response; longer pairs are truncated, and counted
    epochs: float = 1.0  # passes over the data
    steps: int = 0  # optimiser steps; 0: what --epochs comes to
    batch_size: int = 32  # pairs per optimiser step
    micro_batch: int = 0  # pairs per forward pass; 0: the whole batch at once
    micro_tokens: int = 0  # tokens per forward pass at most, padding included; 0: no limit
    lr: float = 1e-3  # peak learning rate
    warmup: int = 20  # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.0  # on matrices
    adam_eps: float = 1e-3  # Adam's ε; with a small one, words that the data never says drift away
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


def log_odds(mean_logp: Tensor) -> Tensor:
    """Mean log-probs m (B,) → log(p / (1 − p)), p = e^m: m − log(1 − e^m), with m kept below −1e-6.

    log(1 − e^m) in two branches (Mächler 2012): log(−expm1(m)) near 0, log1p(−e^m) below −ln 2.
    """
    m = mean_logp.clamp(max=-1e-6)
    near = m > -math.log(2)
    # each branch is fed a harmless value where the other is taken, so that no 0 · ∞ reaches the gradient
    log1mexp = torch.where(
        near,
        torch.log(-torch.expm1(m.masked_fill(~near, -0.1))),
        torch.log1p(-torch.exp(m.masked_fill(near, -1.0))),
    )
    return m - log1mexp


def orpo_loss(nll: Tensor, chosen_mean: Tensor, rejected_mean: Tensor, lam: float = 0.1) -> Tensor:
    """NLL of the chosen side, mean log-probs of both responses, (B,) each → loss (B,).

    Hong et al. 2024, eqs. 6 and 7.
    """
    return nll - lam * F.logsigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))


def pair_logprobs(policy, batch, tokenizer, config: Config, device) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs → NLL of the chosen side, mean response log-probs of both, (B,) each, in one forward pass."""
    ids, mask = collate([side for pair in batch for side in pair], tokenizer.pad)  # (2B, T)
    imitated = mask.clone()
    if config.nll == "all":
        for row, (chosen, _) in enumerate(batch):
            imitated[2 * row, 1 : len(chosen[0])] = True
    ids = ids.to(device, non_blocking=True)
    hidden = policy.packed_hidden(ids, mask, [2] * len(batch)) if config.share_prompts else None
    logp = token_logprobs(policy, ids, imitated, hidden=hidden)  # (2B, T)
    chosen_mean, rejected_mean = masked_mean(logp, mask).view(-1, 2).T
    return -masked_mean(logp, imitated)[::2], chosen_mean, rejected_mean


def parts(nll: Tensor, chosen: Tensor, rejected: Tensor, lam: float) -> Tensor:
    """What is logged of pairs (B,), in the order of LOGGED: (len(LOGGED), B)."""
    ratio = log_odds(chosen) - log_odds(rejected)
    loss = orpo_loss(nll, chosen, rejected, lam)
    return torch.stack((loss, nll, -F.logsigmoid(ratio), ratio, (ratio > 0).float(), chosen, rejected))


@torch.no_grad()
def evaluate(policy, examples, tokenizer, config: Config, device, autocast) -> dict:
    """Held-out means of what is logged."""
    columns = []
    for start in range(0, len(examples), config.batch_size):
        with autocast:
            batch = examples[start : start + config.batch_size]
            columns.append(parts(*pair_logprobs(policy, batch, tokenizer, config, device), config.lam))
    return {f"eval_{name}": v for name, v in zip(LOGGED, torch.cat(columns, dim=1).mean(1).tolist())}


def main(config: Config) -> None:
    if config.nll not in ("all", "response"):
        raise UserError(f"--nll {config.nll} is unknown; choose all or response.")
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, ("base", *CHAT))

    rows = read_rows(config.data, "pairs", config.skip_bad_rows)
    rows, eval_rows = split_rows(rows, config.eval_data, "pairs", config.skip_bad_rows)
    max_length = min(config.max_length, policy.config.context)
    examples, _ = pair_examples(without_ties(rows), tokenizer, max_length)
    eval_examples, _ = pair_examples(without_ties(eval_rows)[:500], tokenizer, max_length)
    shown = one_per_prompt(eval_rows)[:4]
    prompts = [tokenizer.prompt(row["prompt"])[-max_length // 2 :] for row in shown]

    optimizer = make_optimizer(policy, config.lr, config.weight_decay, eps=config.adam_eps)
    prepare(config, policy)
    order = BatchOrder([max(len(c[0]), len(r[0])) for c, r in examples], config.batch_size, config.seed)
    steps = config.steps or max(1, round(config.epochs * order.steps_per_epoch))
    data = fingerprint(policy.embed.weight, *(part for pair in examples for side in pair for part in side))
    first_step = resume(config, policy, optimizer, stage="orpo", data=data)["step"]
    metrics = cli.Metrics(config, steps, device, first_step)
    metrics.models("policy")
    stop = CleanStop()

    for step in range(first_step, steps):
        indices = order[step]
        pairs = len(indices)  # of the whole optimiser step
        sums = torch.zeros(len(LOGGED), device=device)
        lengths = 2 * order.lengths[indices]
        for micro in micro_batches(indices, config.micro_batch, lengths, config.micro_tokens):
            batch = [examples[i] for i in micro]
            with autocast:
                nll, chosen, rejected = pair_logprobs(policy, batch, tokenizer, config, device)
            loss = orpo_loss(nll, chosen, rejected, config.lam)  # (B,)
            (loss.sum() / pairs).backward()
            with torch.no_grad():
                sums += parts(nll, chosen, rejected, config.lam).sum(1)
            metrics.tokens += sum(len(side[0]) for pair in batch for side in pair)
        if step == 0:  # an untrained model thinks both sides about equally likely
            print(f"step-0 check: odds part {sums[2].item() / pairs:.4f}, near ln 2 = {math.log(2):.4f}")
        lr = learning_rate(step, steps, config.lr, config.warmup)
        grad_norm = optimizer_step(policy, optimizer, lr, config.clip)

        done, stopping = step + 1, bool(stop)
        save_now = done % config.save_every == 0 or stopping
        if done % config.log_every == 0 or done in (1, steps) or save_now:
            metrics.log(done, **dict(zip(LOGGED, sums / pairs)), grad_norm=grad_norm, lr=lr)
        if done % config.eval_every == 0 or done == steps:
            result = evaluate(policy, eval_examples, tokenizer, config, device, autocast)
            metrics.note(step=done, **result)
            print("  held-out " + "  ".join(f"{k.removeprefix('eval_')} {v:.3f}" for k, v in result.items()))
            with autocast:
                texts = respond(policy, tokenizer, prompts, 96, config.seed)[0]
            for row, text in zip(shown, texts):
                print(f"  {row['prompt'][-1]['content'][:80]!r} → {text!r}")
        if save_now:
            save_partial(config, policy, optimizer, stage="orpo", tokenizer=tokenizer, step=done, data=data)
        if stopping:
            stop.leave(config, done)
    finish(config, policy, stage="orpo", tokenizer=tokenizer, step=steps)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
