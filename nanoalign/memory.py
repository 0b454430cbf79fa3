"""Will it fit? What a run needs at most, from shapes, before it starts. docs/memory.md derives every term."""

import sys

import numpy as np
import torch.nn as nn

from nanoalign.data import micro_batches
from nanoalign.kernels import LARGE, _chunk_size
from nanoalign.model import GPT
from nanoalign.packing import FLEX_FROM

READ = {"rm": 256, "prm": 128}  # sequences read at once without gradient; else --batch-size examples
ASKED = {"rm": 0, "prm": 0, "dpo": 128, "kto": 128}  # held-out prompts answered at once; else 4
MLP = {"swiglu": 4, "gelu": 2}  # numbers per width: gate, up, silu and product; up and gelu


def tensors(*models: nn.Module) -> list:
    """Their weights and buffers, shared ones once."""
    every = [x for model in models for x in (*model.parameters(), *model.buffers())]
    return list({x.data_ptr() or id(x): x for x in every}.values())


def activations(model: GPT, rows: int, length: int, size: int = 4, fused=False, masked=False) -> int:
    """Bytes that a forward pass keeps, up to the hidden states. size: of a number in a matrix product. fused:
    RMSNorm is one kernel, as on a GPU; a CPU also keeps x / rms. masked: each block has numbers of its own
    for who sees whom, as where sequences share a row."""
    config, D, d = model.config, model.config.width, model.config.head_dim
    H, K, apart = config.heads, config.kv_heads, config.norm == "rmsnorm" and not fused
    norm = 4 * D * (1 + apart) + size * D  # what goes in, what comes out
    attention = size * d * 2 * (H + K) + 4 * H  # q, k, v, what comes out; its log-sum-exp
    if config.positions == "rope":
        attention += size * d * (2 * H + K)  # q and k rotated; what comes out, before heads are joined
    if config.qk_norm:
        attention += 4 * d * (H + K) * (apart + (size == 2))
    block = 2 * norm + attention + size * (config.mlp_width * MLP[config.mlp] + length * masked)
    blocks = 4 * D * config.layers + block if model.checkpointing else block * config.layers
    return rows * length * (blocks + 4 * D * (2 + apart))


def sides(example) -> list[tuple[np.ndarray, np.ndarray]]:
    """An example of any method → its sequences: ids, and which of them are scored."""
    if isinstance(example, np.ndarray):  # of plain text
        return [(example, np.arange(len(example)) > 0)]
    if isinstance(example[0], np.ndarray):
        return [(example[0], example[-1])]
    return [side for part in example if isinstance(part, (tuple, list)) for side in sides(part)]


def counted(example) -> tuple[int, ...]:
    """→ its sequences; tokens of the longest, of all in one row, scored, of the prompt."""
    own = sides(example)
    lengths, scored = zip(*((len(ids), int(mask.sum())) for ids, mask in own))
    prompt = int(own[0][1].argmax())
    return len(own), max(lengths), sum(lengths) - (len(own) - 1) * prompt, sum(scored), prompt


def largest(config, stage: str, order, examples: list, steps: int) -> tuple[int, ...]:
    """→ rows of the largest micro-batch, tokens of the longest, of all its sequences, and that the head sees;
    how many a step has; sequences to read, tokens of one; samples, tokens of their prompts, of one in all."""
    picked = [order[step] for step in range(min(steps, order.steps_per_epoch))]
    batch, new = config.batch_size, getattr(config, "max_new_tokens", 96)
    if hasattr(config, "minibatch"):  # on policy: answers as long as they may be
        prompt, group = order.lengths[np.concatenate(picked)].max(), getattr(config, "group_size", 1)
        T, n = prompt + new, min(config.minibatch, batch)
        pieces = micro_batches(np.arange(n), config.micro_batch, np.full(n, T), config.micro_tokens)
        n, G = len(pieces[0]), min(len(pieces[0]), group)  # G answers to a prompt, which is read once
        read = -(-n // G), prompt + G * new, n * T, n * new, len(pieces)
        return *read, batch, T, batch, batch // group * prompt, T
    count, longest, whole, scored, prompt = np.array([counted(example) for example in examples]).T
    pieces = [micro_batches(i, config.micro_batch, (longest * count)[i], config.micro_tokens) for i in picked]
    i = max((i for step in pieces for i in step), key=lambda i: len(i) * whole[i].max())
    laid_out, parts = count[i].sum() * longest[i].max(), max(map(len, pieces))
    rows, length = (1, laid_out) if getattr(config, "packing", False) else (len(i), whole[i].max())
    held = 10**6 if config.eval_data else len(examples) // 19 + 1  # one in twenty
    n = min(READ.get(stage, batch * count.max()), count.sum() if stage == "rm" else held * count.max())
    asked, read = min(held, ASKED.get(stage, 4)), (rows, length, laid_out, scored[i].sum(), parts)
    return *read, n, longest.max(), asked, asked * prompt.max(), prompt.max() + new


def expected(config, stage: str, trained, held, read: tuple, device, size: int, chunk: int = 0) -> dict:
    """The moments of a run → bytes in memory, by name. held: models beside what is trained. read: `largest`.
    size: of a number in a matrix product. chunk: tokens whose logits exist at one time (kernels.py)."""
    rows, length, laid_out, scored, parts, n, T, drawn, asked, slots = map(int, read)
    own = [model for model in (trained, *held) if model is not None]
    models = [part for model in own for part in model.modules() if isinstance(part, GPT)]
    learners = [x for x in dict.fromkeys(models) if any(p.requires_grad for p in x.parameters())]
    numbers, shape, on_gpu = tensors(*own), learners[0].config, device.type == "cuda"
    V, D, chunk = shape.vocab_size, shape.width, chunk or _chunk_size(shape.vocab_size, 4, device)
    work = max(12 * x.width + size * x.mlp_width * MLP[x.mlp] for x in (model.config for model in models))
    z, one, head, eager = 4 * V * min(scored, chunk), scored <= chunk, 4 * V * D * (scored > 0), V < LARGE
    copy = head * (size == 2 or (V % 64 > 0 and not eager))  # the head's weights, rounded or padded
    forward, backward = z * (1 + eager) + copy, z * one + copy + head + rows * length * work // 2
    if stage in ("dpo", "kto") and len(own) > 1:  # the reference reads what the policy has read
        forward += z * one + copy + rows * length * work
    masked = stage in ("dpo", "orpo", "rm", "grpo") and length < FLEX_FROM.get(device.type, length + 1)
    saved = sum(activations(model, rows, length, size, on_gpu, masked) for model in learners)
    matrices = [p for p in tensors(*(model.blocks for model in learners)) if p.dim() == 2]
    saved += 4 * D * (laid_out + 2 * scored) + sum(p.numel() * size for p in matrices if p.itemsize > size)
    gradients = [p.nbytes for p in tensors(trained) if p.requires_grad]
    weights, due = sum(x.nbytes for x in numbers), sum(gradients)
    cache = 2 * size * shape.layers * shape.kv_heads * shape.head_dim * drawn * slots
    always = {"weights": weights, "optimiser": 2 * due, "cache": cache * on_gpu}  # kept for its graph
    file = max(sum(4 * x.numel() for x in tensors(model)) for model in own) * (not on_gpu)
    moments = {
        "learning": {"gradients": due * (parts > 1), "activations": saved, "head": max(forward, backward)},
        "stepping": {"gradients": due, "passing": 2 * max(gradients) * (not on_gpu)},
        "sampling": {"cache": cache, "passing": max(work * asked, 32 * V * drawn)},
        "reading": {
            "passing": 4 * D * n * T + max(work * n * T, 4 * V * min(n * T, chunk) * (1 + 2 * eager))
        },
    }
    moments = {name: {**always, **more} for name, more in moments.items()}
    return {**moments, "loading": {"weights": sum(4 * x.numel() for x in numbers), "file": file}}


def plan(config, stage: str, trained: nn.Module, held, order, made_from, steps: int) -> dict:
    """Say what a run needs at most → that. The examples: what of made_from has as many parts as the order."""
    device, N = next(trained.parameters()).device, len(order.lengths)
    half = (getattr(config, "precision", "") or {"cuda": "bf16"}.get(device.type)) == "bf16"
    examples = next(x for x in made_from if isinstance(x, (list, np.ndarray)) and len(x) == N)
    how = largest(config, stage, order, examples, steps), device, 2 if half else 4
    moments = expected(config, stage, trained, held, *how)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: n for name, n in moments[moment].items() if n}
    told = " + ".join(f"{n / 2**20:,.0f} {name}" for name, n in parts.items())
    print(f"memory: {sum(parts.values()) / 2**20:,.0f} MB at most, while {moment}: {told}")
    if config.plan:
        sys.exit()
    return {"moment": moment, **parts}
