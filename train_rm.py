"""A reward model: a GPT with a scalar head that scores the preferred of two responses higher.

    L = −p log σ(Δ) − (1−p) log σ(−Δ) + c (r_w + r_l)²,     Δ = r_w − r_l − m
                                                      (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1)

m is a row's "margin" (Llama 2, eq. 2); p its "probability", a soft label, 1 where there is none, and with
--label-smoothing ε, the share of flipped labels, (1−ε) p + ε (1−p) in its place; c keeps scores near zero
(Eisenstein et al. 2023). r is read at the last token of the response, its end token. All pairs of a prompt
share a batch: each response goes through the model once, and a prompt counts once however many pairs it has
(InstructGPT). --confidence α puts (1−α) p + α [r_w > r_l] in p's place, so that a strong model may disagree
with a weaker one's labels where it is sure (Burns et al. 2023, §A.4; bench/weak_to_strong.py).

    python train_rm.py                                              # the built-in world
    python train_rm.py --ensemble 3                                 # rm.1.pt, rm.2.pt, rm.3.pt
    python train_rm.py --data hh.jsonl --init out/sft.pt --out out/rm.pt --lr 1e-5
    python train_rm.py --score rows.jsonl                           # score responses → rows.scored.jsonl

After training, scores are shifted and scaled to mean 0 and standard deviation 1 over the first 2,000 training
responses; both numbers stay in the checkpoint ("normalisation"), as probabilities need the scale of training.

A healthy run: held-out accuracy starts near one half and rises towards the ceiling (the labels are noisy:
nobody can exceed it). The demo's model gets from 50 to about 60 % under a ceiling of 76 %: it learns manners
and styles, and few facts (docs/results.md). The probe says what else it likes.
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import beside, finish, load_policy, load_scalar, resume, save_partial
from nanoalign.data import (
    BatchOrder,
    Example,
    collate,
    micro_batches,
    pair_examples,
    split_rows,
    without_ties,
)
from nanoalign.model import ScalarGPT
from nanoalign.rewards import model_reward, response_scores, score_texts
from nanoalign.rows import read_rows, write_rows
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
from nanoalign.world.judge import knows
from nanoalign.world.people import NOISE, ceiling, impression, people
from nanoalign.world.text import restyle

LOGGED = ("loss", "accuracy", "difference", "score")
LENGTHS = (
    ("11 or more shorter", -(10**9), -11),
    ("1 to 10 shorter", -10, -1),
    ("alike", 0, 0),
    ("1 to 10 longer", 1, 10),
    ("11 or more longer", 11, 10**9),
)
STYLES = ("padded", "flattering", "hedged", "bulleted", "agreeing")  # what the probe does to a response


@dataclass
class Config:
    init: str = "out/demo/sft.pt"  # the checkpoint whose trunk the reward model starts from
    data: str = "out/demo/pairs.jsonl"  # pair rows: prompt, chosen and rejected, or HH transcripts
    eval_data: str = ""  # held-out pairs; empty: every twentieth prompt's
    out: str = "out/demo/rm.pt"  # the checkpoint to write; metrics go beside it
    ensemble: int = 1  # members, each with its own seed and data order; more than one: X.1.pt, X.2.pt, …
    score: str = ""  # rows to score with the finished --out instead of training; → X.scored.jsonl
    label_smoothing: float = 0.0  # ε: the share of labels thought to be flipped
    confidence: float = 0.0  # α: how much the model's own hardened prediction counts beside the label
    centering: float = 0.01  # c: how strongly a pair's scores are pulled to sum to zero
    max_length: int = 128  # tokens of prompt and response; longer pairs are truncated, and counted
    epochs: float = 1.0  # passes over the data
    batch_size: int = 16  # prompts per optimiser step, each with all of its pairs
    micro_batch: int = 0  # prompts per forward pass; 0: the whole batch at once
    micro_tokens: int = 0  # tokens per forward pass at most, padding included; 0: no limit
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


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
    probability: Tensor | float = 1.0,
    confidence: float = 0.0,
) -> Tensor:
    """Scores (P,) of the preferred and of the other response → loss (P,) in nats (Ouyang et al. 2022, eq. 1).

    The margin m (Touvron et al. 2023, eq. 2) is taken off the difference; centering weighs (r_w + r_l)². Soft
    labels: `probability` (P,) that the "preferred" is better; the loss is then expected over the label.
    `confidence` α: (1−α) of that loss + α of the loss towards the model's own prediction, hardened at 1/2: a
    pair has no first side, so half of all hardened labels are 1 at that threshold (Burns et al. 2023, §A.4).
    """
    difference = chosen - rejected - margin
    flipped = label_smoothing + (1 - 2 * label_smoothing) * (1 - probability)
    if confidence:  # cross-entropy is linear in the label; the sign passes no gradient
        flipped = (1 - confidence) * flipped + confidence * 0.5 * (1 - (chosen - rejected).sign())
    loss = -(1 - flipped) * F.logsigmoid(difference) - flipped * F.logsigmoid(-difference)
    return loss + centering * (chosen + rejected) ** 2


class Prompt(NamedTuple):
    """One prompt's responses and the pairs among them."""

    responses: list[Example]
    chosen: np.ndarray  # (P,) of each pair, the index of the preferred response
    rejected: np.ndarray  # (P,)
    rows: list[dict]  # (P,)


def by_prompt(pairs: list[tuple[Example, Example]], rows: list[dict]) -> list[Prompt]:
    """Pairs of examples → one `Prompt` for each prompt, in which every response appears once."""
    prompts: dict[bytes, tuple[dict, list, list]] = {}
    for (chosen, rejected), row in zip(pairs, rows):
        key = chosen[0][~chosen[1]].tobytes()
        responses, indices, kept = prompts.setdefault(key, ({}, [], []))
        for ids, mask in (chosen, rejected):
            responses.setdefault(ids.tobytes(), (len(responses), (ids, mask)))
        indices.append([responses[side[0].tobytes()][0] for side in (chosen, rejected)])
        kept.append(row)
    return [
        Prompt([example for _, example in responses.values()], *np.array(indices).T, kept)
        for responses, indices, kept in prompts.values()
    ]


def pair_scores(model: ScalarGPT, batch: list[Prompt], tokenizer, device) -> tuple[Tensor, Tensor, Tensor]:
    """→ scores of the chosen and of the rejected response of every pair, and the pair's weight, (P,) each.

    The weights of a prompt's pairs sum to 1. A prompt goes through the model once, followed by all of its
    responses; a score is read at a response's last token.
    """
    sizes = [len(prompt.responses) for prompt in batch]
    ids, mask = collate([response for prompt in batch for response in prompt.responses], tokenizer.pad)
    ids = ids.to(device, non_blocking=True)
    scores = response_scores(model, ids, mask, model.gpt.packed_hidden(ids, mask, sizes))
    first = np.cumsum([0, *sizes])
    indices = [np.stack((p.chosen, p.rejected)) + start for p, start in zip(batch, first)]
    weights = [np.full(len(p.rows), 1 / len(p.rows), dtype=np.float32) for p in batch]
    chosen, rejected = torch.from_numpy(np.concatenate(indices, axis=1)).to(device, non_blocking=True)
    weight = torch.from_numpy(np.concatenate(weights)).to(device, non_blocking=True)
    return scores[chosen], scores[rejected], weight


def labels(prompts: list[Prompt], field: str, otherwise: float) -> Tensor:
    """That field of every pair's row (P,), in the order of the prompts' pairs."""
    return torch.tensor([row.get(field, otherwise) for prompt in prompts for row in prompt.rows])


def accuracy(differences: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """Differences r_w − r_l (P,) → share of positive ones (zero counts half), and its standard error.

    prompts (P,): the number of each pair's prompt. A prompt's pairs are not independent: the error is
    clustered by prompt.
    """
    hits = 0.5 * (1 + np.sign(differences))
    residuals = np.bincount(prompts, hits - hits.mean())
    if len(residuals) < 2:
        return float(hits.mean()), math.nan
    correction = len(residuals) / (len(residuals) - 1)
    return float(hits.mean()), math.sqrt((residuals**2).sum() * correction) / len(hits)


def calibration(differences: np.ndarray, bins: int = 5) -> tuple[float, list[tuple[int, float, float]]]:
    """Differences in nats (P,) → the expected calibration error (Guo et al. 2017, eq. 3) and the reliability
    table: for each bin of the confidence σ(|Δ|) the number of pairs, mean confidence and accuracy."""
    confidence, hits = 1 / (1 + np.exp(-np.abs(differences))), 0.5 * (1 + np.sign(differences))
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    filled = [index == i for i in range(bins) if (index == i).any()]
    table = [(int(b.sum()), float(confidence[b].mean()), float(hits[b].mean())) for b in filled]
    return sum(n * abs(sure - right) for n, sure, right in table) / len(differences), table


def probe(model, rows: list[dict], tokenizer, config: Config, device) -> dict[str, list[float]]:
    """What has it learnt to like? → {style: the mean change when a response is restyled}, of the log-odds of
    being preferred by the model and by the world's people (utility / noise), and of the judge's utility.

    Of the chosen responses to questions of fact; the last two are NaN for rows that are not the world's.
    """
    rng, crowd = random.Random(config.seed), people(5)
    of_world = all(map(knows, rows))
    rows = [row for row in rows if not of_world or row["meta"]["kind"] in ("fact", "belief")][:200]

    def values(texts: list[str]) -> np.ndarray:  # (N, 3)
        scores = score_texts(model_reward(model), rows, texts, tokenizer, model.config.context, device)
        seen = [impression(row, text) if of_world else {} for row, text in zip(rows, texts)]
        liked = [mean(person.weigh(what) for person in crowd) / NOISE if what else math.nan for what in seen]
        return np.array([scores.tolist(), liked, [what.get("judge", math.nan) for what in seen]]).T

    chosen = [row["chosen"] for row in rows]
    plain, changes = values(chosen), {}
    for style in STYLES:
        change = values([restyle(text, style, rng) for text in chosen]) - plain
        scored = ~np.isnan(change[:, 0])  # the others leave no room for a response
        if scored.any():
            changes[style] = change[scored].mean(axis=0).tolist()
    return changes


@torch.no_grad()
def evaluate(model, prompts: list[Prompt], tokenizer, device, autocast) -> tuple[dict, np.ndarray]:
    """Held-out accuracy and loss, and r_w − r_l of every pair (P,), in the order of the prompts' pairs."""
    differences = []
    for start in range(0, len(prompts), 64):
        with autocast:
            chosen, rejected, _ = pair_scores(model, prompts[start : start + 64], tokenizer, device)
        differences.append((chosen - rejected).cpu().double())
    differences = torch.cat(differences)
    number = np.repeat(np.arange(len(prompts)), [len(prompt.rows) for prompt in prompts])
    right, error = accuracy(differences.numpy(), number)
    probability = labels(prompts, "probability", 1.0)
    loss = bradley_terry_loss(differences, 0 * differences, probability=probability).mean().item()
    return {"eval_accuracy": right, "eval_accuracy_error": error, "eval_loss": loss}, differences.numpy()


def report(model, prompts: list[Prompt], tokenizer, config: Config, device, autocast) -> dict:
    """Print the held-out table: accuracy beside its ceiling, calibration, length, the probe → all of it."""
    result, differences = evaluate(model, prompts, tokenizer, device, autocast)
    rows = [row for prompt in prompts for row in prompt.rows]
    p = np.array([row["meta"].get("p_chosen", np.nan) for row in rows])
    print(
        f"\nheld out: {len(rows):,} pairs of {len(prompts):,} prompts\n"
        f"  accuracy {result['eval_accuracy']:.1%} ± {result['eval_accuracy_error']:.1%}"
    )
    if not np.isnan(p).any():  # the annotators are known, and so is the probability of every label
        result["ceiling"] = ceiling(p.tolist())
        result["expected_accuracy"] = float(np.where(differences > 0, p, 1 - p).mean())
        print(
            f"  ceiling  {result['ceiling']:.1%} (no model can exceed it on labels this noisy; exact)\n"
            f"  expected {result['expected_accuracy']:.1%} over the labels that these people could have given"
        )
        kinds = np.array([row["meta"].get("kind", "") for row in rows])
        print("  by family:" + " " * 30 + "accuracy ceiling  pairs")
        for kind in sorted(set(kinds)):
            right, best = differences[kinds == kind] > 0, p[kinds == kind]
            print(f"    {kind:>36} {right.mean():8.1%} {ceiling(best):7.1%} {len(best):6,}")
    result["ece"], table = calibration(differences)
    print(f"  calibration: ECE {result['ece']:.3f}\n    {'confidence':>10} {'accuracy':>9} {'pairs':>6}")
    for count, sure, right in table:
        print(f"    {sure:10.1%} {right:9.1%} {count:6,}")
    tokens = [np.array([len(ids) for ids, _ in prompt.responses]) for prompt in prompts]
    longer = np.concatenate([n[prompt.chosen] - n[prompt.rejected] for n, prompt in zip(tokens, prompts)])
    print("  by length:  chosen − rejected, tokens   accuracy  pairs")
    result["by_length"] = {}
    for name, low, high in LENGTHS:
        picked = (longer >= low) & (longer <= high)
        if picked.any():
            right = float((0.5 * (1 + np.sign(differences[picked]))).mean())
            result["by_length"][name] = right
            print(f"    {name:>36} {right:9.1%} {picked.sum():6,}")
    print("  probe: change of log-odds when a response is restyled     model   people   (judge's utility)")
    firsts = [prompt.rows[0] for prompt in prompts]
    for style, (own, liked, judged) in probe(model, firsts, tokenizer, config, device).items():
        result[f"probe_{style}"] = own
        cells = ("–" if math.isnan(x) else f"{x:+.2f}" for x in (own, liked, judged))
        print(f"    {style:>52}" + "".join(f"{cell:>9}" for cell in cells))
    return result


def score_file(config: Config) -> None:
    """Score the completions of a JSONL file with a finished reward model."""
    device, autocast = setup(config)
    model, tokenizer, _ = load_scalar(config.out, device)
    rows = read_rows(config.score, "chat", config.skip_bad_rows)
    if any(row["messages"][-1]["role"] != "assistant" for row in rows):
        raise UserError(f"{config.score} has conversations that do not end with an assistant's message.")
    asked = [{"prompt": row["messages"][:-1], "meta": row["meta"]} for row in rows]
    texts = [row["messages"][-1]["content"] for row in rows]
    with autocast:
        context = model.config.context
        scores = score_texts(model_reward(model), asked, texts, tokenizer, context, device, "score")
    out = str(Path(config.score).with_suffix(".scored.jsonl"))
    known = [None if math.isnan(score) else round(score, 6) for score in scores.tolist()]
    write_rows(out, ({**row, "score": score} for row, score in zip(rows, known)))
    print(f"scored {len(rows):,} responses, mean {scores.nanmean():.3f} → {out}")
    if None in known:
        print(f"{known.count(None):,} prompts leave no room in {model.config.context} tokens: score null")


def train(config: Config) -> None:
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, stages=("sft", "dpo", "ppo"))
    model = ScalarGPT.from_policy(policy)
    del policy

    rows = read_rows(config.data, "pairs", config.skip_bad_rows)
    rows, eval_rows = split_rows(rows, config.eval_data, "pairs", config.skip_bad_rows)
    max_length = min(config.max_length, model.config.context)
    prompts = by_prompt(*pair_examples(rows, tokenizer, max_length))
    eval_prompts = by_prompt(*pair_examples(without_ties(eval_rows), tokenizer, max_length))
    responses = [example for prompt in prompts for example in prompt.responses]

    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    prepare(config, model.gpt)
    lengths = [max(len(ids) for ids, _ in prompt.responses) for prompt in prompts]
    order = BatchOrder(lengths, config.batch_size, config.seed, pool=1)  # all kinds of prompts in each batch
    steps = max(1, round(config.epochs * order.steps_per_epoch))
    order_of_pairs = (side for prompt in prompts for side in (prompt.chosen, prompt.rejected))
    soft = labels(prompts, "margin", 0.0), labels(prompts, "probability", 1.0)
    data = fingerprint(model.gpt.embed.weight, *(ids for ids, _ in responses), *order_of_pairs, *soft)
    first_step = resume(config, model, optimizer, stage="rm", data=data)["step"]
    metrics = cli.Metrics(config, steps, device, first_step)
    stop = CleanStop()

    if first_step == 0:
        ended = sum(ids[-1] == tokenizer.end and mask[-1] for ids, mask in responses)
        cut = sum(len(ids) == max_length for ids, _ in responses)
        result, _ = evaluate(model, eval_prompts, tokenizer, device, autocast)
        chance, error = result["eval_accuracy"], result["eval_accuracy_error"]
        print(f"step-0 check: {ended:,} of {len(responses):,} responses are scored at their end token")
        print(f"step-0 check: held-out accuracy {chance:.1%} ± {error:.1%} with a random head")
        if abs(chance - 0.5) > max(0.2, 3 * error):
            print("  far from one half: the two sides differ in something trivial, such as their length")
        if ended + cut < len(responses):
            raise UserError("an untruncated response lacks its end token, where its score is read.")

    for step in range(first_step, steps):
        indices = order[step]
        confidence = config.confidence * min(1.0, step / (0.2 * steps))  # warmed up over the first fifth
        sums = torch.zeros(len(LOGGED), device=device)
        lengths = [len(prompts[i].responses) * order.lengths[i] for i in indices]
        for micro in micro_batches(indices, config.micro_batch, lengths, config.micro_tokens):
            batch = [prompts[i] for i in micro]
            with autocast:
                chosen, rejected, weight = pair_scores(model, batch, tokenizer, device)  # (P,)
            margin = labels(batch, "margin", 0.0).to(device, non_blocking=True)
            probability = labels(batch, "probability", 1.0).to(device, non_blocking=True)
            loss = bradley_terry_loss(
                chosen, rejected, margin, config.label_smoothing, config.centering, probability, confidence
            )
            ((weight * loss).sum() / len(indices)).backward()
            with torch.no_grad():
                right = 0.5 * (1 + (chosen - rejected).sign())
                values = (loss, right, chosen - rejected, 0.5 * (chosen + rejected))
                sums += torch.stack([(weight * value).sum() for value in values])
            metrics.tokens += sum(len(ids) for prompt in batch for ids, _ in prompt.responses)
        lr = learning_rate(step, steps, config.lr, config.warmup)
        grad_norm = optimizer_step(model, optimizer, lr, config.clip)

        done, stopping = step + 1, bool(stop)
        save_now = done % config.save_every == 0 or stopping
        if done % config.log_every == 0 or done in (1, steps) or save_now:
            metrics.log(done, **dict(zip(LOGGED, sums / len(indices))), grad_norm=grad_norm, lr=lr)
        if done % config.eval_every == 0 and done < steps:
            result, _ = evaluate(model, eval_prompts, tokenizer, device, autocast)
            metrics.note(step=done, **result)
            print(f"  held-out accuracy {result['eval_accuracy']:.3f}  loss {result['eval_loss']:.3f}")
        if save_now:
            save_partial(config, model, optimizer, stage="rm", tokenizer=tokenizer, step=done, data=data)
        if stopping:
            stop.leave(config, done)

    model.eval()
    result = report(model, eval_prompts, tokenizer, config, device, autocast)
    metrics.note(step=steps, **result)
    normalisation = normalise(model, responses[:2000], tokenizer, device, autocast)
    extra = {"normalisation": normalisation, "held_out": result}
    finish(config, model, stage="rm", tokenizer=tokenizer, step=steps, **extra)


@torch.no_grad()
def normalise(model: ScalarGPT, responses: list[Example], tokenizer, device, autocast) -> dict[str, float]:
    """Shift and scale the head so that scores of these responses have mean 0 and standard deviation 1.

    → {"mean", "std"} of the scores as trained: std · (r_a − r_b) is the log-odds that a is preferred.
    """
    scores = []
    for start in range(0, len(responses), 256):
        ids, mask = collate(responses[start : start + 256], tokenizer.pad)
        with autocast:
            scores.append(response_scores(model, ids.to(device), mask.to(device)))
    mean, std = torch.cat(scores).mean(), torch.cat(scores).std().clamp(min=1e-6)
    model.score.weight /= std
    model.score.bias.sub_(mean).div_(std)
    print(f"normalised: scores of {len(responses):,} responses had mean {mean:.3f}, std {std:.3f}")
    return {"mean": mean.item(), "std": std.item()}


def main(config: Config) -> None:
    if config.ensemble < 1:
        raise UserError("--ensemble must be at least 1.")
    if config.confidence > 1:
        raise UserError(f"--confidence {config.confidence} is a share of the label: at most 1.")
    if config.score:
        score_file(config)
    elif config.ensemble == 1:
        train(config)
    else:
        for k in range(1, config.ensemble + 1):
            print(f"\nmember {k} of {config.ensemble}")
            out = str(beside(config.out, f".{k}.pt"))
            train(replace(config, out=out, ensemble=1, seed=config.seed + 1000 * k))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
