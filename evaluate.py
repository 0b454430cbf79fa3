"""The scorecard of one or more checkpoints, side by side, by the world's judge.

Every checkpoint answers the same held-out prompts, several times each; the judge says what went right and
wrong. Standard errors are over prompts (one prompt's samples are averaged first: they are not independent).
The win rate is the share of sample pairs in which the judge's utility is above the baseline's, ties half.
KL(policy ‖ reference) is per response, in nats, on the policy's own samples, at the sampling temperature; the
reference is the last SFT checkpoint named, or --reference.

    python evaluate.py --checkpoints out/demo/base.pt out/demo/sft.pt out/demo/dpo.pt
    python evaluate.py --doctor out/demo/dpo.metrics.jsonl out/demo/ppo.metrics.jsonl

--doctor reads metrics, no checkpoint: it names the known sicknesses that runs show (nanoalign/doctor.py).

A base model has never seen a role token: it gets the prompt as plain text, and goes on from there.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from nanoalign import UserError, cli
from nanoalign.checkpoint import load, load_policy
from nanoalign.doctor import report as doctor
from nanoalign.generate import rollouts
from nanoalign.logprobs import token_logprobs
from nanoalign.rewards import make_reward, total
from nanoalign.rows import read_rows
from nanoalign.training import setup
from nanoalign.world.judge import judge

# name → (which rows it is about, what is averaged over their verdicts)
METRICS = {
    "utility": (lambda meta: True, lambda v: v.utility),
    "correct": (lambda meta: True, lambda v: v.correct),
    "facts correct": (lambda meta: meta["kind"] == "fact", lambda v: v.correct),
    "answered": (lambda meta: True, lambda v: v.answered_the_question),
    "harmful compliance": (lambda meta: meta["kind"] == "harm", lambda v: v.complied_with_harm),
    "over-refusal": (lambda meta: meta["kind"] == "benign", lambda v: v.refused),
    "sycophancy": (lambda meta: meta["kind"] == "belief", lambda v: v.sycophantic),
    "invention": (
        lambda meta: meta["kind"] == "unanswerable",
        lambda v: v.answered_the_question and not v.correct,
    ),
    "hedging": (lambda meta: True, lambda v: v.hedged),
    "wrong form": (lambda meta: True, lambda v: not v.formatted),
    "padding (sentences)": (lambda meta: True, lambda v: v.padding),
    "length (words)": (lambda meta: True, lambda v: v.length),
    "repetition": (lambda meta: True, lambda v: v.repeated),
    "ended": (lambda meta: True, lambda v: v.ended),
}


@dataclass
class Config:
    checkpoints: tuple = ("out/demo/base.pt", "out/demo/sft.pt", "out/demo/dpo.pt")  # whom to judge
    baseline: str = ""  # the checkpoint of the list that win rates are against; empty: the first
    prompts: str = "out/demo/world/prompts_held_out.jsonl"  # prompt rows of the world
    reward: str = ""  # also the mean of this reward: an expression of nanoalign/rewards.py
    reference: str = ""  # the checkpoint that KL is measured to; empty: the last SFT checkpoint named
    out: str = "out/demo/scorecard.json"  # everything that was measured
    doctor: tuple = ()  # metrics.jsonl of runs: only name the sicknesses that they show
    samples: int = 4  # responses per prompt
    show: int = 1  # samples of each family to print
    max_new_tokens: int = 96  # length limit of a response
    temperature: float = 1.0  # of sampling; 0: greedy
    seed: int = 0  # of sampling
    device: str = "auto"  # auto, cpu, cuda, …


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Values (prompts, samples) → mean, and its standard error over prompts."""
    per_prompt = values.mean(axis=1)
    error = per_prompt.std(ddof=1) / math.sqrt(len(per_prompt)) if len(per_prompt) > 1 else float("nan")
    return float(per_prompt.mean()), float(error)


def win_rate(utility: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """Utilities (prompts, samples) of a policy and of its baseline → share of wins over all sample pairs,
    ties half, and its standard error over prompts."""
    a, b = utility[:, :, None], baseline[:, None, :]
    return mean_and_error(((a > b) + 0.5 * (a == b)).reshape(len(utility), -1))


@torch.no_grad()
def answer(path: str, rows: list[dict], ref, config: Config, device, autocast):
    """→ texts, verdicts, KL terms and rewards of a checkpoint, each (prompts, samples).

    KL is NaN for a base model (its prompts differ) and for greedy answers (they are no sample).
    """
    policy, tokenizer, checkpoint = load_policy(path, device)
    plain, K = checkpoint["stage"] == "base", config.samples
    prompts = [tokenizer.prompt(row["prompt"], plain) for row in rows for _ in range(K)]
    texts, verdicts = np.empty(len(prompts), dtype=object), np.empty(len(prompts), dtype=object)
    kl, rewards = np.full((2, len(prompts)), np.nan)
    reward = make_reward(config.reward, tokenizer, device) if config.reward else None
    with autocast:
        for indices, rollout in rollouts(
            policy,
            tokenizer,
            prompts,
            config.max_new_tokens,
            config.seed,
            what=Path(path).stem,
            temperature=config.temperature,
        ):
            if ref is not None and not plain and config.temperature > 0:
                logp, ref_logp = (
                    token_logprobs(model, rollout.ids, rollout.mask, config.temperature)
                    for model in (policy, ref)
                )
                kl[indices] = (logp - ref_logp).sum(-1).cpu().numpy()
            if reward:
                rewards[indices] = total(reward([rows[i // K] for i in indices], rollout)).cpu().numpy()
            for i, response, ended in zip(indices, rollout.responses(), rollout.ended.tolist()):
                texts[i] = tokenizer.decode_response(response)
                verdicts[i] = judge(rows[i // K], texts[i], ended)
    shape = (len(rows), K)
    return texts.reshape(shape), verdicts.reshape(shape), kl.reshape(shape), rewards.reshape(shape)


def summarise(rows: list[dict], verdicts: np.ndarray) -> dict[str, tuple[float, float]]:
    """Every metric of METRICS that some row is about → (mean, standard error)."""
    card = {}
    for name, (about, value) in METRICS.items():
        picked = [i for i, row in enumerate(rows) if about(row["meta"])]
        if picked:
            card[name] = mean_and_error(np.vectorize(value, otypes=[float])(verdicts[picked]))
    return card


def print_table(header: list[str], lines: list[tuple[str, list]]) -> None:
    width = max(16, *(len(name) + 2 for name in header))
    print(f"{'':24}" + "".join(f"{name:>{width}}" for name in header))
    for name, cells in lines:
        print(
            f"{name:24}"
            + "".join(
                f"{f'{c[0]:.3f} ± {c[1]:.3f}' if c and not math.isnan(c[0]) else '–':>{width}}" for c in cells
            )
        )


def main(config: Config) -> None:
    for path in config.doctor:
        doctor(path)
    if config.doctor:
        return
    if config.samples < 1:
        raise UserError("--samples must be at least 1.")
    if config.baseline and config.baseline not in config.checkpoints:
        raise UserError(f"--baseline {config.baseline} is not one of --checkpoints.")
    device, autocast = setup(config)
    rows = read_rows(config.prompts, "prompts")
    if any("kind" not in row["meta"] for row in rows):
        raise UserError(f'the judge needs the world\'s prompts: {config.prompts} has rows without "meta".')
    stages, tokenizers = {}, set()
    for path in config.checkpoints:
        content = load(path)
        stages[path] = content["stage"]
        tokenizers.add(content["tokenizer"])
    if len(tokenizers) > 1:
        raise UserError(f"the checkpoints have different tokenizers ({', '.join(sorted(tokenizers))}).")
    reference = config.reference or next((p for p in reversed(config.checkpoints) if stages[p] == "sft"), "")
    ref = load_policy(reference, device)[0] if reference else None

    names = [Path(path).stem for path in config.checkpoints]
    baseline = config.checkpoints.index(config.baseline or config.checkpoints[0])
    results = [answer(path, rows, ref, config, device, autocast) for path in config.checkpoints]
    utilities = [np.vectorize(lambda v: v.utility, otypes=[float])(verdicts) for _, verdicts, _, _ in results]
    cards = [summarise(rows, verdicts) for _, verdicts, _, _ in results]
    for card, utility, (_, _, kl, rewards) in zip(cards, utilities, results):
        card["win rate"] = win_rate(utility, utilities[baseline])
        card["KL to reference"] = mean_and_error(kl)
        if config.reward:
            card["reward"] = mean_and_error(rewards)
    families = {}
    for kind in dict.fromkeys(row["meta"]["kind"] for row in rows):
        picked = [i for i, row in enumerate(rows) if row["meta"]["kind"] == kind]
        families[kind] = [
            summarise([rows[i] for i in picked], verdicts[picked]) for _, verdicts, _, _ in results
        ]

    for kind in families if config.show else []:
        for i in [i for i, row in enumerate(rows) if row["meta"]["kind"] == kind][: config.show]:
            print(f"\n[{kind}] {rows[i]['prompt'][-1]['content']}")
            for name, (texts, verdicts, _, _) in zip(names, results):
                print(f"  {name:>8} ({verdicts[i, 0].utility:+.2f}): {texts[i, 0][:200]!r}")
    print(f"\nscorecard: {len(rows)} held-out prompts × {config.samples} samples, mean ± standard error")
    print_table(names, [(f"win rate vs {names[baseline]}", [card["win rate"] for card in cards])])
    print_table([""] * len(names), [(name, [card.get(name) for card in cards]) for name in METRICS])
    print_table(
        [""] * len(names), [(f"KL to {Path(reference).stem}", [card["KL to reference"] for card in cards])]
    )
    if config.reward:
        print_table([""] * len(names), [("reward", [card["reward"] for card in cards])])
    print("\nutility by family")
    print_table(names, [(kind, [card["utility"] for card in family]) for kind, family in families.items()])

    report = {
        "config": asdict(config),
        "reference": reference,
        "baseline": config.checkpoints[baseline],
        "checkpoints": {
            path: {
                "stage": stages[path],
                "overall": card,
                "families": {kind: family[i] for kind, family in families.items()},
            }
            for i, (path, card) in enumerate(zip(config.checkpoints, cards))
        },
    }
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text(json.dumps(report, indent=1).replace("NaN", "null"))
    print(f"\nwrote {config.out}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
