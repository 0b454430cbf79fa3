"""What training scripts set up alike: device, precision, optimiser, schedule, a step, reference, critic."""

import copy
import math
import random
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from nanoalign import UserError
from nanoalign.checkpoint import load, load_policy, load_scalar
from nanoalign.compiler import compile_or_eager
from nanoalign.lora import add, without
from nanoalign.model import GPT
from nanoalign.optimizer import AdamW
from nanoalign.scalar import ScalarGPT, ScalarHead, same_weights, share_reader
from nanoalign.sharding import shard, sharded
from nanoalign.tokenizer import Tokenizer


def setup(config) -> tuple[torch.device, torch.autocast]:
    """Seed everything; pick the device and the precision → device, autocast context (reusable)."""
    check(config)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    bf16 = in_bf16(config, device)
    if getattr(config, "base_dtype", "fp32") == "bf16" and not (bf16 and config.lora):
        raise UserError("--base-dtype bf16 needs --lora, and --precision bf16 where that is not the default.")
    torch.set_float32_matmul_precision("high" if bf16 else "highest")  # TF32 for what autocast leaves in fp32
    print(f"device: {device}, {'bf16 autocast' if bf16 else 'fp32'}, {torch.get_num_threads()} threads")
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def in_bf16(config, device: torch.device) -> bool:
    """Are matrix products made in bf16? As --precision says, by default on a GPU."""
    return (getattr(config, "precision", "") or {"cuda": "bf16"}.get(device.type)) == "bf16"


def check(config) -> None:
    """Complain now about what would otherwise fail after the work is done."""
    if hasattr(config, "out") and (not config.out or Path(config.out).is_dir()):
        raise UserError(f"--out {config.out!r} is not a file name.")
    if getattr(config, "epochs", 1) <= 0:
        raise UserError("--epochs must be positive.")
    if not 0 <= (smoothing := getattr(config, "label_smoothing", 0.0)) < 0.5:
        raise UserError(f"--label-smoothing must be at least 0 and below 0.5, not {smoothing}.")
    if hasattr(config, "minibatch") and (config.temperature <= 0 or config.steps < 1):
        raise UserError("--temperature must be above 0 (greed has no gradient), --steps at least 1.")
    if getattr(config, "lora", 0) and not hasattr(config, "init"):
        raise UserError("--lora adapts a model that is trained already, and here none is.")
    if getattr(config, "offload", False) and not config.shard:
        raise UserError("--offload is for --shard: torchrun … --shard --offload.")
    if getattr(config, "shard", False) and config.compile:
        raise UserError("--compile is not for --shard, which gathers blocks one by one; leave one out.")
    for name in ("base_dtype", "precision"):
        if getattr(config, name, "") not in ("", "fp32", "bf16"):
            raise UserError(f"--{name.replace('_', '-')} must be fp32 or bf16.")
    for name in ("batch_size", "minibatch", "eval_prompts", "log_every", "eval_every", "save_every"):
        if getattr(config, name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")


def pick_device(name: str) -> torch.device:
    """ "auto" → the GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except Exception:  # each device fails in its own way: hpu by ModuleNotFoundError
        other = "try --device auto or --device cpu"
        raise UserError(f"device {name[:40]!r} is not available here; {other}.") from None


def compile_hidden(model: nn.Module) -> None:
    """torch.compile the forward in place (state-dict keys stay as they are); decoding stays eager."""
    eager, compiled = model.hidden, compile_or_eager(model.hidden)

    def hidden(*args, cache=None, **more):
        return compiled(*args, **more) if cache is None else eager(*args, cache=cache, **more)

    model.hidden = hidden


def prepare(config, *models: nn.Module | None) -> None:
    """--lora, of what is trained, --compile, --checkpointing and --shard, for the models that there are."""
    for model in filter(None, models):
        gpt = getattr(model, "gpt", model)
        whole = isinstance(gpt, GPT)  # not a critic that is but a head
        if config.lora and whole and gpt.training:
            add(gpt, config.lora, config.lora_alpha or 2.0 * config.lora, config.base_dtype == "bf16")
        gpt.checkpointing = config.checkpointing
        if config.compile and whole:
            compile_hidden(gpt)
        if config.shard:
            shard(model, in_bf16(config, next(model.parameters()).device), config.offload)


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW; weight decay on matrices only, not on norms, biases and scalars. Fused on a GPU."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=parameters[0].is_cuda or None)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warmup over `warmup` steps, then a cosine from `peak` towards zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, clip: float) -> Tensor:
    """Clip the gradient to global norm `clip`, step, zero → the norm before clipping, () on the device."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    norm = norm.full_tensor() if sharded(norm) else norm
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def freeze(model: nn.Module) -> nn.Module:
    """A reference model: eval mode, no gradients."""
    return model.eval().requires_grad_(False)


def load_reference(config, policy: GPT, tokenizer: Tokenizer, device) -> GPT:
    """The frozen model that KL is measured to: that of --reference, of the policy's kind, or the policy as it
    is: a copy, or with --lora, under which its weights stay as they are, no more than a second name."""
    if not (path := getattr(config, "reference", "")):
        return without(policy) if config.lora else freeze(copy.deepcopy(policy))
    ref, own, _ = load_policy(path, device)
    if own.name != tokenizer.name or ref.config != policy.config:
        kind = "it must be a model of the policy's own kind, such as the SFT checkpoint it comes from"
        raise UserError(f"the reference {path} has another tokenizer or shape than the policy; {kind}.")
    return freeze(ref)


def load_critic(path: str, policy: GPT, tokenizer: Tokenizer, device, ref=None, frozen=()) -> nn.Module:
    """A value model that starts from the reward or language model at `path`; without a path a linear head on
    the policy's trunk. The head is zero: at first it expects nothing. ref: see `share_reader`. frozen: models
    in memory; a critic with adapters takes the weights of one that is the same for its own."""
    if path:
        if (kind := load(path)["stage"]) in ("rm", "prm"):
            critic, own, _ = load_scalar(path, device, (kind,))
        else:
            trunk, own, _ = load_policy(path, device)
            critic = ScalarGPT.from_policy(trunk)
        if own.name != tokenizer.name:
            raise UserError(f"the critic {path} reads tokens of {own.name!r}, not of {tokenizer.name!r}.")
        print(f"critic: starts from {path}")
        share_reader(critic, ref)
        for model in frozen:
            critic.gpt = without(model).train() if same_weights(critic.gpt, model) else critic.gpt
    else:
        critic = ScalarHead(policy.config.width).to(device)
    for parameter in (critic.score if path else critic).parameters():
        nn.init.zeros_(parameter)
    return critic
