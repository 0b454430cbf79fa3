"""The explorers' numbers by the project's own functions, in float64, their gradients by autograd."""

import math
from types import SimpleNamespace

import torch

import train_dpo
import train_grpo
import train_kto
import train_orpo
import train_ppo
import train_rm
from lab.oracle import World


def number(x: float, gradient: bool = False) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64, requires_grad=gradient)


def slope(loss: torch.Tensor, of: torch.Tensor) -> float:
    return torch.autograd.grad(loss.sum(), of, retain_graph=True)[0].item()


def bradley_terry(gap, smoothing):
    chosen, rejected = number(gap, True), number(0.0)
    loss = train_rm.bradley_terry_loss(chosen, rejected, label_smoothing=smoothing)
    return {
        "probability": torch.sigmoid(number(gap)).item(),
        "loss": loss.item(),
        "gradient": slope(loss, chosen),
    }


def dpo(loss, chosen, rejected, beta, smoothing, gamma):
    config = SimpleNamespace(loss=loss, beta=beta, label_smoothing=smoothing, gamma=gamma, sft_weight=0.0)
    logps = torch.tensor([[chosen], [rejected]], dtype=torch.float64, requires_grad=True)
    one, none = torch.ones_like(logps), torch.zeros_like(logps)
    found = train_dpo.preference_loss(config, logps, none, one, number(1.0))
    slopes = torch.autograd.grad(found["loss"].sum(), logps)[0].flatten().tolist()
    assert math.isclose(slopes[0], -slopes[1], abs_tol=1e-12)
    return {
        "margin": chosen - rejected, "loss": found["loss"].item(), "gradient": slopes[0],
        "rewardChosen": found["reward_chosen"].item(), "rewardRejected": found["reward_rejected"].item(),
    }  # fmt: skip


def ppo(advantage, ratio, clip):
    logp, mask = (
        torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True),
        torch.tensor([[True]]),
    )
    loss = train_ppo.policy_loss(logp, torch.zeros_like(logp), number(advantage)[None], mask, clip)
    return {"loss": loss.item(), "gradient": slope(loss, logp)}


def kto(label, ratio, z, beta, weight):
    r, up = number(ratio, True), torch.tensor([label == "desirable"])
    loss = train_kto.kto_loss(r, up, number(z)[0], beta, weight, weight)
    return {"value": 1 - loss.item() / weight, "loss": loss.item(), "gradient": slope(loss, r)}


def orpo(chosen, rejected, nll, lam):
    sides = number(chosen, True), number(rejected, True)
    ratio = train_orpo.log_odds(sides[0]) - train_orpo.log_odds(sides[1])
    loss = train_orpo.orpo_loss(number(nll), *sides, lam)
    return {
        "ratio": ratio.item(), "oddsLoss": train_orpo.odds_loss(ratio).item(), "loss": loss.item(),
        "gradientChosen": slope(loss, sides[0]), "gradientRejected": slope(loss, sides[1]),
    }  # fmt: skip


def kl(logp, reference):
    own, found = number(logp, True), {}
    for i, kind in enumerate(("k1", "k2", "k3"), 1):
        value = train_grpo.kl_estimate(own, number(reference), kind)
        found |= {kind: value.item(), f"gradient{i}": slope(value, own)}
    return found


def gae(rewards, values, gamma, lam):
    mask = torch.ones(1, len(rewards), dtype=torch.bool)
    rewards, values = (torch.tensor([x], dtype=torch.float64) for x in (rewards, values))
    advantages, returns = train_ppo.gae(rewards, values, mask, gamma, lam)
    return {"advantages": advantages[0].tolist(), "returns": returns[0].tolist()}


def optimum(beta, logReference, reward, reference=()):
    """Of the first prompt of the oracle's own world, in the order of the page: the reference's."""
    world = World()
    order = world.sequence(world.ref)[: world.each].argsort(descending=True)
    policy = world.optimum(beta)[: world.each][order]
    reward, logp = (torch.tensor(x, dtype=torch.float64) for x in (reward, logReference))
    kl = (policy * (policy.log() - logp)).sum().item()
    return {"policy": policy.tolist(), "reward": (policy * reward).sum().item(), "kl": kl}


PYTHON = {"bradley-terry": bradley_terry, "dpo": dpo, "ppo": ppo, "kto": kto, "orpo": orpo, "kl": kl,
    "gae": gae,
          "optimum": optimum}  # fmt: skip
