"""What every training script does alike: the flags they share, and the run that surrounds the loop.

    run = Run(config, "dpo", policy, tokenizer, optimizer, order, made_from)
    for step in run:                          # from where a stopped run left off
        for batch, where in run.pieces(examples):
            ...                               # forward and loss: the method's own lines
            run.backward(loss)                # (B,): divided by the rows of the step, not of the piece
            run.add(loss=loss)                # (B,): summed on the device until the step is logged
        run.update()                          # gradients of all processes, clip, learning rate, AdamW
        run.log()
        if run.looks:
            run.show(evaluate(...))
    run.finish()

The run saves X.partial.pt every --save-every steps and on Ctrl-C, SIGTERM and SIGHUP; --resume goes on from
there bit for bit. It holds no forward pass, no loss and no evaluation.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from nanoalign import UserError, cli, memory, parallel
from nanoalign.checkpoint import finish, must_not_be_read, partial_path, resume, save_partial
from nanoalign.contents import damaged
from nanoalign.data import BatchOrder
from nanoalign.lora import adapters, restore
from nanoalign.pieces import dealt, micro_batches
from nanoalign.seeds import derived_seed
from nanoalign.sharding import full, home
from nanoalign.stopping import CleanStop
from nanoalign.training import check, in_bf16, learning_rate, optimizer_step


@dataclass(kw_only=True)
class Flags:
    """The flags of every training script. A script lists its own, and may restate a default of these."""

    eval_data: str = ""  # held-out rows of the same kind; empty: those of the prompts that a hash picks,
    # one in twenty, the same in all stages; with it all of --data is trained on: name it in later stages, too
    epochs: float = 1.0  # passes over the data
    steps: int = 0  # optimiser steps; 0: what --epochs comes to
    batch_size: int = 32  # rows per optimiser step
    micro_batch: int = 0  # rows per forward and backward pass; 0: all at once
    micro_tokens: int = 0  # tokens per forward pass at most, padding included; 0: no limit
    lr: float = 2e-4  # peak learning rate
    warmup: int = 20  # steps of linear warmup, then a cosine to zero
    weight_decay: float = 0.0  # on matrices
    clip: float = 1.0  # gradient norm
    log_every: int = 10  # steps between metrics
    eval_every: int = 100  # steps between held-out evaluations
    save_every: int = 100  # steps between saves of X.partial.pt, from which --resume continues
    seed: int = 0  # of data order and samples
    lora: int = 0  # train adapters of this rank in place of the weights (nanoalign/lora.py); 0: none
    lora_alpha: float = 0.0  # α of the adapters; 0: twice their rank
    base_dtype: str = "fp32"  # what --lora keeps the matrices of the blocks in: fp32 or bf16
    precision: str = ""  # of matrix products: fp32 or bf16; empty: bf16 on a GPU, fp32 on a CPU
    device: str = "auto"  # auto, cpu, cuda, …
    compile: bool = False  # torch.compile the forward pass
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    shard: bool = False  # of several processes (torchrun), each keeps a part of every weight: FSDP2
    offload: bool = False  # with --shard: parts, and AdamW, stay on the CPU
    timeout: float = 10.0  # minutes that a process waits for the others
    plan: bool = False  # say how much memory the run needs at most (docs/memory.md), and stop
    resume: bool = False  # continue X.partial.pt where it stopped, bit for bit
    skip_bad_rows: bool = False  # drop and count malformed rows instead of stopping
    fields: str = ""  # other names of the fields in all rows, ours=theirs: prompt=question,completion=answer

    beside_out = (".partial.pt", ".metrics.jsonl")  # X.pt: what else is written


class Run:
    """Iterates over the optimiser steps (PPO's iterations) that are left, and logs, saves, stops and resumes.

    order: `order[step]` are the rows of a step. made_from: models, tensors, arrays and strings (nested) that
    the result depends on; a resumed run must have the same. models: what is held in memory, by name.
    trained: the module whose gradient is clipped, if it is more than `model`. state: what a stopped run kept
    (`keep`) beside weights, optimiser and random numbers. held: models in memory beside what is trained.
    """

    def __init__(
        self, config, stage: str, model: nn.Module, tokenizer, optimizer, order: BatchOrder, made_from,
        models: tuple[str, ...] = ("policy",), chat: bool = True, trained: nn.Module | None = None,
        shown: tuple[str, ...] = (), held: tuple[nn.Module | None, ...] = (),
    ):  # fmt: skip
        self.config, self.model, self.trained = config, model, trained or model
        self.optimizer, self.order = optimizer, order
        self.steps = config.steps or max(1, round(config.epochs * order.steps_per_epoch))
        must_not_be_read(config.out, getattr(model, "bases", ()))
        needs = memory.plan(config, stage, self.trained, held, order, made_from, self.steps)
        self.saved = {"stage": stage, "tokenizer": tokenizer, "chat": chat}
        self.data = fingerprint(*made_from)
        self.state = resume(config, model, optimizer, stage=stage, data=self.data)
        self.first, self.keep = self.state["step"], {}
        if self.first > self.steps:
            raise damaged(partial_path(config.out), f"it is at step {self.first}. Delete it to start afresh")
        self.device = home(model)
        self.bf16 = in_bf16(config, self.device)
        self.metrics = cli.Metrics(config, self.steps, self.device, self.first, shown)
        own = config.lora and not getattr(config, "reference", "")  # the policy with its adapters off
        self.metrics.models(*(name for name in models if not (own and name == "reference")))
        self.metrics.note(event="memory", **needs)
        self.done, self.stop, self.idle, self.agreed = self.first, CleanStop(), False, False
        if config.warmup > self.steps:
            lasts = f"--warmup {config.warmup} outlasts the run's {self.steps} steps"
            print(f"warning: {lasts}, which reach {self.steps / config.warmup:.0%} of --lr {config.lr:g}")

    def __iter__(self) -> Iterator[int]:
        for step in range(self.first, self.steps):
            self.step, self.done, self.since = step, step + 1, time.monotonic()
            self.sums, self.masks, self.laps, self.count = {}, {}, {}, 0
            yield step
            stopping = self.stopping
            if self.saves:
                state = {"step": self.done, "data": self.data, **self.saved, **self.keep}
                save_partial(self.config, self.model, self.optimizer, **state)
            if stopping:
                self.stop.leave(self.config, self.done)

    @property
    def stopping(self) -> bool:  # has anybody asked for it? Several processes agree when they log
        return self.agreed if parallel.size() > 1 else bool(self.stop)

    @property
    def saves(self) -> bool:  # is X.partial.pt written after this step?
        return self.done % self.config.save_every == 0 or self.stopping

    @property
    def looks(self) -> bool:  # is the model to be evaluated after this step?
        return self.done % self.config.eval_every == 0 or self.done == self.steps

    @property
    def seed(self) -> int:  # of the samples that this step draws
        return derived_seed(self.config.seed, "rollout", self.step)

    def keeps(self, name: str, module: nn.Module) -> None:
        """Save a module beside the model, and go on with what a stopped run kept of it."""
        if name in self.state:
            try:
                restore(module, self.state[name])
            except RuntimeError:
                what = f"its {name} does not fit. Delete it to start afresh"
                raise damaged(partial_path(self.config.out), what) from None
        self.keep[name] = adapters(module) or module.state_dict()

    def pieces(self, examples: list, tokens: np.ndarray | None = None) -> Iterator[tuple[list, Tensor]]:
        """The step's examples and their indices, in pieces that --micro-batch and --micro-tokens allow.

        tokens (N,): what each example costs; by default its length in `order`.
        """
        tokens = self.order.lengths if tokens is None else tokens
        for micro in self.own(self.order[self.step], tokens):
            yield [examples[i] for i in micro], torch.from_numpy(micro).to(self.device, non_blocking=True)

    def own(self, rows: np.ndarray, tokens: np.ndarray, group: int = 1) -> Iterator[np.ndarray]:
        """Rows of a step, by index into tokens → this process's pieces (pieces.py). One that counts nothing
        leaves no trace in gradients, metrics and tokens."""
        for piece, counts in dealt(rows, tokens, self.config, group):
            self.idle, before = not counts, self.metrics.tokens
            yield piece
            self.metrics.tokens = self.metrics.tokens if counts else before
        self.idle = False

    def backward(self, loss: Tensor, count: int = 0) -> None:
        """Of a piece's losses (B,) or their sum (), divided by what the whole step counts, as `add` does."""
        loss = loss.sum() / (count or self.count or len(self.order[self.step]))
        (0 * loss if self.idle else loss).backward()

    def minibatches(self, lengths: np.ndarray, group: int = 1) -> Iterator[tuple[np.ndarray, Iterator]]:
        """The iteration's responses of `lengths` (B,) tokens, by index, shuffled, --epochs times: those of an
        optimiser step, and this process's pieces of them (`own`), rows alike in length together. Groups of
        more than one stay whole in a step, and in order in a piece."""
        config = self.config
        for epoch in range(config.epochs):
            rng = np.random.default_rng(derived_seed(config.seed, "minibatches", self.step, epoch))
            rows = rng.permutation(np.arange(len(lengths)).reshape(-1, group)).flatten()
            for step in micro_batches(rows, config.minibatch):
                step = step[np.argsort(step if group > 1 else lengths[step])]
                yield step, self.own(step, lengths, group)

    def add(self, **values: Tensor | tuple[Tensor, Tensor]) -> None:
        """Values (B,) or sums () of a piece, logged as their total over the step divided by `count`: the rows
        of the step, unless the script sets it. Of a pair (values, mask): the mean where mask holds."""
        for name, value in values.items():
            value, mask = value if isinstance(value, tuple) else (value, None)
            value = 0 * value.detach() if self.idle else value.detach()
            if mask is not None:
                value = torch.where(mask, value, 0.0)
                self.masks[name] = self.masks.get(name, 0) + mask.sum() * (not self.idle)
            self.sums[name] = self.sums.get(name, 0) + value.sum()

    def largest(self, values: Tensor) -> Tensor:  # of all processes, ()
        return parallel.total(values.max(), largest=True)

    def means(self) -> dict[str, Tensor]:
        """What was added in this step, by all processes, by name; NaN where no mask held."""
        values = [*self.sums.values(), *self.masks.values()]
        if parallel.size() > 1:
            values = parallel.total(torch.stack([value.double() for value in values]))
        sums, masks = dict(zip(self.sums, values)), dict(zip(self.masks, values[len(self.sums) :]))
        count = self.count or len(self.order[self.step])
        return {name: sums[name] / masks.get(name, count) for name in sums}

    def must_start_at(self, due: float, what: str) -> None:
        """Step-0 check: the first loss is what theory says, or policy and reference disagree."""
        loss = self.means()["loss"].item()
        print(f"step-0 check: loss {loss:.6f}, {what} = {due:.6f}")
        tolerance = 1e-2 if self.bf16 else 1e-4
        if not abs(loss - due) <= tolerance * due:
            raise UserError(f"the loss must start at {due:.6f}: policy and reference disagree.")

    def must_be_on_policy(self, log_ratio: Tensor, kl: Tensor, mask: Tensor) -> None:
        """Check of the first minibatch, log_ratio (N,) of its tokens: the policy that updates is the one that
        sampled. Before the first step it is the reference, too: kl (B,) of responses, mask (B, T), is 0."""
        log_ratio = torch.cat(parallel.everyone(log_ratio.cpu()))
        approxkl, off = 0.5 * log_ratio.square().mean().item(), log_ratio.exp().sub(1).abs().max().item()
        far = 0.0 if self.step or self.config.reference else (kl.abs().sum() / mask.sum()).item()
        moment = "first minibatch" if self.step else "step-0 check"
        print(f"{moment}: ratio 1, off by at most {off:.1e}, approxkl {approxkl:.1e}, KL {far:.1e} a token")
        tolerance = 1e-3 if self.bf16 else 1e-6  # of the mean: a token in bf16 may be far off
        if not (approxkl <= tolerance and far <= 0.1 * tolerance**0.5):  # NaN fails as well
            raise UserError("the ratio must start at 1 and KL at 0: log-probs come from two different paths.")

    def update(self) -> None:
        """Set the learning rate, clip the gradient, one AdamW step, zero the gradient."""
        parallel.add_gradients(self.trained)
        self.lr = learning_rate(self.step, self.steps, self.config.lr, self.config.warmup)
        self.grad_norm = optimizer_step(self.trained, self.optimizer, self.lr, self.config.clip)

    def lap(self, name: str) -> None:
        """Log the seconds since the step began, or since the lap before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.since = self.since, time.monotonic()
        self.laps[name] = self.since - before

    def log(self, **more) -> dict:
        """Log what was added, and more, if the step is due → the row, or an empty one."""
        self.agreed = parallel.meet(bool(self.stop))
        if not (self.done % self.config.log_every == 0 or self.done in (1, self.steps) or self.saves):
            return {}
        own = {"grad_norm": self.grad_norm, "lr": self.lr, **self.laps}
        return self.metrics.log(self.done, self.masks, **more, **self.means(), **own)

    def show(self, result: dict[str, float], rows=(), texts=(), scores=()) -> None:
        """Log and print what an evaluation found; print answers to the prompts of rows, and their scores."""
        self.metrics.note(step=self.done, **{f"eval_{name}": value for name, value in result.items()})
        found = "  ".join(f"{name} {value:.3f}" for name, value in result.items())
        print(f"  {self.metrics.name}: held-out {found}")
        for row, text, score in zip_longest(rows, texts, scores):
            worth = "" if score is None else f" ({score:+.2f})"
            print(f"  {row['prompt'][-1]['content'][:80]!r} → {text!r}{worth}")

    def finish(self, **extra) -> None:
        """Write X.pt, with whatever else the next stage needs, and remove X.partial.pt."""
        finish(self.config, self.model, step=self.steps, **self.saved, **extra)


def already_finished(config) -> bool:
    """With --resume: is the checkpoint there, and nothing left to continue?"""
    check(config)
    done = config.resume and Path(config.out).exists() and not partial_path(config.out).exists()
    if done:
        print(f"{config.out} is finished; delete it to train again.")
    return done


def fingerprint(*parts) -> str:
    """A short hash of arrays, strings, tensors, models and files, nested: what a result was made from."""
    digest = hashlib.sha256()
    for part in parts:
        part = full([*part.state_dict().values()] if isinstance(part, nn.Module) else part)
        if isinstance(part, (list, tuple)):
            part = fingerprint(*part)
        elif isinstance(part, Path):
            part = part.read_bytes()
        elif isinstance(part, Tensor):
            part = (part.float() if part.dtype == torch.bfloat16 else part).detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            part = np.ascontiguousarray(part).tobytes()
        digest.update(part if isinstance(part, bytes) else str(part).encode())
    return digest.hexdigest()[:16]
