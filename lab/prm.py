"""What scoring steps is worth, over seeds; and what policies trained against a process reward model write.

    python -m lab.prm curves --tables out/seed*/best_of_n.csv --plot docs/prm.png
    python -m lab.prm policies --checkpoints out/demo/solver.pt out/demo/prm-hacking/*.pt

`curves` reads tables of best_of_n.py, one per seed, and prints their means ± standard errors over seeds.
`policies` samples a solution of every held-out problem from each checkpoint and prints what the process model
thinks of it, what the world's checker says, and how the steps have changed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lab import run_command
from lab.plot import plot_curves, read_curves
from lab.seeds import over_seeds
from nanoalign import UserError
from nanoalign.answers import final_answer, gold_answer, same
from nanoalign.checkpoint import load_policy
from nanoalign.rewards import make_reward
from nanoalign.rollouts import rollouts
from nanoalign.rows import read_rows
from nanoalign.training import setup
from nanoalign.world.steps import check_steps

MEASURES = (
    "right answer",
    "prm-min",
    "sum of p",
    "steps",
    "steps that follow",
    "repeated or empty",
    "tokens",
)


@dataclass
class Curves:
    tables: tuple[str, ...] = ()  # the CSV files, one per seed
    plot: str = ""  # a picture to write (needs the `plot` extra)


@dataclass
class Policies:
    checkpoints: tuple[str, ...] = ()  # the policies
    prm: str = "out/demo/prm.pt"  # the process reward model
    problems: str = "out/demo/world/problems_held_out.jsonl"  # the problems, of the world
    samples: int = 4  # solutions of each
    max_new_tokens: int = 96  # length limit of a solution
    seed: int = 0  # of sampling
    device: str = "auto"  # auto, cpu, cuda, …


def curves(config: Curves) -> None:
    if not config.tables:
        raise UserError("name the tables: best_of_n.csv of one or more seeds.")
    seeds = []
    for path in config.tables:
        table = read_curves(path)
        seeds.append({(name, n): right for name, own in table.items() for n, (right, _) in own.items()})
    shared = [key for key in seeds[0] if all(key in seed for seed in seeds)]
    names, sizes = list(dict.fromkeys(k for k, _ in shared)), sorted({n for _, n in shared})
    print(f"| seeds: {len(seeds)} | {' | '.join(f'n = {n}' for n in sizes)} |\n|{'---|' * (len(sizes) + 1)}")
    for name in names:
        cells = [over_seeds([s[name, n] for s in seeds]) if (name, n) in shared else "–" for n in sizes]
        print(f"| {name} | {' | '.join(cells)} |")
    if config.plot:
        spread = len(seeds) ** 0.5
        values = {key: [seed[key] for seed in seeds] for key in shared}
        table = {
            name: {n: (np.mean(values[name, n]), np.std(values[name, n], ddof=len(seeds) > 1) / spread)
                   for n in sizes if (name, n) in values}
            for name in names
        }  # fmt: skip
        plot_curves(table, config.plot)


@torch.no_grad()
def policies(config: Policies) -> None:
    device, autocast = setup(config)
    rows = read_rows(config.problems, "prompts")
    for row in rows:  # before the work
        gold_answer(row)
        check_steps(row["meta"], [])
    print(f"| {len(rows)} problems | {' | '.join(MEASURES)} |\n|{'---|' * (len(MEASURES) + 1)}")
    for path in config.checkpoints:
        policy, tokenizer, _ = load_policy(path, device, chat=True)
        score = {how: make_reward(f"prm-{how}:{config.prm}", tokenizer, device) for how in ("min", "steps")}
        prompts = [tokenizer.prompt(row["prompt"]) for row in rows for _ in range(config.samples)]
        values = []
        for indices, rollout in rollouts(policy, tokenizer, prompts, config.max_new_tokens, config.seed):
            batch = [rows[i // config.samples] for i in indices]
            with autocast:
                least, sums = score["min"](batch, rollout), score["steps"](batch, rollout).sum(1)
            lengths = rollout.mask.sum(1)
            for row, response, *own in zip(
                batch, rollout.responses(), least.tolist(), sums.tolist(), lengths.tolist()
            ):
                text = tokenizer.decode_response(response)
                steps = text.split("\n")
                again = sum(not step.strip() or step in steps[:i] for i, step in enumerate(steps))
                values.append((
                    same(final_answer(text), gold_answer(row)), *own[:2], len(steps),
                    np.mean(check_steps(row["meta"], steps)), again / len(steps), own[2],
                ))  # fmt: skip
        means = np.mean(np.array(values, dtype=float), axis=0)
        print(f"| {Path(path).stem} | {' | '.join(f'{value:.3f}' for value in means)} |")


if __name__ == "__main__":
    run_command({"curves": (curves, Curves), "policies": (policies, Policies)}, __doc__)
