"""Twelve bugs to plant (docs/exercises.md): break one line of a copy, run it beside the healthy one, look.

    python -m lab.exercises                                     # the twelve, as the page has them
    python -m lab.exercises plant --n 3 --of out/demo --out out/exercise3
    make exercise N=3 SIZE=tiny                                 # the same, from whatever size is built
    python -m lab.exercises gather --of out                     # what all twelve showed, for the page

Nothing here is changed: the copy is under --out, with the two runs and their curves, exercise3.svg.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lab import run_command
from lab.curves import HIGH, WIDE, of_runs, panel
from nanoalign import UserError
from nanoalign.files import write_text

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs/figures/exercises.json"
FROM_SFT = "--init {of}/sft.pt --data {of}/pairs.jsonl --lr 1e-4 --steps 60 --log-every 2 --eval-every 20"
ON_PROMPTS = (
    "--init {of}/sft.pt --reward {of}/rm.pt --prompts {of}/world/prompts.jsonl --watch judge --lr 2e-4"
)
ON_PROMPTS += " --batch-size 64 --minibatch 32 --steps 12 --eval-every 4 --eval-prompts 64"
RUNS = {  # what is run, healthy and broken, on the files of a demo
    "dpo": f"train_dpo.py {FROM_SFT} --beta 0.3",
    "kto": f"train_kto.py {FROM_SFT}",
    "orpo": f"train_orpo.py {FROM_SFT} --init {{of}}/base.pt --lr 1e-3",
    "rm": f"train_rm.py {FROM_SFT} --lr 5e-4",
    "prm": f"train_prm.py {FROM_SFT} --lr 1e-3 --init {{of}}/solver.pt --data {{of}}/steps.jsonl "
    "--eval-data {of}/steps_held_out.jsonl",
    "ppo": f"train_ppo.py {ON_PROMPTS}",
    "grpo": f"train_grpo.py {ON_PROMPTS}",
}


class Bug(NamedTuple):
    name: str
    run: str  # of RUNS
    file: str
    was: str
    becomes: str
    curves: str  # the metrics to look at
    seen: str
    test: str  # that falls, in its file


BUGS = [
    Bug("means where sums belong", "dpo", "train_dpo.py",
        "ratios = (logps - ref_logps) / tokens if loss.means else logps - ref_logps",
        "ratios = (logps - ref_logps) / tokens",
        "margin loss", "the margin is smaller by the length of a response, and the loss hardly leaves ln 2; "
        "it learns all the same, another reward",
        "tests/test_dpo.py::test_a_run_takes_sums_for_the_dpos_and_means_per_token_for_ipo_and_simpo"),
    Bug("the policy is its own reference", "dpo", "train_dpo.py",
        "ref_logps = pair_logprobs(ref, batch", "ref_logps = pair_logprobs(policy, batch",
        "loss eval_kl", "the loss is ln 2 for ever, and the KL grows all the same: the gradient is there, "
        "the brake is not",
        "tests/wiring/test_wired_dpo.py::test_dpo_is_its_formulas_from_pairs_to_weights_and_log"),
    Bug("the reference point is clamped before the mean", "kto", "train_kto.py",
        "[joined[i] for i in piece], tokenizer, device)[1]",
        "[joined[i] for i in piece], tokenizer, device)[1].clamp(min=0)",
        "z reward_chosen", "z rises where it should be 0: noise alone makes it positive",
        "tests/test_kto.py::test_the_reference_point_is_the_mean_over_rebuilt_pairs_clamped_after"),
    Bug("a thumb down is taken for a thumb up", "kto", "train_kto.py",
        "torch.where(desirable, gain, -gain)", "torch.where(desirable, gain, gain)",
        "reward_rejected eval_auc", "both rewards rise together, and the AUC stays nearer to one half",
        "tests/test_kto.py::test_the_loss_is_its_closed_form_one_value_per_row"),
    Bug("odds of sums", "orpo", "train_orpo.py",
        "masked_mean(logp, mask).view(-1, 2).T", "(logp * mask.to(logp.device)).sum(-1).view(-1, 2).T",
        "log_odds_ratio odds_loss", "the log odds ratio starts ten times as large: length decides",
        "tests/test_orpo.py::test_the_nll_is_over_prompt_and_response_or_the_response_only_and_odds_are_of_"
        "response_means"),
    Bug("the score is read at the first token", "rm", "nanoalign/scalar.py",
        "last_scored(mask)[:, None]", "(0 * last_scored(mask))[:, None]",
        "margin eval_accuracy", "the margin is 0 and the accuracy one half: both sides begin alike",
        "tests/test_rm.py::test_the_score_is_read_at_the_last_scored_token"),
    Bug("the preferred side is the other one", "rm", "train_rm.py",
        "difference = chosen - rejected - margin", "difference = rejected - chosen - margin",
        "loss eval_accuracy", "the loss falls as it should, and the accuracy falls below one half",
        "tests/test_rm.py::test_a_margin_asks_for_a_larger_difference"),
    Bug("the price of KL is a prize", "ppo", "train_ppo.py",
        "penalty = (-beta * (logp - ref_logp))", "penalty = (beta * (logp - ref_logp))",
        "kl eval_reward", "the KL grows faster and faster; the score says nothing of it",
        "tests/test_ppo.py::test_the_score_falls_on_the_last_response_token_and_the_kl_on_every_one"),
    Bug("values have seen their own token", "ppo", "train_ppo.py",
        "return logp, F.pad(values[:, :-1], (1, 0))", "return logp, values",
        "explained_variance value_loss", "nothing alarming: the critic may explain more. But what it knows "
        "of a token is taken out of the token's own advantage",
        "tests/test_ppo.py::test_a_value_is_read_before_its_token_is_emitted"),
    Bug("the hopeful side of the clip", "ppo", "train_ppo.py",
        "torch.maximum(-advantages * ratio", "torch.minimum(-advantages * ratio",
        "policy_loss ratio_max", "next to nothing in twelve iterations. Ratios may run away: what has moved "
        "too far gets no push back, and what pays goes on",
        "tests/test_ppo.py::test_the_clipped_surrogate_by_cases"),
    Bug("groups are not groups", "grpo", "train_grpo.py",
        "indices = order[step].repeat(G)", "indices = np.tile(order[step], G)",
        "score eval_reward", "answers are compared with answers to other prompts: easy prompts win, and the "
        "reward rises less",
        "tests/test_on_policy.py::test_grpo_compares_the_answers_to_one_prompt"),
    Bug("a label stands one token early", "prm", "train_prm.py",
        "at[end] = labels[number]", "at[end - 1] = labels[number]",
        "loss eval_auc", "both look nearly as good, for the held-out rows are labelled by the same bug; "
        "samples are scored at a token that has learnt nothing. Only the test says so",
        "tests/test_prm.py::test_each_label_stands_at_the_token_that_ends_its_step_and_nowhere_else"),
]  # fmt: skip


@dataclass
class Config:
    n: int = 1  # which of the twelve
    of: str = "out/demo"  # the demo whose files are trained on
    out: str = ""  # the folder to work in; empty: out/exerciseN


@dataclass
class Gathered:
    of: str = "out"  # the folder with exercise1 to exercise12
    out: str = "docs/figures/exercises.json"  # the figures to write


def curves_of(bug: Bug, folder: Path) -> tuple[dict, list[str]]:
    """The two runs' curves by name; the metrics to look at that both have."""
    runs = {name: of_runs([folder / f"{name}.metrics.jsonl"]) for name in ("healthy", "broken")}
    return runs, [name for name in bug.curves.split() if all(name in run for run in runs.values())]


def moved(bug: Bug, folder: Path) -> list[str]:
    """First and last value of each of these metrics, in both runs."""
    (runs, metrics), said = curves_of(bug, folder), []
    for metric in metrics:
        ends = [[f"{run[metric]['mean'][end]:.3g}" for end in (0, -1)] for run in runs.values()]
        healthy, broken = (" → ".join(both) for both in ends)
        said.append(f"{metric}: healthy {healthy}, broken {broken}")
    return said


def gather(config: Gathered) -> None:
    found = {bug.name: moved(bug, Path(config.of) / f"exercise{n}") for n, bug in enumerate(BUGS, 1)}
    write_text(config.out, json.dumps(found, ensure_ascii=False, indent=1) + "\n")


def listed() -> str:
    """The twelve as the page has them."""
    parts, figures = [], json.loads(FIGURES.read_text(encoding="utf-8"))
    for n, bug in enumerate(BUGS, 1):
        title, test = f"{n}. {bug.name[0].upper()}{bug.name[1:]}", bug.test.split("::")[1]
        look = f"**Look at** `{'`, `'.join(bug.curves.split())}`: {bug.seen}."
        where = f"[{bug.file}](../{bug.file}), the {bug.run} run:"
        change = f"```diff\n- {bug.was}\n+ {bug.becomes}\n```"
        seen = f"First and last values: {'; '.join(figures[bug.name])}."
        told = look, seen, f"**What falls**: `{test}`"
        parts.append("\n\n".join((f"### {title}", where, change, *told)))
    return "\n\n".join(parts)


def plant(bugs: list[Bug], folder: Path) -> None:
    """A copy of the repository's code, with these bugs in it. Each text must stand in its file just once."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("nanoalign", "lab", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "constitution.txt"]:
        shutil.copy(path, folder)
    for bug in bugs:
        text = (folder / bug.file).read_text(encoding="utf-8")
        if text.count(bug.was) != 1:
            raise UserError(
                f"{bug.file} has {bug.was!r} {text.count(bug.was)} times: the exercise is out of date."
            )
        write_text(folder / bug.file, text.replace(bug.was, bug.becomes))


def main(config: Config) -> None:
    if not 1 <= config.n <= len(BUGS):
        raise UserError(f"--n must be 1 to {len(BUGS)}.")
    bug, of = BUGS[config.n - 1], Path(config.of).resolve()
    out = Path(config.out or f"out/exercise{config.n}").resolve()
    if ROOT.resolve() in (out, *out.parents) and (ROOT / "out").resolve() not in out.parents:
        raise UserError(f"--out {out} is not under out/: a folder of that name is deleted.")
    plant([bug], out)
    script, *flags = RUNS[bug.run].format(of=of).split()
    for name, folder in (("healthy", ROOT), ("broken", out)):
        print(f"{name}: {script} {' '.join(flags)}", flush=True)
        where = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, str(folder / script), *flags, "--out", str(out / f"{name}.pt")]
        if subprocess.run(command, env=where, cwd=folder, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"the {name} run failed; what it needs is made by make demo, see --of.")
    (runs, metrics), panels = curves_of(bug, out), []
    for i, metric in enumerate(metrics):
        both = {f"{name}: {metric}": run[metric] for name, run in runs.items()}
        panels.append(panel(both, list(both), i * 2 * WIDE, 2 * WIDE))
    size = f'width="{2 * WIDE * len(metrics)}" height="{HIGH}" font-family="sans-serif" font-size="9"'
    back = '<rect width="100%" height="100%" fill="#fff"/>'
    picture = out / f"exercise{config.n}.svg"
    write_text(picture, f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{back}{"".join(panels)}</svg>\n')
    print(*moved(bug, out), sep="\n")
    print(f"{bug.name}: {bug.seen}\ncurves: {picture}")
    command = f"PYTHONPATH=.:tests {sys.executable} -m pytest {bug.test}"
    print(f"the test that falls:  cd {out} && {command}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(listed())
    else:
        run_command({"plant": (main, Config), "gather": (gather, Gathered)}, __doc__)
