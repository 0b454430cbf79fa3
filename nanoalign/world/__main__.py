"""Write the built-in world's files: python -m nanoalign.world --out out/demo/world

    pretrain.jsonl  pretrain_held_out.jsonl   {"text"}: web-like documents
    sft.jsonl       sft_held_out.jsonl        {"prompt", "completion", "meta"}: demonstrations, flaws included
    prompts.jsonl   prompts_held_out.jsonl    {"prompt", "meta"}: for collecting preferences; the test
    problems.jsonl  problems_held_out.jsonl   {"prompt", "meta"}: sums of three to five steps, answers in meta
    solutions.jsonl                           {"prompt", "completion", "meta"}: others of these, worked by
    people
    feedback.jsonl                            {"messages"}: people criticise and revise answers, and judge
                                              which of two is better

Held-out prompts differ in entities and phrasing from everything that is trained on.
"""

import random
from dataclasses import dataclass
from functools import partial

from nanoalign import UserError, cli
from nanoalign.rows import write_rows
from nanoalign.world import feedback
from nanoalign.world.steps import problem, solution
from nanoalign.world.text import FAMILIES, answer, documents, request

SIZES = {  # pages, demonstrations, prompts, held-out prompts per family, problems, solutions, feedback
    "tiny": (1_000, 600, 120, 10, 60, 200, 200),
    "small": (60_000, 12_000, 4_800, 60, 3_000, 6_000, 12_000),
    "large": (400_000, 60_000, 20_000, 100, 12_000, 24_000, 60_000),
}


FILES = (
    "pretrain", "pretrain_held_out", "sft", "sft_held_out", "prompts", "prompts_held_out", "problems",
    "problems_held_out", "solutions", "feedback",
)  # fmt: skip


@dataclass
class Config:
    out: str = "out/demo/world"  # folder to write to
    size: str = "small"  # tiny (seconds, for tests), small (minutes on a CPU) or large (minutes on a GPU)
    seed: int = 0  # another seed writes another text about the same world

    def outputs(self) -> list[str]:
        return [f"{self.out}/{name}.jsonl" for name in FILES]


def demonstration(rng: random.Random, held_out: bool) -> dict:
    row = request(rng, held_out)
    return {"prompt": row["prompt"], "completion": answer(row, rng), "meta": row["meta"]}


def distinct(make, count: int) -> list[dict]:
    """Up to `count` of the rows that `make` makes, no prompt twice."""
    rows = {}
    for _ in range(20 * count):
        row = make()
        rows.setdefault(row["prompt"], row)
        if len(rows) == count:
            break
    return list(rows.values())


def by_family(rng: random.Random, held_out: bool, counts: dict[str, int]) -> list[dict]:
    """Prompts of each family, as many as are asked for, if there are, and no two alike, in random order."""
    rows = [row for kind, n in counts.items() for row in distinct(partial(request, rng, held_out, kind), n)]
    rng.shuffle(rows)
    return rows


def main(config: Config) -> None:
    if config.size not in SIZES:
        raise UserError(f"--size {config.size} is unknown; choose from {', '.join(SIZES)}.")
    pages, demonstrations, prompts, per_family, problems, solutions, opinions = SIZES[config.size]
    rng, own = random.Random(f"{config.size}-{config.seed}"), random.Random(f"problems-{config.seed}")
    critic, whole = random.Random(f"feedback-{config.seed}"), sum(FAMILIES.values())
    sums = distinct(lambda: problem(own, False), problems + solutions)
    files = {
        "pretrain": (row for _ in range(pages) for row in documents(rng)),
        "pretrain_held_out": (row for _ in range(max(50, pages // 100)) for row in documents(rng)),
        "sft": (demonstration(rng, False) for _ in range(demonstrations)),
        "sft_held_out": (demonstration(rng, True) for _ in range(max(50, demonstrations // 50))),
        "prompts": by_family(rng, False, {kind: prompts * n // whole for kind, n in FAMILIES.items()}),
        "prompts_held_out": by_family(rng, True, dict.fromkeys(FAMILIES, per_family)),
        "problems": sums[:problems],
        "problems_held_out": distinct(lambda: problem(own, True), problems // 6),
        "solutions": ({**row, "completion": solution(row["meta"], own)} for row in sums[problems:]),
        "feedback": (feedback.demonstration(critic) for _ in range(opinions)),
    }
    for name, rows in files.items():
        write_rows(f"{config.out}/{name}.jsonl", rows)
    print(f"world: wrote {', '.join(f'{name}.jsonl' for name in files)} to {config.out} (size {config.size})")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
