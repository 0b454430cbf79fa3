"""Supervised fine-tuning: imitate demonstrations, with the loss on the response only.

    L = −(1/N) Σ log π(y_t | x, y_<t)      over response and end tokens (Ouyang et al. 2022, §3.5)

All assistant turns of a conversation are learnt from; prompts, role tokens and padding never are.

    python train_sft.py                                             # the built-in world
    python train_sft.py --data hh.jsonl --init out/base.pt --out out/sft.pt

The mean is over the response tokens of the whole optimiser step, so gradient accumulation changes nothing.
Deviation: Adam's ε is 1e-3, so that words which the demonstrations never say stay where they are.

A healthy run: the held-out loss falls and flattens; the samples answer the question and stop. Imitation
copies the demonstrators' flaws along with their answers: that is what the preference methods are for.
"""

from dataclasses import dataclass

import torch

from nanoalign import UserError, cli
from nanoalign.checkpoint import finish, load_policy, resume, save_partial
from nanoalign.data import BatchOrder, chat_examples, collate, micro_batches, split_rows
from nanoalign.generate import respond
from nanoalign.logprobs import token_logprobs, token_losses
from nanoalign.rows import parse_prompt, read_rows
from nanoalign.training import (
    CleanStop,
    already_finished,
    fingerprint,
    learning_rate,
    make_optimizer,
    optimizer_step,
    prepare,
    setup,
)  # fmt: skip


@dataclass
class Config:
    init: str = "out/demo/base.pt"  # the checkpoint to start from
    data: str = "out/demo/world/sft.jsonl"  # chat rows; of pair rows, the chosen side
    eval_data: str = ""  # held-out rows of the same kind; empty: every twentieth prompt's
    out: str = "out/demo/sft.pt"  # the checkpoint to write; metrics go beside it
    max_length: int = 128  # tokens per example; longer ones are truncated, and counted
    epochs: float = 1.0  # passes over the data
    steps: int = 0  # optimiser steps; 0: what --epochs comes to
    batch_size: int = 32  # conversations per optimiser step
    micro_batch: int = 0  # conversations per forward pass; 0: the whole batch at once
    micro_tokens: int = 0  # tokens per forward pass at most, padding included; 0: no limit
    lr: float = 1e-3  # peak learning rate
    warmup: int = 20  # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.0  # on matrices
    adam_eps: float = 1e-3  # Adam's ε; with a small one, words that the data never says drift away
    clip: float = 1.0  # gradient norm
    log_every: int = 20  # steps between metrics
    eval_every: int = 200  # steps between held-out evaluations with samples
    save_every: int = 200  # steps between saves of X.partial.pt, from which --resume continues
    seed: int = 0  # of data order and samples
    device: str = "auto"  # auto, cpu, cuda, …
    compile: bool = False  # torch.compile the forward pass
    packing: bool = False  # one row of whole conversations instead of padded rows: for many tokens, on a GPU
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    resume: bool = False  # continue X.partial.pt where it stopped, bit for bit
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


@torch.no_grad()
def evaluate(policy, examples, tokenizer, config: Config, device, autocast) -> dict:
    """Held-out loss in nats per response token."""
    total, scored = torch.zeros((), device=device), 0
    for start in range(0, len(examples), config.batch_size):
        ids, mask = collate(examples[start : start + config.batch_size], tokenizer.pad)
        with autocast:
            total -= token_logprobs(policy, ids.to(device), mask).sum()
        scored += int(mask.sum())
    return {"eval_loss": total.item() / scored}


def main(config: Config) -> None:
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device, stages=("base", "sft"))

    rows = read_rows(config.data, "chat", config.skip_bad_rows)
    rows, eval_rows = split_rows(rows, config.eval_data, "chat", config.skip_bad_rows)
    max_length = min(config.max_length, policy.config.context)
    examples = chat_examples(rows, tokenizer, max_length)
    eval_examples = chat_examples(eval_rows[:500], tokenizer, max_length)
    shown = [parse_prompt(row)["prompt"] for row in eval_rows if row["messages"][0]["role"] != "assistant"][
        :4
    ]
    prompts = [tokenizer.prompt(messages)[-max_length // 2 :] for messages in shown]

    optimizer = make_optimizer(policy, config.lr, config.weight_decay, eps=config.adam_eps)
    prepare(config, policy)
    order = BatchOrder([len(ids) for ids, _ in examples], config.batch_size, config.seed)
    steps = config.steps or max(1, round(config.epochs * order.steps_per_epoch))
    data = fingerprint(policy.embed.weight, *(part for example in examples for part in example))
    first_step = resume(config, policy, optimizer, stage="sft", data=data)["step"]
    metrics = cli.Metrics(config, steps, device, first_step)
    stop = CleanStop()

    if first_step == 0:  # every response that was not cut short must learn to stop
        ends = [mask[-1] for ids, mask in examples if len(ids) < max_length]
        scored_ends = sum(bool(m) for m in ends)
        print(f"step-0 check: {scored_ends} of {len(ends)} closing end tokens are scored")
        if any(ids[-1] != tokenizer.end for ids, _ in examples if len(ids) < max_length):
            raise UserError("an untruncated example lacks its end token: the model would never stop.")

    for step in range(first_step, steps):
        indices = order[step]
        scored = sum(int(examples[i][1].sum()) for i in indices)  # tokens of the whole optimiser step
        loss = torch.zeros((), device=device)
        lengths = order.lengths[indices]
        for micro in micro_batches(indices, config.micro_batch, lengths, config.micro_tokens):
            ids, mask = collate([examples[i] for i in micro], tokenizer.pad)
            ids, hidden = ids.to(device, non_blocking=True), None
            with autocast:
                if config.packing:
                    whole = torch.arange(ids.shape[1]) < torch.from_numpy(order.lengths[micro])[:, None]
                    hidden = policy.packed_hidden(ids, whole, [len(micro)])
                nll, _ = token_losses(policy, ids, mask, torch.neg, hidden=hidden)
            micro_loss = nll / scored
            micro_loss.backward()
            loss += micro_loss.detach()
            metrics.tokens += sum(len(examples[i][0]) for i in micro)
        lr = learning_rate(step, steps, config.lr, config.warmup)
        grad_norm = optimizer_step(policy, optimizer, lr, config.clip)

        done, stopping = step + 1, bool(stop)
        save_now = done % config.save_every == 0 or stopping
        if done % config.log_every == 0 or done in (1, steps) or save_now:
            metrics.log(done, loss=loss, grad_norm=grad_norm, lr=lr)
        if done % config.eval_every == 0 or done == steps:
            metrics.note(
                step=done, **(result := evaluate(policy, eval_examples, tokenizer, config, device, autocast))
            )
            print(f"  held-out loss {result['eval_loss']:.3f}")
            with autocast:
                texts = respond(policy, tokenizer, prompts, 64, config.seed)[0]
            for messages, text in zip(shown, texts):
                print(f"  {messages[-1]['content'][:80]!r} → {text!r}")
        if save_now:
            save_partial(config, policy, optimizer, stage="sft", tokenizer=tokenizer, step=done, data=data)
        if stopping:
            stop.leave(config, done)
    finish(config, policy, stage="sft", tokenizer=tokenizer, step=steps)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
