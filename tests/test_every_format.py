"""Every place that reads or writes turns asks the tokenizer: the same holds in each chat format."""

import numpy as np
import pytest
import torch

from nanoalign.chat_formats import FORMATS
from nanoalign.data import chat_examples, labelled_examples, pair_examples
from nanoalign.feedback import choice_logprobs
from nanoalign.generate import Rollout
from nanoalign.model import GPT, GPTConfig
from nanoalign.steps import aggregate, step_ends, step_example, step_probabilities
from nanoalign.tokenizer import Tokenizer, world_encoding
from nanoalign.vocabulary import Vocabulary

TALK = [
    {"role": "user", "content": "Is 7 odd?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And 8? <|end|><|im_end|><|eot_id|>"},
]
SPELT = {  # the format of each, written down once more: what opens TALK's answer, and what ends it
    "nanoalign": ("<|assistant|>", "<|end|>"),
    "chatml": ("\n<|im_start|>assistant\n", "<|im_end|>"),
    "qwen3": ("\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
}


@pytest.fixture(scope="module", params=FORMATS)
def tokenizer(request) -> Tokenizer:
    return Tokenizer(Vocabulary(world_encoding()), request.param)


def scored(example, tokenizer) -> str:
    ids, mask = example
    return tokenizer.decode(ids[mask], specials=True)


def test_a_prompt_ends_in_what_opens_the_answer_and_what_is_learnt_begins_there(tokenizer):
    opening, end = SPELT[tokenizer.chat_format]
    prompt = tokenizer.prompt(TALK)
    assert tokenizer.decode(prompt, specials=True).endswith(end + opening)
    whole = [*TALK, {"role": "assistant", "content": "No."}]
    ((ids, mask),) = chat_examples([{"messages": whole}], tokenizer, 200)
    assert np.array_equal(ids[: len(prompt)], prompt) and mask[len(prompt) :].all()
    assert np.array_equal(ids[len(prompt) :], tokenizer.response("No."))
    lead = " " if tokenizer.chat_format == "nanoalign" else ""
    assert scored((ids, mask), tokenizer) == f"{lead}Yes.{end}{lead}No.{end}"


def test_of_pairs_and_thumbs_the_responses_are_scored_and_their_end_tokens(tokenizer):
    _, end = SPELT[tokenizer.chat_format]
    lead = " " if tokenizer.chat_format == "nanoalign" else ""
    row = {"prompt": TALK, "chosen": "No.", "rejected": "Yes, 8 is."}
    ((chosen, rejected),), _ = pair_examples([row], tokenizer, 200)
    assert scored(chosen, tokenizer) == f"{lead}No.{end}"
    assert scored(rejected, tokenizer) == f"{lead}Yes, 8 is.{end}"
    ((ids, mask),), _ = labelled_examples(
        [{"prompt": TALK, "completion": "No.", "label": True}], tokenizer, 200
    )
    assert scored((ids, mask), tokenizer) == f"{lead}No.{end}"
    assert np.array_equal(ids[: -int(mask.sum())], tokenizer.prompt(TALK))


def test_what_a_model_answers_is_read_as_it_was_taught(tokenizer):
    for text in ("No.", "12 + 5 = 17\nAnswer: 17", "a\n\nb"):
        assert tokenizer.decode_response(tokenizer.response(text)) == text


@torch.no_grad()
def test_steps_are_read_in_a_sample_where_they_were_taught(tokenizer):
    """A process model's labels stand at the tokens that its scores are read from."""
    steps = ["7 + 5 = 12", "12 - 4 = 8", "Answer: 8"]
    prompt = tokenizer.prompt(TALK)
    ids, marks, spans = step_example(prompt, steps, tokenizer, 200)
    assert [end for *_, end in spans] == np.flatnonzero(marks).tolist() and len(spans) == 3
    assert (ids[marks] == tokenizer.step).all() and not (ids[~marks] == tokenizer.step).any()
    for (_, start, end), step in zip(spans, steps):
        assert tokenizer.decode(ids[start:end]).strip() == step
    drawn = np.concatenate((prompt, tokenizer.response("\n".join(steps))))
    sample, mask = torch.tensor(drawn[None]), torch.arange(len(drawn))[None] >= len(prompt)
    assert (
        step_ends(sample, mask, tokenizer)[0].nonzero().flatten().tolist() == np.flatnonzero(marks).tolist()
    )

    class Model:
        def hidden(self, read):
            assert read[0].tolist() == ids.tolist()
            last = float(len(drawn) - 1)
            return torch.where(read == tokenizer.step, torch.arange(read.shape[1]) - last, 9.0)

        def score(self, hidden):
            return hidden

    p, ends = step_probabilities(Model(), Rollout(sample, mask, 0.0 * sample, mask[:, -1]), tokenizer)
    assert aggregate(p, ends, "last").item() == 0.5  # the end token's logit is 0
    assert aggregate(p, ends, "min").item() == pytest.approx(1 / (1 + np.exp(len(drawn) - 1 - spans[0][2])))


@torch.no_grad()
def test_a_judge_is_asked_for_the_letter_that_it_was_taught(tokenizer):
    """log P(A) and log P(B) are of the first token of the answers "A" and "B" behind the whole prompt."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, 128, 1, 16, 2))
    found = choice_logprobs(model, tokenizer, [TALK, TALK[:1]])
    for asked, two in zip([TALK, TALK[:1]], found):
        logp = model(torch.tensor(tokenizer.prompt(asked)[None]))[0, -1].log_softmax(-1)
        due = [logp[tokenizer.response(letter)[0]].item() for letter in "AB"]
        assert two.tolist() == pytest.approx(due, abs=1e-5)
        assert tokenizer.decode([tokenizer.response("A")[0]]).strip() == "A"
