"""Direct preference optimisation: fit the policy itself to preferences, without a reward model.

    h = (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x))      token sums
    dpo    L = −log σ(βh)                          (Rafailov et al. 2023, eq. 7)
    cdpo   L = −(1−ε) log σ(βh) − ε log σ(−βh)     labels flip with probability ε (Mitchell 2023)

The implicit reward of a response is β (log π − log π_ref); the optimum is π ∝ π_ref exp(r/β) for the reward
r that explains the preferences best.

    python train_dpo.py                                             # the built-in world
    python train_dpo.py --data hh.jsonl --init out/sft.pt --out out/dpo.pt --lr 1e-5

A healthy run: the loss starts at ln 2 (checked), the accuracy rises above one half, the margin grows. The
log-prob of the chosen responses usually *falls*, only less than that of the rejected: watch logp_chosen and
logp_rejected.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import finish, load_policy, resume, save_partial, write
from nanoalign.data import BatchOrder, collate, micro_batches, pair_examples, read_rows, split_rows
from nanoalign.generate import respond, sample_kl
from nanoalign.logprobs import masked_sum, token_logprobs
from nanoalign.training import (
    CleanStop,
    already_finished,
    compile_hidden,
    fingerprint,
    freeze,
    learning_rate,
    make_optimizer,
    optimizer_step,
    setup,
)  # fmt: skip

LOGGED = ("loss", "reward_chosen", "reward_rejected", "accuracy", "logp_chosen", "logp_rejected")


@dataclass
class Config:
    init: str = "out/demo/sft.pt"  # the checkpoint to start from, and the reference
    data: str = "out/demo/pairs.jsonl"  # pair rows: prompt, chosen and rejected, or HH transcripts
    eval_data: str = ""  # held-out pairs; empty: every twentieth prompt's
    out: str = "out/demo/dpo.pt"  # the checkpoint to write; metrics go beside it
    loss: str = "dpo"  # dpo, or cdpo for labels that may be wrong
    beta: float = 0.1  # β: how strongly the policy is held to the reference
    label_smoothing: float = 0.1  # ε of cdpo: the share of labels thought to be flipped
    cache_reference: str = ""  # a file for the reference's log-probs: computed once, read by later runs
    max_length: int = 128  # tokens of prompt and response; longer pairs are truncated, and counted
    epochs: float = 1.0  # passes over the data
    batch_size: int = 32  # pairs per optimiser step
    micro_batch: int = 0  # pairs per forward pass; 0: the whole batch at once
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


def pair_logprobs(model, batch, tokenizer, device) -> tuple[Tensor, Tensor]:
    """Pairs → summed response log-probs of the chosen and of the rejected, (B,) each, in one forward pass."""
    ids, mask = collate([chosen for chosen, _ in batch] + [rejected for _, rejected in batch], tokenizer.pad)
    logp = token_logprobs(model, ids.to(device, non_blocking=True), mask)  # (2B, T)
    return masked_sum(logp, mask).chunk(2)


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
            logp.append(torch.stack(pair_logprobs(ref, batch, tokenizer, device), dim=1))
        progress.advance(len(batch))
    write(path, {"key": key, "logp": torch.cat(logp).cpu()})
    return torch.cat(logp)


@torch.no_grad()
def evaluate(policy, ref, examples, prompts, tokenizer, config: Config, device, autocast) -> dict:
    """Held-out loss and accuracy, and the KL to the reference on the policy's own samples."""
    losses, hits = [], []
    for start in range(0, len(examples), config.batch_size):
        batch = examples[start : start + config.batch_size]
        with autocast:
            chosen, rejected = pair_logprobs(policy, batch, tokenizer, device)
            ref_chosen, ref_rejected = pair_logprobs(ref, batch, tokenizer, device)
        losses.append(dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta))
        hits.append((chosen - ref_chosen > rejected - ref_rejected).float())
    with autocast:
        kl = sample_kl(policy, ref, tokenizer, prompts, 96, config.seed)
    return {
        "eval_loss": torch.cat(losses).mean().item(),
        "eval_accuracy": torch.cat(hits).mean().item(),
        "eval_kl": kl.mean().item(),
    }


def main(config: Config) -> None:
    if config.loss not in ("dpo", "cdpo"):
        raise UserError(f"--loss {config.loss} is unknown; choose dpo or cdpo.")
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, stages=("sft", "dpo", "ppo"))
    ref = freeze(copy.deepcopy(policy))

    rows = read_rows(config.data, "pairs", config.skip_bad_rows)
    rows, eval_rows = split_rows(rows, config.eval_data, "pairs", config.skip_bad_rows)
    max_length = min(config.max_length, policy.config.context)
    examples, _ = pair_examples(rows, tokenizer, max_length)
    eval_examples, _ = pair_examples(eval_rows[:500], tokenizer, max_length)
    prompts = [tokenizer.prompt(row["prompt"])[-max_length // 2 :] for row in eval_rows[:128]]
    cached = None
    if config.cache_reference:
        cached = reference_logprobs(ref, examples, tokenizer, config, device, autocast)

    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    if config.compile:
        compile_hidden(policy)
        compile_hidden(ref)
    order = BatchOrder([max(len(c[0]), len(r[0])) for c, r in examples], config.batch_size, config.seed)
    steps = max(1, round(config.epochs * order.steps_per_epoch))
    data = fingerprint(policy.embed.weight, *(part for pair in examples for side in pair for part in side))
    first_step = resume(config, policy, optimizer, stage="dpo", data=data)["step"]
    metrics = cli.Metrics(config, steps, device, first_step)
    stop = CleanStop()
    smoothing = config.label_smoothing if config.loss == "cdpo" else 0.0

    for step in range(first_step, steps):
        indices = order[step]
        pairs = len(indices)  # of the whole optimiser step
        sums = torch.zeros(len(LOGGED), device=device)
        for micro in micro_batches(indices, config.micro_batch):
            batch = [examples[i] for i in micro]
            with autocast:
                chosen, rejected = pair_logprobs(policy, batch, tokenizer, device)
                if cached is None:
                    with torch.no_grad():
                        ref_chosen, ref_rejected = pair_logprobs(ref, batch, tokenizer, device)
                else:
                    ref_chosen, ref_rejected = cached[
                        torch.from_numpy(micro).to(device, non_blocking=True)
                    ].unbind(dim=1)
            loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta, smoothing)  # (B,)
            (loss.sum() / pairs).backward()
            with torch.no_grad():
                reward_chosen = config.beta * (chosen - ref_chosen)
                reward_rejected = config.beta * (rejected - ref_rejected)
                right = (reward_chosen > reward_rejected).float()
                values = (loss, reward_chosen, reward_rejected, right, chosen, rejected)
                sums += torch.stack([value.sum() for value in values])
            metrics.tokens += sum(len(side[0]) for pair in batch for side in pair)
        if step == 0:  # policy and reference are the same model, so h = 0
            print(f"step-0 check: loss {sums[0].item() / pairs:.6f}, ln 2 = {math.log(2):.6f}")
            if abs(sums[0].item() / pairs - math.log(2)) > (
                1e-2 if device.type == "cuda" else 1e-4
            ):  # bf16 or fp32
                raise UserError("the loss must start at ln 2: policy and reference disagree.")
        lr = learning_rate(step, steps, config.lr, config.warmup)
        grad_norm = optimizer_step(policy, optimizer, lr, config.clip)

        done, stopping = step + 1, bool(stop)
        save_now = done % config.save_every == 0 or stopping
        if done % config.log_every == 0 or done in (1, steps) or save_now:
            mean = dict(zip(LOGGED, sums / pairs))
            margin = mean["reward_chosen"] - mean["reward_rejected"]
            metrics.log(done, **mean, margin=margin, grad_norm=grad_norm, lr=lr)
        if done % config.eval_every == 0 or done == steps:
            result = evaluate(policy, ref, eval_examples, prompts, tokenizer, config, device, autocast)
            metrics.note(step=done, **result)
            print("  held-out " + "  ".join(f"{k.removeprefix('eval_')} {v:.3f}" for k, v in result.items()))
            with autocast:
                texts = respond(policy, tokenizer, prompts[:4], 96, config.seed)[0]
            for row, text in zip(eval_rows, texts):
                print(f"  {row['prompt'][-1]['content'][:80]!r} → {text!r}")
        if save_now:
            save_partial(config, policy, optimizer, stage="dpo", tokenizer=tokenizer, step=done, data=data)
        if stopping:
            stop.leave(config, done)
    finish(config, policy, stage="dpo", tokenizer=tokenizer, step=steps)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
