"""Pretraining: learn to predict the next token of plain text.

    L = −(1/N) Σ_t log π(x_t | x_<t)                    (Bengio et al. 2003; GPT-2, Radford et al. 2019)

Documents, each closed by the end token, are packed into one stream and cut into blocks; every token is
predicted exactly once per epoch. Attention may look across the documents of a block, as in GPT-2.

    python train_pretrain.py                                        # the built-in world
    python train_pretrain.py --data tinyshakespeare.txt --tokenizer gpt2 --model mini --out out/shakespeare.pt

A healthy run: starts at ln(vocabulary) (7.62 on the world, checked), falls steeply for a hundred steps, then
slowly; training and held-out loss stay together. The samples turn from noise into sentences of the world.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from nanoalign import UserError, cli
from nanoalign.checkpoint import finish, resume, save_partial
from nanoalign.data import BatchOrder, micro_batches, pack
from nanoalign.generate import respond
from nanoalign.logprobs import token_logprobs, token_losses
from nanoalign.model import GPT, parameter_count, preset
from nanoalign.rows import read_rows
from nanoalign.tokenizer import get_tokenizer
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
    data: str = "out/demo/world/pretrain.jsonl"  # a plain text file, or JSONL rows {"text"}
    eval_data: str = ""  # held-out text; empty: the last twentieth of the blocks
    out: str = "out/demo/base.pt"  # the checkpoint to write; metrics go beside it
    model: str = "world-small"  # a preset of nanoalign/model.py
    tokenizer: str = "world"  # "world" or the name of a tiktoken encoding, such as gpt2
    context: int = 128  # block length in tokens, and the model's context
    epochs: float = 1.0  # passes over the data
    batch_size: int = 16  # blocks per optimiser step
    micro_batch: int = 0  # blocks per forward pass; 0: the whole batch at once
    lr: float = 3e-3  # peak learning rate
    warmup: int = 50  # steps of linear warmup, then a cosine to a tenth
    weight_decay: float = 0.1  # on matrices
    clip: float = 1.0  # gradient norm
    log_every: int = 50  # steps between metrics
    eval_every: int = 500  # steps between held-out evaluations with samples
    save_every: int = 500  # steps between saves of X.partial.pt, from which --resume continues
    seed: int = 0  # of initialisation, data order and samples
    device: str = "auto"  # auto, cpu, cuda, …
    compile: bool = False  # torch.compile the forward pass
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    resume: bool = False  # continue X.partial.pt where it stopped, bit for bit
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping


@torch.no_grad()
def evaluate(policy: GPT, blocks: np.ndarray, config: Config, device, autocast) -> dict:
    """Held-out loss in nats per token."""
    total = torch.zeros((), device=device)
    for rows in np.split(blocks, range(config.batch_size, len(blocks), config.batch_size)):
        with autocast:
            total -= token_logprobs(policy, torch.tensor(rows, device=device)).sum()
    loss = total.item() / (len(blocks) * (blocks.shape[1] - 1))
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 50))}


def main(config: Config) -> None:
    if already_finished(config):
        return
    device, autocast = setup(config)
    tokenizer = get_tokenizer(config.tokenizer)

    blocks = pack(read_rows(config.data, "text", config.skip_bad_rows), tokenizer, config.context)
    if config.eval_data:
        eval_blocks = pack(
            read_rows(config.eval_data, "text", config.skip_bad_rows), tokenizer, config.context
        )
    else:
        held_out = max(1, len(blocks) // 20)
        blocks, eval_blocks = blocks[:-held_out], blocks[-held_out:]
    if not len(blocks):
        raise UserError(
            f"{config.data} is too short to hold anything out; name held-out text with --eval-data."
        )
    eval_blocks = eval_blocks[:256]
    print(f"data: {blocks.size:,} tokens to train on, {eval_blocks.size:,} held out")

    policy = GPT(preset(config.model, vocab_size=tokenizer.vocab_size, context=config.context)).to(device)
    print(f"model: {config.model}, {parameter_count(policy) / 1e6:.2f} M parameters")
    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    prepare(config, policy)

    order = BatchOrder(np.full(len(blocks), config.context), config.batch_size, config.seed)
    steps = max(1, round(config.epochs * order.steps_per_epoch))
    data = fingerprint(blocks)
    first_step = resume(config, policy, optimizer, stage="base", data=data)["step"]
    metrics = cli.Metrics(config, steps, device, first_step)
    stop = CleanStop()

    if first_step == 0:  # an untrained model knows nothing: its loss is that of a uniform guess
        loss, uniform = (
            evaluate(policy, eval_blocks[:16], config, device, autocast)["eval_loss"],
            math.log(tokenizer.vocab_size),
        )
        print(f"step-0 check: loss {loss:.3f}, ln(vocabulary) = {uniform:.3f}")
        if abs(loss - uniform) > 0.1 + 4e-4 * policy.config.width:  # the logits' variance adds half of itself
            raise UserError(
                f"an untrained model must start at ln(vocabulary) = {uniform:.3f}, not {loss:.3f}."
            )

    for step in range(first_step, steps):
        indices = order[step]
        scored = len(indices) * (config.context - 1)  # tokens of the whole optimiser step
        loss = torch.zeros((), device=device)
        for micro in micro_batches(indices, config.micro_batch):
            ids = torch.from_numpy(blocks[micro]).to(device, non_blocking=True)
            with autocast:
                nll, _ = token_losses(policy, ids, None, torch.neg)
            micro_loss = nll / scored
            micro_loss.backward()
            loss += micro_loss.detach()
        lr = learning_rate(step, steps, config.lr, config.warmup)
        grad_norm = optimizer_step(policy, optimizer, lr, config.clip)
        metrics.tokens += len(indices) * config.context

        done, stopping = step + 1, bool(stop)
        save_now = done % config.save_every == 0 or stopping
        if done % config.log_every == 0 or done in (1, steps) or save_now:
            metrics.log(done, loss=loss, grad_norm=grad_norm, lr=lr)
        if done % config.eval_every == 0 or done == steps:
            metrics.note(step=done, **(result := evaluate(policy, eval_blocks, config, device, autocast)))
            print(f"  held-out loss {result['eval_loss']:.3f}")
            start = eval_blocks[0][: min(16, config.context // 2)]
            with autocast:
                sample = respond(policy, tokenizer, [start], 64, config.seed)[0][0]
            print(f"  sample: {tokenizer.decode(start)!r} → {sample!r}")
        if save_now:
            save_partial(config, policy, optimizer, stage="base", tokenizer=tokenizer, step=done, data=data)
        if stopping:
            stop.leave(config, done)
    finish(config, policy, stage="base", tokenizer=tokenizer, step=steps)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
