"""A PPO iteration against the algorithm of Ziegler et al. (2019) on transformers' models and `generate`.

    python -m lab.bench.ppo --init out/demo/sft.pt --prompts out/demo/world/prompts.jsonl
    python -m lab.bench.ppo --short                      # half a minute

An iteration: answer 128 prompts with up to 48 tokens, score the answers, log-probs of policy and reference,
values, advantages, two epochs over minibatches of 64: the defaults of train_ppo.py. nanoalign's side is that
script's `main`, of which the laps count that it logs: generation_s + scoring_s + update_s. The other side is
lab/bench/ziegler.py, with the same weights, prompts, hyperparameters and optimiser, in fp32. The reward model
is the policy's trunk under a random head, without a reader, which transformers has not. Its minibatches are
whole; nanoalign's go in pieces of 16 rows alike in length, as in the demo, which makes the same gradients.

First both must make the same of one batch of responses: log-probs, values, rewards, advantages; and, under an
older policy's log-probs and values, the loss and the gradient norm. Each run starts from the same weights.
tokens/s: of responses.
"""

import contextlib
import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import train_ppo
from lab.bench import ziegler
from lab.bench.timing import alternate, finish
from nanoalign import UserError, cli, hf
from nanoalign.checkpoint import load_policy, load_scalar, save
from nanoalign.data import BatchOrder, read_prompts
from nanoalign.rollouts import rollout
from nanoalign.scalar import ScalarGPT, response_scores
from nanoalign.training import learning_rate, pick_device

PARTS = "sampling", "scoring", "update"
KEPT = ("logp", "ref_logp", "values", "rewards", "advantages", "returns")


@dataclass
class Config:
    init: str = "out/demo/sft.pt"  # the policy, of the Llama family
    prompts: str = "out/demo/world/prompts.jsonl"  # prompt rows
    batch_size: int = 128  # responses per iteration
    minibatch: int = 64  # responses per optimiser step
    micro_batch: int = 16  # nanoalign's rows of a pass, alike in length, as the demo has it; 0: all at once
    max_new_tokens: int = 48  # length limit of a response
    steps: int = 3  # iterations of a run
    rounds: int = 5  # runs of each
    short: bool = False  # two rounds of an iteration of 64 responses
    device: str = "auto"  # auto, cpu, cuda, …
    out: str = ""  # a file to add the results to, instead of printing the table
    seed: int = 0  # of prompts, samples and minibatches


def prepare(config: Config, folder: str) -> train_ppo.Config:
    """Write policy and reward model into the folder, for both sides → train_ppo.py's flags: its defaults,
    without looks at held-out prompts."""
    policy, tokenizer, _ = load_policy(config.init)
    torch.manual_seed(config.seed)
    given = {"tokenizer": tokenizer, "config": config, "step": 0}
    save(f"{folder}/sft.pt", policy, stage="sft", **given)
    save(f"{folder}/rm.pt", ScalarGPT.from_policy(policy), stage="rm", **given)
    for name in ("sft", "rm"):
        hf.export(f"{folder}/{name}.pt", f"{folder}/{name}", torch.float32)
    alike = "prompts", "batch_size", "minibatch", "micro_batch", "max_new_tokens", "steps", "device", "seed"
    more = {"init": f"{folder}/sft.pt", "reward": f"{folder}/rm.pt", "out": f"{folder}/ppo.pt"}
    more |= {"warmup": 1, "eval_every": 10**6, "eval_prompts": 1, "doctor": "", "precision": "fp32"}
    return train_ppo.Config(**{name: getattr(config, name) for name in alike}, **more)


def run_script(given: train_ppo.Config) -> tuple[list[tuple], float]:
    """main of train_ppo.py → the seconds of each iteration's `PARTS`, and response tokens."""
    with contextlib.redirect_stdout(io.StringIO()):
        train_ppo.main(given)
    rows = cli.readable_rows(Path(given.out).with_suffix(".metrics.jsonl"))
    rows = [row for row in rows if "update_s" in row]
    laps = [tuple(row[f"{name}_s"] for name in ("generation", "scoring", "update")) for row in rows]
    return laps, given.batch_size * sum(row["length"] for row in rows)


def run_peer(given: train_ppo.Config, folder: str, batches: list, tokenizer, device) -> tuple[list, float]:
    """The same of the peer, with the prompts of those batches."""
    models = ziegler.load(folder, device, tokenizer.end, tokenizer.pad)
    optimizer = torch.optim.AdamW(models.trained, given.lr, (0.9, 0.95), 1e-5, 0.0)
    laps, tokens = [], 0
    for step, prompts in enumerate(batches):
        lr = learning_rate(step, given.steps, given.lr, given.warmup)
        said, seconds = ziegler.iterate(models, prompts, optimizer, lr, given)
        laps.append(seconds)
        tokens += said
    return laps, tokens


def ours(policy, critic, reward, drawn, given) -> dict[str, Tensor]:
    """What `ziegler.experience` gives, of a rollout, by train_ppo.py's functions: (B, T) each."""
    ids, mask = drawn.ids, drawn.mask
    with torch.no_grad():
        logp, values = train_ppo.forward(policy, critic, ids, mask, given.temperature)
        score = torch.where(drawn.ended, response_scores(reward, ids, mask), given.missing_eos_score)
        rewards = train_ppo.shape_rewards(score, logp, logp, mask, given.beta)
        advantages, returns = train_ppo.gae(rewards, values, mask, given.gamma, given.lam)
    found = logp, logp, values, rewards, train_ppo.whiten(advantages, mask), returns
    return {**dict(zip(KEPT, found)), "mask": mask}


def check(given: train_ppo.Config, folder: str, prompts: list, tokenizer, device) -> None:
    """Before any timing: both make the same of the same responses, whichever side the padding is on."""
    policy, critic, reward = (
        load(f"{folder}/{name}.pt", device)[0]
        for load, name in ((load_policy, "sft"), (load_scalar, "rm"), (load_scalar, "rm"))
    )
    models = ziegler.load(folder, device, tokenizer.end, tokenizer.pad)
    models.critic.score.load_state_dict(critic.score.state_dict())  # not zero, so that values are not
    drawn = rollout(policy, tokenizer, prompts, seed=given.seed, **given.sampling)
    asked = ziegler.left_padded(prompts, tokenizer.pad, device)
    said = [torch.tensor(response, device=device) for response in drawn.responses()]
    ids = torch.cat((asked, nn.utils.rnn.pad_sequence(said, True, tokenizer.pad)), 1)
    P, old = asked.shape[1], ours(policy, critic, reward, drawn, given)
    other = ziegler.experience(models, ids, P, given)
    off = [(old[name][old["mask"]] - other[name][other["mask"]]).abs().max().item() for name in KEPT]
    noise = torch.randn(int(drawn.mask.sum()), device=device) / 4
    for found in (old, other):  # beyond the clips on either side
        for name in ("logp", "values"):
            found[name] = found[name].masked_scatter(found["mask"], found[name][found["mask"]] + noise)
    logp, values = train_ppo.forward(policy, critic, drawn.ids, drawn.mask, given.temperature)
    rest = (old[name] for name in ("values", "advantages", "returns", "mask"))
    losses = train_ppo.losses(logp, old["logp"], values, *rest, given)["loss"]
    losses = losses, ziegler.loss(models, ids, P, other, given)
    norms = []
    for loss, trained in zip(losses, ([*policy.parameters(), *critic.parameters()], models.trained)):
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(trained, torch.inf).item())
    for a, b in (losses, norms):
        off.append(abs(a - b) / abs(a))
    names = *KEPT, "loss", "gradient norm"
    print("check: off by at most " + ", ".join(f"{name} {value:.0e}" for name, value in zip(names, off)))
    if not max(off) <= 1e-4:
        raise UserError("the two do not compute the same: no timing would mean anything.")


def main(config: Config) -> None:
    if config.short:
        config = replace(config, rounds=2, steps=1, batch_size=64, minibatch=32)
    device, results = pick_device(config.device), []
    with tempfile.TemporaryDirectory() as folder:
        given = prepare(config, folder)
        policy, tokenizer, _ = load_policy(given.init)
        (_, prompts), _ = read_prompts(given, tokenizer, policy.config.context)
        order = BatchOrder([*map(len, prompts)], given.batch_size, given.seed, pool=1)
        batches = [[prompts[i] for i in order[step]] for step in range(given.steps)]
        check(given, folder, batches[0], tokenizer, device)
        runs = {
            "transformers, Ziegler et al.": lambda: run_peer(given, folder, batches, tokenizer, device),
            "nanoalign": lambda: run_script(given),
        }
        for run in runs.values():
            run()  # compiles, imports
        for name, found in alternate(runs, config.rounds, "PPO").items():
            seconds = [sum(map(sum, laps)) / len(laps) for laps, _ in found]
            rates = [tokens / sum(map(sum, laps)) for laps, tokens in found]
            parts = zip(PARTS, zip(*(lap for laps, _ in found for lap in laps)))
            length = sum(tokens for _, tokens in found) / (len(found) * given.steps * given.batch_size)
            row = {"case": f"PPO iteration, {config.batch_size} responses", "name": name}
            row["note"] = f"{length:.1f} tokens a response; median s: "
            row["note"] += ", ".join(f"{part} {median(seconds):.2f}" for part, seconds in parts)
            results.append({**row, "seconds": seconds, "rates": rates})
    finish(results, device, config.out)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
