"""Direct preference optimisation: fit the policy itself to preferences, without a reward model.

    h = (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x))      token sums
    dpo    L = −log σ(βh)                          (Rafailov et al. 2023, eq. 7)
    cdpo   L = −(1−ε) log σ(βh) − ε log σ(−βh)     labels flip with probability ε (Mitchell 2023)
    robust L = (−(1−ε) log σ(βh) + ε log σ(−βh)) / (1−2ε)       the same, unbiased (Chowdhury et al. 2024)
    ipo    L = (h̄ − 1/(2β))²                       h̄ of per-token means (Azar et al. 2023, eq. 17)
    simpo  L = −log σ(β (m_w − m_l) − γ)           m the mean log-prob; no reference (Meng et al. 2024, eq. 6)

Every loss is a function of the margin h. With a soft label p (a row's "probability") it is p L(h) + (1−p)
L(−h), expected over the label. The implicit reward of a response is β (log π − log π_ref); the optimum of dpo
is π ∝ π_ref exp(r/β) for the reward r that explains the preferences best. With --sft-weight α, −α m_w is
added (RPO: Pang et al. 2024).

    python train_dpo.py                                             # the built-in world
    python train_dpo.py --loss simpo --gamma 0.5 --out out/demo/simpo.pt
    python train_dpo.py --data hh.jsonl --init out/sft.pt --out out/dpo.pt --lr 1e-5

Deviations: IPO takes per-token means where its paper takes sums, so that a long response is not a strong
one; its β is therefore per token. SimPO's γ is subtracted as it is: not the ratio γ/β that the paper tunes.

A healthy run: dpo, cdpo and robust start at ln 2, ipo at 1/(4β²) (checked); the accuracy rises above one
half, the margin grows. The log-prob of the chosen responses usually *falls*, only less than that of the
rejected: watch logp_chosen and logp_rejected. In the demo accuracy reaches two thirds at a KL of 0.3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, collate, pair_examples, questions, read_split, without_ties
from nanoalign.logprobs import token_logprobs
from nanoalign.packing import packed_hidden
from nanoalign.rollouts import respond, sample_kl
from nanoalign.run import Flags, Run, already_finished
from nanoalign.training import load_reference, make_optimizer, prepare, setup


@dataclass(kw_only=True)
class Config(Flags):
    init: str = "out/demo/sft.pt"  # the checkpoint to start from, and the reference
    data: str = "out/demo/pairs.jsonl"  # pair rows: prompt, chosen and rejected, or HH transcripts
    out: str = "out/demo/dpo.pt"  # the checkpoint to write; metrics go beside it
    loss: str = "dpo"  # dpo; cdpo or robust for labels that may be wrong; ipo; simpo
    beta: float = 0.0  # β: how strongly it is held to the reference; 0: the papers' 0.1, for simpo 2
    gamma: float = 1.0  # γ of simpo: the margin that is asked for
    label_smoothing: float = 0.1  # ε of cdpo and robust: the share of labels thought to be flipped
    sft_weight: float = 0.0  # α: weight of the chosen response's mean negative log-prob
    max_length: int = 128  # tokens of prompt and response; longer pairs are truncated, and counted
    max_new_tokens: int = 96  # length limit of a sampled response


def dpo_loss(h: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Margins h (B,) in nats → loss (B,) (Rafailov et al. 2023, eq. 7).

    With label_smoothing ε > 0 it is conservative DPO (Mitchell 2023, eq. 3).
    """
    kept, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return (1 - label_smoothing) * kept + label_smoothing * flipped


def robust_dpo_loss(h: Tensor, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Margins h (B,) → loss (B,) whose mean over labels flipped with probability ε is the clean labels' loss.

    Chowdhury et al. 2024, eq. 12.
    """
    kept, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(h: Tensor, beta: float = 0.1) -> Tensor:
    """Margins h (B,) of per-token means → loss (B,), least at 1/(2β) (Azar et al. 2023, eq. 17)."""
    return (h - 1 / (2 * beta)) ** 2


def simpo_loss(h: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Margins h (B,) of per-token means, without reference → loss (B,) (Meng et al. 2024, eq. 6)."""
    return -F.logsigmoid(beta * h - gamma)


class Loss(NamedTuple):
    of: Callable  # (margins h (B,), config) → loss (B,)
    means: bool = False  # h is of per-token means, not of sums
    reference: bool = True  # h is measured from the reference
    start: Callable = lambda beta: math.log(2)  # L(0), where a run must start
    beta: float = 0.1  # the paper's


LOSSES = {
    "dpo": Loss(lambda h, c: dpo_loss(h, c.beta)),
    "cdpo": Loss(lambda h, c: dpo_loss(h, c.beta, c.label_smoothing)),
    "robust": Loss(lambda h, c: robust_dpo_loss(h, c.beta, c.label_smoothing)),
    "ipo": Loss(lambda h, c: ipo_loss(h, c.beta), means=True, start=lambda beta: 1 / (2 * beta) ** 2),
    "simpo": Loss(lambda h, c: simpo_loss(h, c.beta, c.gamma), means=True, reference=False, beta=2.0),
}


def preference_loss(config: Config, logps: Tensor, ref_logps: Tensor, tokens: Tensor, p: Tensor) -> dict:
    """Log-prob sums of both sides (2, B), the reference's, their lengths, P(chosen is better) (B,) → what is
    logged, (B,) each: the loss, and of both sides the implicit rewards and log-probs."""
    loss = LOSSES[config.loss]
    ratios = (logps - ref_logps) / tokens if loss.means else logps - ref_logps  # (2, B)
    h = ratios[0] - ratios[1]
    value = p * loss.of(h, config) + (1 - p) * loss.of(-h, config)
    if config.sft_weight:
        imitated = config.sft_weight * logps / tokens
        value = value - p * imitated[0] - (1 - p) * imitated[1]
    chosen, rejected = config.beta * ratios
    return {
        "loss": value, "reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected,
        "accuracy": (chosen > rejected).float(), "logp_chosen": logps[0], "logp_rejected": logps[1],
    }  # fmt: skip


def pair_logprobs(model, batch: list, tokenizer, device) -> tuple[Tensor, Tensor]:
    """Pairs → summed response log-probs of the chosen and of the rejected (2, B), and their tokens (2, B).

    One forward pass, in which each prompt is read once, not with either response.
    """
    ids, mask = collate([side for pair in batch for side in pair], tokenizer.pad)  # (2B, T)
    ids = ids.to(device, non_blocking=True)
    hidden = packed_hidden(model, ids, mask, [2] * len(batch))
    logp = token_logprobs(model, ids, mask, hidden=hidden).sum(-1)  # 0 elsewhere
    tokens = mask.sum(-1).float().to(device, non_blocking=True)
    return logp.view(-1, 2).T, tokens.view(-1, 2).T


def measure(policy, ref, batch: list, p: Tensor, tokenizer, config: Config, device) -> dict[str, Tensor]:
    """Pairs and their soft labels p (B,) → what `preference_loss` says of them."""
    logps, tokens = pair_logprobs(policy, batch, tokenizer, device)
    with torch.no_grad():
        ref_logps = pair_logprobs(ref, batch, tokenizer, device)[0] if ref else torch.zeros_like(logps)
    return preference_loss(config, logps, ref_logps, tokens, p)


def soft_labels(rows: list[dict], device) -> Tensor:
    """Pair rows → the probability (N,) that the chosen side is the better one; 1 where a row names none."""
    return torch.tensor([row.get("probability", 1.0) for row in rows], device=device)


@torch.no_grad()
def evaluate(policy, ref, pairs: list, soft: Tensor, prompts, tokenizer, config: Config, device) -> dict:
    """Held-out loss, without SFT term, and accuracy; KL to the reference (if any) on the policy's samples."""
    size, config = config.batch_size, replace(config, sft_weight=0.0)
    pieces = [slice(start, start + size) for start in range(0, len(pairs), size)]
    found = [measure(policy, ref, pairs[i], soft[i], tokenizer, config, device) for i in pieces]
    result = {name: torch.cat([f[name] for f in found]).mean().item() for name in ("loss", "accuracy")}
    if ref:
        kl = sample_kl(policy, ref, tokenizer, prompts, config.max_new_tokens, config.seed)
        result["kl"] = kl.mean().item()
    return result


def main(config: Config) -> None:
    if config.loss not in LOSSES:
        raise UserError(f"--loss {config.loss} is unknown; choose from {', '.join(LOSSES)}.")
    if config.max_new_tokens < 1:
        raise UserError("--max-new-tokens must be at least 1.")
    loss = LOSSES[config.loss]
    config.beta = config.beta or loss.beta
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, chat=True)
    ref = load_reference(config, policy, tokenizer, device) if loss.reference else None

    rows, eval_rows = read_split(config, config.data, "pairs", 500)
    eval_rows = without_ties(eval_rows, "held-out")
    max_length = min(config.max_length, policy.config.context)
    eval_pairs, kept = pair_examples(eval_rows, tokenizer, max_length, "held-out")
    eval_soft = soft_labels(kept, device)
    pairs, kept = pair_examples(rows, tokenizer, max_length)
    soft = soft_labels(kept, device)
    shown, prompts = questions(eval_rows, tokenizer, max_length)

    prepare(config, policy, ref)
    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    lengths = [max(len(ids) for ids, _ in pair) for pair in pairs]
    order = BatchOrder(lengths, config.batch_size, config.seed)
    made_from = policy, pairs, soft
    models = ("policy", *(["reference"] if ref else []))
    run = Run(config, "dpo", policy, tokenizer, optimizer, order, made_from, models, held=(ref,))

    for step in run:
        for batch, where in run.pieces(pairs, 2 * order.lengths):
            with autocast:
                found = measure(policy, ref, batch, soft[where], tokenizer, config, device)
            run.backward(found["loss"])
            run.add(**found)
            run.metrics.tokens += sum(len(side[0]) for pair in batch for side in pair)
        if step == 0 and ref and not config.sft_weight:  # the same model: h = 0
            run.must_start_at(loss.start(config.beta), "L(0)")
        run.update()
        run.log()
        if run.looks:
            with autocast:
                result = evaluate(policy, ref, eval_pairs, eval_soft, prompts, tokenizer, config, device)
                texts, _ = respond(policy, tokenizer, prompts[:4], config.max_new_tokens, config.seed)
            run.show(result, shown[:4], texts)
    run.finish()


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
