"""Every method on a world so small that the right answer is known.

    python -m lab.oracle --plot docs/oracle.png

Two prompts, three tokens (one of them ends a response), at most three tokens a response: 15 responses to each
prompt, all of them enumerated. With a reward r and a reference the best policy is known in closed form,

    π*(y|x) = π_ref(y|x) exp(r(x,y)/β) / Z(x)

and every method that claims this optimum is trained, by the loss functions of its own script and with the
real GPT, in float64, until it is there. The table says how far each ends from it in total variation (the
largest over prompts): ½ Σ |π − π*|. tests/test_oracle.py requires what the table shows.
"""

import copy
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

import train_dpo
import train_grpo
import train_ppo
import train_rm
from lab import pyplot
from lab.plot import write
from nanoalign import cli
from nanoalign.logprobs import masked_sum, token_logprobs
from nanoalign.model import GPT, GPTConfig
from nanoalign.scalar import ScalarGPT, response_scores

END, LONGEST, BETA = 2, 3, 1.0


@dataclass
class Config:
    plot: str = ""  # a picture to write (needs the `plot` extra)


def responses() -> list[tuple[int, ...]]:
    """All that can be said: up to LONGEST tokens, nothing after the end token."""
    free = [t for n in range(LONGEST) for t in product((0, 1), repeat=n)]
    return [(*t, END) for t in free] + list(product((0, 1), repeat=LONGEST))


class World:
    """ids, mask (N, T) of every response to every prompt; x (N,) the prompt's number; reward (N,)."""

    def __init__(self, seed: int = 1):
        said = responses()
        rows = [((x, *y), len(y)) for x in (0, 1) for y in said]
        T = 1 + LONGEST
        self.ids = torch.tensor([[*ids, *[END] * (T - len(ids))] for ids, _ in rows])
        self.mask = torch.tensor([[0 < t <= length for t in range(T)] for _, length in rows])
        self.x, self.each, self.said = torch.arange(2).repeat_interleave(len(said)), len(said), said
        torch.manual_seed(seed)
        self.reward = torch.randn(len(rows), dtype=torch.float64)
        # learned positions: attention over equal tokens is the same for any number of them, RoPE or not
        shape = GPTConfig(3, context=T, layers=2, width=32, heads=2, positions="learned", tied=False)
        self.ref = GPT(shape).double().requires_grad_(False)
        for name, parameter in self.ref.named_parameters():
            if parameter.dim() == 2:  # weights that make it a policy worth being held to: far from uniform
                parameter.mul_(50 if "embed" in name or "position" in name else 8)

    def logp(self, model: GPT) -> Tensor:
        """log π of every token of every response (N, T), 0 outside mask."""
        return token_logprobs(model, self.ids, self.mask)

    def sequence(self, model: GPT) -> Tensor:
        """log π(y|x) of every response (N,)."""
        return masked_sum(self.logp(model), self.mask)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every ordered pair of different responses to one prompt: (better, worse, P(better ≻ worse)), (M,).

        The probabilities are Bradley–Terry's for the reward: infinitely many labels.
        """
        i, j = torch.meshgrid(torch.arange(len(self.x)), torch.arange(len(self.x)), indexing="ij")
        same = (self.x[i] == self.x[j]) & (i != j)
        i, j = i[same], j[same]
        return i, j, torch.sigmoid(self.reward[i] - self.reward[j])

    def optimum(self, beta: float = BETA) -> Tensor:
        """π* of every response (N,)."""
        logits = self.sequence(self.ref) + self.reward / beta
        return logits.view(2, self.each).softmax(-1).flatten()

    def distance(self, p: Tensor, q: Tensor) -> float:
        """Total variation between two policies (N,), the larger of the two prompts'."""
        return 0.5 * (p - q).abs().view(2, self.each).sum(1).max().item()

    def draw(self, p: Tensor, per_prompt: int, generator: torch.Generator) -> Tensor:
        """Row numbers of responses drawn from p (N,), `per_prompt` to each, one prompt after another."""
        drawn = torch.multinomial(p.view(2, -1), per_prompt, True, generator=generator)  # (2, per_prompt)
        return (drawn + torch.tensor([[0], [self.each]])).flatten()


def minimise(model: torch.nn.Module, loss, steps: int = 300) -> float:
    """L-BFGS on the whole objective, a function without arguments → its last value."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-14, history_size=30,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return loss().item()


def copy_of(ref: GPT) -> GPT:
    return copy.deepcopy(ref).requires_grad_(True)


# ------------------------------------------------------------------------------------------ preferences


def dpo(world: World, loss=train_dpo.dpo_loss, flipped: float = 0.0, **options) -> GPT:
    """Pairs in their exact proportions; a share of the labels can be flipped."""
    policy, ref = copy_of(world.ref), world.sequence(world.ref)
    i, j, p = world.pairs()
    p = (1 - flipped) * p + flipped * (1 - p)

    def objective():
        ratio = world.sequence(policy) - ref
        return (p * loss(ratio[i] - ratio[j], beta=BETA, **options)).sum() / p.sum()

    minimise(policy, objective)
    return policy


def reward_model(world: World) -> Tensor:
    """The scores (N,) of a reward model that has seen every pair in its exact proportion."""
    model = ScalarGPT.from_policy(world.ref).double().requires_grad_(True)
    i, j, p = world.pairs()

    def objective():
        scores = response_scores(model, world.ids, world.mask)
        return (p * train_rm.bradley_terry_loss(scores[i], scores[j])).sum() / p.sum()

    minimise(model, objective, 1000)
    return response_scores(model, world.ids, world.mask).detach()


# -------------------------------------------------------------------------------------------- rewards


def policy_gradient(world: World, update, parameters, policy: GPT, steps: int, lr: float) -> list[float]:
    """Adam with a rate that falls to 0; update(step, rows) returns the loss → distance to π* per step."""
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    best, curve = world.optimum(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        update(optimizer)
        curve.append(world.distance(world.sequence(policy).detach().exp(), best))
    return curve


def ppo(world: World, steps: int = 250, lr: float = 3e-3, seed: int = 0) -> tuple[GPT, list[float]]:
    """Reward shaping, GAE, whitening, both clipped losses, two epochs, as in train_ppo.py."""
    policy, critic = copy_of(world.ref), ScalarGPT.from_policy(world.ref).double().requires_grad_(True)
    torch.nn.init.zeros_(critic.score.weight)
    generator, mask = torch.Generator().manual_seed(seed), world.mask
    ref = world.logp(world.ref)

    def update(optimizer):
        with torch.no_grad():
            old, old_values = train_ppo.forward(policy, critic, world.ids, mask, 1.0)
            rows = world.draw(masked_sum(old, mask).exp(), 2048, generator)
            shaped = train_ppo.shape_rewards(world.reward, old, ref, mask, BETA)
            advantages, returns = train_ppo.gae(shaped, old_values, mask)
            advantages = train_ppo.whiten(advantages[rows], mask[rows])
        for _ in range(2):
            logp, values = train_ppo.forward(policy, critic, world.ids, mask, 1.0)
            loss = train_ppo.policy_loss(logp[rows], old[rows], advantages, mask[rows])
            of_values = train_ppo.value_loss(values[rows], old_values[rows], returns[rows], mask[rows])
            (loss + 0.5 * of_values).backward()
            optimizer.step()
            optimizer.zero_grad()

    both = [*policy.parameters(), *critic.parameters()]
    return policy, policy_gradient(world, update, both, policy, steps, lr)


def grpo(
    world: World, kind: str, kl: str = "reward", steps: int = 250, lr: float = 3e-3, seed: int = 0
) -> tuple[GPT, list[float]]:
    """Groups of 8, two epochs, as in train_grpo.py; KL in the reward, or an estimate of it in the loss."""
    policy, G = copy_of(world.ref), 8
    generator, mask, ref = torch.Generator().manual_seed(seed), world.mask, world.logp(world.ref)

    def update(optimizer):
        with torch.no_grad():
            old = world.logp(policy)
            rows = world.draw(masked_sum(old, mask).exp(), 2048, generator)
            price = BETA * masked_sum(old - ref, mask)[rows] if kl == "reward" else None
            advantages = train_grpo.group_advantages(world.reward[rows], G, kind, price)
            weights = train_grpo.token_weights(mask[rows], kind, LONGEST)
        for _ in range(2):
            logp = world.logp(policy)[rows]
            loss, _ = train_grpo.policy_loss(logp, old[rows], advantages, mask[rows], kind, 0.2, 0.2)
            if kl != "reward":
                loss = loss + BETA * train_grpo.kl_estimate(logp, ref[rows], kl)
            masked_sum(loss * weights, mask[rows]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return policy, policy_gradient(world, update, policy.parameters(), policy, steps, lr)


def main(config: Config) -> None:
    if config.plot:
        pyplot(config.plot)
    torch.set_default_dtype(torch.float64)
    world = World()
    ref, best = world.sequence(world.ref).exp(), world.optimum()
    policies, curves = {"π_ref": ref}, {}
    policies["DPO"] = world.sequence(dpo(world)).detach().exp()
    robust = dpo(world, train_dpo.robust_dpo_loss, flipped=0.2, label_smoothing=0.2)
    policies["robust, 20 % flipped"] = world.sequence(robust).detach().exp()
    for name, run in {
        "PPO": lambda: ppo(world),
        **{f"{kind}, KL in reward": lambda k=kind: grpo(world, k) for kind in train_grpo.KINDS},
        **{f"dr_grpo, {kl} in loss": lambda k=kl: grpo(world, "dr_grpo", k) for kl in ("k1", "k2", "k3")},
        "grpo, k3 in loss": lambda: grpo(world, "grpo", "k3"),
    }.items():
        policy, curves[name] = run()
        policies[name] = world.sequence(policy).detach().exp()
    print("| policy | total variation from π* |\n|---|---|")
    for name, p in policies.items():
        print(f"| {name} | {world.distance(p, best):.4f} |")
    off = reward_model(world) - world.reward
    off = off - off.view(2, -1).mean(1).repeat_interleave(world.each)
    print(f"\nreward model: r up to a constant per prompt, within {off.abs().max().item():.1e}")
    if config.plot:
        draw(world, policies, curves, best, config.plot)


def draw(world: World, policies: dict, curves: dict, best: Tensor, path: str) -> None:
    plt = pyplot(path)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=(3, 2))
    names = ["".join("ab."[t] for t in y) for y in world.said]
    order = best[: world.each].argsort(descending=True)
    at = torch.arange(world.each, dtype=torch.float64)
    left.bar(at, best[order], 0.85, color="0.85", label="π*, in closed form")
    marks = {"π_ref": "x", "DPO": "o", "PPO": "^", "rloo, KL in reward": "s", "dr_grpo, k3 in loss": "v"}
    for k, (name, marker) in enumerate(marks.items()):
        left.plot(at + 0.15 * (k - 2), policies[name][order], marker, ms=5, label=name, ls="")
    left.set_xticks(at, [names[i] for i in order], rotation=60, family="monospace")
    left.set(ylabel="probability", title="what each policy says to the first prompt (“.” ends)")
    left.legend(frameon=False)
    for name, curve in curves.items():
        right.semilogy(curve, lw=1.2, label=name, ls="--" if "in loss" in name else "-")
    right.set(xlabel="iteration", ylabel="total variation from π*", title="on the way there")
    right.legend(frameon=False, fontsize=7)
    write(figure, path)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
