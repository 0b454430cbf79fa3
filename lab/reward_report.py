"""What a reward model has learnt: its held-out report.

    python -m lab.reward_report                                         # the built-in world
    python -m lab.reward_report --model out/rm.pt --data hh.jsonl

Prints, of the pairs that train_rm.py held out, and writes to X.report.json, beside the model X.pt:

- accuracy; for the world's pairs beside its ceiling, which no model can exceed on labels this noisy, and over
  the labels that these people could have given; and by family of prompts
- calibration: how sure the model is, beside how often it is right
- accuracy by how much longer the chosen response is: a model that has learnt length shows it here
- the probe: what becomes of a response's log-odds of being preferred when it is padded, made to flatter and
  so on, beside what the world's people and its judge would say
"""

import math
import random
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_scalar
from nanoalign.data import pair_examples, read_split, without_ties
from nanoalign.files import beside, write_json
from nanoalign.rewards import model_reward, score_texts
from nanoalign.terminal import visible
from nanoalign.training import freeze, setup
from nanoalign.world.judge import knows
from nanoalign.world.people import NOISE, ceiling, impression, people
from nanoalign.world.text import restyle
from train_rm import Prompt, by_prompt, evaluate

LENGTHS = (  # of the chosen less the rejected response, in tokens
    ("11 or more shorter", -(10**9), -11),
    ("1 to 10 shorter", -10, -1),
    ("alike", 0, 0),
    ("1 to 10 longer", 1, 10),
    ("11 or more longer", 11, 10**9),
)
STYLES = ("padded", "flattering", "hedged", "bulleted", "agreeing")  # what the probe does to a response


@dataclass
class Config:
    model: str = "out/demo/rm.pt"  # the reward model
    data: str = "out/demo/pairs.jsonl"  # the pairs that it was trained on, of which some were held out
    eval_data: str = ""  # held-out pairs; empty: those of the prompts that a hash picks
    out: str = ""  # the report; empty: X.report.json beside the model X.pt
    seed: int = 0  # of the probe
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping
    fields: str = ""  # other field names: prompt=instruction,completion=output

    def __post_init__(self):
        self.out = self.out or str(beside(self.model, ".report.json"))


def hits(margins: np.ndarray) -> np.ndarray:
    """Margins r_w − r_l (P,) → 1 where the model is right, 1/2 where it does not decide."""
    return 0.5 * (1 + np.sign(margins))


def calibration(margins: np.ndarray, bins: int = 5) -> tuple[float, list[tuple[int, float, float]]]:
    """Margins in nats (P,) → the expected calibration error (Guo et al. 2017, eq. 3) and the reliability
    table: for each bin of the confidence σ(|margin|) the number of pairs, mean confidence and accuracy."""
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), hits(margins)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    filled = [index == i for i in range(bins) if (index == i).any()]
    table = [(int(b.sum()), float(confidence[b].mean()), float(right[b].mean())) for b in filled]
    return sum(n * abs(sure - share) for n, sure, share in table) / len(margins), table


def beside_its_ceiling(margins: np.ndarray, rows: list[dict]) -> dict:
    """Where the annotators are known, and so is the probability of every label: what could be reached."""
    p = np.array([row["meta"].get("p_chosen", np.nan) for row in rows])
    if np.isnan(p).any():
        return {}
    expected = float(np.where(margins > 0, p, 1 - p).mean())
    kinds = np.array([row["meta"].get("kind", "") for row in rows])
    families = {}
    for kind in sorted(set(kinds)):
        of_kind = kinds == kind
        own = np.where(margins > 0, p, 1 - p)[of_kind].mean()
        families[kind] = {"expected": float(own), "ceiling": ceiling(p[of_kind]), "pairs": int(of_kind.sum())}
    return {"ceiling": ceiling(p.tolist()), "expected_accuracy": expected, "by_family": families}


def by_length(margins: np.ndarray, prompts: list[Prompt]) -> dict[str, dict]:
    """Margins (P,) → for each of `LENGTHS` that there is, accuracy and the number of pairs."""
    tokens = [np.array([len(ids) for ids, _ in prompt.responses]) for prompt in prompts]
    longer = np.concatenate([n[p.chosen] - n[p.rejected] for n, p in zip(tokens, prompts)])
    right, found = hits(margins), {}
    for name, low, high in LENGTHS:
        picked = (longer >= low) & (longer <= high)
        if picked.any():
            found[name] = {"accuracy": float(right[picked].mean()), "pairs": int(picked.sum())}
    return found


def probe(model, rows: list[dict], tokenizer, seed: int, device) -> dict[str, list[float]]:
    """What has it learnt to like? → {style: the mean change when a response is restyled}, of the log-odds of
    being preferred by the model and by the world's people (utility / noise), and of the judge's utility.

    Of the chosen responses to questions of fact; the last two are NaN for rows that are not the world's.
    """
    rng, crowd = random.Random(seed), people(5)
    of_world = all(map(knows, rows))
    rows = [row for row in rows if not of_world or row["meta"]["kind"] in ("fact", "belief")][:200]
    reward, context = model_reward(model), model.config.context

    def values(texts: list[str]) -> np.ndarray:  # (N, 3)
        scores = score_texts(reward, rows, texts, tokenizer, context, device)
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


def report(model, prompts: list[Prompt], tokenizer, seed: int, device, autocast) -> dict:
    """All of it, of a model whose scores are in nats. Accuracies are shares."""
    with autocast:
        result, margins = evaluate(model, prompts, tokenizer, device)
    rows = [row for prompt in prompts for row in prompt.rows]
    error, table = calibration(margins)
    changes = probe(model, [prompt.rows[0] for prompt in prompts], tokenizer, seed, device)
    return {
        "pairs": len(rows),
        "prompts": len(prompts),
        **result,
        **beside_its_ceiling(margins, rows),
        "ece": error,
        "reliability": [dict(zip(("pairs", "confidence", "accuracy"), one)) for one in table],
        "by_length": by_length(margins, prompts),
        "probe": {style: dict(zip(("model", "people", "judge"), one)) for style, one in changes.items()},
    }


def show(found: dict) -> None:
    """Print the report."""
    print(f"\nheld out: {found['pairs']:,} pairs of {found['prompts']:,} prompts")
    print(f"  accuracy {found['accuracy']:.1%} ± {found['accuracy_error']:.1%}")
    if "ceiling" in found:
        print(f"  ceiling  {found['ceiling']:.1%} (no model can exceed it on labels this noisy; exact)")
        expected = found["expected_accuracy"]
        print(f"  expected {expected:.1%} over the labels that these people could have given")
        print("  by family:" + " " * 30 + "expected ceiling  pairs")
        for kind, one in found["by_family"].items():
            print(f"    {visible(kind):>36} {one['expected']:8.1%} {one['ceiling']:7.1%} {one['pairs']:6,}")
    print(f"  calibration: ECE {found['ece']:.3f}\n    {'confidence':>10} {'accuracy':>9} {'pairs':>6}")
    for one in found["reliability"]:
        print(f"    {one['confidence']:10.1%} {one['accuracy']:9.1%} {one['pairs']:6,}")
    print("  by length:  chosen − rejected, tokens   accuracy  pairs")
    for name, one in found["by_length"].items():
        print(f"    {name:>36} {one['accuracy']:9.1%} {one['pairs']:6,}")
    print("  probe: change of log-odds when a response is restyled     model   people   (judge's utility)")
    for style, one in found["probe"].items():
        cells = ("–" if math.isnan(x) else f"{x:+.2f}" for x in one.values())
        print(f"    {style:>52}" + "".join(f"{cell:>9}" for cell in cells))


def main(config: Config) -> None:
    device, autocast = setup(config)
    model, tokenizer, content = load_scalar(config.model, device)
    if "normalisation" not in content:
        raise UserError(f"{config.model} is unfinished and its scores have no scale: resume its training.")
    with torch.no_grad():  # back to nats, which probabilities are made of
        model.score.weight *= content["normalisation"]["std"]
    _, rows = read_split(config, config.data, "pairs")
    max_length = min(content["config"]["max_length"], model.config.context)  # as it was trained
    prompts = by_prompt(*pair_examples(without_ties(rows, "held-out"), tokenizer, max_length, "held-out"))
    found = report(freeze(model), prompts, tokenizer, config.seed, device, autocast)
    show(found)
    write_json(config.out, found)
    print(f"saved {config.out}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
