"""What scores a response: each term by hand, sums of terms, and what cannot be scored."""

import pytest
import torch

from nanoalign import UserError
from nanoalign.checkpoint import save
from nanoalign.generate import Rollout
from nanoalign.model import GPT, GPTConfig, ScalarGPT
from nanoalign.rewards import final_answer, make_reward, measure, response_scores, reward_files
from nanoalign.tokenizer import get_tokenizer
from nanoalign.world.judge import judge
from train_rm import Config

TOKENIZER = get_tokenizer("world")
SMALL = GPTConfig(vocab_size=TOKENIZER.vocab_size, context=64, layers=1, width=16, heads=2)
CAPITAL = {"kind": "fact", "relation": "capital", "subject": "France"}
ROWS = [{"prompt": [{"role": "user", "content": "What is the capital of France?"}], "meta": CAPITAL}] * 3


def rollout(texts: list[str], ended=(True, True, True)) -> Rollout:
    prompt = TOKENIZER.prompt(ROWS[0]["prompt"]).tolist()
    rows = [
        [*prompt, *TOKENIZER.response(text).tolist()[: None if end else -1]]
        for text, end in zip(texts, ended)
    ]
    T = max(map(len, rows))
    ids = torch.tensor([row + [TOKENIZER.pad] * (T - len(row)) for row in rows])
    mask = torch.tensor([[len(prompt) <= t < len(row) for t in range(T)] for row in rows])
    return Rollout(ids, mask, torch.zeros(ids.shape), torch.tensor(ended))


SAID = ["Paris.", "It is Rome, I hope this helps!", "Paris. Paris. Paris. Paris."]


@pytest.fixture
def members(tmp_path):
    """Three reward models, and what each thinks of SAID."""
    said, scores = rollout(SAID), []
    for k in range(1, 4):
        torch.manual_seed(k)
        model = ScalarGPT(SMALL)
        save(tmp_path / f"rm.{k}.pt", model, stage="rm", tokenizer=TOKENIZER, config=Config(), step=1)
        scores.append(response_scores(model, said.ids, said.mask).detach())
    save(tmp_path / "rm.1.partial.pt", model, stage="rm", tokenizer=TOKENIZER, config=Config(), step=1)
    return tmp_path, torch.stack(scores)


def score(expression: str, said=None, rows=ROWS) -> torch.Tensor:
    return make_reward(expression, TOKENIZER, "cpu")(rows, said or rollout(SAID))


def test_a_reward_model_and_ensembles_of_them(members):
    folder, each = members
    torch.testing.assert_close(score(f"{folder}/rm.2.pt"), each[1])
    torch.testing.assert_close(score(f"mean:{folder}/rm.*.pt"), each.mean(0))
    torch.testing.assert_close(score(f"min:{folder}/rm.*.pt"), each.min(0).values)
    torch.testing.assert_close(score(f"mean-1.5std:{folder}/rm.*.pt"), each.mean(0) - 1.5 * each.std(0))
    two = f"{folder}/rm.1.pt,{folder}/rm.3.pt"
    torch.testing.assert_close(score(f"min:{two}"), each[[0, 2]].min(0).values)


def test_the_files_of_an_expression_are_found(members):
    folder, _ = members
    assert reward_files(f"{folder}/rm.2.pt - 0.02*length") == [f"{folder}/rm.2.pt"]
    assert reward_files(f"judge + 0.5*{folder}/rm.3.pt") == [f"{folder}/rm.3.pt"]
    assert reward_files(f"min:{folder}/rm.[12].pt") == [f"{folder}/rm.{k}.pt" for k in (1, 2)]
    assert reward_files(f"mean:{folder}/rm.1.pt,{folder}/rm.2.pt") == [f"{folder}/rm.{k}.pt" for k in (1, 2)]
    assert reward_files("judge - 0.1*length") == []


def test_the_judge_is_the_worlds_own():
    said = rollout(SAID, ended=(True, True, False))
    expected = [judge(ROWS[0], text, end).utility for text, end in zip(SAID, (True, True, False))]
    assert score("judge", said).tolist() == pytest.approx(expected)


def test_a_sum_weighs_its_terms_and_length_counts_response_tokens(members):
    folder, each = members
    said = rollout(SAID)
    length = torch.tensor([len(TOKENIZER.response(text)) for text in SAID])
    assert score("length").tolist() == length.tolist()
    expected = 0.5 * each[0] - 0.02 * length + 2 * score("judge")
    torch.testing.assert_close(score(f"0.5*{folder}/rm.1.pt - 0.02*length + 2*judge", said), expected)


@pytest.mark.parametrize(
    "text, number",
    [
        ("2 + 3 = 5\nAnswer: 5", 5),
        ("so\n#### 1,234", 1234),
        ("#### $18", 18),
        ("#### -7", -7),
        ("Answer: 2.50", 2.5),
        ("Answer: 6.", 6),
        ("Answer: 5\nAnswer: 6", 6),
        ("The answer is 5", None),
        ("Answer: none", None),
        ("", None),
    ],
)
def test_final_answers_are_read_as_people_write_them(text, number):
    assert final_answer(text) == number


def test_the_answer_reward_is_1_for_the_right_number_only():
    said = rollout(["3 + 4 = 7\nAnswer: 7", "Answer: 8", "It is 7"])
    for gold in (7, "7", "3 + 4 = 7\n#### 7"):
        rows = [{**ROWS[0], "meta": {"answer": gold}}] * 3
        assert score("answer", said, rows).tolist() == [1.0, 0.0, 0.0]
    for unknown in ({}, {"answer": [7]}, {"answer": True}, {"answer": "seven"}):
        with pytest.raises(UserError, match="final answer"):
            score("answer", said, [{**ROWS[0], "meta": unknown}] * 3)


@pytest.mark.parametrize(
    "expression", ["nobody", "0.5*nobody", "judge + nobody", "", "max:a.pt", "judge+length"]
)
def test_an_unknown_reward_is_an_error_that_lists_the_known_ones(expression):
    with pytest.raises(UserError, match="there is no reward"):
        make_reward(expression, TOKENIZER, "cpu")


def test_what_cannot_score_these_responses_says_so(members):
    folder, _ = members
    with pytest.raises(UserError, match="two or more"):
        make_reward(f"min:{folder}/rm.1.pt", TOKENIZER, "cpu")
    with pytest.raises(UserError, match="no checkpoint"):
        make_reward(f"{folder}/nothing.pt", TOKENIZER, "cpu")
    with pytest.raises(UserError, match="meta"):
        score("judge", rows=[{**ROWS[0], "meta": {}}] * 3)
    policy = GPT(SMALL)
    save(folder / "sft.pt", policy, stage="sft", tokenizer=TOKENIZER, config=Config(), step=1)
    with pytest.raises(UserError, match="'sft' checkpoint; expected 'rm'"):
        make_reward(f"{folder}/sft.pt", TOKENIZER, "cpu")


def test_another_tokenizer_is_an_error(members, r50k):
    with pytest.raises(UserError, match=r"'world'.*'r50k_base'"):
        make_reward(f"{members[0]}/rm.1.pt", r50k, "cpu")


def test_scores_that_are_not_numbers_stop_the_run(members):
    folder, _ = members
    model = ScalarGPT(SMALL)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    save(folder / "nan.pt", model, stage="rm", tokenizer=TOKENIZER, config=Config(), step=1)
    with pytest.raises(UserError, match="not a finite number for 3 of 3"):
        score(f"{folder}/nan.pt")


def test_a_policy_is_measured_on_its_own_samples():
    torch.manual_seed(0)
    policy, prompts = GPT(SMALL), [TOKENIZER.prompt(ROWS[0]["prompt"])] * 3
    rewards = {"score": make_reward("length", TOKENIZER, "cpu")}
    means, texts, scores = measure(
        policy, policy, TOKENIZER, ROWS, prompts, rewards, max_new_tokens=5, seed=0, temperature=0.7
    )
    assert means["kl"] == pytest.approx(0, abs=1e-5) and means["score"] == means["length"] == sum(scores) / 3
    assert 1 <= means["length"] <= 5 and len(texts) == 3
