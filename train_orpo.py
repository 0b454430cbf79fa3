"""Odds-ratio preference optimisation: imitation and preferences in one stage, from the base model.

    L = NLL(x, y_w) − λ log σ(log odds(y_w|x) − log odds(y_l|x))        (Hong et al. 2024, eqs. 6 and 7)
    odds(y|x) = p / (1 − p),   log p = m = the mean log-prob of the response's tokens

No reference model and no SFT stage before: the first part teaches the answer, the second that the rejected
one is less likely. As in the paper the NLL is the mean over prompt and response; `--nll response` leaves the
prompt out. With a pair's "probability" p that the chosen side is better the loss is expected over the label,
p L(x, y_w, y_l) + (1−p) L(x, y_l, y_w), as if the pair stood there in both orders that often.

    python train_orpo.py                                            # the built-in world, from its base model
    python train_orpo.py --data hh.jsonl --init out/base.pt --out out/orpo.pt --lr 1e-4

A healthy run: nll falls as in SFT, odds_loss starts near ln 2 and falls more slowly, log_odds_ratio rises
above 0. The log-probs of *both* sides rise at first, because rejected answers are answers too. In the demo
nll goes from 2.0 to 0.7 (held out 0.5), odds_loss from 0.73 to 0.54 (0.61), held-out accuracy to 69 %.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, collate, pair_examples, questions, read_split, without_ties
from nanoalign.logprobs import masked_mean, token_logprobs, within
from nanoalign.packing import packed_hidden
from nanoalign.rollouts import respond
from nanoalign.run import Flags, Run, already_finished
from nanoalign.training import make_optimizer, prepare, setup


@dataclass(kw_only=True)
class Config(Flags):
    init: str = "out/demo/base.pt"  # the checkpoint to start from: the base model
    data: str = "out/demo/pairs.jsonl"  # pair rows: prompt, chosen and rejected, or HH transcripts
    out: str = "out/demo/orpo.pt"  # the checkpoint to write; metrics go beside it
    lam: float = 0.1  # λ: weight of the odds-ratio part
    nll: str = "all"  # imitate all of prompt and chosen response, as in the paper, or the response only
    max_length: int = 128  # tokens of prompt and response; longer pairs are truncated, and counted
    adam_eps: float = 1e-3  # Adam's ε; with a small one, words that the data never says drift away
    lr: float = 1e-3


def log_odds(mean_logp: Tensor) -> Tensor:
    """Mean log-probs m (B,) → log(p / (1 − p)), p = e^m: m − log(1 − e^m). An m above −1e-6 is taken
    for −1e-6, and has no gradient.

    log(1 − e^m) in two branches (Mächler 2012): log(−expm1(m)) near 0, log1p(−e^m) below −ln 2.
    """
    m = within(mean_logp, -math.inf, -1e-6)
    near = m > -math.log(2)
    # each branch is fed a harmless value where the other is taken, so that no 0 · ∞ reaches the gradient
    log1mexp = torch.where(
        near,
        torch.log(-torch.expm1(m.masked_fill(~near, -0.1))),
        torch.log1p(-torch.exp(m.masked_fill(near, -1.0))),
    )
    return m - log1mexp


def odds_loss(ratio: Tensor, p: Tensor | float = 1.0) -> Tensor:
    """Log-odds ratios (B,) → the second part of the loss (B,), expected over the label."""
    return -p * F.logsigmoid(ratio) - (1 - p) * F.logsigmoid(-ratio)


def orpo_loss(
    nll: Tensor, chosen_mean: Tensor, rejected_mean: Tensor, lam: float = 0.1, p: Tensor | float = 1.0
) -> Tensor:
    """NLL of what is imitated, mean log-probs of both responses, labels p, (B,) each → loss (B,)."""
    return nll + lam * odds_loss(log_odds(chosen_mean) - log_odds(rejected_mean), p)


def pair_logprobs(
    policy, batch: list, tokenizer, config: Config, device, p: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs → NLL of the chosen side, mean response log-probs of both, (B,) each.

    p (B,), on the CPU: the NLL is the rejected side's with 1 − p. Each prompt is read once, for both sides.
    """
    sides = [side for pair in batch for side in pair]
    ids, mask = collate(sides, tokenizer.pad)  # (2B, T)
    p = torch.ones(len(batch)) if p is None else p
    share = torch.stack((p, 1 - p), dim=1)  # (B, 2) of each side in what is imitated
    imitated = mask.clone()
    for row, (side, _) in enumerate(sides):
        if config.nll == "all" and share[row // 2, row % 2] > 0:
            imitated[row, 1 : len(side)] = True
    ids = ids.to(device, non_blocking=True)
    hidden = packed_hidden(policy, ids, mask, [2] * len(batch))
    logp = token_logprobs(policy, ids, imitated, hidden=hidden)  # (2B, T)
    chosen_mean, rejected_mean = masked_mean(logp, mask).view(-1, 2).T
    nll = -masked_mean(logp, imitated).view(-1, 2)
    expected = (share.to(device, non_blocking=True) * nll).sum(-1)
    return expected, chosen_mean, rejected_mean


def measure(policy, batch: list, tokenizer, config: Config, device) -> dict[str, Tensor]:
    """Pairs with labels → what is logged, (B,) each: the loss, its parts, and both sides' mean log-probs."""
    pairs, p = zip(*batch)
    p = torch.tensor(p)
    nll, chosen, rejected = pair_logprobs(policy, pairs, tokenizer, config, device, p)
    ratio, p = log_odds(chosen) - log_odds(rejected), p.to(device, non_blocking=True)
    return {
        "loss": orpo_loss(nll, chosen, rejected, config.lam, p),
        "nll": nll, "odds_loss": odds_loss(ratio, p), "log_odds_ratio": ratio,
        "accuracy": (ratio > 0).float(), "mean_logp_chosen": chosen, "mean_logp_rejected": rejected,
    }  # fmt: skip


def with_labels(pairs: list, rows: list[dict]) -> list[tuple]:
    """Pairs and the row of each → (pair, P(its chosen side is the better one)) of each."""
    return [(pair, row.get("probability", 1.0)) for pair, row in zip(pairs, rows)]


@torch.no_grad()
def evaluate(policy, pairs: list, tokenizer, config: Config, device) -> dict[str, float]:
    """Held-out means of what is logged."""
    pieces = [pairs[i : i + config.batch_size] for i in range(0, len(pairs), config.batch_size)]
    found = [measure(policy, piece, tokenizer, config, device) for piece in pieces]
    return {name: torch.cat([f[name] for f in found]).mean().item() for name in found[0]}


def main(config: Config) -> None:
    if config.nll not in ("all", "response"):
        raise UserError(f"--nll {config.nll} is unknown; choose all or response.")
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device)

    rows, eval_rows = read_split(config, config.data, "pairs", 500)
    eval_rows = without_ties(eval_rows, "held-out")
    max_length = min(config.max_length, policy.config.context)
    pairs = with_labels(*pair_examples(rows, tokenizer, max_length))
    eval_pairs = with_labels(*pair_examples(eval_rows, tokenizer, max_length, "held-out"))
    shown, prompts = questions(eval_rows, tokenizer, max_length, 4)

    prepare(config, policy)
    optimizer = make_optimizer(policy, config.lr, config.weight_decay, eps=config.adam_eps)
    lengths = [max(len(ids) for ids, _ in pair) for pair, _ in pairs]
    order = BatchOrder(lengths, config.batch_size, config.seed)
    made_from = policy, pairs
    run = Run(config, "orpo", policy, tokenizer, optimizer, order, made_from)

    for step in run:
        for batch, _ in run.pieces(pairs, 2 * order.lengths):
            with autocast:
                found = measure(policy, batch, tokenizer, config, device)
            run.backward(found["loss"])
            run.add(**found)
            run.metrics.tokens += sum(len(ids) for pair, _ in batch for ids, _ in pair)
        if step == 0:  # an untrained model thinks both sides about equally likely
            print(f"step-0 check: odds part {run.means()['odds_loss']:.4f}, near ln 2 = {math.log(2):.4f}")
        run.update()
        run.log()
        if run.looks:
            with autocast:
                result = evaluate(policy, eval_pairs, tokenizer, config, device)
                texts, _ = respond(policy, tokenizer, prompts, 96, config.seed)
            run.show(result, shown, texts)
    run.finish()


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
