"""A run's report: one HTML file that opens anywhere, without a network.

    python -m lab.report --run out/demo        # → out/demo/report.html

The pipeline of this run, the curves of every run over the reference band with the doctor's word, samples
side by side, the token view, the hacking curve, explorers of the losses, and what the textbooks say beside
what was measured. It reads a folder as `make demo` fills it (and what other targets add to it), asks its
models a few held-out prompts on the CPU, and keeps nothing. What a folder lacks is named, with the command
that makes it.

Its parts: lab/sections/ (a section a file), lab/report.js (the page's one script), lab/report.css.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lab import story
from lab.sections import comparison, curves, deployment, explorers, hacked, pipeline, samples, tokens
from lab.sections.models import Models, quietly
from lab.sections.page import Html, el, missing, number, share
from lab.sections.runs import Run, read_runs
from nanoalign import UserError, cli
from nanoalign.files import write_text
from nanoalign.terminal import visible

HERE = Path(__file__).parent
CHAPTERS = {
    "summary": "Summary", "pipeline": "Pipeline", "curves": "Curves", "samples": "Samples", "tokens":
        "Tokens",
    "hacking": "Hacking", "deployment": "Deployment", "explorers": "Explorers", "comparison": "Comparison",
}  # fmt: skip


@dataclass
class Config:
    run: str = "out/demo"  # the folder of a run, as `make demo` fills it
    out: str = ""  # the page; empty: report.html in that folder
    prompts: int = 2  # held-out prompts of each family that the models are asked
    seed: int = 0  # of sampling

    def __post_init__(self):
        self.out = self.out or str(Path(self.run) / "report.html")


def tile(value: str, what: str) -> Html:
    return el("div", el("b", value), el("span", what), class_="tile")


def best(cards: dict) -> tuple[str, list] | None:
    """The method with the highest win rate, and that rate with its error."""
    rates = {
        name: card["overall"].get("win rate") for name, card in cards.items() if name not in ("base", "sft")
    }
    rates = {name: rate for name, rate in rates.items() if rate and rate[0] is not None}
    return max(rates.items(), key=lambda item: item[1][0]) if rates else None


def summary(folder: Path, runs: dict[str, Run]) -> Html:
    """What was trained on what, how good it is, whether the curves are healthy, where it was hacked."""
    there = [run for run in runs.values() if run.rows]
    ill = [run.title for run in there if curves.health(run)[0] == "ill"]
    kinds = [curves.against_band(run)[0] for run in there]
    usual, known = kinds.count("ok"), len(kinds) - kinds.count("none")
    tiles = [tile(f"{len(there)} of {len(runs)}", "runs of the demo are in this folder")]
    try:
        cards = comparison.cards_of(folder)
        lines = story.story(folder)
    except (UserError, KeyError, TypeError, ValueError):
        cards, lines = {}, []
    if found := best(cards):
        name, (rate, error) = found
        tiles.append(
            tile(
                f"{name.upper()} {share(rate)} ± {share(error)}", "wins most often against SFT, by the judge"
            )
        )
    tiles.append(
        tile(
            f"{len(there) - len(ill)} of {len(there)} healthy",
            f"by the doctor{': not ' + ', '.join(ill) if ill else ''}",
        )
    )
    tiles.append(
        tile(
            f"{usual} of {known}" if known else "–",
            "have the curves of three reference seeds" if known else "no reference band is of these settings",
        )
    )
    hacking = hacked.told(runs)
    tiles.append(tile(", ".join(hacking) or "none", "of the runs climbed the reward while the judge fell"))
    listed = [part for name, text in lines for part in (el("dt", name.upper()), el("dd", text))]
    told = (
        el("dl", listed, class_="story")
        if lines
        else missing("scorecard.json and rm.report.json", "make demo")
    )
    return el("section", el("h2", "Summary"), el("div", tiles, class_="tiles"), told, id="summary")


def sections(folder: Path, models: Models) -> list[Html]:
    runs = read_runs(folder)
    return [
        summary(folder, runs),
        pipeline.section(folder, runs),
        curves.section(runs),
        samples.section(folder, models),
        tokens.section(models),
        hacked.section(folder, runs),
        deployment.section(folder),
        explorers.section(),
        comparison.section(folder, runs),
    ]


def page(title: str, body: list[Html]) -> str:
    """The whole page: nothing in it comes from elsewhere."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    links = [el("li", el("a", name, href=f"#{key}")) for key, name in CHAPTERS.items()]
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("title", f"{title}: a run of nanoalign"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("style", Html(style)),
    )
    top = el(
        "header",
        el("h1", f"The run in {title}"),
        el("p", "nanoalign: from a base model to an aligned one, as it went", class_="lead"),
        class_="top",
    )
    foot = el(
        "footer", "Made by python -m lab.report from the files of the run. It loads nothing from anywhere."
    )
    skip = el("a", "Skip to the summary", href="#summary", class_="skip")
    inside = (
        skip,
        top,
        el("nav", el("ul", links), aria_label="Sections"),
        el("main", body),
        foot,
        el("script", Html(script)),
    )
    return f"<!doctype html>\n{el('html', head, el('body', *inside), lang='en')}\n"


def main(config: Config) -> None:
    if config.prompts < 1:
        raise UserError("--prompts must be at least 1.")
    start, folder = time.perf_counter(), Path(config.run)
    torch.manual_seed(config.seed)
    models = Models(folder, config.prompts, config.seed)
    text = page(str(folder), quietly(sections, folder, models))
    write_text(config.out, text)
    took = number(time.perf_counter() - start, 2)
    print(visible(f"report: {config.out} ({len(text.encode()) / 1e6:.2f} MB, {took} s)"))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
