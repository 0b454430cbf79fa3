"""Kahneman–Tversky optimisation: learn from thumbs up and thumbs down, without pairs.

    r = log π(y|x) − log π_ref(y|x)                       token sums
    z = max(0, mean of r over mismatched pairs (x_i, y_{i+1}))      ≈ KL(π ‖ π_ref), no gradient
    L = λ_D (1 − σ(β (r − z)))   for a desirable response,
        λ_U (1 − σ(β (z − r)))   for an undesirable one   (Ethayarajh et al. 2024, eq. 8)

People feel a gain or a loss against a reference point, z, and both saturate. The reference point is estimated
from prompts of the batch joined to answers that were given to others.

    python train_kto.py                                     # the built-in world's thumbs
    python train_kto.py --data out/demo/pairs.jsonl         # pairs, split into a thumb up and one down
    python train_kto.py --data verdicts.jsonl --init out/sft.pt --out out/kto.pt --lr 1e-5

λ_D and λ_U default to the paper's rule for unbalanced data: the smallest weights of at least 1 that bring
λ_D n_D / (λ_U n_U) into [1, 4/3]. The mean is over the rows of the optimiser step, whatever their labels.

A healthy run: at step 0 r = z = 0, so every row costs half its weight (checked); then the reward of
desirable responses rises above that of the undesirable, and z stays small. A z of 0 throughout means that the
mismatched log-ratios are negative on average: the clamp is at work, and the reference point is the reference
model. So it is in the demo, where both rewards fall, the undesirable one further: held-out AUC 0.63, margin
0.24, KL 2.1.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import CHAT, finish, load_policy, resume, save_partial
from nanoalign.data import (
    BatchOrder,
    collate,
    join,
    labelled_examples,
    micro_batches,
    one_per_prompt,
    split_rows,
)
from nanoalign.generate import respond, sample_kl
from nanoalign.logprobs import masked_sum, token_logprobs
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


@dataclass
class Config:
    init: str = "out/demo/sft.pt"  # the checkpoint to start from, and the reference
    data: str = "out/demo/pairs.thumbs.jsonl"  # rows of prompt, completion, label; or pair rows, split in two
    eval_data: str = ""  # held-out rows; empty: every twentieth prompt's
    out: str = "out/demo/kto.pt"  # the checkpoint to write; metrics go beside it
    beta: float = 0.1  # β: how fast gains and losses saturate; a large one ties the policy to the reference
    desirable_weight: float = 0.0  # λ_D; 0: by the rule
    undesirable_weight: float = 0.0  # λ_U; 0: by the rule
    max_length: int = 128  # tokens of prompt and response; longer rows are truncated, and counted
    epochs: float = 1.0  # passes over the data
    steps: int = 0  # optimiser steps; 0: what --epochs comes to
    batch_size: int = 32  # rows per optimiser step, at least 2
    micro_batch: int = 0  # rows per forward pass; 0: the whole batch at once
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
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    resume: bool = False  # continue X.partial.pt where it stopped, bit for bit
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    z: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Sequence log-ratios r (B,), labels (B,) bool, the reference point z () in nats → loss (B,).

    Ethayarajh et al. 2024, eq. 8, without its constant λ_y.
    """
    gain = beta * (log_ratio - z.detach())
    value = torch.where(desirable, gain, -gain)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-value)  # 1 − σ(v)


def mismatched(prompts: list, responses: list) -> list[tuple]:
    """Prompts x_i and their responses y_i → pairs (x_i, y_{i+1}), the last prompt with the first response."""
    if len(prompts) < 2:
        raise UserError("a batch of one row has no mismatched pair; --batch-size must be at least 2.")
    return list(zip(prompts, responses[1:] + responses[:1]))


def balanced_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """n_D, n_U → the smallest λ_D, λ_U ≥ 1 with λ_D n_D / (λ_U n_U) in [1, 4/3]; 1, 1 if one n is 0."""
    if not desirable or not undesirable:
        return 1.0, 1.0
    ratio = desirable / undesirable
    return max(1.0, 1 / ratio), max(1.0, ratio * 3 / 4)


def sequence_logprobs(model, batch, tokenizer, device) -> Tensor:
    """Examples → summed response log-probs (B,)."""
    ids, mask = collate(batch, tokenizer.pad)
    logp = token_logprobs(model, ids.to(device, non_blocking=True), mask)  # (B, T)
    return masked_sum(logp, mask)


@torch.no_grad()
def reference_point(
    policy, ref, batch, tokenizer, config: Config, max_length: int, device, autocast
) -> Tensor:
    """The examples of a whole optimiser step → z (): the mean log-ratio of mismatched pairs, clamped at 0."""
    pairs = mismatched([ids[~mask] for ids, mask in batch], [ids[mask] for ids, mask in batch])
    joined = [join(prompt, response, max_length) for prompt, response in pairs]
    log_ratios = []
    rows, lengths = np.arange(len(joined)), [len(ids) for ids, _ in joined]
    for micro in micro_batches(rows, config.micro_batch, lengths, config.micro_tokens):
        part = [joined[i] for i in micro]
        with autocast:
            logp, ref_logp = (sequence_logprobs(model, part, tokenizer, device) for model in (policy, ref))
        log_ratios.append(logp - ref_logp)
    return torch.cat(log_ratios).mean().clamp(min=0)


@torch.no_grad()
def evaluate(policy, ref, examples, labels, prompts, tokenizer, config: Config, device, autocast) -> dict:
    """Held-out rewards by label, how often a desirable one has the higher reward, and KL on samples."""
    rewards = []
    for start in range(0, len(examples), config.batch_size):
        batch = examples[start : start + config.batch_size]
        with autocast:
            logp, ref_logp = (sequence_logprobs(model, batch, tokenizer, device) for model in (policy, ref))
        rewards.append(config.beta * (logp - ref_logp))
    with autocast:
        kl = sample_kl(policy, ref, tokenizer, prompts, 96, config.seed)
    rewards, result = torch.cat(rewards).cpu(), {}
    up, down = rewards[labels], rewards[~labels]
    if len(up) and len(down):
        above = (up[:, None] > down).float() + 0.5 * (up[:, None] == down)
        result = {"eval_auc": above.mean().item(), "eval_margin": (up.mean() - down.mean()).item()}
    return {**result, "eval_kl": kl.mean().item()}


def main(config: Config) -> None:
    if config.batch_size < 2:
        raise UserError("--batch-size must be at least 2: the reference point needs mismatched pairs.")
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, CHAT)
    ref = freeze(copy.deepcopy(policy))

    rows = read_rows(config.data, "labelled", config.skip_bad_rows)
    rows, eval_rows = split_rows(rows, config.eval_data, "labelled", config.skip_bad_rows)
    max_length = min(config.max_length, policy.config.context)
    examples, rows = labelled_examples(rows, tokenizer, max_length)
    eval_examples, eval_rows = labelled_examples(eval_rows[:1000], tokenizer, max_length)
    labels, eval_labels = (torch.tensor([row["label"] for row in r]) for r in (rows, eval_rows))
    shown = one_per_prompt(eval_rows)[:128]
    prompts = [tokenizer.prompt(row["prompt"])[-max_length // 2 :] for row in shown]
    up, down = int(labels.sum()), int((~labels).sum())
    by_rule = balanced_weights(up, down)
    weight_up, weight_down = config.desirable_weight or by_rule[0], config.undesirable_weight or by_rule[1]
    print(
        f"labels: {up:,} desirable × {weight_up:.3g}, {down:,} undesirable × {weight_down:.3g}: "
        f"λ_D n_D / (λ_U n_U) = {weight_up * up / max(1, weight_down * down):.3g} (the rule: 1 to 1.33)"
    )
    if len(examples) < 2:
        raise UserError("a single row has no mismatched pair: KTO needs at least two.")

    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    prepare(config, policy, ref)
    order = BatchOrder([len(ids) for ids, _ in examples], config.batch_size, config.seed, least=2)
    steps = config.steps or max(1, round(config.epochs * order.steps_per_epoch))
    data = fingerprint(policy.embed.weight, labels, *(part for example in examples for part in example))
    first_step = resume(config, policy, optimizer, stage="kto", data=data)["step"]
    metrics = cli.Metrics(config, steps, device, first_step)
    metrics.models("policy", "reference")
    stop = CleanStop()

    for step in range(first_step, steps):
        indices = order[step]
        z = reference_point(
            policy, ref, [examples[i] for i in indices], tokenizer, config, max_length, device, autocast
        )
        loss_sum, by_label = torch.zeros((), device=device), torch.zeros(3, 2, device=device)
        lengths = order.lengths[indices]
        for micro in micro_batches(indices, config.micro_batch, lengths, config.micro_tokens):
            batch = [examples[i] for i in micro]
            desirable = labels[torch.from_numpy(micro)].to(device, non_blocking=True)
            with autocast:
                logp = sequence_logprobs(policy, batch, tokenizer, device)
                with torch.no_grad():
                    ref_logp = sequence_logprobs(ref, batch, tokenizer, device)
            loss = kto_loss(logp - ref_logp, desirable, z, config.beta, weight_up, weight_down)  # (B,)
            (loss.sum() / len(indices)).backward()
            with torch.no_grad():
                loss_sum += loss.sum()
                values = torch.stack((config.beta * (logp - ref_logp), logp, torch.ones_like(logp)))  # (3, B)
                by_label += values @ torch.stack((desirable, ~desirable), dim=1).to(values.dtype)
            metrics.tokens += sum(len(ids) for ids, _ in batch)
        if step == 0:  # policy and reference are the same model, so r = z = 0
            due = (weight_up * by_label[2, 0] + weight_down * by_label[2, 1]).item() / 2 / len(indices)
            found = loss_sum.item() / len(indices)
            print(f"step-0 check: loss {found:.6f}, half the mean weight is {due:.6f}, z {z.item():.1e}")
            if not abs(found - due) <= (1e-2 if device.type == "cuda" else 1e-4) * due:  # bf16 or fp32
                raise UserError("the loss must start at half the weight: policy and reference disagree.")
        lr = learning_rate(step, steps, config.lr, config.warmup)
        grad_norm = optimizer_step(policy, optimizer, lr, config.clip)

        done, stopping = step + 1, bool(stop)
        save_now = done % config.save_every == 0 or stopping
        if done % config.log_every == 0 or done in (1, steps) or save_now:
            (reward_up, reward_down), (logp_up, logp_down) = by_label[:2] / by_label[2].clamp(min=1)
            metrics.log(
                done, loss=loss_sum / len(indices), z=z, reward_desirable=reward_up,
                reward_undesirable=reward_down, logp_desirable=logp_up, logp_undesirable=logp_down,
                desirable=by_label[2, 0] / len(indices), grad_norm=grad_norm, lr=lr,
            )  # fmt: skip
        if done % config.eval_every == 0 or done == steps:
            result = evaluate(
                policy, ref, eval_examples, eval_labels, prompts, tokenizer, config, device, autocast
            )
            metrics.note(step=done, **result)
            print("  held-out " + "  ".join(f"{k.removeprefix('eval_')} {v:.3f}" for k, v in result.items()))
            with autocast:
                texts = respond(policy, tokenizer, prompts[:4], 96, config.seed)[0]
            for row, text in zip(shown, texts):
                print(f"  {row['prompt'][-1]['content'][:80]!r} → {text!r}")
        if save_now:
            save_partial(config, policy, optimizer, stage="kto", tokenizer=tokenizer, step=done, data=data)
        if stopping:
            stop.leave(config, done)
    finish(config, policy, stage="kto", tokenizer=tokenizer, step=steps)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
