"""The scorecard of one or more checkpoints, side by side: what checks say, win rates, KL.

Every checkpoint answers the same held-out prompts, several times each. Standard errors are over prompts (one
prompt's samples are averaged first: they are not independent). A star marks a change from the baseline of
more than two standard errors, prompt by prompt: one line in twenty has one by chance. The win rate is the
share of sample pairs in which the utility is above the baseline's, ties half: independent pairs, for a
checkpoint's random numbers come of --seed and its own weights, whoever else is named and in what order.
KL(policy ‖ reference) is per response, in nats, on the policy's own samples, at the sampling temperature. Elo
ratings are Bradley & Terry's maximum likelihood, their mean 1000, their intervals bootstrapped over prompts.

    python evaluate.py --checkpoints out/demo/base.pt out/demo/sft.pt out/demo/dpo.pt
    python evaluate.py --checkpoints sft.pt dpo.pt --prompts prompts.jsonl --checks my_checks.py
    python evaluate.py --checkpoints sft.pt dpo.pt --prompts hh.jsonl --reward rm.pt

The checks are the built-in world's judge's, or your own: a function in a Python file, called once for every
response, and once for every prompt with an empty one before anything is sampled:

    def checks(prompt: list[dict], response: str, meta: dict) -> dict[str, float | None]:
        return {"apologises": "sorry" in response.lower(),
                "cites": "[1]" in response if meta.get("source") else None}   # None: not about this prompt

A fourth argument `ended` is told whether the model wrote an end token. A check called "utility" decides the
win rate; length, repetition and the rate of end tokens come by themselves. The file may define knows(row):
can it judge this prompt? Prompts that it does not know are judged by --reward alone. The file is code and is
run as such: name none that you would not run. What is read from prompts and checkpoints is never run. A base
model has never seen a role token: it gets the prompt as plain text, and goes on from there.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from inspect import signature
from numbers import Real
from pathlib import Path

import numpy as np
import torch

from nanoalign import UserError, cli
from nanoalign.checkpoint import load, load_policy
from nanoalign.data import prompt_examples
from nanoalign.hf import tokenizer_of
from nanoalign.logprobs import token_logprobs
from nanoalign.rewards import load_function, make_reward, total
from nanoalign.rollouts import rollouts
from nanoalign.rows import read_rows
from nanoalign.run import fingerprint
from nanoalign.seeds import derived_seed
from nanoalign.statistics import change, elo, mean_and_error, pairwise_wins, print_table
from nanoalign.training import setup

VALUE = (Real, np.bool_, type(None))  # of a check
always = cache(lambda: load_function("nanoalign/world/verdicts.py:always"))


@dataclass
class Config:
    checkpoints: tuple = ("out/demo/base.pt", "out/demo/sft.pt", "out/demo/dpo.pt")  # whom to judge
    baseline: str = ""  # the one that win rates are against; empty: the first
    prompts: str = "out/demo/world/prompts_held_out.jsonl"  # prompt rows
    checks: str = "nanoalign/world/verdicts.py"  # a Python file, which is run
    reward: str = ""  # also its mean; it judges prompts that checks do not know
    reference: str = ""  # whom KL is measured to; empty: the last SFT checkpoint named
    out: str = "out/demo/scorecard.json"  # everything that was measured
    samples: int = 4  # responses per prompt
    count: int = 0  # how many of the prompts; 0: all
    elo: bool = False  # also rate the checkpoints by each pair's utilities
    show: int = 1  # samples of each family to print
    max_new_tokens: int = 96  # length limit of a response
    temperature: float = 1.0  # of sampling; 0: greedy
    seed: int = 0  # of sampling
    device: str = "auto"  # auto, cpu, cuda, …
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping
    fields: str = ""  # other field names: prompt=instruction,completion=output


def checks_for(rows: list[dict], path: str, prompts: str, reward: str = "") -> Callable | None:
    """The checks of a file, which is run, asked about every prompt before anything is sampled; None where
    they do not know each, but a reward can judge."""
    checks = load_function(f"{path}:checks")
    knows = getattr(checks, "__globals__", {}).get("knows", lambda row: True)  # of the same file
    if all(map(knows, rows)):
        for row in rows:
            measure(row, "", False, checks)
        return checks
    if not reward:
        raise UserError(
            f"{path} does not know every prompt of {prompts} (the world's judge needs their meta): "
            "name checks of your own (--checks my_checks.py), or a --reward."
        )


def measure(row: dict, response: str, ended: bool, checks) -> dict[str, float]:
    """What the checks say of a response → {metric: value}; NaN: not about this row."""
    said, asked = {}, row["prompt"][-1]["content"]
    try:
        if checks:
            more = {"ended": ended} if "ended" in signature(checks).parameters else {}
            said = checks(row["prompt"], response, row["meta"], **more)
    except (Exception, SystemExit) as error:
        where = f"the prompt {asked[:80]!r} and the response {response[:80]!r}"
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"--checks failed on {where}: {what}.") from None
    if not isinstance(said, dict) or not all(
        isinstance(name, str) and isinstance(x, VALUE) and abs(x or 0) <= 1e300 for name, x in said.items()
    ):
        raise UserError(f"--checks gave {said!r}; expected a dict of names and numbers, bools or None.")
    found = said | always()(response, ended) | said
    return {name: math.nan if x is None else float(x) for name, x in found.items()}


def own_seed(seed: int, policy, chat: bool) -> int:
    """Of a checkpoint's samples, by what it is: two that shared random numbers would win or lose together."""
    return derived_seed(seed, "answers", str(chat), fingerprint(*policy.state_dict().values()))


@torch.no_grad()
def answer(path: str, rows: list, checks, ref, config: Config, device) -> tuple:
    """→ texts, {metric: values}, KL terms and rewards of a checkpoint, each (prompts, samples).

    KL is NaN for a base model (its prompts differ) and for greedy answers (they are no sample).
    """
    policy, tokenizer, checkpoint = load_policy(path, device)
    plain, K, T = not checkpoint["chat"], config.samples, config.temperature
    prompts = [tokenizer.prompt(row["prompt"], plain) for row in rows for _ in range(K)]
    texts, measured = np.empty(len(prompts), dtype=object), [{}] * len(prompts)
    kl, rewards = np.full((2, len(prompts)), np.nan)
    reward = make_reward(config.reward, tokenizer, device) if config.reward else None
    limit, how = config.max_new_tokens, {"what": Path(path).stem, "temperature": T}
    seed = own_seed(config.seed, policy, not plain)
    how["into"] = lambda: (texts, measured, kl, rewards)
    for indices, drawn in rollouts(policy, tokenizer, prompts, limit, seed, **how):
        ids, mask, asked = drawn.ids, drawn.mask, [rows[i // K] for i in indices]
        if ref is not None and not plain and T > 0:
            logp, ref_logp = (token_logprobs(m, ids, mask, T) for m in (policy, ref))
            kl[indices] = (logp - ref_logp).sum(-1).cpu().numpy()
        if reward:
            rewards[indices] = total(reward(asked, drawn)).cpu().numpy()
        for i, response, ended in zip(indices, drawn.responses(), drawn.ended.tolist()):
            texts[i] = tokenizer.decode_response(response)
            measured[i] = measure(rows[i // K], texts[i], ended, checks)
    names = dict.fromkeys(name for found in measured for name in found)
    scores = {n: np.array([found.get(n, math.nan) for found in measured]) for n in names}
    if checks is None:
        scores["utility"] = rewards
    scores = {name: values.reshape(-1, K) for name, values in scores.items()}
    return texts.reshape(-1, K), scores, kl.reshape(-1, K), rewards.reshape(-1, K)


def summarise(scores: dict, picked=slice(None)) -> dict[str, tuple[float, float]]:
    """Every metric that some of the picked rows is about → (mean, standard error)."""
    told = {name: x[picked] for name, x in scores.items() if not np.isnan(x[picked]).all()}
    return {name: mean_and_error(x) for name, x in told.items()}


def win_rate(utility: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """Utilities (prompts, samples) of a policy and of its baseline → share of wins over all sample pairs,
    ties half, and its standard error over prompts."""
    a, b = utility[:, :, None], baseline[:, None, :]
    wins = (a > b) + 0.5 * (a == b) + 0 * (a + b)  # NaN where either is
    return mean_and_error(wins.reshape(len(utility), -1))


def starred(cell, change):
    """The cell of a table, marked if the change is more than twice its standard error."""
    return (*cell, "*" if abs(change[0]) > 2 * change[1] else " ") if cell and change else cell


def print_card(names: list[str], lines: list[str], cards: list, against: str, kl: str) -> None:
    parts = [(card["overall"], card["change from the baseline"]) for card in cards]
    groups = [{f"win rate vs {against}": "win rate"}] if "utility" in lines else []
    groups += [dict(zip(lines, lines)), {kl: "KL to reference"}]
    groups += [{"reward": "reward"}] if "reward" in cards[0]["overall"] else []
    header = names
    for group in groups:
        table = [[starred(own.get(k), by.get(k)) for own, by in parts] for k in group.values()]
        print_table(header, list(zip(group, table)))
        header = [""] * len(names)
    print(f"* differs from {against} by more than two standard errors of the difference")
    if "utility" in lines:
        print("\nutility by family")
        kinds = cards[0]["families"]
        print_table(names, [(k, [c["families"][k].get("utility") for c in cards]) for k in kinds])


def report(config: Config, rows: list, found: list, stages: dict, reference: str) -> dict:
    """What `answer` found of each checkpoint → the scorecard, printed."""
    texts, scores, kls, rewards = zip(*found)
    paths, names = config.checkpoints, [Path(path).stem for path in config.checkpoints]
    base = paths.index(config.baseline or paths[0])
    nothing = np.full_like(kls[0], np.nan)
    utilities = [own.get("utility", nothing) for own in scores]
    kinds = np.array([str(row["meta"].get("kind", "all")) for row in rows])
    families = {k: np.flatnonzero(kinds == k) for k in dict.fromkeys(kinds.tolist())}
    cards = []
    for i, (path, own) in enumerate(zip(paths, scores)):
        overall = summarise(own)
        changes = {name: change(own[name], scores[base].get(name, nothing)) for name in overall}
        overall["win rate"] = win_rate(utilities[i], utilities[base])
        overall["KL to reference"] = mean_and_error(kls[i])
        if config.reward:
            overall["reward"] = mean_and_error(rewards[i])
        card = {"stage": stages[path], "overall": overall, "change from the baseline": changes}
        card["families"] = {k: summarise(own, picked) for k, picked in families.items()}
        cards.append(card)
    for kind, picked in families.items():
        for i in picked[: config.show]:
            print(cli.visible(f"\n[{kind}] {rows[i]['prompt'][-1]['content']}"))
            for name, utility, said in zip(names, utilities, texts):
                value = "" if math.isnan(utility[i, 0]) else f" ({utility[i, 0]:+.2f})"
                print(f"  {name:>8}{value}: {said[i, 0][:200]!r}")
    count = f"{len(rows)} held-out prompts × {config.samples} samples"
    print(f"\nscorecard: {count}, mean ± standard error")
    lines = list(dict.fromkeys(name for own in scores for name in own))
    print_card(names, lines, cards, names[base], f"KL to {Path(reference).stem}")
    rated = {}
    if config.elo and "utility" not in lines:
        print('--elo: there is no check called "utility" to rate the checkpoints by.')
    elif config.elo:
        ratings, (low, high) = elo(pairwise_wins(np.array(utilities)), seed=config.seed)
        print("\nElo rating, 95 % interval over prompts")
        for i in np.argsort(-ratings):
            rated[paths[i]] = {"rating": ratings[i], "low": low[i], "high": high[i]}
            print(f"{names[i]:24}{ratings[i]:16.0f}  ({low[i]:.0f} to {high[i]:.0f})")
    return {
        "config": asdict(config), "reference": reference, "elo": rated,
        "baseline": paths[base], "checkpoints": dict(zip(paths, cards)),
    }  # fmt: skip


def main(config: Config) -> None:
    if config.samples < 1:
        raise UserError("--samples must be at least 1.")
    paths = config.checkpoints
    if config.elo and len(paths) < 2:
        raise UserError("--elo needs two or more --checkpoints to compare.")
    if config.baseline and config.baseline not in paths:
        raise UserError(f"--baseline {config.baseline} is not one of --checkpoints.")
    device, autocast = setup(config)
    rows = read_rows(config.prompts, "prompts", config.skip_bad_rows, config.fields)
    checks = checks_for(rows, config.checks, config.prompts, config.reward)
    stages, tokenizers, room = {}, set(), []
    for path in filter(None, (*paths, config.reference)):
        content = load(path)
        stages[path], tokenizer = content["stage"], tokenizer_of(content)
        tokenizers.add(tokenizer.name)
        room.append(content["model_config"]["context"] - 1)
    if len(tokenizers) > 1:
        different = ", ".join(sorted(tokenizers))
        raise UserError(f"the checkpoints have different tokenizers ({different}).")
    rows, _ = prompt_examples(rows, tokenizer, min(room), config.count)
    sft = [path for path in paths if stages[path] == "sft"]
    reference = config.reference or (sft or [""])[-1]
    ref = load_policy(reference, device)[0] if reference else None
    with autocast:
        found = [answer(path, rows, checks, ref, config, device) for path in paths]
    card = report(config, rows, found, stages, reference)
    cli.write_json(config.out, card)
    print(f"\nwrote {config.out}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, shared=True)
