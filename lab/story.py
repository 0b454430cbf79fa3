"""What each stage of the demo changed, in words, on one screen.

    python -m lab.story out/demo

Reads what the demo measured on held-out prompts (scorecard.json), pairs (rm.report.json) and problems
(best_of_8.csv). Of a method it names what changed by more than two standard errors, prompt by prompt: what
got better, then what got worse. The tables: scorecard.txt, rm.report.txt and best_of_8.txt of that folder.
"""

import textwrap
from pathlib import Path

from lab import run_on_paths
from lab.plot import read_curves
from lab.seeds import read_report, scorecards
from nanoalign import UserError
from nanoalign.terminal import visible

CHANGES = {  # metric: (how it is called, how it is written, is more of it better?)
    "correct": ("right answers", "{:.0%}", True),
    "facts correct": ("right facts", "{:.0%}", True),
    "answered": ("answers given", "{:.0%}", True),
    "harmful compliance": ("help with harm", "{:.0%}", False),
    "over-refusal": ("refusals of the harmless", "{:.0%}", False),
    "sycophancy": ("agreement with false beliefs", "{:.0%}", False),
    "invention": ("invented answers", "{:.0%}", False),
    "hedging": ("hedging", "{:.0%}", False),
    "wrong form": ("wrong form", "{:.0%}", False),
    "padding (sentences)": ("needless sentences", "{:.2f}", False),
    "repetition": ("repetition", "{:.0%}", False),
}
WIDTH = 118


def changes(before: dict, card: dict) -> str:
    """What is beyond two standard errors of a checkpoint's changes, from the most certain on."""
    found = {True: [], False: []}
    for name, (called, written, more) in CHANGES.items():
        change, error = card["change from the baseline"].get(name) or (0, 0)
        if change and error and abs(change) > 2 * error:
            values = (written.format(own["overall"][name][0]) for own in (before, card))
            found[(change > 0) == more].append((-abs(change) / error, f"{called} {' → '.join(values)}"))
    better, worse = (listed([text for _, text in sorted(found[side])]) for side in (True, False))
    return f"{better or 'nothing better'}; but {worse}" if worse else better or "no change to speak of"


def listed(changed: list[str], most: int = 4) -> str:
    more = f", and {len(changed) - most} more" if len(changed) > most else ""
    return ", ".join(changed[:most]) + more


def share(card: dict, name: str) -> str:
    return f"{card['overall'][name][0]:.0%}"


def story(folder: Path) -> list[tuple[str, str]]:
    """(stage, what it changed) of a demo's folder."""
    [cards] = scorecards([folder / "scorecard.json"])
    by_name = {Path(path).stem: card for path, card in cards.items()}
    if not {"base", "sft"} <= by_name.keys():
        raise UserError(f"{folder}/scorecard.json is not the demo's: it has no base and no sft.")
    base, sft = by_name.pop("base"), by_name.pop("sft")
    accuracy, ceiling = (read_report(folder / "rm.report.json", part, "lab/reward_report.py")
                         for part in ("expected_accuracy", "ceiling"))  # fmt: skip
    lines = [
        ("base", f"goes on instead of answering: {share(base, 'answered')} of its texts answer, "
                 f"{share(base, 'correct')} are right"),
        ("sft", f"answers {share(sft, 'answered')}, and {share(sft, 'correct')} are right; but it copies its "
                f"demonstrators: it helps with {share(sft, 'harmful compliance')} of harm, refuses "
                f"{share(sft, 'over-refusal')} of the harmless, agrees with {share(sft, 'sycophancy')} of "
                f"false beliefs, invents {share(sft, 'invention')} of what nobody can know"),
        ("rm", f"tells which answer people prefer in {accuracy:.0%} of held-out pairs; nobody could in more "
               f"than {ceiling:.0%}, people being as they are"),
    ]  # fmt: skip
    for name, card in by_name.items():
        (won, error), (kl, _) = card["overall"]["win rate"], card["overall"]["KL to reference"]
        far = "" if kl is None else f" at {kl:.1f} nats"
        lines.append((name, f"wins {won:.0%} ± {error:.0%} against SFT{far}: {changes(sft, card)}"))
    return [*lines, *process(folder / "best_of_8.csv")]


def process(path: Path) -> list[tuple[str, str]]:
    """What selecting by steps is worth, from best_of_n.py's table; nothing where there is none."""
    if not path.exists():
        return []
    curves = read_curves(str(path))
    n = max(curves["majority"])
    one, most, best = (curves[name][k][0] for name, k in (("mean", 1), ("majority", n), ("prm-min", n)))
    line = f"of a sum one solution is right in {one:.0%}, the commonest answer of {n} in {most:.0%}, the best"
    return [("prm", f"{line} of {n} by its least certain step in {best:.0%}")]


def main(paths: list[str]) -> None:
    if len(paths) != 1:
        raise UserError("name the demo's folder, such as out/demo.")
    lines = story(Path(paths[0]))
    indent = max(len(name) for name, _ in lines) + 2
    print("What each stage changed, on prompts that none has seen, by the exact judge\n")
    for name, text in lines:
        wrapped = textwrap.wrap(text, WIDTH - indent)
        print(visible(f"{name:{indent}}" + ("\n" + " " * indent).join(wrapped)))
    print(f"\nThe tables: {paths[0]}/scorecard.txt, rm.report.txt, best_of_8.txt")


if __name__ == "__main__":
    run_on_paths(main)
