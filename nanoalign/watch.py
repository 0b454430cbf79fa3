"""What an on-policy run shows of itself: answers to held-out prompts, and warnings of known sicknesses."""

from pathlib import Path

from nanoalign.doctor import columns, diagnose
from nanoalign.rewards import make_reward, measure


def watched_rewards(reward: str, watch: str, tokenizer, device) -> dict:
    """The reward that is maximised, as "score", and those that are only looked at, by their names."""
    rewards = {"score": make_reward(reward, tokenizer, device)}
    for name in filter(None, watch.split(", ")):
        rewards[Path(name).stem] = make_reward(name, tokenizer, device)
    return rewards


class Watch:
    """Looks at the policy's answers to the same held-out prompts, and remembers.

    history: one row of means per look, oldest first; pass that of a partial checkpoint to go on with it.
    """

    def __init__(self, rows: list[dict], prompts: list, rewards: dict, history: list[dict], **sampling):
        self.rows, self.prompts, self.rewards = rows, prompts, rewards
        self.history, self.sampling, self.warned = history, sampling, set()
        self.seen = []  # what was logged of this process's iterations

    def look(self, step: int, policy, ref, tokenizer, metrics) -> None:
        """Answer, score, print, note in the metrics."""
        means, texts, scores = measure(
            policy, ref, tokenizer, self.rows, self.prompts, self.rewards, **self.sampling
        )
        self.history.append({"step": step, **means})
        metrics.note(step=step, **{f"eval_{name}": value for name, value in means.items()})
        print("  held-out " + "  ".join(f"{name} {value:.3f}" for name, value in means.items()))
        for row, text, score in list(zip(self.rows, texts, scores))[:4]:
            print(f"  {row['prompt'][-1]['content'][:80]!r} → {text!r} ({score:+.2f})")

    def warn(self, row: dict) -> None:
        """Name each sickness that the run shows up to this iteration, once a run."""
        self.seen.append(row)
        looks = [{f"eval_{name}": value for name, value in look.items()} for look in self.history]
        for name, cause, remedy in diagnose(columns([*self.seen, *looks])):
            if name not in self.warned:
                print(f"  warning: {name}: {cause}; {remedy}.")
                self.warned.add(name)

    def table(self) -> None:
        """Every look of the run, a line each."""
        print("\nheld out" + "".join(f"{name:>10}" for name in self.history[0]))
        for row in self.history:
            cells = (f"{v:10.3f}" if name != "step" else f"{v:10}" for name, v in row.items())
            print(f"{'':8}" + "".join(cells))
