"""A reward model: a GPT with a scalar head that scores the preferred of two responses higher.

    L = −p log σ(Δ) − (1−p) log σ(−Δ) + c (r_w + r_l)²    (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1)

Δ = r_w − r_l − m. m is a row's "margin" (Llama 2, eq. 2); p its "probability", a soft label, 1 where there is
none; with --label-smoothing ε, the share of flipped labels, (1−ε) p + ε (1−p) takes its place; c keeps scores
near zero (Eisenstein et al. 2023). r is read at the end token. All pairs of a prompt share a batch: each
response goes through the model once, and a prompt counts once however many pairs it has (InstructGPT).

    python train_rm.py                                              # the built-in world
    python train_rm.py --seed 1000 --out out/demo/rm.1.pt           # a member of an ensemble
    python train_rm.py --data hh.jsonl --init out/sft.pt --out out/rm.pt --lr 1e-5

After training, scores are shifted and scaled to mean 0 and standard deviation 1 over 2,000 training
responses; both numbers stay in the checkpoint ("normalisation"), as probabilities need the scale of training.

A healthy run: held-out accuracy rises from one half towards the ceiling, which noisy labels set. The demo's
gets to some 73 % of a possible 79 % (lab/reward_report.py; `make reader`: what the reader is worth).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, Example, collate, pair_examples, read_split, thin, without_ties
from nanoalign.packing import packed_hidden
from nanoalign.run import Flags, Run, already_finished
from nanoalign.scalar import ScalarGPT, response_scores
from nanoalign.statistics import clustered_error
from nanoalign.training import make_optimizer, prepare, setup


@dataclass(kw_only=True)
class Config(Flags):
    init: str = "out/demo/sft.pt"  # the checkpoint whose trunk it starts from
    data: str = "out/demo/pairs.jsonl"  # pair rows: prompt, chosen, rejected; or HH transcripts
    out: str = "out/demo/rm.pt"  # the checkpoint to write; metrics go beside it
    reader: bool = True  # show it how likely --init finds each token: what a small model needs
    label_smoothing: float = 0.0  # ε: the share of labels thought to be flipped
    centering: float = 0.01  # c: how strongly a pair's scores are pulled to sum to zero
    max_length: int = 128  # tokens of prompt and response; longer pairs are truncated
    batch_size: int = 16  # prompts per optimiser step, each with all of its pairs
    lr: float = 1e-3


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, label_smoothing: float = 0.0,
    centering: float = 0.0, probability: Tensor | float = 1.0,
) -> Tensor:  # fmt: skip
    """Scores (P,) of the preferred and of the other response → loss (P,) in nats (Ouyang et al. 2022, eq. 1).

    The margin m (Touvron et al. 2023, eq. 2) is taken off the difference; centering weighs (r_w + r_l)². Soft
    labels: `probability` (P,) that the "preferred" is better; the loss is then expected over the label.
    """
    difference = chosen - rejected - margin
    flipped = label_smoothing + (1 - 2 * label_smoothing) * (1 - probability)
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
    prompts = {}
    for pair, row in zip(pairs, rows):
        ids, mask = pair[0]
        responses, indices, kept = prompts.setdefault(ids[~mask].tobytes(), ({}, [], []))
        for side in pair:
            responses.setdefault(side[0].tobytes(), (len(responses), side))
        indices.append([responses[side[0].tobytes()][0] for side in pair])
        kept.append(row)
    return [
        Prompt([example for _, example in responses.values()], *np.array(indices).T, kept)
        for responses, indices, kept in prompts.values()
    ]


def pair_scores(model, batch: list[Prompt], tokenizer, device) -> tuple[Tensor, ...]:
    """→ scores of the chosen and of the rejected response of every pair, and the pair's weight, (P,) each.

    The weights of a prompt's pairs sum to 1. A prompt is read once, followed by all of its responses.
    """
    sizes = [len(prompt.responses) for prompt in batch]
    ids, mask = collate([example for p in batch for example in p.responses], tokenizer.pad)
    ids = ids.to(device, non_blocking=True)
    hidden = packed_hidden(model, ids, mask, sizes)
    scores = response_scores(model, ids, mask, hidden)
    starts = np.cumsum([0, *sizes])  # of each prompt's responses
    sides = [np.stack((p.chosen, p.rejected)) + at for p, at in zip(batch, starts)]
    sides = torch.from_numpy(np.concatenate(sides, axis=1))  # (2, P)
    chosen, rejected = sides.to(device, non_blocking=True)
    weight = torch.tensor([1 / len(p.rows) for p in batch for _ in p.rows])
    return scores[chosen], scores[rejected], weight.to(device, non_blocking=True)


def labels(prompts: list[Prompt], device="cpu") -> tuple[Tensor, Tensor]:
    """The margin and the probability of every pair, (P,) each, prompt by prompt."""
    rows = [row for prompt in prompts for row in prompt.rows]
    margin = torch.tensor([row.get("margin", 0.0) for row in rows])
    p = torch.tensor([row.get("probability", 1.0) for row in rows])
    return margin.to(device, non_blocking=True), p.to(device, non_blocking=True)


def accuracy(margins: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """Margins r_w − r_l (P,) → share of positive ones (zero counts half), and its standard error: pairs of
    one prompt are not independent. prompts (P,): the number of each pair's."""
    hits = 0.5 * (1 + np.sign(margins))
    return float(hits.mean()), clustered_error(hits, prompts)


@torch.no_grad()
def evaluate(model, prompts: list[Prompt], tokenizer, device) -> tuple[dict, np.ndarray]:
    """Held-out accuracy, its error and loss, and r_w − r_l of every pair (P,), prompt by prompt."""
    pieces = [prompts[start : start + 64] for start in range(0, len(prompts), 64)]
    scores = [pair_scores(model, piece, tokenizer, device) for piece in pieces]
    margins = torch.cat([chosen - rejected for chosen, rejected, _ in scores]).cpu().double()
    number = np.repeat(range(len(prompts)), [len(p.rows) for p in prompts])
    right, error = accuracy(margins.numpy(), number)
    _, p = labels(prompts)
    loss = bradley_terry_loss(margins, 0 * margins, probability=p).mean().item()
    return {"accuracy": right, "accuracy_error": error, "loss": loss}, margins.numpy()


def check_start(responses: list, max_length: int, end: int, result: dict) -> None:
    """Step-0 checks: scores are read at end tokens, and a random head is right by chance alone."""
    ended = sum(ids[-1] == end and mask[-1] for ids, mask in responses)
    cut = sum(len(ids) == max_length for ids, _ in responses)
    chance, error = result["accuracy"], result["accuracy_error"]
    print(f"step-0 check: {ended:,} of {len(responses):,} responses scored at their end token")
    print(f"step-0 check: held-out accuracy {chance:.1%} ± {error:.1%} with a random head")
    if abs(chance - 0.5) > max(0.2, 3 * error):
        print("  far from one half: the two sides differ in something trivial, such as their length")
    if ended + cut < len(responses):
        raise UserError("an untruncated response lacks its end token, where its score is read.")


@torch.no_grad()
def normalise(model, responses: list, tokenizer, device) -> dict[str, float]:
    """Shift and scale the head so that scores of these responses have mean 0 and standard deviation 1.

    → {"mean", "std"} of the scores as trained: std · (r_a − r_b) is the log-odds that a is preferred.
    """
    scores = []
    for start in range(0, len(responses), 256):
        ids, mask = collate(responses[start : start + 256], tokenizer.pad)
        scores.append(response_scores(model, ids.to(device), mask.to(device)))
    mean, std = torch.cat(scores).mean().item(), torch.cat(scores).std().clamp(min=1e-6).item()
    weight, bias = model.score.state_dict().values()  # also of a sharded model
    weight.div_(std)
    bias.sub_(mean).div_(std)
    print(f"normalised: scores of {len(responses):,} responses had mean {mean:.3f}, std {std:.3f}")
    return {"mean": mean, "std": std}


def main(config: Config) -> None:
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, chat=True)
    model = ScalarGPT.from_policy(policy, config.reader)
    del policy

    rows, eval_rows = read_split(config, config.data, "pairs")
    max_length, part = min(config.max_length, model.config.context), "held-out"
    prompts = by_prompt(*pair_examples(rows, tokenizer, max_length))
    eval_rows = without_ties(eval_rows, part)
    held_out = by_prompt(*pair_examples(eval_rows, tokenizer, max_length, part))
    responses = [example for p in prompts for example in p.responses]

    prepare(config, model)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    lengths = [max(len(ids) for ids, _ in p.responses) for p in prompts]
    order = BatchOrder(lengths, config.batch_size, config.seed, pool=1)  # all kinds in each batch
    tokens = order.lengths * [len(p.responses) for p in prompts]
    run = Run(config, "rm", model, tokenizer, optimizer, order, (model, prompts), ("reward",), chat=False)
    if run.first == 0:
        with autocast:
            result, _ = evaluate(model, held_out, tokenizer, device)
        check_start(responses, max_length, tokenizer.end, result)
    for _ in run:
        for batch, _ in run.pieces(prompts, tokens):
            with autocast:
                chosen, rejected, weight = pair_scores(model, batch, tokenizer, device)  # (P,)
            m, p = labels(batch, device)
            smoothing, c = config.label_smoothing, config.centering
            loss = bradley_terry_loss(chosen, rejected, m, smoothing, c, p)
            run.backward(weight * loss)
            margin, score = chosen - rejected, 0.5 * (chosen + rejected)
            right = 0.5 * (1 + margin.sign())
            run.add(loss=weight * loss, accuracy=weight * right)
            run.add(margin=weight * margin, score=weight * score)
            run.metrics.tokens += sum(len(ids) for one in batch for ids, _ in one.responses)
        run.update()
        run.log()
        if run.looks:
            with autocast:
                run.show(evaluate(model, held_out, tokenizer, device)[0])
    with autocast:
        scale = normalise(model, thin(responses, 2000), tokenizer, device)
    run.finish(normalisation=scale)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
