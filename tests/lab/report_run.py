"""A folder as a demo leaves it, in a second: models of some thousand parameters, metrics along the reference
bands, and rows of which some are hostile."""

import json
import math
from pathlib import Path

from runs import WORLD, write_lines
from wires import some_policy, some_scalar, training_config

from lab.bands import read_band
from lab.sections.runs import STAGES
from nanoalign.checkpoint import save

HOSTILE = (
    "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'> \u202eevil\u001b[31m \u200f&amp;"
)
FAMILIES = ("harm", "belief", "<b onclick=x>")


def prompt(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def models(folder: Path) -> None:
    """A checkpoint of every stage, each of its own weights."""
    import train_ppo

    config, ppo = training_config(), train_ppo.Config(max_new_tokens=14, micro_batch=0)
    (folder / "scoreboard").mkdir()
    for seed, (name, (path, *_)) in enumerate(STAGES.items(), 1):
        scalar = name in ("rm", "prm")
        model = some_scalar(seed, reader=2) if scalar else some_policy(seed)
        more = {"normalisation": {"mean": 0.0, "std": 1.5}} if name == "rm" else {}
        stage = {"base": "base", "rm": "rm", "prm": "prm"}.get(name, "sft")
        chat = not scalar and name != "base"
        flags = {"config": ppo if name == "ppo" else config, "stage": stage, "step": 0, "chat": chat}
        save(folder / path, model, tokenizer=WORLD, **flags, **more)


def metrics(folder: Path, name: str, off: float = 0.0) -> None:
    """The reference band's own mean as a run; `off` by so many half widths of the band."""
    path, band = STAGES[name][0], read_band(name)
    rows: dict[int, dict] = {}
    for metric, own in band["metrics"].items():
        for step, middle, high in zip(own["step"], own["mean"], own["high"]):
            rows.setdefault(step, {"step": step})[metric] = middle + off * (high - middle)
    rows[min(rows)]["never"] = math.nan  # a metric without a value
    last = max(rows)
    rows[last] |= {"elapsed": 75.0, "tokens": 120_000, "peak_mb": 500, "tokens_per_s": 1600}
    rows[last]["step"] = band["settings"]["steps"]
    begun = {"event": "start", "at_step": 0, "config": band["settings"]}
    held = {"event": "models", "names": ["policy", "reference"]}
    file = (folder / path).with_suffix(".metrics.jsonl")
    write_lines(file, [begun, held, *(rows[step] for step in sorted(rows))])


def files(folder: Path) -> None:
    """Rows: what a person, a model or a file may say, hostile in part."""
    asked = [
        {"prompt": f"{HOSTILE if i == 0 else 'Question'} {i}?", "meta": {"kind": FAMILIES[i % 3]}}
        for i in range(6)
    ]
    (folder / "world").mkdir()
    write_lines(folder / "world/prompts_held_out.jsonl", asked)
    for name in ("pretrain", "sft", "prompts", "solutions"):
        write_lines(folder / f"world/{name}.jsonl", [{"text": "x"}] * 7)
    pairs = [
        {
            "prompt": f"{i}?",
            "chosen": f"{HOSTILE} {i}",
            "rejected": "no, it is tea",
            "meta": {"kind": "harm", "p_chosen": 0.8},
        }
        for i in range(300)
    ]
    write_lines(folder / "pairs.jsonl", pairs)
    steps = {"completions": ["1 + 1 = 2", HOSTILE, "Answer: 2"], "labels": [True, False, True], "label": True}
    write_lines(folder / "steps_held_out.jsonl", [{"prompt": prompt(f"{i}?"), **steps} for i in range(4)])
    write_lines(folder / "steps.jsonl", [{"prompt": prompt("?"), **steps}])
    one = {"principle": "Be kind.", "critique": HOSTILE, "revision": HOSTILE[::-1]}
    trail = {"prompt": prompt(HOSTILE), "response": HOSTILE, "rounds": [one], "meta": {"kind": "harm"}}
    (folder / "cai").mkdir()
    write_lines(folder / "cai/revisions.trail.jsonl", [trail])
    (folder / "best_of_8.csv").write_text(
        "selector,n,right,error\n"
        + "".join(
            f"{name},{n},{0.2 + n / 20},0.02\n"
            for name in ("mean", "majority", "prm-min")
            for n in (1, 2, 4, 8)
        )
    )


def hacking(folder: Path) -> None:
    """Two runs: of β = 0, whose judge falls while the proxy rises, and of β = 0.2, whose does not."""
    (folder / "hacking").mkdir()
    for beta, fall in ((0, 0.6), (0.2, 0.0)):
        looks = [
            {"step": i, "eval_judge": 0.5 - fall * max(0, i - 2) / 4, "eval_rm": i / 5, "eval_kl": i / 2}
            for i in range(7)
        ]
        write_lines(folder / f"hacking/beta-{beta}.metrics.jsonl", looks)


def scorecards(folder: Path) -> None:
    """What evaluate.py and lab.reward_report would have measured."""
    names = {name: STAGES[name][0] for name in ("base", "sft", "dpo", "ppo")}
    cards = {}
    for i, (name, path) in enumerate(names.items()):
        overall = {"utility": [0.1 * i, 0.02], "correct": [0.5, 0.02], "win rate": [0.4 + 0.1 * i, 0.01],
                   "KL to reference": [None if name == "base" else 0.3, None], "harmful "
                       "compliance": [0.2, 0.02],
                   "answered": [0.7, 0.02], "over-refusal": [0.1, 0.02], "sycophancy": [0.1, 0.02],
                   "invention": [0.2, 0.02], "length (words)": [9.5, 0.1]}  # fmt: skip
        cards[f"out/{path}"] = {"stage": name, "overall": overall, "change from the baseline": {}}
    (folder / "scorecard.json").write_text(json.dumps({"checkpoints": cards}))
    (folder / "rm.report.json").write_text(json.dumps({"expected_accuracy": 0.72, "ceiling": 0.79}))


def write_run(folder: Path) -> Path:
    models(folder)
    for name in STAGES:
        metrics(folder, name)
    files(folder)
    hacking(folder)
    scorecards(folder)
    return folder
