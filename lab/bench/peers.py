"""One training script and its peer in trl, run on the same weights, rows and batches. For lab/bench/train.py.

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
from importlib.util import find_spec

import torch

from lab.bench.timing import forget_peak, memory
from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import BatchOrder, chat_examples, labelled_examples, pair_examples
from nanoalign.model import GPT, GPTConfig
from nanoalign.rows import read_rows
from nanoalign.scalar import ScalarGPT
from nanoalign.tokenizer import Tokenizer, get_tokenizer
from nanoalign.training import pick_device

GRPO = {"kind": "dapo", "clip_high": 0.2, "kl": "k3", "beta": 0.04, "epochs": 1}  # trl's defaults, and a KL
OURS = {  # flags in which the scripts' defaults are not trl's
    "sft": {"adam_eps": 1e-8}, "dpo": {}, "kto": {}, "orpo": {"adam_eps": 1e-8},
    "rm": {"centering": 0.0, "reader": False},
    "grpo": {**GRPO, "reward": "length", "eval_prompts": 1},
}  # fmt: skip
KINDS = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "orpo": "ORPO", "rm": "Reward", "grpo": "GRPO"}
TRL = {  # the same in trl's names
    "sft": {}, "dpo": {"beta": 0.1}, "kto": {"beta": 0.1}, "orpo": {"beta": 0.1}, "rm": {},
    "grpo": {"beta": 0.04, "adam_epsilon": 1e-5, "use_bias_correction_kl": False, "shuffle_dataset": False},
}  # fmt: skip
PEERS = ("trl, defaults", "trl, fast", "trl, fast, bf16")  # the last is for a CPU: a GPU's are all in bf16


def fast(stage: str, on_cpu: bool) -> dict:
    """trl's settings that cost memory, or need more than a CPU, and save time, as far as they run here.

    DPO's padding_free is "temporarily unavailable" in trl 1.16, KTO, ORPO and rewards have none; the chunked
    loss is the default of all but ORPO. On a CPU torch_compile compiles anew for nearly every shape.
    """
    options = {"gradient_checkpointing": False}
    if stage == "sft":  # needs truncated rows, which these are
        options |= {"padding_free": True, "max_length": None}
    if stage == "grpo":
        options |= {"cache_implementation": "static"}
    if not on_cpu:
        options |= {"torch_compile": True, "use_liger_kernel": find_spec("liger_kernel") is not None}
    return options


def from_gpt2(theirs: dict) -> dict:
    """A state dict of transformers' GPT-2 → the same weights under the names of nanoalign's GPT."""
    names = {"ln_1": "attention_norm", "ln_2": "mlp_norm"}
    names |= {"attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out"}
    names |= {"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    ours = {"embed.weight": theirs["wte.weight"], "position.weight": theirs["wpe.weight"]}
    ours |= {f"norm.{kind}": theirs[f"ln_f.{kind}"] for kind in ("weight", "bias")}
    for name, value in theirs.items():
        if name.startswith("h."):
            _, layer, rest = name.split(".", 2)
            module, kind = rest.rsplit(".", 1)
            value = value.T if value.dim() == 2 else value  # Conv1D stores (in, out)
            ours[f"blocks.{layer}.{names[module]}.{kind}"] = value
    return ours


def twins(config: GPTConfig, end: int, mean_length: int, seed: int = 0):
    """The same random weights twice → (GPT, GPT2LMHeadModel), without dropout.

    Token `end` has a probability of about 1/mean_length everywhere, so that samples end at lengths like a
    trained model's: the bias of the final norm points along its embedding.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("transformers is not installed: `make parity` installs it and trl.") from None

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


def run_script(stage: str, given: dict, folder: str) -> dict:
    """Run main of train_<stage>.py → the clock's result, the batches it drew, the responses it sampled."""
    script, draw, log = importlib.import_module(f"train_{stage}"), BatchOrder.__getitem__, cli.Metrics.log
    clock, batches, answers = Clock(given), {}, []  # batches: by step, which reads its own more than once
    flags = {
        **given, **OURS[stage], "lr": 1e-4, "warmup": 0, "eval_every": 10**6, "save_every": 10**6,
        "init": f"{folder}/init.pt", "data": f"{folder}/data.jsonl", "prompts": f"{folder}/data.jsonl",
        "eval_data": f"{folder}/eval.jsonl", "out": f"{folder}/{stage}.pt",
    }  # fmt: skip
    if stage == "grpo":
        flags["batch_size"] = flags["minibatch"] = given["batch_size"] * given["group_size"]
        rollout = script.rollout

        def sampled(policy, tokenizer, prompts, **options):
            drawn = rollout(policy, tokenizer, prompts, **options)
            asked = [prompt.tolist() for prompt in prompts]
            answers.append(list(zip(asked, drawn.responses())))
            return drawn

        script.rollout = sampled

    def drawn(order, step):
        indices = draw(order, step)
        batches[step] = indices.tolist()
        return indices

    def logged(metrics, step, *optional, **values):
        values = log(metrics, step, *optional, **values)
        clock.log(values["loss"], values["grad_norm"])
        clock.step(step)
        if step == clock.last:
            raise Enough
        return values

    BatchOrder.__getitem__, cli.Metrics.log = drawn, logged
    known = {field.name for field in fields(script.Config)}
    with contextlib.suppress(Enough):
        script.main(script.Config(**{name: value for name, value in flags.items() if name in known}))
    sampled = [[(len(prompt), len(response)) for prompt, response in step] for step in answers]
    return {**clock.result, "batches": [*batches.values()], "answers": answers, "sampled": sampled}


# -------------------------------------------------------------------------------------------------- trl


def words(tokenizer: Tokenizer):
    """A tokenizer of transformers to which a word is a token: "w5 w7 <end>" → [5, 7, end]."""
    import tokenizers
    import transformers

    names = {tokenizer.end: "<end>", tokenizer.pad: "<pad>"}
    vocabulary = {names.get(i, f"w{i}"): i for i in range(tokenizer.vocab_size)}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    split.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=split, eos_token="<end>", pad_token="<pad>")


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
        labels = [
            torch.where(torch.from_numpy(mask), torch.from_numpy(ids), -100).tolist() for ids, mask in rows
        ]
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


def arguments(stage: str, given: dict, folder: str, name: str, on_cpu: bool) -> dict:
    """What trl's config is given: the script's optimiser and schedule, and `name`'s settings."""
    options = dict(TRL[stage])
    if stage == "grpo":
        options |= {"num_generations": given["group_size"], "max_completion_length": given["max_new_tokens"]}
        options |= {"model_init_kwargs": {"dtype": "float32"}}
    else:
        options |= {"max_length": given["max_length"]}
    return {
        "output_dir": f"{folder}/trl", "use_cpu": on_cpu, "bf16": not on_cpu or "bf16" in name,
        "per_device_train_batch_size": given["batch_size"] * (given["group_size"] if stage == "grpo" else 1),
        "max_steps": given["steps"], "learning_rate": 1e-4, "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95, "save_strategy": "no", "report_to": "none",
        "train_sampling_strategy": "sequential", "logging_steps": given["log_every"], "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu, **options, **(fast(stage, on_cpu) if "fast" in name else {}),
    }  # fmt: skip


def run_trl(stage: str, given: dict, folder: str, name: str, batches: list, answers: list) -> dict:
    """Run trl's trainer on those batches → the clock's result; `answers`: what GRPO is made to sample."""
    os.environ.update(CI="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import datasets
    import trl
    import trl.experimental.orpo
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, TrainerCallback

    home, kind = trl.experimental.orpo if stage == "orpo" else trl, KINDS[stage]
    Config, Trainer = getattr(home, f"{kind}Config"), getattr(home, f"{kind}Trainer")
    clock, on_cpu, hf = Clock(given), pick_device(given["device"]).type == "cpu", f"{folder}/hf"

    tokenizer = get_tokenizer("gpt2")
    model, more = hf if stage == "grpo" else GPT2LMHeadModel.from_pretrained(hf), {}
    if stage == "rm":
        torch.manual_seed(0)  # as train_rm.py draws its head
        head = ScalarGPT.from_policy(load_policy(f"{folder}/init.pt")[0]).score.weight
        model = GPT2ForSequenceClassification.from_pretrained(hf, num_labels=1, pad_token_id=tokenizer.pad)
        model.score.weight.data.copy_(head.detach())
    if stage in ("dpo", "kto"):
        more["ref_model"] = GPT2LMHeadModel.from_pretrained(hf)
    sampled, said = [], {}

    def length(prompts, completion_ids, **_):  # nanoalign's reward `length`, with its --missing-eos-score
        asked = [len(prompt.split()) for prompt in prompts]
        sampled.append([(n, len(ids)) for n, ids in zip(asked, completion_ids)])
        return [float(len(ids)) if ids[-1] == tokenizer.end else -1.0 for ids in completion_ids]

    if stage == "grpo":
        more["reward_funcs"] = length
    data = datasets.Dataset.from_dict(columns(stage, folder, tokenizer, batches, given["max_length"]))
    args = Config(**arguments(stage, given, folder, name, on_cpu))
    peer = Trainer(model=model, args=args, train_dataset=data, processing_class=words(tokenizer), **more)
    for prompt, response in (answer for step in answers for answer in step):
        said.setdefault(tuple(prompt), []).append(response)

    def repeat(prompts, *_):  # the sampler puts a prompt's responses next to each other
        return [said[tuple(prompt)][i % given["group_size"]] for i, prompt in enumerate(prompts)], None

    if said:
        peer._generate_single_turn = repeat

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            clock.step(state.global_step)

        def on_log(self, args, state, control, logs, **_):
            if "grad_norm" in logs:
                clock.log(logs["loss"], logs["grad_norm"])

    peer.add_callback(Look())
    peer.train()
    return {**clock.result, "sampled": sampled}


if __name__ == "__main__":
    spec = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        found = run_trl(**spec) if "name" in spec else run_script(**spec)
    print(json.dumps(found))
