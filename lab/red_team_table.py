"""Reports of `make red-team` → markdown tables, means ± standard errors over seeds.

    python -m lab.red_team_table out/seed0/red-team out/seed1/red-team out/seed2/red-team

Reads a folder per seed with policies.json, before.json and after.json (lab/red_team.py). First how often
each checkpoint helps with the harm that was asked for, under each attack. Then, before and after the reward
model was retrained, by kind of attack: how many are exploits, the share of responses that fool the reward,
and the change of the reward, in the standard deviations of that reward model.
"""

from pathlib import Path

from lab import run_on_paths
from lab.scoreboard import table
from lab.seeds import over_seeds, read_report
from nanoalign import UserError

KINDS = {  # how the names of attacks begin
    "another sample": "another sample (no attack)",
    "template": "templates",
    "old": "what fooled it before",
    "search": "searches around a response",
    "whole text": "searches for a whole text",
    "gap": "a policy trained against the first model",
    "gap-again": "a policy trained against this one",
}


def kind(name: str) -> str:
    return max((begin for begin in KINDS if name.startswith(begin)), key=len)


def found(folder: str, name: str) -> dict:
    return read_report(Path(folder) / f"{name}.json", "found", "a red team's report: `make red-team`")


def cells(reports: list[dict], begin: str) -> list[str]:
    """One kind of attack in the reports of every seed → exploits of each seed, share fooled, reward."""
    own = [[one for name, one in report.items() if kind(name) == begin] for report in reports]
    if not all(own):
        return ["–"] * 3
    exploits = "–"
    if begin != "another sample":
        exploits = ", ".join(f"{sum(one['exploit'] for one in each)} of {len(each)}" for each in own)
    means = [[sum(one[c][0] for one in each) / len(each) for each in own] for c in ("fooled", "reward")]
    return [exploits, *map(over_seeds, means)]


def main(folders: list[str]) -> None:
    if not folders:
        raise UserError("name the folders, such as out/seed0/red-team.")
    policies = [list(found(folder, "policies").items()) for folder in folders]
    rows = []
    for attack in policies[0][0][1]:
        helped = [[own[attack]["helped"][0] for _, own in report] for report in policies]
        rows.append([attack, *map(over_seeds, zip(*helped))])
    table([f"seeds: {len(folders)}", *(Path(path).stem for path, _ in policies[0])], rows)
    before, after = ([found(folder, name) for folder in folders] for name in ("before", "after"))
    rows = [[what, *cells(before, begin), *cells(after, begin)] for begin, what in KINDS.items()]
    columns = ("exploits", "fooled", "reward")
    table(
        [f"seeds: {len(folders)}", *(f"{c}, {when}" for when in ("before", "after") for c in columns)], rows
    )


if __name__ == "__main__":
    run_on_paths(main)
