"""The pipeline as a picture whose boxes are this run's: what went in, what came out, what it took."""

from pathlib import Path

from lab.sections.page import Html, el
from lab.sections.page import count as written
from lab.sections.runs import Run, counted
from nanoalign import cli

# name: (title, where in the grid of columns and rows, where a click leads, what it comes from)
BOXES = {
    "world": ("World", 0, 2, "summary", []),
    "base": ("Base model", 1, 2, "run-base", ["world"]),
    "sft": ("SFT", 2, 1, "run-sft", ["base"]),
    "pairs": ("Preferences", 3, 1, "pair", ["sft"]),
    "dpo": ("DPO", 4, 0, "run-dpo", ["pairs"]),
    "kto": ("KTO", 4, 1, "run-kto", ["pairs"]),
    "rm": ("Reward model", 4, 2, "run-rm", ["pairs"]),
    "orpo": ("ORPO", 4, 3, "run-orpo", ["base", "pairs"]),
    "ppo": ("PPO", 5, 1.5, "run-ppo", ["rm"]),
    "grpo": ("GRPO", 5, 2.5, "run-grpo", ["rm"]),
    "solver": ("Solver", 2, 4, "run-solver", ["base"]),
    "steps": ("Marked steps", 3, 4, "steps", ["solver"]),
    "prm": ("Process model", 4, 4, "run-prm", ["steps"]),
    "best": ("Best of n", 5, 4, "best-of-n", ["prm"]),
    "chats": ("After deployment", 5, 0.5, "deployment", ["dpo", "kto"]),
}
WIDTH, HEIGHT, ACROSS, DOWN = 164, 78, 190, 100
FILES = {
    "world": "world/pretrain.jsonl",
    "pairs": "pairs.jsonl",
    "steps": "steps.jsonl",
    "best": "best_of_8.csv",
    "chats": "chats.jsonl",
}


def parameters(path: Path) -> int:
    """The numbers in a checkpoint's weights, shared ones once; 0 where it cannot be read."""
    from nanoalign.checkpoint import load

    try:
        own = load(path)["model"]
        heads = {name: own.get(name.replace("head.", "embed."), own[name]) for name in own}
        shared = sum(x.numel() for name, x in heads.items() if x is not own[name] and x.equal(own[name]))
        return sum(weights.numel() for weights in own.values()) - shared
    except (Exception, SystemExit):  # a picture is drawn whatever lies in a folder
        return 0


def took(run: Run) -> list[str]:
    """What a run's box says."""
    if not run.there and not run.rows:
        return ["not made: make demo"]
    rows = sum(counted(path) for path in run.inputs)
    out = run.checkpoint.name
    lines = [f"{rows:,} rows → {out}" if rows else f"→ {out}; its rows are gone"]
    size = parameters(run.checkpoint) if run.there else 0
    lines.append(f"{written(size)} parameters" if size else "no checkpoint")
    if run.last:
        models = max(1, len(run.models))
        lines.append(f"{cli.duration(run.last['elapsed'])}, {models} model{'s' if models > 1 else ''} held")
    return lines


def made(folder: Path, name: str) -> list[str]:
    """What the box of a file says."""
    path = folder / FILES[name]
    if not path.is_file():
        return (
            ["no conversations yet", "chat.py --log chats.jsonl"]
            if name == "chats"
            else ["not made: make demo"]
        )
    if name == "chats":
        return [f"{counted(path):,} answers, logged"]
    if name == "world":
        prompts = counted(folder / "world/prompts.jsonl")
        return [
            f"{counted(path):,} texts",
            f"{counted(folder / 'world/sft.jsonl'):,} demonstrations",
            f"{prompts:,} prompts",
        ]
    if name == "best":
        return ["solutions drawn, and", "chosen among by steps"]
    return [
        f"{counted(path):,} {'pairs of answers' if name == 'pairs' else 'solutions'}",
        "of sft.pt’s, compared" if name == "pairs" else "each step right or wrong",
    ]


def place(name: str) -> tuple[float, float]:
    _, column, row, *_ = BOXES[name]
    return 4 + column * ACROSS, 4 + row * DOWN


def arrow(start: str, end: str) -> Html:
    (x1, y1), (x2, y2) = place(start), place(end)
    x1, y1, y2 = x1 + WIDTH, y1 + HEIGHT / 2, y2 + HEIGHT / 2
    half = (x2 - x1) / 2
    if x2 - x1 > ACROSS:  # past other boxes: below them
        low = y2
        bend = f"M{x1} {y1} C{x1 + 16} {y1} {x1 + 4} {low} {x1 + 40} {low} L{x2 - 6} {y2}"
        return el("path", class_="arrow", d=bend, marker_end="url(#tip)")
    bend = f"M{x1} {y1} C{x1 + half} {y1} {x2 - half} {y2} {x2 - 5} {y2}"
    return el("path", class_="arrow", d=bend, marker_end="url(#tip)")


def drawn(name: str, lines: list[str]) -> Html:
    title, _, _, goal, _ = BOXES[name]
    x, y = place(name)
    absent = lines[0].startswith(("not made", "no conv"))
    parts = [el("rect", x=x, y=y, width=WIDTH, height=HEIGHT, rx=9)]
    parts.append(el("text", title, class_="title", x=x + 12, y=y + 22))
    parts += [el("text", line, class_="small", x=x + 12, y=y + 39 + 15 * i) for i, line in enumerate(lines)]
    return el(
        "a",
        parts,
        href=f"#{goal}",
        class_="box absent" if absent else "box",
        aria_label=f"{title}: {', '.join(lines)}",
    )


def section(folder: Path, runs: dict[str, Run]) -> Html:
    lines = {name: took(runs[name]) if name in runs else made(folder, name) for name in BOXES}
    size = f"0 0 {8 + 5 * ACROSS + WIDTH} {8 + 4 * DOWN + HEIGHT}"
    arrows = [arrow(start, name) for name, (*_, starts) in BOXES.items() for start in starts]
    tip = el("path", d="M0 0L7 3.5L0 7z", class_="tip")
    head = el(
        "marker",
        tip,
        id="tip",
        viewBox="0 0 7 7",
        refX="6",
        refY="3.5",
        markerWidth="7",
        markerHeight="7",
        orient="auto",
        markerUnits="userSpaceOnUse",
    )
    picture = el(
        "svg",
        el("defs", head),
        arrows,
        [drawn(name, own) for name, own in lines.items()],
        viewBox=size,
        role="group",
        class_="pipeline",
        aria_label="The pipeline of this run",
    )
    items = [
        el("li", el("a", el("b", BOXES[name][0]), el("span", ", ".join(own)), href=f"#{BOXES[name][3]}"))
        for name, own in lines.items()
    ]
    intro = el(
        "p",
        "Every box is this run’s: rows in and checkpoint out, its parameters, how long it took and how "
        "many models it held in memory. A click leads to what it did.",
        class_="lead",
    )
    both = picture, el("ol", items, class_="pipeline-list")
    return el("section", el("h2", "The pipeline"), intro, both, id="pipeline")
