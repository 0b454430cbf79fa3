"""What on-policy runs share: their flags, and what they show of themselves on held-out prompts."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanoalign.expressions import parse_rewards
from nanoalign.rewards import load_function, make_reward, total
from nanoalign.rollouts import Rollout, rollouts
from nanoalign.run import Flags
from nanoalign.statistics import clustered_error

MOST = 256  # rows of metrics that are remembered


@dataclass(kw_only=True)
class OnPolicy(Flags):
    """The flags of a run that learns from its own samples. They are the policy's own: of a truncated one
    (top-k, top-p) log π − log π_ref would be no KL, and the first ratio not that of the sampler."""

    steps: int = 25  # iterations: rollout, then epochs over it
    batch_size: int = 128  # responses per iteration
    epochs: int = 2  # passes over each iteration's responses
    minibatch: int = 64  # responses per optimiser step
    missing_eos_score: float = -1.0  # a response's score, in place of its reward, without an end token
    max_new_tokens: int = 48  # length limit of a response
    temperature: float = 1.0  # of sampling, and of every log-prob
    warmup: int = 5
    log_every: int = 1
    eval_every: int = 5
    eval_prompts: int = 128  # how many held-out prompts to answer then
    save_every: int = 10
    watch: str = ""  # other rewards to report on held-out samples: "judge, out/demo/rm.pt"
    doctor: str = "lab/doctor.py:diagnose_rows"  # who warns of known sicknesses; empty: nobody

    @property
    def sampling(self) -> dict:
        """What `rollout` is to know."""
        own = {"max_new_tokens": self.max_new_tokens, "size": self.micro_batch}
        return {**own, "temperature": self.temperature}


@torch.no_grad()
def measure(policy, ref, tokenizer, rows: list[dict], prompts: list, rewards: dict, **sampling):
    """Answer prompts (ids) → mean of each reward, of the sequence KL (nats), end tokens and length (tokens);
    the texts; their scores by the first reward. sampling: as for `generate.rollouts`."""
    columns, texts, scores = {}, [""] * len(rows), [0.0] * len(rows)
    temperature = sampling.get("temperature", 1.0)
    sampling["into"] = lambda: (texts, scores, *columns.values())
    for indices, drawn in rollouts(policy, tokenizer, prompts, **sampling):
        batch = [rows[i] for i in indices]
        parts = {name: total(reward(batch, drawn)) for name, reward in rewards.items()}
        first = next(iter(parts.values())).tolist()
        logp, ref_logp = (drawn.logprobs(model, temperature) for model in (policy, ref))
        parts["kl"] = (logp - ref_logp).sum(-1)
        parts["ended"], parts["length"] = drawn.ended.float(), drawn.mask.sum(-1).float()
        for name, values in parts.items():
            column = columns.setdefault(name, torch.zeros(len(rows)))
            column[indices] = values.to(column)
        for i, response, score in zip(indices, drawn.responses(), first):
            texts[i], scores[i] = tokenizer.decode_response(response), score
    return {name: values.mean().item() for name, values in columns.items()}, texts, scores


class Watch:
    """Looks at the policy's answers to the same held-out prompts, and remembers.

    models: policy, reference and tokenizer. held_out: prompt rows and their ids. --watch names rewards beside
    the one that is maximised; --doctor a function(metrics) → [(sickness, cause, remedy)…]. What is shown is
    the mean "reward" as it is, without the "score"'s --missing-eos-score. held: all frozen models, ref first.
    """

    def __init__(self, config: OnPolicy, models: tuple, held_out: tuple, reward, autocast):
        policy, ref, tokenizer = models
        rewards = {"reward": reward}
        for name in parse_rewards(config.watch):
            short = name if Path(name).stem in rewards else Path(name).stem
            rewards[short] = make_reward(name, tokenizer, policy.embed.weight.device, ref)
        self.asked, self.rows = (*models, *held_out, rewards), held_out[0]
        self.sampling = {**config.sampling, "batch_size": config.batch_size, "seed": config.seed}
        self.diagnose = load_function(config.doctor) if config.doctor else lambda rows: ()
        self.warned, self.held = set(), (ref, *(model for one in rewards.values() for model in one.held))
        self.autocast, self.seen, self.count, self.every = autocast, [], 0, 1  # every so-manieth is seen

    def begin(self, run) -> None:
        """Go on with what a stopped run has seen, or look for the first time."""
        self.run, self.history = run, run.state.get("history", [])
        run.keep["history"] = self.history
        if run.first == 0:
            self.look()

    def look(self) -> None:
        """Answer, score, print, note in the metrics."""
        with self.autocast:
            means, texts, scores = measure(*self.asked, **self.sampling)
        self.history.append({"step": self.run.done, **means})
        self.run.show(means, self.rows[:4], texts[:4], scores[:4])

    def describe(self, drawn: Rollout, asked: list, score: Tensor, kl: Tensor, entropy: Tensor) -> dict:
        """What is logged of an iteration's responses to the prompts asked (ids): score (B,) or (B, T), KL
        (B,), entropy (B, T). The KL's error allows for responses to one prompt, which are not independent."""
        length = drawn.mask.sum(-1).float()
        at_limit = length >= self.sampling["max_new_tokens"]
        return {
            "score": total(score).mean(),
            "kl": kl.mean(),
            "kl_error": clustered_error(kl.cpu().double().numpy(), [prompt.tobytes() for prompt in asked]),
            "entropy": entropy.sum() / drawn.mask.sum(),
            "ended": drawn.ended.float().mean(),
            "length": length.mean(),
            "at_limit": at_limit.float().mean(),
        }

    def warn(self, row: dict) -> None:
        """Name each sickness that the run shows up to this iteration, once a run.

        Of a long run the doctor is shown `MOST` rows at most, so that an iteration costs the same whenever it
        comes: evenly spaced ones and this one, the first look at held-out prompts and the last ones.
        """
        if not row:
            return
        looks = self.history[:1] + self.history[max(1, len(self.history) - MOST) :]
        looks = [{f"eval_{name}": value for name, value in look.items()} for look in looks]
        for name, cause, remedy in self.diagnose([*self.seen, row, *looks]):
            if name not in self.warned:
                print(f"  warning: {name}: {cause}; {remedy}.")
                self.warned.add(name)
        if self.count % self.every == 0:
            self.seen.append(row)
        self.count += 1
        if len(self.seen) == MOST:
            self.seen, self.every = self.seen[::2], 2 * self.every

    def table(self) -> None:
        """Every look of the run, a line each."""
        print("\nheld out" + "".join(f"{name:>10}" for name in self.history[0]))
        for row in self.history:
            cells = (f"{v:10.3f}" if name != "step" else f"{v:10}" for name, v in row.items())
            print(f"{'':8}" + "".join(cells))
