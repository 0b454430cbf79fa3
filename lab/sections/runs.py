"""What a folder of runs holds: the demo's checkpoints and the metrics beside them."""

from dataclasses import dataclass, field
from pathlib import Path

from lab.doctor import columns
from nanoalign import UserError
from nanoalign.cli import readable_rows

# name: (its file in a folder, the method, what it is called, one line, the files it learns from)
STAGES = {
    "base": ("base.pt", "pretrain", "Base model", "pretraining on the world's text", [
        "world/pretrain.jsonl"]),
    "sft": ("sft.pt", "sft", "SFT", "imitates demonstrations", ["world/sft.jsonl"]),
    "dpo": ("dpo.pt", "dpo", "DPO", "preferences, directly", ["pairs.jsonl"]),
    "kto": ("scoreboard/kto.pt", "kto", "KTO", "thumbs up or down", ["pairs.jsonl"]),
    "orpo": ("scoreboard/orpo.pt", "orpo", "ORPO", "imitation and preferences at once", ["pairs.jsonl"]),
    "rm": ("rm.pt", "rm", "Reward model", "scores answers as people would", ["pairs.jsonl"]),
    "ppo": ("ppo.pt", "ppo", "PPO", "samples, scored, held by KL", ["world/prompts.jsonl"]),
    "grpo": ("scoreboard/grpo.pt", "grpo", "GRPO", "groups of samples, no critic", ["world/prompts.jsonl"]),
    "solver": ("solver.pt", "solver", "Solver", "SFT on worked sums", ["world/solutions.jsonl"]),
    "prm": ("prm.pt", "prm", "Process model", "which step is right", ["steps.jsonl"]),
}  # fmt: skip
POLICIES = ("base", "sft", "dpo", "kto", "orpo", "ppo", "grpo")


@dataclass
class Run:
    """One run: where its checkpoint would be, and what its metrics say."""

    name: str
    method: str
    title: str
    about: str
    checkpoint: Path
    inputs: list[Path]
    rows: list[dict] = field(default_factory=list)

    @property
    def there(self) -> bool:
        return self.checkpoint.is_file()

    @property
    def config(self) -> dict:
        return columns(self.rows)["config"]

    def column(self, name: str) -> tuple[list, list]:
        """The steps at which a metric was logged, and its values."""
        found = [(row["step"], row[name]) for row in self.rows if is_logged(row, name)]
        return ([x for x, _ in found], [y for _, y in found])

    @property
    def metrics(self) -> list[str]:
        names = dict.fromkeys(name for row in self.rows for name in row if is_logged(row, name))
        return [name for name in names if name != "step"]

    @property
    def last(self) -> dict:
        """The last row that says what the run took; empty of none."""
        return next((row for row in reversed(self.rows) if "elapsed" in row), {})

    @property
    def models(self) -> list[str]:
        return next((row["names"] for row in self.rows if row.get("event") == "models"), [])


def is_logged(row: dict, name: str) -> bool:
    return "step" in row and isinstance(row.get(name), (int, float)) and not isinstance(row[name], bool)


def metrics_of(path: Path) -> list[dict]:
    """Rows of X.metrics.jsonl, of its last beginning; empty where there is none."""
    if not path.is_file():
        return []
    rows = readable_rows(path)
    starts = [i for i, row in enumerate(rows) if row.get("event") == "start" and not row.get("at_step")]
    return rows[starts[-1] :] if starts else rows


def read_runs(folder: Path) -> dict[str, Run]:
    """The demo's runs in a folder, whether or not they are there."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; `make demo` fills one.")
    if not any(folder.glob("*.metrics.jsonl")):
        raise UserError(f"{folder} holds no run: name a folder that training has written to.")
    runs = {}
    for name, (path, method, title, about, inputs) in STAGES.items():
        checkpoint = folder / path
        rows = metrics_of(checkpoint.with_name(f"{checkpoint.stem}.metrics.jsonl"))
        files = [folder / own for own in inputs]
        runs[name] = Run(name, method, title, about, checkpoint, files, rows)
    return runs


def spaced(count: int, most: int) -> list[int]:
    """Which of so many points are drawn: about `most`, evenly, the first and the last among them."""
    return sorted({*range(0, count, -(-count // most)), count - 1})


def counted(path: Path) -> int:
    """The rows of a JSONL file; 0 where there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
