"""What the textbooks say of each method, beside what this run measured."""

import json
from pathlib import Path

from lab.scoreboard import cost
from lab.sections.page import Html, decimals, el, missing, number, share, table
from lab.sections.runs import STAGES, Run
from lab.seeds import scorecards
from nanoalign import UserError, cli

# method: (what the textbooks say, models in memory by the book)
SAID = {
    "base": ("continues text; knows, but does not answer", "1"),
    "sft": ("cheap and stable; learns the form of an answer, and the demonstrators’ faults with it", "1"),
    "dpo": (
        "no reward model, no sampling: stable and cheap; the chosen log-prob falls too, and it can overfit "
        "its pairs",
        "2",
    ),
    "kto": ("needs thumbs only, not pairs; as good as DPO from noisy labels", "2"),
    "orpo": ("no reference and no SFT stage before it: the cheapest", "1"),
    "ppo": (
        "the strongest where it is tuned, the most to tune; explores, and so finds the reward’s holes",
        "4",
    ),
    "grpo": ("PPO without a critic: less memory; wants many samples a prompt and rewards that differ", "3"),
}


def cards_of(folder: Path) -> dict[str, dict]:
    """The scorecard's checkpoints by the names of STAGES; empty where there is none."""
    path = folder / "scorecard.json"
    if not path.is_file():
        return {}
    return {Path(checkpoint).stem: card for checkpoint, card in scorecards([path])[0].items()}


def with_error(value: tuple, written=decimals) -> str:
    mean, error = value
    return written(mean) if error is None else f"{written(mean)} ± {written(error)}"


def took(run: Run) -> list[str]:
    """Models in memory, time and tokens of a run, as measured."""
    if not run.last:
        return ["–"] * 3
    path = run.checkpoint.with_name(f"{run.checkpoint.stem}.metrics.jsonl")
    try:
        own = cost(path)
    except (KeyError, IndexError):
        return ["–"] * 3
    return [str(own["models"]), cli.duration(own["seconds"]), f"{own['tokens'] / 1e6:.2f} M"]


def section(folder: Path, runs: dict[str, Run]) -> Html:
    head = el("h2", "The methods, compared")
    try:
        cards = cards_of(folder)
    except (UserError, json.JSONDecodeError):
        cards = {}
    if not cards:
        return el("section", head, missing("scorecard.json", "make demo"), id="comparison")
    rows = []
    for name, (said, models) in SAID.items():
        if name not in cards:
            continue
        overall = cards[name]["overall"]
        measured = [
            with_error(overall.get("win rate", (None, None)), share),
            decimals(overall.get("KL to reference", (None, None))[0]),
            with_error(overall.get("utility", (None, None))),
            share(overall.get("correct", (None, None))[0]),
            share(overall.get("harmful compliance", (None, None))[0]),
            number(overall.get("length (words)", (None, None))[0], 3),
        ]
        held, time, tokens = took(runs[name])
        held = f"{held} (book: {models})" if held != models else held
        rows.append([STAGES[name][2], said, *measured, held, time, tokens])
    names = [
        "method",
        "the textbooks say",
        "win rate against SFT",
        "KL",
        "utility",
        "right",
        "helps with harm",
        "words",
        "models",
        "time",
        "tokens",
    ]
    lead = el(
        "p",
        "On the left what one reads; on the right what this run measured, on held-out prompts, by the "
        "exact judge. Times are of the machines that they ran on.",
        class_="lead",
    )
    return el("section", head, lead, table(names, rows, class_="stack compared"), id="comparison")
