"""Samples side by side: answers of every model, a pair and its scores, best of n, marked steps, revisions."""

import json
from pathlib import Path

import torch

from lab.plot import read_curves
from lab.sections.charts import Line, chart, legend
from lab.sections.models import Models, family, judged, last_words
from lab.sections.page import Html, el, missing, number, said, share, table
from lab.sections.runs import STAGES
from nanoalign.steps import step_example
from nanoalign.world import verdicts

# of a verdict: what is worth a word, and whether it is good news
WORDS = {
    "correct": ("right", True), "harmful compliance": ("helps with harm", False), "over-refusal": (
        "refuses the harmless", False),
    "sycophancy": ("agrees with what is false", False), "invention": ("invented", False), "hedging": (
        "hedged", False),
    "wrong form": ("wrong form", False), "padding (sentences)": ("padded", False), "repetition": (
        "repeats", False),
}  # fmt: skip
TELLING = ("harm", "belief", "unanswerable")  # families in which training shows at once: one is shown first
SELECTORS = {
    "pass": ("any of n is right", "dashed"),
    "prm-min": ("best by its least certain step", ""),
    "majority": ("the commonest answer", "second"),
    "mean": ("one drawn", "fourth"),
    "vote": ("vote weighed by steps", "third"),
}


def question(row: dict) -> Html:
    return el("div", el("b", family(row)), said(last_words(row), "span"), class_="question")


def tags(row: dict, text: str, ended: bool) -> Html:
    """The judge's utility, and a word for what it found."""
    found = verdicts.checks(row["prompt"], text, row["meta"], ended)
    words = [(word, good) for name, (word, good) in WORDS.items() if found.get(name)]
    words += [] if found["ended"] else [("did not end", False)]
    marks = [el("span", word, class_=f"tag {'good' if good else 'bad'}") for word, good in words]
    return Html(" ".join(marks))


def side_by_side(models: Models) -> Html:
    """The same held-out prompts, answered by base, SFT and each method."""
    rows = models.prompts
    if not rows or not models.policies:
        return missing("world/prompts_held_out.jsonl, or a policy to ask", "make demo")
    answers = {name: models.answers(name, rows) for name in models.policies}
    scores = {}
    if models.has("rm"):
        scores = {name: models.scores(rows, *answers[name]).tolist() for name in answers}
    families = list(dict.fromkeys(map(family, rows)))
    first = next((name for name in TELLING if name in families), families[0])
    options = [el("option", name, value=name, selected=name == first) for name in families]
    choice = el(
        "div",
        el("label", "Family", for_="family"),
        el("select", options, el("option", "all families", value=""), id="family", data_shows="family"),
        class_="controls",
    )
    parts = []
    for i, row in enumerate(rows):
        known = judged(row)
        lines = []
        for name, (texts, ended) in answers.items():
            line = [STAGES[name][2], said(texts[i]) if texts[i].strip() else el("i", "(nothing)")]
            if known:
                utility = verdicts.utility([row], [texts[i]], [ended[i]])[0]
                line.append(joined_cell(number(utility, 3), tags(row, texts[i], ended[i])))
            if scores:
                line.append(number(scores[name][i], 2))
            lines.append(line)
        names = ["model", "answer", *(["judge"] if known else []), *(["reward model"] if scores else [])]
        shown = table(names, lines, class_="stack answers")
        parts.append(
            el("div", question(row), shown, class_="sample", data_group="family", data_of=family(row))
        )
    intro = (
        "One sample each, at temperature 1: the judge is exact, the reward model is what PPO and GRPO climb."
    )
    return el(
        "article", el("h3", "The same prompts, every model"), el("p", intro), choice, parts, id="answers"
    )


def joined_cell(value: str, marks: Html) -> Html:
    return Html(el("span", value) + " " + marks)


def pair(models: Models) -> Html:
    """Held-out pairs, the reward model's two scores, P(A ≻ B): surest and people chose as it would,
    surest and they chose otherwise, nearest to a half."""
    rows = [row for row in models.held_out_pairs if "chosen" in row][:240]
    if not rows or not models.has("rm"):
        return el("article", el("h3", "A pair"), missing("held-out pairs, or rm.pt", "make demo"), id="pair")
    both = torch.stack([models.scores(rows, [row[side] for row in rows]) for side in ("chosen", "rejected")])
    scale = models.scalar("rm")[2].get("normalisation", {}).get("std", 1.0)
    p = torch.sigmoid((both[0] - both[1]).double() * scale)
    p = torch.where(p.isfinite(), p, 0.5)
    picked = {
        "Surest, and people chose as it would": p.argmax(),
        "Surest, and people chose otherwise": p.argmin(),
        "Undecided": (p - 0.5).abs().argmin(),
    }
    parts = []
    for what, i in picked.items():
        row, chance, swap = rows[i], p[i].item(), int(i) % 2 == 1  # which of them is A says nothing
        sides = [("chosen", both[0, i].item(), chance), ("rejected", both[1, i].item(), 1 - chance)]
        sides = sides[::-1] if swap else sides
        cards = []
        for letter, (side, score, _) in zip("AB", sides):
            head = el(
                "h4",
                letter,
                " ",
                el("span", f"score {number(score, 2)}", class_="value"),
                el("span", " people chose this", class_="quiet") if side == "chosen" else None,
            )
            cards.append(
                el("div", head, said(row[side], "div"), class_="card first" if side == "chosen" else "card")
            )
        of_a = sides[0][2]
        gauge = el("meter", min="0", max="1", value=f"{of_a:.3f}", aria_label=f"P(A ≻ B) = {of_a:.2f}")
        people = (row.get("meta") or {}).get("p_chosen")
        share_of_a = None if people is None else people if sides[0][0] == "chosen" else 1 - people
        truth = "" if people is None else f" The people of this world would choose A with {share_of_a:.2f}."
        line = el(
            "p",
            f"P(A ≻ B) = σ({number(scale, 3)} (score A − score B)) = ",
            el("b", f"{of_a:.2f}"),
            " ",
            gauge,
            truth,
            class_="below",
        )
        parts.append(
            el("div", el("h4", what), question(row), el("div", cards, class_="two"), line, class_="sample")
        )
    intro = (
        f"Of {len(rows)} held-out pairs. The labels are noisy, as people are: where the model is sure and "
        "they chose otherwise, it may be they who slipped. Scores are in units of their spread in "
        f"training, {number(scale, 3)} nats."
    )
    return el("article", el("h3", "A pair, scored"), el("p", intro), parts, id="pair")


def best_of_n(folder: Path) -> Html:
    path = folder / "best_of_8.csv"
    head = el("h3", "Best of n")
    if not path.is_file():
        return el("article", head, missing("best_of_8.csv", "make demo"), id="best-of-n")
    curves = read_curves(str(path))
    lines = [
        Line(list(curves[name]), [right for right, _ in curves[name].values()], kind, called, True)
        for name, (called, kind) in SELECTORS.items()
        if name in curves
    ]
    picture = chart(
        lines,
        x_label="n, solutions drawn",
        label="share of problems right against n",
        within=(0, 0.5),
        x_ticks=list(next(iter(curves.values()))),
    )
    sizes = list(next(iter(curves.values())))
    rows = [
        [name, *(f"{share(right)} ± {share(error)}" for right, error in own.values())]
        for name, own in curves.items()
    ]
    figures = el("figure", picture, legend(lines), el("figcaption", "Share of held-out sums that are right."))
    listed = table(["selector", *(f"n = {n}" for n in sizes)], rows)
    intro = (
        "More samples help only as much as what chooses among them; “any of n” is what a perfect one would "
        "reach."
    )
    return el("article", head, el("p", intro), el("div", figures, listed, class_="two"), id="best-of-n")


def steps(models: Models, most: int = 3) -> Html:
    """Solutions whose steps are coloured by the process model, beside what is right."""
    rows = models.rows("steps_held_out.jsonl", "steps")
    head = el("h3", "Steps, as the process model reads them")
    if not rows or not models.has("prm"):
        return el("article", head, missing("steps_held_out.jsonl, or prm.pt", "make demo"), id="steps")
    model, tokenizer, _ = models.scalar("prm")
    wrong = [row for row in rows if not all(row["labels"])]
    right = [row for row in rows if all(row["labels"])]
    picked = (wrong[: most - 1] + right[:1] + wrong[most - 1 :])[:most]
    parts = []
    for row in picked:
        prompt = tokenizer.prompt(row["prompt"])
        ids, _, spans = step_example(prompt, row["completions"], tokenizer, model.config.context)
        with torch.no_grad():
            p = model(torch.from_numpy(ids)[None])[0].float().sigmoid()
        items = []
        for number_, _, end in spans:
            chance, label = p[end].item(), row["labels"][number_]
            mark = "" if label is None else " ✓" if label >= 0.5 else " ✗"
            colour = f"--c: color-mix(in oklab, var(--accent) {chance:.0%}, var(--second))"
            note = el("span", f"{chance:.0%}{mark}")
            items.append(el("li", note, said(row["completions"][number_]), style=colour))
        parts.append(el("div", question(row), el("ol", items, class_="steps"), class_="card"))
    intro = (
        "P(this step is right) of each step, and what the checker says of it: a step is judged by what "
        "stands before it."
    )
    return el("article", head, el("p", intro), el("div", parts, class_="two"), id="steps")


def revisions(folder: Path, most: int = 3) -> Html:
    """A critique and its revisions, round by round."""
    path = folder / "cai/revisions.trail.jsonl"
    head = el("h3", "A critique and its revisions")
    if not path.is_file():
        return el("article", head, missing("cai/revisions.trail.jsonl", "make cai"), id="revisions")
    picked: dict[str, dict] = {}
    with path.open(encoding="utf-8") as file:
        for line, _ in zip(file, range(400)):
            row = json.loads(line)
            changed = row["rounds"] and row["rounds"][-1]["revision"] != row["response"]
            if changed and len(picked) < most:
                picked.setdefault(family(row), row)
    parts = []
    for row in picked.values():
        items = [el("li", el("b", "First answer. "), said(row["response"]))]
        for number_, one in enumerate(row["rounds"], 1):
            items.append(
                el(
                    "li",
                    el("b", f"Round {number_}. "),
                    el("span", one["principle"], class_="quiet"),
                    el("br"),
                    "Critique: ",
                    said(one["critique"]),
                    el("br"),
                    "Revision: ",
                    said(one["revision"]),
                )
            )
        parts.append(el("div", question(row), el("ol", items), class_="card"))
    intro = (
        "The model criticises its own answer by a principle drawn from the constitution, and writes it anew."
    )
    return el("article", head, el("p", intro), el("div", parts, class_="two"), id="revisions")


def section(folder: Path, models: Models) -> Html:
    parts = side_by_side(models), pair(models), best_of_n(folder), steps(models), revisions(folder)
    lead = el("p", "What the models say, on prompts that none has seen.", class_="lead")
    return el("section", el("h2", "Samples"), lead, parts, id="samples")
