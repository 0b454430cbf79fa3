"""The peer of lab/bench/ppo.py: PPO of Ziegler et al. (2019) on transformers' models and `generate`.

As lm-human-preferences has it, and its public re-implementations ("The N Implementation Details of RLHF with
PPO", Huang et al. 2024): prompts padded on the left, responses on the right, full logits of whole rows, a
loop over time for the advantages, two trunks that are trained. `ids` are (B, P + N): P positions of prompts,
N of responses; what is of responses alone is (B, N). `given` are train_ppo.py's flags.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lab.bench.timing import timed
from nanoalign import UserError


class Models(NamedTuple):
    policy: nn.Module  # LlamaForCausalLM
    ref: nn.Module
    critic: nn.Module  # LlamaForSequenceClassification, of which the head reads every position
    reward: nn.Module
    end: int  # token ids
    pad: int

    @property
    def trained(self) -> list[Tensor]:
        head = self.critic.score, self.critic.model
        return [p for module in (self.policy, *head) for p in module.parameters()]


def load(folder: str, device: torch.device, end: int, pad: int) -> Models:
    """Of the folders sft and rm, as nanoalign.hf exports them, in fp32; the critic's head is zero."""
    try:
        from transformers import LlamaForCausalLM, LlamaForSequenceClassification
    except ImportError:
        raise UserError("transformers is not installed: `make parity` installs it.") from None

    kinds = [(LlamaForCausalLM, "sft")] * 2 + [(LlamaForSequenceClassification, "rm")] * 2
    models = [kind.from_pretrained(f"{folder}/{name}", dtype=torch.float32) for kind, name in kinds]
    models[2].score = nn.Linear(models[2].config.hidden_size, 1)  # with a bias
    policy, ref, critic, reward = (model.to(device).eval() for model in models)
    for parameter in critic.score.parameters():
        nn.init.zeros_(parameter)
    return Models(policy, ref.requires_grad_(False), critic, reward.requires_grad_(False), end, pad)


def left_padded(prompts: list[np.ndarray], pad: int, device) -> Tensor:
    """→ (B, P)"""
    P = max(map(len, prompts))
    rows = [np.pad(prompt, (P - len(prompt), 0), constant_values=pad) for prompt in prompts]
    return torch.from_numpy(np.stack(rows)).to(device)


def respond(models: Models, prompts: Tensor, given) -> Tensor:
    """Prompts (B, P) → ids (B, P + N)."""
    return models.policy.generate(
        input_ids=prompts, attention_mask=(prompts != models.pad).long(), do_sample=True, top_k=0,
        temperature=given.temperature, max_new_tokens=given.max_new_tokens,
        eos_token_id=models.end, pad_token_id=models.pad,
    )  # fmt: skip


def read(model: nn.Module, ids: Tensor, pad: int):
    """What a model of transformers makes of rows with padding on both sides."""
    seen = (ids != pad).long()
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False)


def logprobs(model: nn.Module, ids: Tensor, P: int, pad: int, temperature: float) -> Tensor:
    """→ log π of the responses (B, N)."""
    logits = read(model, ids, pad).logits[:, P - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[:, P:, None]).squeeze(-1)


def scalars(model: nn.Module, ids: Tensor, pad: int) -> Tensor:
    """→ a critic's or a reward model's number at every position (B, P + N)."""
    return model.score(read(model.model, ids, pad).last_hidden_state).squeeze(-1)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


@torch.no_grad()
def experience(models: Models, ids: Tensor, P: int, given) -> dict[str, Tensor]:
    """→ what PPO learns from, (B, N) each, 0 after the end of a response; `mask`."""
    pad, said = models.pad, ids[:, P:]
    mask = said != pad
    logp, ref_logp = (logprobs(m, ids, P, pad, given.temperature) * mask for m in models[:2])
    values = scalars(models.critic, ids, pad)[:, P - 1 : -1] * mask
    last = mask.sum(1, keepdim=True) - 1
    score = scalars(models.reward, ids, pad)[:, P:].gather(1, last)
    score = torch.where((said == models.end).any(1, keepdim=True), score, given.missing_eos_score)
    rewards = (-given.beta * (logp - ref_logp)).scatter_add(1, last, score)
    advantage, found = 0, []
    for t in reversed(range(mask.shape[1])):
        following = values[:, t + 1] if t + 1 < mask.shape[1] else 0
        delta = rewards[:, t] + given.gamma * following - values[:, t]
        advantage = delta + given.gamma * given.lam * advantage
        found.append(advantage)
    advantages = torch.stack(found[::-1], 1) * mask
    centred = advantages - mean(advantages, mask)
    whitened = centred * torch.rsqrt(mean(centred**2, mask) + 1e-8) * mask
    kept = {"logp": logp, "ref_logp": ref_logp, "values": values, "rewards": rewards, "mask": mask}
    return {**kept, "advantages": whitened, "returns": advantages + values}


def loss(models: Models, ids: Tensor, P: int, old: dict[str, Tensor], given) -> Tensor:
    """A minibatch's rows and what `experience` found of them → policy loss + vf_coef · value loss, ()."""
    mask, returns, clip = old["mask"], old["returns"], given.clip_value
    logp = logprobs(models.policy, ids, P, models.pad, given.temperature)
    ratio = ((logp - old["logp"]) * mask).exp()
    clipped = ratio.clamp(1 - given.clip_ratio, 1 + given.clip_ratio)
    policy_loss = mean(torch.maximum(-old["advantages"] * ratio, -old["advantages"] * clipped), mask)
    values = scalars(models.critic, ids, models.pad)[:, P - 1 : -1]
    kept = torch.clamp(values, old["values"] - clip, old["values"] + clip)
    value_loss = mean(torch.maximum((values - returns) ** 2, (kept - returns) ** 2), mask) / 2
    return policy_loss + given.vf_coef * value_loss


def update(models: Models, ids: Tensor, P: int, old: dict, optimizer, given) -> None:
    """Epochs over minibatches of what `experience` gave."""
    for _ in range(given.epochs):
        for rows in torch.randperm(len(ids), device=ids.device).split(given.minibatch):
            own = {name: value[rows] for name, value in old.items()}
            loss(models, ids[rows], P, own, given).backward()
            nn.utils.clip_grad_norm_(models.trained, given.clip)
            optimizer.step()
            optimizer.zero_grad()


def iterate(models: Models, prompts: list[np.ndarray], optimizer, lr: float, given) -> tuple[int, tuple]:
    """One iteration → the number of response tokens; the seconds of sampling, scoring, update."""
    device = models.policy.device
    asked = left_padded(prompts, models.pad, device)
    P = asked.shape[1]
    for group in optimizer.param_groups:
        group["lr"] = lr
    sampling, ids = timed(partial(respond, models, asked, given), device)
    scoring, old = timed(partial(experience, models, ids, P, given), device)
    updating, _ = timed(partial(update, models, ids, P, old, optimizer, given), device)
    return int(old["mask"].sum()), (sampling, scoring, updating)
