"""One training script and its peer in trl, run on the same weights, rows and batches. For bench/train.py.

nanoalign's side is `main` of train_X.py, untouched: a clock stands in the method that logs. trl's side is its
trainer's `train`; it gets the batches that the script drew, in the same order, token for token: to it a word
is a token. Losses mean the same: tests/parity/test_losses.py.
"""

import contextlib
import importlib
import json
import math
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]

import torch

from bench.timing import forget_peak, memory
from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, chat_examples, labelled_examples, pair_examples
from nanoalign.model import GPT, GPTConfig, ScalarGPT
from nanoalign.rows import read_rows
from nanoalign.tokenizer import Tokenizer
from nanoalign.training import pick_device

GRPO = {"kind": "dapo", "clip_high": 0.2, "kl": "k3", "beta": 0.04, "epochs": 1}  # trl's defaults, and a KL
OURS = {  # flags in which the scripts' defaults are not trl's
    "sft": {"adam_eps": 1e-8}, "dpo": {}, "kto": {}, "orpo": {"adam_eps": 1e-8}, "rm": {"centering": 0.0},
    "grpo": {**GRPO, "reward": "length", "watch": "", "eval_prompts": 1},
}  # fmt: skip
TRL = {  # the same in trl's names
    "sft": ("SFT", {}), "dpo": ("DPO", {"beta": 0.1}), "kto": ("KTO", {"beta": 0.1}),
    "orpo": ("ORPO", {"beta": 0.1}), "rm": ("Reward", {}),
    "grpo": ("GRPO", {"beta": 0.04, "adam_epsilon": 1e-5, "use_bias_correction_kl": False, "shuffle_dataset": False}),
}  # fmt: skip
DEFAULTS, FAST = "trl, defaults", "trl, fast"


def twins(config: GPTConfig, end: int, mean_length: int, seed: int = 0):
    """The same random weights twice → (GPT, GPT2LMHeadModel), without dropout.

    Token `end` has a probability of about 1/mean_length everywhere, so that samples end at lengths like a
    trained model's: the bias of the final norm points along its embedding.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("transformers is not installed: `make parity` installs it and trl.") from None
    from test_models import from_gpt2

    torch.manual_seed(seed)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.context, n_embd=config.width, n_layer=config.layers,
        n_head=config.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
        eos_token_id=end,
    ))  # fmt: skip
    toward = theirs.transformer.wte.weight[end].detach()
    logit = math.log((config.vocab_size - 1) / (mean_length - 1))  # the others' are near 0
    theirs.transformer.ln_f.bias.data.copy_(logit * toward / toward.square().sum())
    ours = GPT(config)
    ours.load_state_dict(from_gpt2(theirs.base_model.state_dict()) | {"head.weight": theirs.lm_head.weight})
    return ours, theirs


class Clock:
    """Losses and gradient norms as they are logged; time and peak memory from step `warmup` to the last."""

    def __init__(self, given: dict):
        import torch._inductor.compile_fx  # noqa: F401  an import of either side, not memory of a step

        self.device, self.warmup, self.last = pick_device(given["device"]), given["warmup"], given["steps"]
        self.before, self.result = memory(self.device), {"losses": [], "norms": []}

    def log(self, loss: float, norm: float) -> None:
        self.result["losses"].append(loss)
        self.result["norms"].append(norm)

    def step(self, step: int) -> None:
        if self.device.type == "cuda" and step in (self.warmup, self.last):
            torch.cuda.synchronize()
        if step == self.warmup:
            forget_peak(self.device)
            self.start = time.perf_counter()
        elif step == self.last:
            self.result["seconds"] = time.perf_counter() - self.start
            self.result["mb"] = memory(self.device, peak=True) - self.before


class Enough(Exception):
    """The last step that counts is done."""


# -------------------------------------------------------------------------------------------- nanoalign


def nanoalign(stage: str, given: dict, folder: str) -> dict:
    """Run main of train_<stage>.py → the clock's result, the batches it drew, the responses it sampled."""
    script, draw, log = importlib.import_module(f"train_{stage}"), BatchOrder.__getitem__, cli.Metrics.log
    clock, batches, answers = Clock(given), [], []
    flags = {
        **given, **OURS[stage], "lr": 1e-4, "warmup": 0, "eval_every": 10**6, "save_every": 10**6,
        "init": f"{folder}/init.pt", "data": f"{folder}/data.jsonl", "prompts": f"{folder}/data.jsonl",
        "eval_data": f"{folder}/eval.jsonl", "out": f"{folder}/{stage}.pt",
    }  # fmt: skip
    if stage == "grpo":
        flags["batch_size"] = flags["minibatch"] = given["batch_size"] * given["group_size"]
        rollouts = script.rollouts

        def sampled(policy, tokenizer, prompts, **options):
            for indices, rollout in rollouts(policy, tokenizer, prompts, **options):
                answers.append([(prompts[i].tolist(), r) for i, r in zip(indices, rollout.responses())])
                yield indices, rollout

        script.rollouts = sampled

    def drawn(order, step):
        batches.append(draw(order, step).tolist())
        return draw(order, step)

    def logged(metrics, step, **values):
        values = log(metrics, step, **values)
        clock.log(values["loss"], values["grad_norm"])
        clock.step(step)
        if step == clock.last:
            raise Enough
        return values

    BatchOrder.__getitem__, cli.Metrics.log = drawn, logged
    known = {field.name for field in fields(script.Config)}
    with contextlib.suppress(Enough):
        script.main(script.Config(**{name: value for name, value in flags.items() if name in known}))
    return {**clock.result, "batches": batches, "answers": answers}


# -------------------------------------------------------------------------------------------------- trl


def words(tokenizer: Tokenizer):
    """A tokenizer of transformers to which a word is a token: "w5 w7 <end>" → [5, 7, end]."""
    import tokenizers
    import transformers

    names = {tokenizer.end: "<end>", tokenizer.pad: "<pad>"}
    vocabulary = {names.get(i, f"w{i}"): i for i in range(tokenizer.vocab_size)}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    split.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, eos_token="<end>", pad_token="<pad>"
    )


def columns(stage: str, folder: str, tokenizer: Tokenizer, batches: list, max_length: int) -> dict:
    """The rows of the batches, in their order, as the columns of trl's dataset."""
    path, order = f"{folder}/data.jsonl", [i for batch in batches for i in batch]
    spell = {tokenizer.end: "<end>"}

    def text(ids) -> str:
        return " ".join(spell.get(i, f"w{i}") for i in ids.tolist())

    def prompt(ids, mask) -> str:
        return text(ids[~mask]) + " "

    if stage == "sft":
        rows = [chat_examples(read_rows(path, "chat"), tokenizer, max_length)[i] for i in order]
        labels = [torch.where(torch.from_numpy(mask), torch.from_numpy(ids), -100).tolist() for ids, mask in rows]
        return {"input_ids": [ids.tolist() for ids, _ in rows], "labels": labels}
    if stage == "kto":  # trl joins x_i to y_{i−1}, nanoalign to y_{i+1}: the same pairs in reverse
        examples, rows = labelled_examples(read_rows(path, "labelled"), tokenizer, max_length)
        order = [i for batch in batches for i in reversed(batch)]
        picked = [examples[i] for i in order]
        return {
            "prompt": [prompt(*side) for side in picked], "completion": [text(ids[m]) for ids, m in picked],
            "label": [rows[i]["label"] for i in order],
        }  # fmt: skip
    pairs, _ = pair_examples(read_rows(path, "pairs"), tokenizer, max_length)
    picked = [pairs[i] for i in order]
    table = {"prompt": [prompt(*chosen) for chosen, _ in picked]}
    if stage != "grpo":
        for k, side in enumerate(("chosen", "rejected")):
            table[side] = [text(pair[k][0][pair[k][1]]) for pair in picked]
    return table


def trainer(stage: str, given: dict, folder: str, name: str, batches: list):
    """trl's trainer of these batches, with its defaults or its fast settings."""
    import datasets
    import trl
    import trl.experimental.orpo as experimental
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

    policy, tokenizer, _ = load_policy(f"{folder}/init.pt")
    (kind, options), on_cpu, hf = TRL[stage], pick_device(given["device"]).type == "cpu", f"{folder}/hf"
    options = options | ({"gradient_checkpointing": False} if name == FAST else {})
    more, data = {}, datasets.Dataset.from_dict(columns(stage, folder, tokenizer, batches, given["max_length"]))
    model = GPT2LMHeadModel.from_pretrained(hf) if stage not in ("rm", "grpo") else hf
    if stage == "rm":
        torch.manual_seed(0)  # as train_rm.py draws its head
        head = ScalarGPT.from_policy(load_policy(f"{folder}/init.pt")[0]).score.weight
        model = GPT2ForSequenceClassification.from_pretrained(hf, num_labels=1, pad_token_id=tokenizer.pad)
        model.score.weight.data.copy_(head.detach())
    if stage in ("dpo", "kto"):
        more["ref_model"] = GPT2LMHeadModel.from_pretrained(hf)
    if stage == "grpo":
        more["reward_funcs"] = lambda completion_ids, **_: [
            float(len(ids)) if ids[-1] == tokenizer.end else -1.0 for ids in completion_ids
        ]
        options |= {
            "num_generations": given["group_size"], "max_completion_length": given["max_new_tokens"],
            "model_init_kwargs": {"dtype": "float32"},
        }  # fmt: skip
    else:
        options["max_length"] = given["max_length"]
    home = experimental if stage == "orpo" else trl
    arguments = getattr(home, f"{kind}Config")(**{
        "output_dir": f"{folder}/trl", "use_cpu": on_cpu, "bf16": not on_cpu, "max_steps": given["steps"],
        "per_device_train_batch_size": given["batch_size"] * (given["group_size"] if stage == "grpo" else 1),
        "learning_rate": 1e-4, "lr_scheduler_type": "cosine_with_min_lr", "adam_beta2": 0.95,
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "train_sampling_strategy": "sequential",
        "logging_steps": given["log_every"], "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu, **options,
    })  # fmt: skip
    data = {"train_dataset": data, "processing_class": words(tokenizer)}
    return getattr(home, f"{kind}Trainer")(model=model, args=arguments, **data, **more)


def trl(stage: str, given: dict, folder: str, name: str, batches: list, answers: list) -> dict:
    """Run trl's trainer on those batches → the clock's result; `answers`: what GRPO is made to sample."""
    os.environ.update(CI="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from transformers import TrainerCallback

    peer = trainer(stage, given, folder, name, batches)
    clock, said = Clock(given), {}
    for prompt, response in (answer for step in answers for answer in step):
        said.setdefault(tuple(prompt), []).append(response)
    if said:
        G = given["group_size"]
        peer._generate_single_turn = lambda prompts, *_: ([said[tuple(p)][i % G] for i, p in enumerate(prompts)], None)

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            clock.step(state.global_step)

        def on_log(self, args, state, control, logs, **_):
            if "grad_norm" in logs:
                clock.log(logs["loss"], logs["grad_norm"])

    peer.add_callback(Look())
    peer.train()
    return clock.result


if __name__ == "__main__":
    spec = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        found = trl(**spec) if "name" in spec else nanoalign(**spec)
    print(json.dumps(found))
