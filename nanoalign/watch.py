"""What an on-policy run shows of itself: answers to held-out prompts, and warnings of known sicknesses."""

from pathlib import Path

from nanoalign.rewards import make_reward, measure

MEANINGS = {
    "KL is negative beyond noise": "sampled and scored log-probs disagree; look at the mask (does it run "
    "past the end token?), at --top-k and --top-p, at the temperature",
    "the ratio is off 1 at the first minibatch": "old and new log-probs come from different paths; look at "
    "dtype, temperature and alignment",
    "the end-token rate collapses": "the policy forgets to stop; look at --missing-eos-score (is it below "
    "every real score?) and at what the reward thinks of long responses",
    "explained variance is below 0": "the critic predicts worse than a constant; look at the scale of the "
    "score, at --clip-value, --vf-coef and --epochs",
    "all lengths are at the limit": "the reward pays for length; take 0.02*length off it, or raise --beta",
    "most groups teach nothing": "all responses to a prompt get one score, so no advantage is left; look for "
    "prompts that are neither too easy nor too hard, or raise --group-size or --temperature",
}


def sicknesses(row: dict, step: int) -> dict[str, str]:
    """The metrics of an iteration → {each known sickness they show: what it means, and where to look}."""
    signs = {
        "KL is negative beyond noise": row["kl"] < -3 * row["kl_error"] - 1e-3,
        "the ratio is off 1 at the first minibatch": row["ratio_error"] > 0.03,
        "the end-token rate collapses": row["ended"] < 0.5,
        "explained variance is below 0": step >= 10 and row.get("explained_variance", 1.0) < 0,
        "all lengths are at the limit": row["at_limit"] > 0.9,
        "most groups teach nothing": row.get("equal_groups", 0.0) > 0.8,
    }
    return {name: MEANINGS[name] for name, ill in signs.items() if ill}


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

    def warn(self, row: dict, step: int) -> None:
        """Name each sickness that this iteration's metrics show, once a run."""
        for name, meaning in sicknesses(row, step).items():
            if name not in self.warned:
                print(f"  warning: {name}: {meaning}.")
                self.warned.add(name)

    def table(self) -> None:
        """Every look of the run, a line each."""
        print("\nheld out" + "".join(f"{name:>10}" for name in self.history[0]))
        for row in self.history:
            cells = (f"{v:10.3f}" if name != "step" else f"{v:10}" for name, v in row.items())
            print(f"{'':8}" + "".join(cells))
