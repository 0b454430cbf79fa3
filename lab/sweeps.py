"""One knob at a time: what a flag or other data change, measured on finished runs, for docs/methods.

    python -m lab.sweeps out/seed0 out/seed1 out/seed2       # writes docs/figures/sweeps.json
    python -m lab.sweeps --add out/demo                      # adds to it what it lacks and this folder has
    python -m lab.sweeps dpo                                 # prints DPO's table

Of each run its last held-out evaluation, and from the scorecard of its folder the win rate against SFT and
the KL to it; mean ± standard error over the seeds that have it, and how many have. `make sweeps` runs what no
other target needs.
"""

import json
import re
import sys
from pathlib import Path

from lab import run_on_paths
from lab.doctor import late
from lab.plot import read_curves
from lab.seeds import over_seeds, read_report
from nanoalign import UserError
from nanoalign.cli import readable_rows
from nanoalign.files import write_text

FIGURES = Path("docs/figures/sweeps.json")
CARD = {"win rate": "card:win rate", "KL to SFT": "card:KL to reference"}
DPO = {"accuracy": "last:accuracy", "log π/π_ref of chosen": "ratio:reward_chosen"} | CARD
N = {f"n = {n}": f"best:{n}" for n in (1, 4, 16, 64)}
RM = {"expected accuracy": "report:expected_accuracy", "calibration error": "report:ece"}
# page: (columns {title: where it is}, rows {what is changed: the run's file})
SWEEPS = {
    "sft": (
        {"held-out loss": "last:loss", "facts correct": "card:facts correct"} | CARD,
        {"as in the demo": "sft", "--lr 1.5e-4": "sweeps/sft-slow", "--lr 1.5e-3": "sweeps/sft-fast",
         "--adam-eps 1e-8": "sweeps/sft-eps", "1,200 good demonstrations": "claims/sft-clean"},
    ),
    "rm": (
        RM,
        {"as in the demo": "rm.report", "half of the pairs": "claims/rm-half",
         "a quarter of the pairs": "claims/rm-quarter", "an eighth of the pairs": "claims/rm-eighth",
         "--label-smoothing 0.1": "claims/rm-smoothed", "--no-reader": "reader/plain",
         "pairs on which three agree": "claims/rm-agreed", "8 responses a prompt": "reader/more"},
    ),
    "dpo": (
        DPO,
        {"--beta 1 --lr 1e-4": "scoreboard/dpo", "--beta 3": "pareto/beta-3", "--beta 0.3": "pareto/beta-0.3",
         "--beta 0.1": "claims/dpo-loose", "--lr 3e-5": "claims/dpo-slow", "--lr 3e-4": "claims/dpo-fast",
         "--loss cdpo": "scoreboard/cdpo", "--loss robust": "scoreboard/robust",
         "--loss ipo --beta 0.1": "scoreboard/ipo", "--sft-weight 1": "scoreboard/rpo",
         "pairs of another policy": "claims/dpo-foreign"},
    ),
    "kto": (
        {"AUC": "last:auc", "margin": "last:margin"} | CARD,
        {"--beta 0.1": "scoreboard/kto", "--beta 0.01": "sweeps/kto-loose", "--beta 1": "sweeps/kto-tight",
         "nine up to one down": "claims/kto-lopsided"},
    ),
    "orpo": (
        {"accuracy": "last:accuracy", "NLL": "last:nll", "log odds ratio": "last:log_odds_ratio"} | CARD,
        {"--lam 0.1": "scoreboard/orpo", "--lam 0": "sweeps/orpo-none", "--lam 1": "sweeps/orpo-strong"},
    ),
    "ppo": (
        {"reward": "last:reward", "judge": "last:judge", "KL": "last:kl"} | CARD,
        {"--beta 0.2 --lr 2e-4": "scoreboard/ppo", "--beta 3": "claims/ppo-tight",
         "--beta 0.05": "hacking/beta-0.05", "--beta 0": "hacking/beta-0", "--lr 7e-5": "claims/ppo-slow",
         "--lr 6e-4": "claims/ppo-fast",
         "--clip-ratio 1000": "claims/ppo-unclipped", "--shared-critic": "claims/ppo-shared"},
    ),
    "grpo": (
        {"reward": "last:reward", "judge": "last:judge", "KL": "last:kl"} | CARD,
        {"--beta 0.2 --group-size 8": "scoreboard/grpo", "--beta 0.02": "sweeps/grpo-loose",
         "--group-size 2": "sweeps/grpo-few", "--kind dr_grpo": "scoreboard/dr_grpo",
         "--kind dapo": "scoreboard/dapo", "--kind rloo": "scoreboard/rloo"},
    ),
    "prm": (
        {"AUC": "last:auc", "exact": "last:exact", "clean": "last:clean", "calibration error": "last:ece"},
        {"as in the demo": "prm", "--lm-weight 0": "sweeps/prm-no-lm", "--no-reader": "sweeps/prm-no-reader",
         "1,000 solutions labelled by continuations": "prm-rollouts"},
    ),
    "best-of-n": (
        N,
        {"by the least step": "best_of_n.csv#prm-min", "by the product": "best_of_n.csv#prm-product",
         "by the last step": "best_of_n.csv#prm-last", "by the outcome model": "best_of_n.csv#orm",
         "by the commonest answer": "best_of_n.csv#majority",
         "by the policy itself": "best_of_n.csv#likelihood",
         "least step, labels by continuations": "best_of_n.rollouts.csv#prm-min",
         "product, labels by continuations": "best_of_n.rollouts.csv#prm-product"},
    ),
    "cai": (
        {"win rate against SL-CAI": "card:win rate", "utility": "card:utility",
         "harmful compliance": "card:harmful compliance", "sycophancy": "card:sycophancy"},
        {"the assistant": "assistant", "SFT on its first answers": "cai/unrevised",
         "SFT on its revisions": "cai/sl-cai", "then DPO, AI labels": "cai/ai",
         "then DPO, people's labels": "cai/human", "a tenth of people's labels": "cai/few",
         "half of the money each": "cai/mixed"},
    ),
}  # fmt: skip


def value(folder: Path, run: str, where: str, page: str) -> float | None:
    """One figure of one run; None where a file, or the figure in it, is not there."""
    kind, name = where.split(":")
    if kind == "card":
        cards = folder / ("cai" if page == "cai" else Path(run).parent) / "scorecard.json"
        found = read_report(cards, "checkpoints", "evaluate.py") if cards.exists() else {}
        [card] = [card for path, card in found.items() if path.endswith(f"/{run}.pt")] or [None]
        return card and card["overall"].get(name, [None])[0]
    if kind == "report":
        file = folder / f"{run}.json"
        return read_report(file, name, "lab.reward_report") if file.exists() else None
    if kind == "best":
        table, selector = run.split("#")
        return read_curves(str(folder / table))[selector][int(name)][0] if (folder / table).exists() else None
    file = folder / f"{run}.metrics.jsonl"
    rows = readable_rows(file) if file.exists() else []
    values = [row[key] for row in rows if (key := "eval_" * (kind == "last") + name) in row]
    if kind == "ratio" and values:
        return late(values) / rows[0]["config"]["beta"]
    return (values[-1] if kind == "last" else late(values)) if values else None


def figures_of(folders: list[Path], run: str, columns: dict, page: str) -> tuple[dict, list[Path]]:
    """→ {column: "mean ± error"} over the seeds that have the run, and which these are."""
    values = {title: [value(one, run, where, page) for one in folders] for title, where in columns.items()}
    have = [one for one, *found in zip(folders, *values.values()) if any(x is not None for x in found)]
    known = {title: [x for x in found if x is not None] for title, found in values.items()}
    row = {title: over_seeds(found) if found else "–" for title, found in known.items()}
    return row | {"seeds": str(len(have))}, have


def measured(folders: list[Path]) -> dict:
    """→ {page: {what is changed: figures}}; runs that no seed has are left out. Where some seeds lack a run
    the first row, to compare with, stands there for the other seeds alone as well."""
    found = {}
    for page, (columns, rows) in SWEEPS.items():
        known = {what: figures_of(folders, run, columns, page) for what, run in rows.items()}
        fewer = next((have for _, have in known.values() if 0 < len(have) < len(folders)), None)
        if fewer:
            first, run = next(iter(rows.items()))
            alone = f"{first} ({', '.join(folder.name for folder in fewer)} alone)"
            known = {first: known[first], alone: figures_of(fewer, run, columns, page), **known}
        found[page] = {what: row for what, (row, have) in known.items() if have}
    return found


def added(figures: dict, folder: Path) -> dict:
    """Figures with the rows that they lack, of one folder, behind its own first row to compare with."""
    found = {}
    for page, (columns, rows) in SWEEPS.items():
        first, *_ = rows
        have = figures.get(page, {})
        own = {what: figures_of([folder], run, columns, page) for what, run in rows.items()}
        new = {what: row for what, (row, seeds) in own.items() if seeds and what not in have}
        if new and first in have:
            new = {first: have[first], f"{first} ({folder.name} alone)": own[first][0], **new}
        found[page] = {**new, **have}
    return found


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--add"]:
        if len(arguments) != 2:
            raise UserError("name one folder: --add out/demo.")
        figures = added(json.loads(FIGURES.read_text(encoding="utf-8")), Path(arguments[1]))
        write_text(FIGURES, json.dumps(figures, ensure_ascii=False, indent=1) + "\n")
        print(f"wrote {FIGURES}", file=sys.stderr)
        return
    pages = [name for name in arguments if name in SWEEPS]
    for page in pages:
        rows = read_report(FIGURES, page, "python -m lab.sweeps")
        titles = list(next(iter(rows.values())))
        print(f"| {page} | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
        for what, row in rows.items():
            name = re.sub(r"^--[^(]*[^( ]", r"`\g<0>`", what)
            print(f"| {name} | {' | '.join(row.values())} |")
    if not pages:
        if not arguments:
            raise UserError(f"name the folders of the seeds, or a page: {', '.join(SWEEPS)}.")
        figures = measured([Path(folder) for folder in arguments])
        write_text(FIGURES, json.dumps(figures, ensure_ascii=False, indent=1) + "\n")
        print(f"wrote {FIGURES}", file=sys.stderr)


if __name__ == "__main__":
    run_on_paths(main)
