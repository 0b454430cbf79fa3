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
from nanoalign.data import BatchOrder, read_split, thin
from nanoalign.logprobs import token_logprobs, token_losses
from nanoalign.model import GPT, parameter_count, preset
from nanoalign.rollouts import respond
from nanoalign.rows import read_rows
from nanoalign.run import Flags, Run, already_finished
from nanoalign.tokenizer import Tokenizer, get_tokenizer
from nanoalign.training import make_optimizer, prepare, setup


@dataclass(kw_only=True)
class Config(Flags):
    data: str = "out/demo/world/pretrain.jsonl"  # a plain text file, or JSONL rows {"text"}
    out: str = "out/demo/base.pt"  # the checkpoint to write; metrics go beside it
    model: str = "world-small"  # a preset of nanoalign/model.py
    tokenizer: str = "world"  # "world" or the name of a tiktoken encoding, such as gpt2
    context: int = 128  # block length in tokens, and the model's context
    eval_data: str = ""  # held-out text; empty: those of the texts that a hash picks, one in twenty;
    # of a single text the last twentieth
    batch_size: int = 16  # blocks per optimiser step
    lr: float = 4e-3
    warmup: int = 50
    weight_decay: float = 0.1
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500


def pack(rows: list[dict], tokenizer: Tokenizer, context: int, part: str = "training") -> np.ndarray:
    """Texts, each followed by the end token, cut into blocks (N, context) int64; what fills none is left out.
    Neighbouring blocks share one token, so that every token but the very first is predicted exactly once."""
    texts = tokenizer.encode_all([row["text"] for row in rows])
    stream = np.concatenate([np.array([*ids, tokenizer.end], dtype=np.int64) for ids in texts])
    if not 2 <= context <= len(stream):
        count = f"the {len(stream):,} tokens of the {part} text"
        raise UserError(f"--context must be at least 2 and at most {count}; or name --eval-data.")
    return np.lib.stride_tricks.sliding_window_view(stream, context)[:: context - 1]


@torch.no_grad()
def evaluate(policy: GPT, blocks: np.ndarray, config: Config, device) -> dict[str, float]:
    """Held-out loss in nats per token, and its exponential."""
    batches = np.split(blocks, range(config.batch_size, len(blocks), config.batch_size))
    total = sum(token_logprobs(policy, torch.tensor(ids, device=device)).sum() for ids in batches)
    loss = -total.item() / blocks[:, 1:].size
    return {"loss": loss, "perplexity": math.exp(min(loss, 50))}


def main(config: Config) -> None:
    if already_finished(config):
        return
    device, autocast = setup(config)
    tokenizer = get_tokenizer(config.tokenizer)
    shape = preset(config.model, vocab_size=tokenizer.vocab_size, context=config.context)

    rows = read_rows(config.data, "text", config.skip_bad_rows, config.fields)
    if len(rows) > 1 or config.eval_data:
        rows, eval_rows = read_split(config, config.data, "text")
        blocks = pack(rows, tokenizer, config.context)
        held_out = pack(eval_rows, tokenizer, config.context, "held-out")
    else:
        blocks = pack(rows, tokenizer, config.context)
        blocks, held_out = np.split(blocks, [-max(1, len(blocks) // 20)])
    if not len(blocks):
        raise UserError(f"{config.data} is too short to hold anything out; name --eval-data.")
    eval_blocks = np.stack(thin(held_out, 256))
    print(f"data: {blocks.size:,} tokens to train on, {eval_blocks.size:,} held out")

    policy = GPT(shape).to(device)
    print(f"model: {config.model}, {parameter_count(policy) / 1e6:.2f} M parameters")
    prepare(config, policy)
    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    order = BatchOrder(np.full(len(blocks), config.context), config.batch_size, config.seed)
    run = Run(config, "base", policy, tokenizer, optimizer, order, [blocks], chat=False)
    if run.first == 0:  # an untrained model knows nothing: its loss is that of a uniform guess
        with autocast:
            loss = evaluate(policy, eval_blocks[:16], config, device)["loss"]
        due, room = math.log(tokenizer.vocab_size), 0.1 + 4e-4 * shape.width
        print(f"step-0 check: loss {loss:.3f}, ln(vocabulary) = {due:.3f}")
        if abs(loss - due) > room:  # the logits' variance adds half of itself
            raise UserError(f"an untrained model must start at ln(vocabulary) = {due:.3f}, not {loss:.3f}.")

    for step in run:
        run.count = len(order[step]) * (config.context - 1)  # tokens that are predicted
        for batch, _ in run.pieces(blocks):
            ids = torch.from_numpy(np.stack(batch)).to(device, non_blocking=True)
            with autocast:
                nll, _ = token_losses(policy, ids, None, torch.neg)
            run.backward(nll)
            run.add(loss=nll)
            run.metrics.tokens += ids.numel()
        run.update()
        run.log()
        if run.looks:
            start = eval_blocks[0, : min(16, config.context // 2)]
            with autocast:
                run.show(evaluate(policy, eval_blocks, config, device))
                [text], _ = respond(policy, tokenizer, [start], 64, config.seed)
            print(f"  sample: {tokenizer.decode(start)!r} → {text!r}")
    run.finish()


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
