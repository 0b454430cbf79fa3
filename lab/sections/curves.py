"""The curves of every run over the reference band, each with what it means and the doctor's word on it."""

import json
import math

from lab import bands, doctor
from lab.sections.charts import Band, Line, chart, finite, legend
from lab.sections.meanings import FIRST, meaning
from lab.sections.page import Html, el, missing, number, share
from lab.sections.runs import Run

LATER = ("lr", "tokens_per_s", "peak_mb")  # behind a click, last
LEFT_OUT = {"tokens", "elapsed", "generation_s", "scoring_s", "update_s"}
INSIDE, PARTLY = 0.8, 0.5  # shares of points in the band: as usual, and partly so
FEWEST = 3  # points before where they lie says anything


def charted(run: Run) -> list[str]:
    """The names of a run's charts, X and eval_X being one: those of FIRST, then what else was logged."""
    errors = {f"{name}_error" for name in run.metrics}
    names = dict.fromkeys(name.removeprefix("eval_") for name in run.metrics if name not in LEFT_OUT | errors)
    first = [name for name in FIRST.get(run.name, ()) if name in names]
    rest = [name for name in names if name not in first and name not in LATER]
    return first + rest + [name for name in LATER if name in names]


def band_of(own: dict | None, dots: bool) -> list[Band]:
    if not own:
        return []
    return [Band(own["step"], own["low"], own["high"], dots)]


def where(run: Run, name: str, reference: dict | None) -> float | None:
    """The share of a run's values that lie in the reference band; None if there are too few to say."""
    own = reference and reference["metrics"].get(name)
    steps, values = run.column(name)
    return bands.inside(own, steps, values) if own and len(steps) >= FEWEST else None


def verdict(run: Run, name: str) -> tuple[str, Html]:
    """The doctor's word on a metric: (ok or ill or none, what it says)."""
    columns = doctor.columns(run.rows)
    try:
        asked = [one for one in doctor.askable(columns) if {name, f"eval_{name}"} & set(one[1])]
        ill = [one for one in asked if one[2](columns)]
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return "none", el("span", "the doctor cannot read it", class_="verdict none")
    if ill:
        name, _, _, cause, remedy = ill[0]
        return "ill", el("span", f"{name}: {cause}. {remedy[0].upper()}{remedy[1:]}.", class_="verdict ill")
    if not asked:
        return "none", Html()
    known = "1 known sickness" if len(asked) == 1 else f"{len(asked)} known sicknesses"
    return "ok", el("span", f"healthy: none of {known}", class_="verdict ok")


def reading(run: Run, name: str) -> dict:
    """What the page's script reads under the pointer: the training values, or the held-out ones."""
    steps, values = max((run.column(name), run.column(f"eval_{name}")), key=lambda both: len(both[0]))
    kept = [(x, float(f"{y:.4g}")) for x, y in zip(steps, values) if math.isfinite(y)][
        :: -(-len(steps) // 240)
    ]
    everything = [*run.column(name)[0], *run.column(f"eval_{name}")[0]]
    ends = {"x0": min(everything), "x1": max(everything)}
    return {"x": [x for x, _ in kept], "y": [y for _, y in kept], **ends}


def small(run: Run, name: str, reference: dict | None) -> Html:
    """One metric: its curve, held out as dots, the band; its meaning, its range, its verdicts."""
    pairs = (name, run.column(name)), (f"eval_{name}", run.column(f"eval_{name}"))
    pairs = [(own, column) for own, column in pairs if column[0]]
    lines, areas = [], []
    for own, (steps, values) in pairs:
        held_out = own != name
        kind = "second" if held_out and len(pairs) > 1 else ""
        lines.append(
            Line(steps, values, kind, "held out" if held_out else "training", held_out and len(steps) < 30)
        )
        if reference:
            areas += band_of(reference["metrics"].get(own), held_out and len(pairs) > 1)
    what, range_ = meaning(run.name, name)
    last = ", ".join(f"{number(column[1][-1])}{' held out' if own != name else ''}" for own, column in pairs)
    first = number(pairs[0][1][1][0])
    label = f"{run.title}, {name.replace('_', ' ')}: from {first} to {last}"
    lines = [line for line in lines if finite(line.ys)]
    drawn = chart(lines, areas, "step", label) if lines else el("p", "Never a number.", class_="missing")
    inside = [where(run, own, reference) for own, _ in pairs]
    inside = [x for x in inside if x is not None]
    said = verdict(run, name)[1]
    notes = [el("p", what, ".", class_="what") if what else None]
    notes += [el("p", el("b", "Healthy: "), range_, ".") if range_ else None]
    notes += [el("p", said) if said else None]
    notes += [
        el("p", f"{share(min(inside))} of its points lie in the band.", class_="quiet") if inside else None
    ]
    head = el("h4", name.replace("_", " "), " ", el("span", last, class_="value"))
    reader = el("p", class_="reading", aria_hidden="true")
    names = legend([line for line in lines if len(lines) > 1])
    curve = json.dumps(reading(run, name), separators=(",", ":")) if lines else None
    return el(
        "figure", head, drawn, reader, names, el("figcaption", notes), class_="metric", data_curve=curve
    )


def health(run: Run) -> tuple[str, list[str]]:
    """(ok or ill, the names of the sicknesses that the run shows)."""
    try:
        found = [name for name, *_ in doctor.diagnose(doctor.columns(run.rows))]
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        found = ["its metrics do not fit together"]
    return ("ill" if found else "ok"), found


def against_band(run: Run) -> tuple[str, str]:
    """(ok, partly, outside or none, a sentence): is this run's curve the usual one?"""
    reference = bands.read_band(run.name)
    if reference is None:
        return "none", f"There is no reference band of {run.title}."
    if other := bands.different(reference["settings"], run):
        listed = "; ".join(other[:4]) + ("; …" if len(other) > 4 else "")
        return "none", f"The band is of other settings ({listed}), and is not drawn."
    shares = {name: where(run, name, reference) for name in reference["metrics"]}
    shares = {name: x for name, x in shares.items() if x is not None}
    if not shares:
        return "none", "Too few steps were logged to say whether its curves are the usual ones."
    whole = sum(shares.values()) / len(shares)
    kind = "ok" if whole >= INSIDE else "partly" if whole >= PARTLY else "outside"
    odd = [name.replace("_", " ") for name, x in shares.items() if x < PARTLY]
    which = f" Not the usual ones: {', '.join(odd)}." if odd else ""
    word = {"ok": "As usual", "partly": "Partly as usual", "outside": "Not as usual"}[kind]
    seeds = reference["seeds"]
    return kind, f"{word}: {share(whole)} of all points lie in the band of {seeds} seeds.{which}"


def one(run: Run) -> Html:
    """A run's section."""
    heading = el("h3", run.title, " ", el("span", run.about, class_="quiet"))
    if not any("step" in row for row in run.rows):
        name = run.checkpoint.with_suffix(".metrics.jsonl").name
        return el(
            "article",
            heading,
            missing(f"{name}, the metrics of {run.title}", "make demo"),
            id=f"run-{run.name}",
        )
    kind, sentence = against_band(run)
    reference = bands.read_band(run.name) if kind != "none" else None
    state, found = health(run)
    word = "; ".join(found) if found else "healthy: it shows no known sickness"
    verdicts = [
        el("li", el("b", "Doctor: "), el("span", word, class_=f"verdict {state}")),
        el("li", el("b", "Band: "), el("span", sentence, class_=f"verdict {kind}")),
    ]
    names = charted(run)
    at_once = [name for name in names if name in FIRST.get(run.name, names[:4])]
    later = [name for name in names if name not in at_once]
    more = (
        el(
            "details",
            el("summary", f"{len(later)} more metrics"),
            el("div", [small(run, name, reference) for name in later], class_="grid"),
        )
        if later
        else None
    )
    charts = el("div", [small(run, name, reference) for name in at_once], class_="grid")
    return el("article", heading, el("ul", verdicts, class_="verdicts"), charts, more, id=f"run-{run.name}")


def section(runs: dict[str, Run]) -> Html:
    intro = el(
        "p",
        "Each run’s own metrics.jsonl. The shaded band is where a healthy run of the same settings lies, "
        "by the runs of three seeds: two standard deviations of a new run. Bars are the same for single "
        "held-out looks. Point at a curve to read it.",
        class_="lead",
    )
    return el("section", el("h2", "Curves"), intro, [one(run) for run in runs.values()], id="curves")
