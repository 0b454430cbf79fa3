"""Over a whole pipeline: what a model is evaluated on, neither it nor what it comes from was trained on."""

import importlib
import re

import pytest
import torch
from runs import WORLD

import collect
from nanoalign.model import GPT
from nanoalign.rows import read_rows
from nanoalign.watch import Watch

LOOKS = "evaluate", "respond", "sample_kl"  # what a script does with held-out rows
AFTER = {  # stage: what it comes from, and its flags in a pipeline of a few seconds
    "sft": ((), {"data": "{world}/sft.jsonl", "init": "{base}"}),
    "rm": (("sft",), {"data": "{tmp}/pairs.jsonl", "init": "{tmp}/sft.pt"}),
    "dpo": (("sft",), {"data": "{tmp}/pairs.jsonl", "init": "{tmp}/sft.pt", "max_new_tokens": 4}),
    "kto": (("sft",), {"data": "{tmp}/pairs.thumbs.jsonl", "init": "{tmp}/sft.pt"}),
    "orpo": ((), {"data": "{tmp}/pairs.jsonl", "init": "{base}"}),
    "prm": (("sft",), {"data": "{steps}", "init": "{tmp}/sft.pt"}),
    "ppo": (("sft", "rm"), {"init": "{tmp}/sft.pt", "reward": "{tmp}/rm.pt"}),
    "grpo": (("sft", "rm"), {"init": "{tmp}/sft.pt", "reward": "{tmp}/rm.pt", "group_size": 2}),
}
ON_POLICY = {
    "prompts": "{world}/prompts.jsonl", "watch": "", "doctor": "", "max_new_tokens": 4, "steps": 2,
    "epochs": 1,
}  # fmt: skip


class Reader:
    """Notes what is asked in every row that a model reads: while it learns, and while it is looked at."""

    def __init__(self, patch):
        self.patch, self.looking, read = patch, False, GPT.hidden

        def hidden(model, ids, *args, **more):
            if self.looking or (torch.is_grad_enabled() and model.embed.weight.requires_grad):
                text = WORLD.decode(ids.flatten(), specials=True)
                asked = re.findall(r"<\|user\|>([^<]+)<\|end\|>", text)
                (self.looked_at if self.looking else self.learnt).update(asked)
            return read(model, ids, *args, **more)

        patch.setattr(GPT, "hidden", hidden)

    def look(self, owner, name):
        function = getattr(owner, name)

        def looking(*args, **more):
            self.looking = True
            try:
                return function(*args, **more)
            finally:
                self.looking = False

        self.patch.setattr(owner, name, looking)

    def read(self, script, flags) -> tuple[set, set]:
        self.learnt, self.looked_at = set(), set()
        for name in LOOKS:
            if hasattr(script, name):
                self.look(script, name)
        script.main(script.Config(**flags))
        return self.learnt, self.looked_at


@pytest.fixture(scope="module")
def pipeline(world, base, steps_file, tmp_path_factory):
    """{stage: (what it learnt from, what it was looked at with)}, each run over all of its rows."""
    folder, found = tmp_path_factory.mktemp("pipeline"), {}
    paths = {"world": world, "base": base, "steps": steps_file, "tmp": folder}
    with pytest.MonkeyPatch.context() as patch:
        reader = Reader(patch)
        reader.look(Watch, "look")
        for stage, (_, flags) in AFTER.items():
            flags = {"micro_batch": 64, **flags, **(ON_POLICY if "reward" in flags else {"batch_size": 32})}
            flags = {name: x.format(**paths) if isinstance(x, str) else x for name, x in flags.items()}
            if stage == "grpo":
                flags |= {"batch_size": 120, "minibatch": 120}
            script, out = importlib.import_module(f"train_{stage}"), {"out": f"{folder}/{stage}.pt"}
            found[stage] = reader.read(script, {**flags, **out, "log_every": 99, "eval_every": 99})
            if stage == "sft":
                files = {"policy": out["out"], "prompts": f"{world}/prompts.jsonl"}
                files["out"] = f"{folder}/pairs.jsonl"
                collect.main(collect.Config(**files, samples=2, max_new_tokens=8))
    return found


def questions(world, name):
    return {row["prompt"][-1]["content"] for row in read_rows(f"{world}/{name}.jsonl", "prompts")}


def said(asked):
    return {text.strip() for text in asked}


@pytest.mark.parametrize("stage", AFTER)
def test_no_model_is_looked_at_with_a_prompt_that_it_or_what_it_comes_from_learnt_from(pipeline, stage):
    learnt, looked_at = pipeline[stage]
    assert len(learnt) > 50 and looked_at
    for before in (stage, *AFTER[stage][0]):
        assert not looked_at & pipeline[before][0], before


def test_between_them_the_two_sides_are_all_the_prompts_there_are(pipeline, world):
    for stage in ("ppo", "grpo"):
        learnt, looked_at = map(said, pipeline[stage])
        assert learnt | looked_at == questions(world, "prompts") and len(looked_at) >= 3


def test_the_worlds_own_test_is_of_prompts_that_no_stage_has_learnt_from(pipeline, world):
    test = questions(world, "prompts_held_out") | questions(world, "problems_held_out")
    assert len(test) > 50 and not any(said(learnt) & test for learnt, _ in pipeline.values())
