"""The explorers: sliders over formulas. report.js computes; a test holds it equal to the Python losses."""

import re

from lab.sections.formulas import Choice, Explorer, explorers
from lab.sections.page import Html, data, el


def enumerated() -> dict:
    """The oracle's first prompt: the reference, the rewards, the names of its responses, likeliest first."""
    import torch

    from lab.oracle import World

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        world = World()
        logp = world.sequence(world.ref)[: world.each]
        reward = world.reward[: world.each]
    finally:
        torch.set_default_dtype(before)
    order = logp.argsort(descending=True).tolist()
    names = ["".join("ab."[t] for t in world.said[i]) for i in order]
    return {
        "logReference": [logp[i].item() for i in order],
        "reference": [logp[i].exp().item() for i in order],
        "reward": [reward[i].item() for i in order],
        "names": names,
    }


def control(explorer: Explorer, one) -> Html:
    key = f"{explorer.name}-{one.name}"
    label = el("label", one.label, for_=key)
    if isinstance(one, Choice):
        options = [el("option", name) for name in one.options]
        return el("div", label, el("select", options, id=key, name=one.name), class_="slider")
    bounds = {"min": one.low, "max": one.high, "step": one.step, "value": one.value}
    return el(
        "div",
        label,
        el("output", f"{one.value:g}", for_=key),
        el("input", type="range", id=key, name=one.name, **bounds),
        class_="slider",
    )


def subscripts(formula: str) -> list:
    """π_ref → π with ref below the line; several formulas on lines of their own."""
    lines = []
    for line in formula.split(";  "):
        parts = re.split(r"_\(([^)]+)\)|_([\w*]+)", line)
        words = [el("sub", part) if i % 3 else part for i, part in enumerate(parts) if part]
        lines += [el("span", words), " "]
    return lines


def drawn(explorer: Explorer) -> Html:
    kinds = dict((explorer.plot or {}).get("lines", []))
    results = []
    for output, called in explorer.outputs.items():
        key = el("span", class_=f"key {kinds[output]}".strip()) if output in kinds else None
        results += [el("dt", key, called), el("dd", el("output", "…", data_output=output))]
    left = el(
        "div", [control(explorer, one) for one in explorer.controls], el("dl", results, class_="results")
    )
    along = (explorer.plot or {}).get("along")
    axis = next((c.label for c in explorer.controls if c.name == along), "")
    label = f"{explorer.title}, over {axis}" if axis else explorer.title
    picture = el("svg", class_="chart", viewBox="0 0 342 190", role="img", aria_label=label)
    caption = el("figcaption", f"Over {axis}; the dots are where the sliders stand.") if axis else None
    inside = data({"plot": explorer.plot, "bars": explorer.bars, "arrays": explorer.arrays})
    parts = (
        el("h3", explorer.title),
        el("p", subscripts(explorer.formula), class_="formula"),
        el("p", explorer.note, class_="quiet"),
    )
    body = left, el("figure", picture, caption), inside
    return el(
        "article", parts, body, class_="explorer", data_explorer=explorer.name, id=f"explore-{explorer.name}"
    )


def section() -> Html:
    lead = el(
        "p",
        "Each formula is computed in this page, by functions that a test holds equal to the project’s own "
        "Python losses, values and gradients, to nine digits.",
        class_="lead",
    )
    parts = [drawn(one) for one in explorers(enumerated())]
    return el(
        "section",
        el("h2", "Explorers"),
        lead,
        el("noscript", "The sliders need JavaScript."),
        parts,
        id="explorers",
    )
