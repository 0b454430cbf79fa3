"""A process reward model: a GPT with a scalar head that says of each step of a solution whether it is right.

    L = −1/S Σ_s [ y_s log σ(z_s) + (1 − y_s) log(1 − σ(z_s)) ]           (Uesato et al. 2022; Lightman et al.
                                                                           2023, §2.6)

over the S labelled steps of an optimiser step. z_s is the model's output at the token that ends step s, with
no shift: the model has read the whole step by then. Unlabelled steps take part in nothing but the context.
y_s may be a probability: Math-Shepherd's labels are the share of continuations from s that reach the right
answer (Wang et al. 2024, eq. 4).

With --lm-weight w the model also stays a language model (the joint objective of Cobbe et al. 2021, §4.2): w
times the mean −log p of the tokens of steps labelled right is added, read through the embedding.

    python train_prm.py                                         # the built-in world, labels by its checker
    python train_prm.py --outcome --out out/demo/orm.pt         # an outcome reward model, for comparison
    python train_prm.py --data out/demo/steps.rollouts.jsonl --out out/demo/prm-rollouts.pt   # Math-Shepherd
    python train_prm.py --data prm800k.jsonl --neutral ignore --init out/sft.pt --out out/prm.pt

--outcome is the same network on the same solutions with a single label each: at the last step, whether the
final answer is right.

What is made into rows of steps: PRM800K's raw rows, Math-Shepherd's, and any labelled solutions, whose lines
become the steps. Lines of GSM8K solutions carry their own check, <<48/2=24>>: a line is labelled wrong if
such an equation is false, right if all are true. That finds slips in reckoning only: GSM8K's models had a
calculator, and their mistakes lie in what they chose to reckon, which nothing in the line gives away.

A healthy run: held-out AUC starts near 0.5, with a random head, and rises. Watch `exact` and `f1`, the first
errors that it finds, more than `accuracy`: a model that has learnt which steps are hard, not yet which are
wrong, calls most steps right, as they are, and best of n by it gets worse as n grows (docs/prm.md).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanoalign import UserError, cli
from nanoalign.checkpoint import CHAT, finish, load_policy, resume, save_partial
from nanoalign.data import BatchOrder, collate, micro_batches, split_rows
from nanoalign.logprobs import masked_sum, token_logprobs
from nanoalign.model import ScalarGPT
from nanoalign.rows import read_rows
from nanoalign.steps import UNLABELLED, step_example
from nanoalign.training import (
    CleanStop,
    already_finished,
    fingerprint,
    learning_rate,
    make_optimizer,
    optimizer_step,
    prepare,
    setup,
)


@dataclass
class Config:
    init: str = "out/demo/solver.pt"  # the checkpoint whose trunk the model starts from
    data: str = "out/demo/steps.jsonl"  # rows of steps and labels, or any format named above
    eval_data: str = ""  # held-out rows; empty: every twentieth prompt's
    out: str = "out/demo/prm.pt"  # the checkpoint to write; metrics go beside it
    outcome: bool = False  # one label a solution, at its end: whether the final answer is right
    neutral: str = "good"  # PRM800K's rating 0: good (it counts as right) or ignore
    max_length: int = 128  # tokens of prompt and steps; steps that end beyond are cut off, and counted
    epochs: float = 1.0  # passes over the data
    batch_size: int = 32  # solutions per optimiser step
    micro_batch: int = 0  # solutions per forward pass; 0: the whole batch at once
    micro_tokens: int = 0  # tokens per forward pass at most, padding included; 0: no limit
    lm_weight: float = 0.3  # of the language-modelling loss on steps that are right; 0: none
    lr: float = 1e-3  # peak learning rate
    warmup: int = 20  # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.0  # on matrices
    clip: float = 1.0  # gradient norm
    log_every: int = 10  # steps between metrics
    eval_every: int = 100  # steps between held-out evaluations
    save_every: int = 100  # steps between saves of X.partial.pt, from which --resume continues
    seed: int = 0  # of the head and of the data order
    device: str = "auto"  # auto, cpu, cuda, …
    compile: bool = False  # torch.compile the forward pass
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    resume: bool = False  # continue X.partial.pt where it stopped, bit for bit
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


def step_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, T), labels (B, T) in [0, 1], or −100 where there is none → binary cross-entropy in nats, the
    mean over the labelled steps, a scalar (Lightman et al. 2023, §2.6). No label at all gives 0."""
    logits, labels = logits.float(), labels.float()
    labelled = labels != UNLABELLED
    loss = F.binary_cross_entropy_with_logits(logits, labels.masked_fill(~labelled, 0.0), reduction="none")
    return loss.masked_fill(~labelled, 0.0).sum() / labelled.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------ data


def labels_of(row: dict, outcome: bool, neutral: str) -> list[float]:
    """A row of steps → a label for each step, −100 for none."""
    labels = [UNLABELLED if label is None else label for label in row["labels"]]
    if outcome:
        return [UNLABELLED] * (len(labels) - 1) + [float(row["label"])]
    ignored = row.get("neutral", []) if neutral == "ignore" else []
    return [UNLABELLED if i in ignored else label for i, label in enumerate(labels)]


def step_examples(rows: list[dict], tokenizer, max_length: int, outcome: bool, neutral: str) -> list:
    """Rows of steps → (ids (T,), labels (T,) fp32, which tokens are text of right steps (T,) bool).

    Prints what was cut off and dropped.
    """
    if outcome and any("label" not in row for row in rows):
        raise UserError('--outcome needs rows with a "label": whether the final answer is right.')
    examples, cut = [], 0
    for row in rows:
        labels = np.array(labels_of(row, outcome, neutral), dtype=np.float32)
        prompt = tokenizer.prompt(row["prompt"])
        example = step_example(prompt, row["completions"], tokenizer, max_length)
        if example is None:
            continue
        ids, ends = example
        kept = int(ends.sum())
        cut += kept < len(labels)
        if (labels[:kept] != UNLABELLED).any():
            at = np.full(len(ids), UNLABELLED, dtype=np.float32)
            at[ends] = labels[:kept]
            right, imitated = [row["label"]] * kept if outcome else labels, np.zeros(len(ids), dtype=bool)
            start = len(prompt)
            for end, value in zip(np.flatnonzero(ends), right):
                imitated[start:end] = value >= 0.5
                start = end + 1
            examples.append((ids, at, imitated))
    print(
        f"data: {len(examples):,} solutions with a labelled step, {cut:,} cut off at {max_length} tokens, "
        f"{len(rows) - len(examples):,} dropped: no labelled step"
    )
    if not examples:
        raise UserError(
            f"no step of the {len(rows):,} rows is labelled (within --max-length {max_length}): there is "
            "nothing to learn."
        )
    return examples


def batch_of(examples: list, tokenizer, device) -> tuple[Tensor, Tensor, Tensor]:
    """→ ids (B, T) right-padded, labels (B, T), −100 on padding, and which tokens to imitate, on the CPU."""
    ids, imitated = collate([(ids, mask) for ids, _, mask in examples], tokenizer.pad)
    labels = pad_sequence([torch.from_numpy(at) for _, at, _ in examples], True, UNLABELLED)
    return ids.to(device, non_blocking=True), labels.to(device, non_blocking=True), imitated


# ------------------------------------------------------------------------------------------- evaluation


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive (N,) scores above a negative, ties half (Mann & Whitney 1947); NaN if there
    are none of one kind."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # of equal scores the mean rank
    P, N = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - P * (P + 1) / 2) / (P * N)) if P and N else math.nan


def calibration_error(p: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Probabilities and labels (N,) → the expected calibration error (Guo et al. 2017, eq. 3)."""
    index = np.digitize(p, np.linspace(0, 1, bins + 1)[1:-1])
    gaps = np.abs(np.bincount(index, p, bins) - np.bincount(index, labels, bins))
    return float(gaps.sum() / len(p))


def first_error(p: list[np.ndarray], labels: list[np.ndarray], threshold: float = 0.5) -> dict:
    """Per solution the probabilities and labels of its labelled steps → how well the first wrong step is
    found.

    exact: the share of solutions with an error whose first one is named; clean: of those without in which
    none is named; f1: their harmonic mean (Zheng et al. 2024, ProcessBench). A step is named if p <
    threshold.
    """
    found, clean = [], []
    for probabilities, truth in zip(p, labels):
        named, wrong = np.flatnonzero(probabilities < threshold), np.flatnonzero(truth < 0.5)
        first = named[0] if len(named) else -1
        found.append(first == wrong[0]) if len(wrong) else clean.append(first == -1)
    exact, none = (float(np.mean(x)) if x else math.nan for x in (found, clean))
    return {"exact": exact, "clean": none, "f1": 2 * exact * none / (exact + none) if exact + none else 0.0}


@torch.no_grad()
def evaluate(model: ScalarGPT, examples: list, tokenizer, device, autocast) -> dict:
    """Held-out loss in nats, AUC, accuracy and calibration over labelled steps, and first-error localisation.

    A soft label counts as right from one half.
    """
    p, labels = [], []
    for start in range(0, len(examples), 128):
        ids, at, _ = batch_of(examples[start : start + 128], tokenizer, device)
        with autocast:
            logits = model(ids)
        p += [row[y != UNLABELLED].cpu().numpy() for row, y in zip(logits.float().sigmoid(), at)]
        labels += [y[y != UNLABELLED].cpu().numpy() for y in at]
    flat, truth = np.concatenate(p).astype(np.float64), np.concatenate(labels).astype(np.float64)
    sure = flat.clip(1e-7, 1 - 1e-7)
    loss = -(truth * np.log(sure) + (1 - truth) * np.log(1 - sure)).mean()
    return {
        "loss": float(loss),
        "auc": auc(flat, truth >= 0.5),
        "accuracy": float(((flat >= 0.5) == (truth >= 0.5)).mean()),
        "ece": calibration_error(flat, truth),
        "right": float((truth >= 0.5).mean()),
        **first_error(p, labels),
    }


def main(config: Config) -> None:
    if config.neutral not in ("good", "ignore"):
        raise UserError(f"--neutral {config.neutral} is unknown; choose good or ignore.")
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, CHAT)
    if config.lm_weight and not policy.config.tied:
        raise UserError(f"{config.init} has an output head apart from its embedding: use --lm-weight 0.")
    model = ScalarGPT.from_policy(policy)
    del policy
    with torch.no_grad():  # the trunk knows what a line break means, and nothing yet of <|step|>
        model.gpt.embed.weight[tokenizer.step] = model.gpt.embed.weight[tokenizer.newlines[0]]

    rows = read_rows(config.data, "steps", config.skip_bad_rows)
    rows, eval_rows = split_rows(rows, config.eval_data, "steps", config.skip_bad_rows)
    max_length = min(config.max_length, model.config.context)
    examples, eval_examples = (
        step_examples(some, tokenizer, max_length, config.outcome, config.neutral)
        for some in (rows, eval_rows)
    )

    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    prepare(config, model.gpt)
    order = BatchOrder([len(ids) for ids, *_ in examples], config.batch_size, config.seed)
    steps = max(1, round(config.epochs * order.steps_per_epoch))
    data = fingerprint(model.gpt.embed.weight, *(part for example in examples for part in example))
    first_step = resume(config, model, optimizer, stage="prm", data=data)["step"]
    metrics = cli.Metrics(config, steps, device, first_step)
    stop = CleanStop()

    if first_step == 0:
        result = evaluate(model, eval_examples, tokenizer, device, autocast)
        if math.isnan(result["auc"]):
            print("step-0 check: the held-out steps are all right, or all wrong: there is no AUC to look at")
        else:
            print(f"step-0 check: held-out AUC {result['auc']:.3f} with a random head: chance is 0.5")

    for step in range(first_step, steps):
        indices = order[step]
        labelled = sum(int((examples[i][1] != UNLABELLED).sum()) for i in indices)  # of the optimiser step
        written = max(1, sum(int(examples[i][2].sum()) for i in indices))
        loss = torch.zeros((), device=device)
        lengths = order.lengths[indices]
        for micro in micro_batches(indices, config.micro_batch, lengths, config.micro_tokens):
            ids, labels, imitated = batch_of([examples[i] for i in micro], tokenizer, device)
            share = sum(int((examples[i][1] != UNLABELLED).sum()) for i in micro) / labelled
            with autocast:
                hidden = model.gpt.hidden(ids)
                micro_loss = step_loss(model.score(hidden), labels) * share
                loss += micro_loss.detach()
                if config.lm_weight:
                    logp = token_logprobs(model.gpt, ids, imitated, hidden=hidden)  # (B, T)
                    micro_loss = micro_loss - config.lm_weight * masked_sum(logp, imitated).sum() / written
            micro_loss.backward()
            metrics.tokens += sum(len(examples[i][0]) for i in micro)
        lr = learning_rate(step, steps, config.lr, config.warmup)
        grad_norm = optimizer_step(model, optimizer, lr, config.clip)

        done, stopping = step + 1, bool(stop)
        save_now = done % config.save_every == 0 or stopping
        if done % config.log_every == 0 or done in (1, steps) or save_now:
            metrics.log(done, loss=loss, grad_norm=grad_norm, lr=lr)
        if done % config.eval_every == 0 or done == steps:
            result = evaluate(model, eval_examples, tokenizer, device, autocast)
            metrics.note(step=done, **{f"eval_{name}": value for name, value in result.items()})
            print("  held-out " + "  ".join(f"{name} {value:.3f}" for name, value in result.items()))
        if save_now:
            save_partial(config, model, optimizer, stage="prm", tokenizer=tokenizer, step=done, data=data)
        if stopping:
            stop.leave(config, done)
    kind = "outcome" if config.outcome else "process"
    finish(config, model, stage="prm", tokenizer=tokenizer, step=steps, kind=kind, held_out=result)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
