"""A process reward model: a GPT with a scalar head that says of each step of a solution whether it is right.

    L = −1/S Σ_s [ y_s log σ(z_s) + (1 − y_s) log(1 − σ(z_s)) ]     (Uesato et al. 2022; Lightman et al. 2023)

over the S labelled steps of an optimiser step. z_s is the model's output at the token that ends step s, with
no shift: it has read the whole step by then. Unlabelled steps are context only. y_s may be a probability: the
share of continuations from s that reach the right answer (Math-Shepherd: Wang et al. 2024, eq. 4).

With --lm-weight w the model also stays a language model (the joint objective of Cobbe et al. 2021, §4.2): w
times the mean −log p of the tokens of steps labelled right is added, read through the embedding. With --lora
the embedding stays as it is, in which <|step|> is a line break.

    python train_prm.py                                         # the built-in world, labels by its checker
    python train_prm.py --outcome --out out/demo/orm.pt         # an outcome reward model, for comparison
    python train_prm.py --data out/demo/steps.rollouts.jsonl --out out/demo/prm-rollouts.pt   # Math-Shepherd
    python train_prm.py --data prm800k_steps.jsonl --neutral ignore --init out/sft.pt --out out/prm.pt

--outcome: one label a solution, at its end: is the final answer right? Other formats: lab/convert_steps.py.

A healthy run: held-out AUC starts near 0.5, with a random head, and rises (in the demo to 0.91, f1 to 0.76).
Watch `exact` and `f1`, the first errors that it finds, more than `accuracy`: a model that has learnt which
steps are hard, not yet which are wrong, calls most steps right, and best of n by it gets worse as n grows.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, collate, read_split
from nanoalign.logprobs import token_logprobs
from nanoalign.run import Flags, Run, already_finished
from nanoalign.scalar import ScalarGPT
from nanoalign.statistics import auc, calibration_error
from nanoalign.steps import UNLABELLED, read_as_line_breaks, step_example
from nanoalign.training import make_optimizer, prepare, setup


@dataclass(kw_only=True)
class Config(Flags):
    init: str = "out/demo/solver.pt"  # the checkpoint whose trunk the model starts from
    data: str = "out/demo/steps.jsonl"  # rows of steps and labels
    out: str = "out/demo/prm.pt"  # the checkpoint to write; metrics go beside it
    reader: bool = True  # show it how likely --init finds each token: what a small model needs
    outcome: bool = False  # one label a solution, at its end: whether the final answer is right
    neutral: str = "good"  # PRM800K's rating 0: good (it counts as right) or ignore
    max_length: int = 128  # tokens of prompt and steps; what ends beyond is cut off
    lm_weight: float = 0.3  # of the language-modelling loss on steps that are right; 0: none
    lr: float = 1e-3


def step_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, T), labels (B, T) in [0, 1], or −100 where there is none → binary cross-entropy in nats, the
    mean over the labelled steps, a scalar (Lightman et al. 2023, §2.6). No label at all gives 0."""
    none = labels == UNLABELLED
    labels = labels.float().masked_fill(none, 0.0)
    loss = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
    return loss.masked_fill(none, 0.0).sum() / (~none).sum().clamp(min=1)


def labels_of(row: dict, outcome: bool, neutral: str) -> list[float]:
    """A row of steps → a label for each step, −100 for none."""
    labels = [UNLABELLED if label is None else label for label in row["labels"]]
    if outcome:
        return [UNLABELLED] * (len(labels) - 1) + [float(row["label"])]
    ignored = row.get("neutral", []) if neutral == "ignore" else []
    return [UNLABELLED if i in ignored else label for i, label in enumerate(labels)]


def step_examples(
    rows: list, tokenizer, max_length: int, outcome: bool, neutral: str, part: str = "training"
) -> list:
    """Rows of steps → (ids (T,), labels (T,) fp32, which tokens are text of right steps (T,) bool)."""
    if outcome and any("label" not in row for row in rows):
        raise UserError('--outcome needs rows with a "label": whether the final answer is right.')
    examples, cut = [], 0
    for row in rows:
        labels = np.array(labels_of(row, outcome, neutral), dtype=np.float32)
        prompt = tokenizer.prompt(row["prompt"])
        ids, marks, steps = step_example(prompt, row["completions"], tokenizer, max_length)
        at, imitated = np.full(len(ids), UNLABELLED, np.float32), np.zeros(len(ids), bool)
        for number, start, end in steps:
            if labels[number] == 1 and not outcome:  # then so is each of its lines
                at[start:end][marks[start:end]] = 1
            at[end] = labels[number]
            right = row["label"] if outcome else labels[number] >= 0.5
            imitated[start:end] = right & ~marks[start:end]
        cut += bool(steps) and steps[-1][0] < len(labels) - 1
        if (at != UNLABELLED).any():
            examples.append((ids, at, imitated))
    line = f"data: {len(examples):,} {part} solutions with a labelled step, "
    line += f"{cut:,} cut off at {max_length} tokens"
    print(f"{line}, {len(rows) - len(examples):,} dropped: no labelled step")
    if not examples:
        where = f"of the {len(rows):,} rows is labelled within --max-length {max_length}"
        raise UserError(f"no step {where}: there is nothing to learn.")
    return examples


def batch_of(examples: list, tokenizer, device) -> tuple[Tensor, Tensor, Tensor]:
    """→ ids (B, T) right-padded, labels (B, T), −100 on padding, and which tokens to imitate, on the CPU."""
    ids, imitated = collate([(ids, mask) for ids, _, mask in examples], tokenizer.pad)
    labels = pad_sequence([torch.from_numpy(at) for _, at, _ in examples], True, UNLABELLED)
    return ids.to(device, non_blocking=True), labels.to(device, non_blocking=True), imitated


def first_error(p: list[np.ndarray], labels: list[np.ndarray], threshold: float = 0.5) -> dict:
    """Per solution the probabilities and labels of its labelled steps → how well its first error is found.

    exact: the share of solutions with an error in which it is the first step of p < threshold; clean: of
    those without in which there is none; f1: their harmonic mean (Zheng et al. 2024, ProcessBench).
    """
    found, clean = [], []
    for probabilities, truth in zip(p, labels):
        named, wrong = np.flatnonzero(probabilities < threshold), np.flatnonzero(truth < 0.5)
        first = named[0] if len(named) else -1
        found.append(first == wrong[0]) if len(wrong) else clean.append(first == -1)
    exact, none = (float(np.mean(x)) if x else math.nan for x in (found, clean))
    return {"exact": exact, "clean": none, "f1": 2 * exact * none / (exact + none) if exact + none else 0.0}


@torch.no_grad()
def evaluate(model: ScalarGPT, examples: list, tokenizer, device) -> dict[str, float]:
    """Held-out loss in nats, AUC, accuracy, calibration, first errors; a label is right from one half."""
    p, labels = [], []
    for start in range(0, len(examples), 128):
        ids, at, _ = batch_of(examples[start : start + 128], tokenizer, device)
        z, at = model(ids).float().cpu(), at.cpu()
        p += [row[y != UNLABELLED].numpy() for row, y in zip(z.sigmoid(), at)]
        labels += [y[y != UNLABELLED].numpy() for y in at]
    flat, truth = (np.concatenate(x).astype(np.float64) for x in (p, labels))
    right = truth >= 0.5
    sure = flat.clip(1e-7, 1 - 1e-7)
    loss = -(truth * np.log(sure) + (1 - truth) * np.log(1 - sure)).mean()
    return {
        "loss": float(loss),
        "auc": auc(flat, right),
        "accuracy": float(((flat >= 0.5) == right).mean()),
        "ece": calibration_error(flat, truth),
        "right": float(right.mean()),
        **first_error(p, labels),
    }


def main(config: Config) -> None:
    if config.neutral not in ("good", "ignore"):
        raise UserError(f"--neutral {config.neutral} is unknown; choose good or ignore.")
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, chat=True)
    if config.lm_weight and not policy.config.tied:
        raise UserError(f"{config.init} has an output head apart from its embedding: use --lm-weight 0.")
    read_as_line_breaks(policy, tokenizer)
    model = ScalarGPT.from_policy(policy, config.reader)
    del policy

    max_length = min(config.max_length, model.config.context)
    how = tokenizer, max_length, config.outcome, config.neutral
    rows, eval_rows = read_split(config, config.data, "steps")
    examples, eval_examples = step_examples(rows, *how), step_examples(eval_rows, *how, "held-out")
    prepare(config, model)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    order = BatchOrder([len(ids) for ids, *_ in examples], config.batch_size, config.seed)
    made_from = model, examples
    models = ("process reward",)
    run = Run(config, "prm", model, tokenizer, optimizer, order, made_from, models, chat=False)
    if run.first == 0:
        with autocast:
            chance = evaluate(model, eval_examples, tokenizer, device)["auc"]
        print(f"step-0 check: AUC {chance:.3f} with a random head (nan: all right, or all wrong)")

    for step in run:
        rows, run.count = [examples[i] for i in order[step]], 1
        labelled = sum((at != UNLABELLED).sum() for _, at, _ in rows)  # of the whole step
        written = max(1, sum(imitated.sum() for *_, imitated in rows))
        for batch, _ in run.pieces(examples):
            ids, labels, imitated = batch_of(batch, tokenizer, device)
            share = sum((at != UNLABELLED).sum() for _, at, _ in batch) / labelled
            with autocast:
                hidden = model.hidden(ids)
                loss = step_loss(model.score(hidden), labels) * share
                run.add(loss=loss)
                if config.lm_weight:
                    logp = token_logprobs(model.gpt, ids, imitated, hidden=hidden)  # (B, T)
                    loss = loss - config.lm_weight * logp.sum(-1).sum() / written
            run.backward(loss)
            run.metrics.tokens += sum(len(ids) for ids, *_ in batch)
        run.update()
        run.log()
        if run.looks:
            with autocast:
                run.show(evaluate(model, eval_examples, tokenizer, device))
    run.finish(kind="outcome" if config.outcome else "process")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
