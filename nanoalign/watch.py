"""What an on-policy run shows of itself: answers to held-out prompts, and warnings of known sicknesses."""

from pathlib import Path

import torch

from nanoalign.generate import rollouts
from nanoalign.logprobs import token_logprobs
from nanoalign.rewards import load_function, make_reward, total


def watched_rewards(reward: str, watch: str, tokenizer, device) -> dict:
    """The reward that is maximised, as "score", and those that are only looked at, by their names."""
    rewards = {"score": make_reward(reward, tokenizer, device)}
    for name in filter(None, watch.split(", ")):
        rewards[Path(name).stem] = make_reward(name, tokenizer, device)
    return rewards


@torch.no_grad()
def measure(policy, ref, tokenizer, rows: list[dict], prompts: list, rewards: dict, **sampling):
    """Answer prompts (ids) → mean of each reward, of the sequence KL (nats), end tokens and length (tokens);
    the texts; their scores by the first reward. sampling: as for `generate.rollouts`."""
    columns, texts, scores = {}, [""] * len(rows), [0.0] * len(rows)
    temperature = sampling.get("temperature", 1.0)
    for indices, rollout in rollouts(policy, tokenizer, prompts, **sampling):
        batch = [rows[i] for i in indices]
        parts = {name: total(reward(batch, rollout)) for name, reward in rewards.items()}
        first = next(iter(parts.values())).tolist()
        ref_logp = token_logprobs(ref, rollout.ids, rollout.mask, temperature)
        parts["kl"] = (token_logprobs(policy, rollout.ids, rollout.mask, temperature) - ref_logp).sum(-1)
        parts["ended"], parts["length"] = rollout.ended.float(), rollout.mask.sum(-1).float()
        for name, values in parts.items():
            columns.setdefault(name, []).append(values)
        for i, response, score in zip(indices, rollout.responses(), first):
            texts[i], scores[i] = tokenizer.decode_response(response), score
    return {name: torch.cat(parts).mean().item() for name, parts in columns.items()}, texts, scores


class Watch:
    """Looks at the policy's answers to the same held-out prompts, and remembers.

    models: policy, reference and tokenizer. held_out: prompt rows and their ids. history: a row of means per
    look; a resumed run goes on with it. doctor: names a function(metrics) → [(sickness, cause, remedy)…].
    """

    def __init__(self, run, models: tuple, held_out: tuple, rewards: dict, doctor: str = "", **sampling):
        self.run, self.models, self.asked = run, models, (*held_out, rewards)
        self.sampling, self.seen, self.warned = sampling, [], set()
        self.diagnose = load_function(doctor) if doctor else None
        self.history = run.keep["history"] = run.state.get("history", [])

    def look(self) -> None:
        """Answer, score, print, note in the metrics."""
        means, texts, scores = measure(*self.models, *self.asked, **self.sampling)
        self.history.append({"step": self.run.done, **means})
        self.run.show(means, self.asked[0][:4], texts[:4], scores[:4])

    def warn(self, row: dict) -> None:
        """Name each sickness that the run shows up to this iteration, once a run."""
        self.seen.append(row)
        looks = [{f"eval_{name}": value for name, value in look.items()} for look in self.history]
        for name, cause, remedy in self.diagnose([*self.seen, *looks]) if self.diagnose else ():
            if name not in self.warned:
                print(f"  warning: {name}: {cause}; {remedy}.")
                self.warned.add(name)

    def table(self) -> None:
        """Every look of the run, a line each."""
        print("\nheld out" + "".join(f"{name:>10}" for name in self.history[0]))
        for row in self.history:
            cells = (f"{v:10.3f}" if name != "step" else f"{v:10}" for name, v in row.items())
            print(f"{'':8}" + "".join(cells))
