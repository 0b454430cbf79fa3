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
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, chat_examples, collate, questions, read_split
from nanoalign.logprobs import token_logprobs, token_losses
from nanoalign.packing import packed_hidden
from nanoalign.rollouts import respond
from nanoalign.rows import parse_prompt
from nanoalign.run import Flags, Run, already_finished
from nanoalign.training import make_optimizer, prepare, setup


@dataclass(kw_only=True)
class Config(Flags):
    init: str = "out/demo/base.pt"  # the checkpoint to start from
    data: str = "out/demo/world/sft.jsonl"  # chat rows; of pair rows, the chosen side
    out: str = "out/demo/sft.pt"  # the checkpoint to write; metrics go beside it
    max_length: int = 128  # tokens per example; longer ones are truncated, and counted
    adam_eps: float = 1e-3  # Adam's ε; with a small one, words that the data never says drift away
    packing: bool = False  # one row of whole conversations instead of padded rows: for many tokens, on a GPU
    lr: float = 5e-4
    log_every: int = 20
    eval_every: int = 200
    save_every: int = 200


@torch.no_grad()
def evaluate(policy, examples: list, tokenizer, config: Config, device) -> dict[str, float]:
    """Held-out loss in nats per response token."""
    total, scored = torch.zeros((), device=device), 0
    for start in range(0, len(examples), config.batch_size):
        ids, mask = collate(examples[start : start + config.batch_size], tokenizer.pad)
        total -= token_logprobs(policy, ids.to(device), mask).sum()
        scored += int(mask.sum())
    return {"loss": total.item() / scored}


def check_ends(examples: list, tokenizer, max_length: int) -> None:
    """Step-0 check: every response that was not cut short must learn to stop."""
    whole = [(ids[-1], mask[-1]) for ids, mask in examples if len(ids) < max_length]
    scored = sum(bool(mask) for _, mask in whole)
    print(f"step-0 check: {scored} of {len(whole)} closing end tokens are scored")
    if any(last != tokenizer.end for last, _ in whole):
        raise UserError("an untruncated example lacks its end token: the model would never stop.")


def main(config: Config) -> None:
    if already_finished(config):
        return
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.init, device)

    rows, eval_rows = read_split(config, config.data, "chat", 500)
    max_length = min(config.max_length, policy.config.context)
    examples = chat_examples(rows, tokenizer, max_length)
    eval_examples = chat_examples(eval_rows, tokenizer, max_length, "held-out")
    asked = [row for row in eval_rows if row["messages"][0]["role"] != "assistant"]
    shown, prompts = questions(list(map(parse_prompt, asked)), tokenizer, max_length, 4)

    prepare(config, policy)
    optimizer = make_optimizer(policy, config.lr, config.weight_decay, eps=config.adam_eps)
    order = BatchOrder([len(ids) for ids, _ in examples], config.batch_size, config.seed)
    made_from = policy, examples
    run = Run(config, "sft", policy, tokenizer, optimizer, order, made_from)
    if run.first == 0:
        check_ends(examples, tokenizer, max_length)

    for step in run:
        run.count = sum(int(examples[i][1].sum()) for i in order[step])  # scored tokens of the whole step
        for batch, _ in run.pieces(examples):
            ids, mask = collate(batch, tokenizer.pad)
            ids, hidden = ids.to(device, non_blocking=True), None
            lengths = torch.tensor([len(ids) for ids, _ in batch])
            with autocast:
                if config.packing:
                    whole = torch.arange(ids.shape[1]) < lengths[:, None]
                    hidden = packed_hidden(policy, ids, whole, [len(batch)])
                nll, _ = token_losses(policy, ids, mask, torch.neg, hidden=hidden)
            run.backward(nll)
            run.add(loss=nll)
            run.metrics.tokens += int(lengths.sum())
        run.update()
        run.log()
        if run.looks:
            with autocast:
                result = evaluate(policy, eval_examples, tokenizer, config, device)
                texts, _ = respond(policy, tokenizer, prompts, 64, config.seed)
            run.show(result, shown, texts)
    run.finish()


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
