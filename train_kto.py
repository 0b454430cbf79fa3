"""Kahneman–Tversky optimisation: learn from thumbs up and thumbs down, without pairs.

    r = log π(y|x) − log π_ref(y|x)                       token sums
    z = max(0, mean of r over mismatched pairs (x_i, y_{i+1}))      ≈ KL(π ‖ π_ref), no gradient
    L = λ_D (1 − σ(β (r − z)))   for a desirable response,
        λ_U (1 − σ(β (z − r)))   for an undesirable one   (Ethayarajh et al. 2024, eq. 8)

People feel a gain or a loss against a reference point, z, and both saturate. The reference point is estimated
from prompts of the batch joined to answers that were given to others.

    python train_kto.py                                     # the built-in world's thumbs
    python train_kto.py --data out/demo/pairs.jsonl         # pairs, split into a thumb up and one down
    python train_kto.py --data verdicts.jsonl --init out/sft.pt --out out/kto.pt --lr 1e-5

λ_D and λ_U default to the paper's rule for unbalanced data: the smallest weights of at least 1 that bring
λ_D n_D / (λ_U n_U) into [1, 4/3]. The mean is over the rows of the optimiser step, whatever their labels.

A healthy run: at step 0 r = z = 0, so every row costs half its weight (checked); then the reward of
desirable responses (reward_chosen) rises above that of the undesirable (reward_rejected), and z stays small.
A z of 0 throughout means that the mismatched log-ratios are negative on average: the clamp is at work, and
the reference point is the reference model. So it is in the demo: held-out AUC 0.67, margin 0.19, KL 1.3.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, collate, join, labelled_examples, questions, read_split
from nanoalign.logprobs import token_logprobs
from nanoalign.pieces import summed
from nanoalign.rollouts import respond, sample_kl
from nanoalign.run import Flags, Run, already_finished
from nanoalign.training import load_reference, make_optimizer, prepare, setup


@dataclass(kw_only=True)
class Config(Flags):
    init: str = "out/demo/sft.pt"  # the checkpoint to start from, and the reference
    data: str = "out/demo/pairs.thumbs.jsonl"  # rows of prompt, completion, label; or pairs, split
    out: str = "out/demo/kto.pt"  # the checkpoint to write; metrics go beside it
    beta: float = 0.1  # β: how fast gains and losses saturate; a large one ties it to the reference
    desirable_weight: float = 0.0  # λ_D; 0: by the rule
    undesirable_weight: float = 0.0  # λ_U; 0: by the rule
    max_length: int = 128  # tokens of prompt and response; longer rows are cut, and counted


# ---------------------------------------------------------------------------------------------- the loss


def kto_loss(
    log_ratio: Tensor, desirable: Tensor, z: Tensor, beta: float = 0.1,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """Sequence log-ratios r (B,), labels (B,) bool, the reference point z () in nats → loss (B,).

    Ethayarajh et al. 2024, eq. 8, without its constant λ_y.
    """
    gain = beta * (log_ratio - z.detach())
    value = torch.where(desirable, gain, -gain)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-value)  # 1 − σ(v)


def balanced_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """n_D, n_U → the smallest λ_D, λ_U ≥ 1 with λ_D n_D / (λ_U n_U) in [1, 4/3]; 1, 1 if one n is 0."""
    if not desirable or not undesirable:
        return 1.0, 1.0
    ratio = desirable / undesirable
    return max(1.0, 1 / ratio), max(1.0, ratio * 3 / 4)


def mismatched(prompts: list, responses: list) -> list[tuple]:
    """Prompts x_i and their responses y_i → pairs (x_i, y_{i+1}), the last prompt with the first response."""
    if len(prompts) < 2:
        raise UserError("a batch of one row has no mismatched pair; --batch-size must be at least 2.")
    return list(zip(prompts, responses[1:] + responses[:1]))


# ------------------------------------------------------------------------------------------------- a run


def sequence_logprobs(model, batch: list, tokenizer, device) -> Tensor:
    """Examples → summed response log-probs (B,)."""
    ids, mask = collate(batch, tokenizer.pad)
    return token_logprobs(model, ids.to(device, non_blocking=True), mask).sum(-1)  # 0 elsewhere


def sequence_log_ratios(policy, ref, batch: list, tokenizer, device) -> tuple[Tensor, Tensor]:
    """Examples → log π, and r = log π − log π_ref, of their responses (B,)."""
    logp = sequence_logprobs(policy, batch, tokenizer, device)
    with torch.no_grad():
        ref_logp = sequence_logprobs(ref, batch, tokenizer, device)
    return logp, logp - ref_logp


@torch.no_grad()
def reference_point(policy, ref, batch: list, tokenizer, config: Config, max_length: int, device) -> Tensor:
    """The examples of a whole optimiser step → z (): the mean log-ratio of mismatched pairs, clamped at 0."""
    pairs = mismatched([ids[~mask] for ids, mask in batch], [ids[mask] for ids, mask in batch])
    joined = [join(prompt, response, max_length) for prompt, response in pairs]

    def ratios(piece: np.ndarray) -> Tensor:
        return sequence_log_ratios(policy, ref, [joined[i] for i in piece], tokenizer, device)[1]

    return (summed([len(ids) for ids, _ in joined], config, ratios) / len(joined)).clamp(min=0)


@torch.no_grad()
def evaluate(policy, ref, examples, labels, prompts, tokenizer, config: Config, device) -> dict:
    """How often a desirable held-out row has the higher reward, by how much, and the KL on samples."""
    ratios, result = [], {}
    for start in range(0, len(examples), config.batch_size):
        batch = examples[start : start + config.batch_size]
        ratios.append(sequence_log_ratios(policy, ref, batch, tokenizer, device)[1])
    rewards = config.beta * torch.cat(ratios)
    up, down = rewards[labels], rewards[~labels]
    if len(up) and len(down):
        above = (up[:, None] > down).float() + 0.5 * (up[:, None] == down)
        result = {"auc": above.mean().item(), "margin": (up.mean() - down.mean()).item()}
    kl = sample_kl(policy, ref, tokenizer, prompts, 96, config.seed)
    return {**result, "kl": kl.mean().item()}


def label_weights(labels: Tensor, config: Config) -> tuple[float, float]:
    """λ_D and λ_U: the flags', or where these are 0 the rule's."""
    up, down = int(labels.sum()), int((~labels).sum())
    by_rule = balanced_weights(up, down)
    weight_up = config.desirable_weight or by_rule[0]
    weight_down = config.undesirable_weight or by_rule[1]
    ratio = weight_up * up / max(1, weight_down * down)
    print(
        f"labels: {up:,} desirable × {weight_up:.3g}, {down:,} undesirable × {weight_down:.3g}: "
        f"λ_D n_D / (λ_U n_U) = {ratio:.3g} (the rule: 1 to 1.33)"
    )
    if not (up and down):
        print(
            f"warning: all {up + down:,} are {'desirable' if up else 'undesirable'}: nothing to compare with"
        )
    return weight_up, weight_down


def main(config: Config) -> None:
    if config.batch_size < 2:
        raise UserError("--batch-size must be at least 2: the reference point needs mismatched pairs.")
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, chat=True)
    ref = load_reference(config, policy, tokenizer, device)

    rows, eval_rows = read_split(config, config.data, "labelled", 1000)
    max_length = min(config.max_length, policy.config.context)
    examples, rows = labelled_examples(rows, tokenizer, max_length)
    eval_examples, eval_rows = labelled_examples(eval_rows, tokenizer, max_length, "held-out")
    labels = torch.tensor([row["label"] for row in rows], device=device)
    eval_labels = torch.tensor([row["label"] for row in eval_rows], device=device)
    shown, prompts = questions(eval_rows, tokenizer, max_length)
    weights = label_weights(labels, config)
    if soft := sum(row.get("probability", 1) < 1 for row in rows):
        which = f"{soft:,} of {len(rows):,} labels"
        print(f'warning: {which} have a "probability": KTO takes them for certain')
    if len(examples) < 2:
        raise UserError("a single row has no mismatched pair: KTO needs at least two.")

    prepare(config, policy, ref)
    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    lengths = [len(ids) for ids, _ in examples]
    order = BatchOrder(lengths, config.batch_size, config.seed, least=2)
    made_from = policy, labels, examples
    models = "policy", "reference"
    run = Run(config, "kto", policy, tokenizer, optimizer, order, made_from, models, held=(ref,))

    for step in run:
        everyone = [examples[i] for i in order[step]]
        with autocast:
            z = reference_point(policy, ref, everyone, tokenizer, config, max_length, device)
        for batch, where in run.pieces(examples):
            up = labels[where]
            with autocast:
                logp, ratio = sequence_log_ratios(policy, ref, batch, tokenizer, device)
            loss = kto_loss(ratio, up, z, config.beta, *weights)  # (B,)
            run.backward(loss)
            reward = config.beta * ratio
            run.add(loss=loss, desirable=up)
            run.add(reward_chosen=(reward, up), reward_rejected=(reward, ~up))
            run.add(logp_chosen=(logp, up), logp_rejected=(logp, ~up))
            run.metrics.tokens += sum(len(ids) for ids, _ in batch)
        if step == 0:  # policy and reference are the same model, so r = z = 0
            due = torch.where(labels[order[step]], *weights).mean().item() / 2
            run.must_start_at(due, "half the mean weight")
        run.update()
        run.log(z=z)
        if run.looks:
            with autocast:
                result = evaluate(policy, ref, eval_examples, eval_labels, prompts, tokenizer, config, device)
                texts, _ = respond(policy, tokenizer, prompts[:4], 96, config.seed)
            run.show(result, shown[:4], texts)
    run.finish()


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
