"""Every method under one budget, side by side.

    python -m lab.scoreboard out/seed*/scoreboard

Each folder is one seed's, as `make scoreboard` fills it: a scorecard.json of all checkpoints, and beside each
checkpoint X.pt its X.metrics.jsonl. Prints markdown tables: what the methods reach and every failure mode,
means ± standard errors over the seeds, and what they cost.
"""

from pathlib import Path

from lab import run_on_paths
from lab.seeds import over_seeds, scorecards
from nanoalign import UserError
from nanoalign.cli import duration, readable_rows
from nanoalign.terminal import visible

COSTS = ("models", "tokens", "seconds", "MB")
MEASURES = ("utility", "win rate", "KL to reference", "length (words)", "reward")


def cost(metrics: Path) -> dict:
    """What a run took: models in memory, tokens through training, seconds, peak memory in MB."""
    rows = readable_rows(metrics)
    models = next((len(row["names"]) for row in rows if row.get("event") == "models"), 1)
    last = [row for row in rows if "elapsed" in row][-1]
    return {"models": models, "tokens": last["tokens"], "seconds": last["elapsed"], "MB": last["peak_mb"]}


def print_time(folders: tuple[str, ...]) -> None:
    """How long the runs of a folder took to train, in the mean of the folders."""
    runs = [run for folder in folders for run in Path(folder).glob("*.metrics.jsonl")]
    seconds = sum(cost(run)["seconds"] for run in runs) / len(folders)
    print(f"training took {duration(seconds)} a seed, of {len(runs) // len(folders)} models")


def main(folders: list[str]) -> None:
    if not folders:
        raise UserError("name the folders, such as out/seed0/scoreboard.")
    cards = scorecards([Path(folder) / "scorecard.json" for folder in folders])
    methods = [Path(path).stem for path in cards[0]]
    by_method = [{Path(path).stem: c["overall"] for path, c in card.items()} for card in cards]
    failures = [name for name in by_method[0][methods[0]] if name not in MEASURES]
    for names in (MEASURES, failures):
        rows = [
            [method, *(over_seeds([card[method][name][0] for card in by_method]) for name in names)]
            for method in methods
        ]
        table([f"seeds: {len(folders)}", *names], rows)
    costs = {
        method: [run for f in folders if (run := Path(f) / f"{method}.metrics.jsonl").exists()]
        for method in methods
    }
    rows = []
    for method, runs in costs.items():
        if runs:
            taken = [cost(run) for run in runs]
            rows.append([method, *(f"{sum(c[name] for c in taken) / len(taken):,.0f}" for name in COSTS)])
    table(["mean of the runs", *COSTS], rows)


def table(names: list[str], rows: list[list[str]]) -> None:
    print(visible(f"| {' | '.join(names)} |\n|{'---|' * len(names)}"))
    print(visible("\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"))


if __name__ == "__main__":
    run_on_paths(main)
