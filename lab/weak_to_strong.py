"""Weak-to-strong generalisation: a small reward model's labels supervise a larger one (Burns et al. 2023).

    python -m lab.weak_to_strong split --pairs out/demo/pairs.jsonl --out out/demo/weak-to-strong
    python -m lab.weak_to_strong train --data labels.jsonl --eval-data test.jsonl --out confident.pt
    python -m lab.weak_to_strong report out/seed*/weak-to-strong

`split` has the world's exact judge, not its people, say which side of each pair is better (ties are left out)
and deals the prompts out: 40 % to train the weak model (weak.jsonl), 40 % for the strong one, 20 % to test
both (test.jsonl). The strong one's pairs are written twice: with the judge's labels (ceiling.jsonl), and in
random order for the weak model to vote on (unlabelled.jsonl: `collect.py --resume` goes on from there).

`train` is train_rm.py for a student that may disagree with its supervisor where it is sure: in the place of
the label p stands (1−α) p + α [r_w > r_l], with α = --confidence warmed up over the first fifth of the steps
(the confidence loss: Burns et al. 2023, §A.4). All other flags are train_rm.py's.

`report` reads a folder per seed with X.metrics.jsonl of the reward models of `make weak-to-strong`: weak;
naive, the strong model on the weak one's labels; confident, the same by `train`; ceiling, the strong model on
the judge's labels. It prints their held-out accuracy and the performance gap recovered,

    PGR = (weak-to-strong − weak) / (ceiling − weak)
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import train_rm
from collect import comparison
from lab import run_command, run_on_paths
from lab.scoreboard import print_time, table
from lab.seeds import over_seeds
from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, pair_examples, prompt_key, read_split, without_ties
from nanoalign.rows import read_rows, write_rows
from nanoalign.run import Run, already_finished
from nanoalign.scalar import ScalarGPT
from nanoalign.training import make_optimizer, prepare, setup
from nanoalign.world.judge import judge, knows

MODELS = {
    "weak": "weak, the judge's labels",
    "naive": "strong, the weak model's labels",
    "confident": "strong, the same and its own confidence",
    "ceiling": "strong, the judge's labels",
}


@dataclass
class Split:
    pairs: str = "out/demo/pairs.jsonl"  # pair rows of the world
    out: str = "out/demo/weak-to-strong"  # the folder to write to
    seed: int = 0  # of the split, and of the order in which the weak model sees two responses

    def outputs(self) -> list[str]:
        return [f"{self.out}/{name}.jsonl" for name in ("weak", "ceiling", "test", "unlabelled")]


@dataclass(kw_only=True)
class Student(train_rm.Config):
    confidence: float = 0.5  # α: how much the model's own hardened prediction counts beside the label


# ------------------------------------------------------------------------------------------------- split


def by_judge(pair: dict) -> dict | None:
    """The pair with the side first that the exact judge prefers, without what people said; None for a tie."""
    chosen, rejected = (judge(pair, pair[side]).utility for side in ("chosen", "rejected"))
    if chosen == rejected:
        return None
    sides = ("chosen", "rejected") if chosen > rejected else ("rejected", "chosen")
    meta = {k: v for k, v in pair["meta"].items() if k not in ("annotator", "annotators", "p_chosen")}
    return {"prompt": pair["prompt"], "chosen": pair[sides[0]], "rejected": pair[sides[1]], "meta": meta}


def split(config: Split) -> None:
    pairs = read_rows(config.pairs, "pairs")
    if not all(map(knows, pairs)):
        raise UserError(f"{config.pairs} has rows without meta: the judge only knows the world's prompts.")
    judged = [pair for pair in map(by_judge, pairs) if pair]
    rng, parts = random.Random(f"weak-to-strong-{config.seed}"), {"weak": [], "ceiling": [], "test": []}
    keys = list(dict.fromkeys(map(prompt_key, judged)))
    if len(keys) < 5:
        raise UserError(f"{config.pairs} has {len(keys)} prompts with a better response; five are needed.")
    rng.shuffle(keys)
    place = {key: ("weak", "ceiling", "test")[5 * i // len(keys) // 2] for i, key in enumerate(keys)}
    for pair in judged:
        parts[place[prompt_key(pair)]].append(pair)
    votes = []
    for pair in parts["ceiling"]:
        sides = [(pair["chosen"], True), (pair["rejected"], True)]
        rng.shuffle(sides)
        votes.append(comparison(pair, *sides))
    for name, rows in {**parts, "unlabelled": votes}.items():
        write_rows(f"{config.out}/{name}.jsonl", rows)
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in parts.items())
    print(f"split: {len(judged):,} of {len(pairs):,} pairs have a better side: {counts} → {config.out}")


# ------------------------------------------------------------------------------------------- the student


def confident_labels(p: Tensor, margin: Tensor, confidence: float) -> Tensor:
    """Labels p (P,) and the student's own margins r_w − r_l (P,) → (1−α) p + α [r_w > r_l] (P,).

    The prediction is hardened at 1/2, as a pair has no first side: half of all hardened labels are 1 at that
    threshold. A tie takes no side. It passes no gradient (Burns et al. 2023, §A.4).
    """
    guess = 0.5 * (1 + margin.detach().sign())
    return (1 - confidence) * p + confidence * guess


def train(config: Student) -> None:
    if config.confidence > 1:
        raise UserError(f"--confidence {config.confidence} is a share of the label: at most 1.")
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, chat=True)
    model = ScalarGPT.from_policy(policy, config.reader)
    rows, eval_rows = read_split(config, config.data, "pairs")
    max_length = min(config.max_length, model.config.context)
    prompts = train_rm.by_prompt(*pair_examples(rows, tokenizer, max_length))
    eval_rows, part = without_ties(eval_rows, "held-out"), "held-out"
    held_out = train_rm.by_prompt(*pair_examples(eval_rows, tokenizer, max_length, part))

    prepare(config, model.gpt)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    lengths = [max(len(ids) for ids, _ in p.responses) for p in prompts]
    order = BatchOrder(lengths, config.batch_size, config.seed, pool=1)
    tokens = order.lengths * [len(p.responses) for p in prompts]
    made_from, models = (model, prompts), ("reward",)
    run = Run(config, "rm", model, tokenizer, optimizer, order, made_from, models, chat=False)
    for step in run:
        alpha = config.confidence * min(1.0, step / (0.2 * run.steps))
        for batch, _ in run.pieces(prompts, tokens):
            with autocast:
                chosen, rejected, weight = train_rm.pair_scores(model, batch, tokenizer, device)
            m, p = train_rm.labels(batch, device)
            smoothed = config.label_smoothing + (1 - 2 * config.label_smoothing) * p
            p = confident_labels(smoothed, chosen - rejected, alpha)
            loss = train_rm.bradley_terry_loss(chosen, rejected, m, 0.0, config.centering, p)
            ((weight * loss).sum() / len(order[step])).backward()
            margin = chosen - rejected
            run.add(loss=weight * loss, accuracy=weight * (0.5 * (1 + margin.sign())))
            run.add(margin=weight * margin, score=weight * (0.5 * (chosen + rejected)))
            run.metrics.tokens += sum(len(ids) for one in batch for ids, _ in one.responses)
        run.update()
        run.log()
        if run.looks:
            with autocast:
                run.show(train_rm.evaluate(model, held_out, tokenizer, device)[0])
    responses = [example for p in prompts for example in p.responses]
    with autocast:
        normalisation = train_rm.normalise(model, responses[:2000], tokenizer, device)
    run.finish(normalisation=normalisation)


# ------------------------------------------------------------------------------------------------ report


def gap_recovered(weak: float, student: float, ceiling: float) -> float | None:
    """PGR (Burns et al. 2023, §3): 0 as good as its supervisor, 1 as good as on true labels; None where there
    is no gap to recover."""
    return (student - weak) / (ceiling - weak) if ceiling > weak else None


def held_out_accuracy(folder: str, name: str) -> float:
    """The last evaluation of a run that has finished."""
    path = Path(folder) / f"{name}.metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path} cannot be read; `make weak-to-strong` writes it.")
    found = [row["eval_accuracy"] for row in cli.readable_rows(path) if "eval_accuracy" in row]
    if not found or not (Path(folder) / f"{name}.pt").exists():
        raise UserError(f"{path} has no final evaluation: the run has not finished; `make weak-to-strong`.")
    return found[-1]


def report(folders: list[str]) -> None:
    if not folders:
        raise UserError("name the folders, such as out/seed0/weak-to-strong.")
    accuracy = {name: [held_out_accuracy(folder, name) for folder in folders] for name in MODELS}
    rows = []
    for name, what in MODELS.items():
        recovered = list(map(gap_recovered, accuracy["weak"], accuracy[name], accuracy["ceiling"]))
        rows.append([what, over_seeds(accuracy[name]), over_seeds(recovered)])
    table([f"seeds: {len(folders)}", "held-out accuracy", "PGR"], rows)
    print_time(folders)


if __name__ == "__main__":
    if sys.argv[1:2] == ["report"]:
        del sys.argv[1]
        run_on_paths(report)
    else:
        run_command({"split": (split, Split), "train": (train, Student)}, __doc__)
