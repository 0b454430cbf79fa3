"""The hacking curve: proxy, judge and KL through training, for every β that was run."""

import re
from pathlib import Path

from lab.doctor import columns, hacked
from lab.hacking import curve
from lab.sections.charts import Line, chart, legend
from lab.sections.page import Html, el, missing, number, table
from lab.sections.runs import Run

FALLEN = 0.2  # the doctor's: from its best


def of_betas(folder: Path) -> dict[float, list[dict]]:
    """β → its curve, of the runs hacking/beta-X (longer ones in place of short ones)."""
    found: dict[float, list[dict]] = {}
    for path in sorted(folder.glob("hacking/beta-*.metrics.jsonl")):
        if parts := re.fullmatch(r"beta-([\d.]+)(-long)?", path.name.removesuffix(".metrics.jsonl")):
            points = curve(path)
            beta = float(parts[1])
            if len(points) > len(found.get(beta, ())):
                found[beta] = points
    return found


def panel(points: list[dict], name: str) -> Html:
    """One run: proxy and judge, and KL beside them, by the look."""
    looks = list(range(len(points)))
    both = [
        Line(looks, [p["proxy"] for p in points], "", "proxy: the reward model", True),
        Line(looks, [p["judge"] for p in points], "second", "the exact judge", True),
    ]
    distance = [Line(looks, [p["kl"] for p in points], "third", "KL to SFT, nats", True)]
    best = max(range(len(points)), key=lambda i: points[i]["judge"])
    lost = points[best]["judge"] - points[-1]["judge"]
    verdict = (
        f"the judge was best at look {best}, and has lost {number(lost, 2)} since"
        if lost > 0.05
        else "the judge ends near its best"
    )
    climbed = points[-1]["proxy"] > points[0]["proxy"]
    verdict += ": hacked" if lost > FALLEN and climbed else ""
    ends = f"{name}: proxy {number(points[0]['proxy'], 2)} → {number(points[-1]['proxy'], 2)}, judge "
    ends += (
        f"{number(points[0]['judge'], 2)} → {number(points[-1]['judge'], 2)}, KL "
        f"{number(points[-1]['kl'], 3)}"
    )
    scores = el("figure", chart(both, x_label="look at held-out prompts", label=ends), legend(both))
    kls = el("figure", chart(distance, x_label="look", label=f"{name}: KL", within=(0, 1)), legend(distance))
    return el(
        "div",
        el("p", el("b", ends), ". ", verdict[0].upper() + verdict[1:], "."),
        el("div", scores, kls, class_="two"),
    )


def ended(points: list[dict]) -> list[str]:
    """A run's row of the table."""
    last, best = points[-1], max(p["judge"] for p in points)
    return [str(len(points)), *(number(x, 3) for x in (last["kl"], last["proxy"], best, last["judge"]))]


def section(folder: Path, runs: dict[str, Run]) -> Html:
    head = el("h2", "The hacking curve")
    lead = el(
        "p",
        "A reward model is a proxy. PPO climbs it; the exact judge, which PPO never sees, says what the "
        "climb was worth. The less KL costs (β), the further the two can part.",
        class_="lead",
    )
    betas = of_betas(folder)
    if betas:
        names = sorted(betas)
        parts = [
            el("div", panel(betas[beta], f"β = {number(beta)}"), data_group="beta", data_of=beta)
            for beta in names
        ]
        top = max(names) or 1
        slider = el(
            "div",
            el("label", "β, the price of a nat", for_="beta-measured"),
            el("output", number(names[0]), for_="beta-measured"),
            el(
                "input",
                type="range",
                id="beta-measured",
                min="0",
                max=top,
                step=top / 40,
                value=names[0],
                data_nearest="beta",
            ),
            class_="slider",
        )
        ends = [[f"β = {number(beta)}", *ended(betas[beta])] for beta in names]
        heads = ["run", "looks", "KL at the end", "proxy", "judge at its best", "judge at the end"]
        body = [slider, parts, table(heads, ends, "every measured run, at its end", class_="stack")]
    else:
        body = [missing("hacking/beta-*.metrics.jsonl, runs of several β", "make hacking")]
        for name in ("ppo", "grpo"):
            points = [
                {"kl": row["eval_kl"], "proxy": row.get("eval_reward"), "judge": row["eval_judge"]}
                for row in runs[name].rows
                if {"eval_judge", "eval_kl", "eval_reward"} <= row.keys()
            ]
            if points:
                beta = runs[name].config.get("beta")
                body.append(el("h3", f"{runs[name].title}, this run"))
                body.append(panel(points, f"β = {number(beta)}"))
    return el("section", head, lead, body, id="hacking")


def told(runs: dict[str, Run]) -> list[str]:
    """The demo's runs whose judge fell while the reward rose."""
    found = []
    for run in runs.values():
        own = columns(run.rows)
        if own.get("eval_judge") and own.get("eval_reward") and hacked(own):
            found.append(run.title)
    return found
