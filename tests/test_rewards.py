"""What scores a response: each term by hand, sums of terms, and what cannot be scored."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from runs import write_lines

import train_grpo
from nanoalign import UserError
from nanoalign.checkpoint import load_policy, save
from nanoalign.data import read_prompts
from nanoalign.expressions import Term, parse_reward, parse_rewards, spelled_out
from nanoalign.generate import Rollout
from nanoalign.model import GPT, GPTConfig
from nanoalign.rewards import (
    load_function,
    make_reward,
    response_scores,
    reward_files,
    reward_models,
    score_texts,
)
from nanoalign.scalar import ScalarGPT
from nanoalign.tokenizer import get_tokenizer
from nanoalign.watch import OnPolicy, Watch, measure
from nanoalign.world.judge import judge


@dataclass
class Config:
    out: str = ""


ROOT = Path(__file__).parents[1]
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
    assert reward_models(f"judge + 0.5*{folder}/rm.3.pt") == [f"{folder}/rm.3.pt"]
    assert reward_files(f"min:{folder}/rm.[12].pt") == [f"{folder}/rm.{k}.pt" for k in (1, 2)]
    assert reward_files(f"mean:{folder}/rm.1.pt,{folder}/rm.2.pt") == [f"{folder}/rm.{k}.pt" for k in (1, 2)]
    assert reward_models("judge - 0.1*length") == []
    assert reward_files("judge - 0.1*length") == [str(ROOT / "nanoalign/world/verdicts.py")]  # code counts


def test_an_expression_is_parsed_once_into_weights_kinds_and_paths():
    terms = "0.5*a b/rm.pt - 2*judge + prm-min:p.pt", "min:x.pt,y.pt - -0.1*length + answer"
    assert parse_reward(f" {' - '.join(terms)} ") == [
        Term(0.5, "rm", "a b/rm.pt"),
        Term(-2.0, "function", "nanoalign/world/verdicts.py:utility"),
        Term(1.0, "prm-min", "p.pt"),
        Term(-1.0, "min", "x.pt,y.pt"),
        Term(0.1, "length", ""),
        Term(1.0, "answer", ""),
    ]  # fmt: skip


ODD = "my models (old) [v2] - first, tried"  # spaces, brackets, a sign between spaces, a comma


@pytest.mark.parametrize("folder", ["plain", ODD])
def test_what_is_scored_with_is_what_is_listed_whatever_stands_in_a_path(members, folder, monkeypatch):
    monkeypatch.chdir(members[0])
    each = members[1]
    Path(folder).mkdir()
    for k in (1, 2):
        Path(f"{folder}/rm {k}.pt").write_bytes(Path(f"rm.{k}.pt").read_bytes())
    Path(f"{folder}/rm 3.partial.pt").write_bytes(b"half of it")
    Path(f"{folder}/my reward.py").write_text(OWN)
    for expression, files, due in [
        (f"{folder}/rm 1.pt", ["rm 1.pt"], each[0]),
        (f"2*{folder}/rm 1.pt - {folder}/rm 2.pt", ["rm 1.pt", "rm 2.pt"], 2 * each[0] - each[1]),
        (f"min:{folder}/rm *.pt", ["rm 1.pt", "rm 2.pt"], each[:2].amin(0)),
        (f"min:{folder}/rm *.pt,{folder}/rm 2.pt", ["rm 1.pt", "rm 2.pt"], each[:2].amin(0)),
        (f"mean:{folder}/rm 2.pt,{folder}/rm 1.pt", ["rm 2.pt", "rm 1.pt"], each[:2].mean(0)),
        (f"-1*{folder}/my reward.py:brevity", ["my reward.py"], torch.tensor([1.0, 7.0, 4.0])),
    ]:
        listed = [os.path.relpath(file) for file in reward_files(expression)]
        assert listed == [f"{folder}/{file}" for file in files]
        assert reward_models(expression) == [file for file in listed if file.endswith(".pt")]
        torch.testing.assert_close(score(expression), due)
        reward = make_reward(expression, TOKENIZER, "cpu")
        assert ([*map(str, reward.files)], reward.models) == (
            reward_files(expression),
            listed[: len(reward.models)],
        )
        assert parse_rewards(f"judge, {expression}, {expression}, length") == [
            "judge", expression, expression, "length",
        ]  # fmt: skip
        assert spelled_out(expression) == spelled_out(expression.replace(folder, f"{members[0]}/./{folder}"))
        assert spelled_out(expression) != spelled_out(f"{expression} + length")


def test_an_ensemble_is_of_finished_checkpoints_each_of_them_once(members):
    folder, each = members
    (folder / "link.pt").symlink_to(folder / "rm.1.pt")
    torch.testing.assert_close(score(f"mean:{folder}/*.pt,{folder}/rm.2.pt"), each.mean(0))
    with pytest.raises(UserError, match="names 1 checkpoint"):
        score(f"min:{folder}/link.pt,{folder}/rm.1.pt")
    for names in (f"{folder}/none.*.pt", f"{folder}/rm.1.pt,", ",", f"{folder}/*.partial.pt"):
        with pytest.raises(UserError, match="no checkpoint matches"):
            score(f"mean:{names}")


def test_a_sign_or_a_comma_inside_any_brackets_belongs_to_what_is_handed_over():
    assert [term.path for term in parse_reward("f.py:g(a - (b + (c) - d) + e) - length")] == [
        "f.py:g(a - (b + (c) - d) + e)", "",
    ]  # fmt: skip
    assert parse_rewards("f.py:g(a, (b, c)), f.py:h(d)") == ["f.py:g(a, (b, c))", "f.py:h(d)"]
    assert parse_rewards("") == []


@pytest.mark.parametrize("expression", [
    *("nan*judge", "inf*judge", "1e999*judge", f"{'9' * 400}*judge", "1e39*judge", "-4e38*judge", "٣*judge"),
    *("judge + + length", "judge + - length", "+ judge", "judge +", "judge - ", " ", "+", "judge  length"),
    *("judge\nlength", "a\x1b[2J.pt", "f.py:g(\u2028)", "mean-1e400std:a.pt,b.pt", "mean-std:a.pt,b.pt"),
    *("*judge", "1**judge", "2*3*judge", "0x1*judge", "1_0*judge", ".pt:judge", "mean:", "prm-:a.pt"),
])  # fmt: skip
def test_an_expression_that_is_none_is_refused_in_one_sentence(expression):
    with pytest.raises(UserError) as caught:
        make_reward(expression, TOKENIZER, "cpu")
    assert str(caught.value).isprintable()


def test_weights_may_have_exponents():
    assert [term.weight for term in parse_reward("1e-2*length - 2.E+3*length + -.5*length")] == [
        0.01,
        -2e3,
        -0.5,
    ]


def test_rewards_of_one_name_are_watched_side_by_side(members, sft, world, monkeypatch):
    """--watch a/rm.pt, b/rm.pt: neither takes the place of the other, nor of the reward."""
    folder, _ = members
    names = []
    for place in ("a", "b"):
        (folder / place).mkdir()
        names.append(f"{folder}/{place}/rm.pt")
        Path(names[-1]).write_bytes((folder / "rm.1.pt").read_bytes())
    policy, _, _ = load_policy(sft)
    config = OnPolicy(watch=", ".join(["length", *names]), doctor="")
    watch = Watch(config, (policy, policy, TOKENIZER), ([], []), make_reward("judge", TOKENIZER, "cpu"), None)
    assert [*watch.asked[-1]] == ["reward", "length", "rm", names[1]]


# ------------------------------------------------------------------------------------ a reward of one's own

OWN = """
def brevity(rows, texts, ended):
    return [-float(len(text.split())) for text in texts]

def names(rows, texts, ended, word):
    assert all(row["prompt"] and row["meta"] for row in rows)
    return [float(word in text) for text in texts]

def finished(rows, texts, ended):
    return ended

def one_too_few(rows, texts, ended):
    return [0.0] * (len(texts) - 1)

def fails(rows, texts, ended):
    return {}["nothing"]

seven = 7
"""


@pytest.fixture
def own(tmp_path):
    """The path of a file of reward functions."""
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_a_function_in_a_file_is_a_reward_of_rows_texts_and_how_they_ended(own):
    assert score(f"{own}:brevity").tolist() == [-1, -7, -4]
    assert score(f"{own}:names(Paris)").tolist() == [1, 0, 1]
    assert score(f"{own}:finished", rollout(SAID, ended=(True, False, True))).tolist() == [1, 0, 1]
    mixed = score(f"10*{own}:names(it is Rome, or: Paris?) + 2*{own}:names(Rome) - 0.5*{own}:brevity")
    assert mixed.tolist() == [0.5, 2 + 3.5, 2]
    assert load_function(f"{own}:brevity")([], ["one two"], [True]) == [-2]


def test_a_function_is_found_from_here_or_from_the_root_and_lists_the_file_it_is_handed(
    own, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").touch()
    assert score("own.py:brevity").tolist() == [-1, -7, -4]
    assert reward_files("own.py:names(words.txt)") == [str(own), "words.txt"]
    assert reward_files("own.py:names(Paris)") == [str(own)]
    assert reward_files("judge") == [str(ROOT / "nanoalign/world/verdicts.py")]
    assert reward_models("own.py:names(rm.pt)") == []  # no such file: a text
    (tmp_path / "rm.pt").touch()
    assert reward_models("own.py:names(rm.pt)") == ["rm.pt"]


def test_a_sign_inside_a_functions_brackets_belongs_to_its_text():
    terms = parse_reward("f.py:g(a - b) - 0.5*rm (1).pt + length")
    assert terms == [(1, "function", "f.py:g(a - b)"), (-0.5, "rm", "rm (1).pt"), (1, "length", "")]


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("none.py:f", r"no Python file none\.py"),
        ("{own}:nothing", r"own\.py defines no function nothing"),
        ("{own}:seven", "defines no function seven"),
        ("{broken}:f", r"broken\.py cannot be loaded: ZeroDivisionError"),
        ("{leaves}:f", r"leaves\.py cannot be loaded: SystemExit"),
        ("{own}:fails", r"the reward .*own\.py:fails failed: KeyError: 'nothing'"),
        ("{own}:brevity(x)", "brevity.* failed: TypeError"),
        ("{own}:one_too_few", r"gave \(2,\) scores for 3 responses"),
    ],
)
def test_a_function_that_is_missing_or_fails_is_one_sentence(name, sentence, own):
    broken, leaves = own.with_name("broken.py"), own.with_name("leaves.py")
    broken.write_text("1 / 0")
    leaves.write_text("import sys; sys.exit(3)")
    with pytest.raises(UserError, match=sentence) as caught:
        score(name.format(own=own, broken=broken, leaves=leaves))
    assert "\n" not in str(caught.value)


def test_texts_are_scored_as_ended_unless_they_are_cut_short_or_said_not_to_be(own):
    def scores(max_length, **options):
        reward = make_reward(f"{own}:finished", TOKENIZER, "cpu")
        return score_texts(reward, ROWS, SAID, TOKENIZER, max_length, "cpu", **options).tolist()

    room = len(TOKENIZER.prompt(ROWS[0]["prompt"]))
    assert scores(64) == [1, 1, 1]
    assert scores(64, ended=[True, False, True]) == [1, 0, 1]
    assert scores(room + 1) == [0, 0, 0]
    assert all(value != value for value in scores(room))  # no room for an answer: NaN


# -------------------------------------------------------------------------------------------- other terms


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


def test_the_answer_reward_is_1_for_the_right_number_only():
    said = rollout(["3 + 4 = 7\nAnswer: 7", "Answer: 8", "It is 7"])
    for gold in (7, "7", "3 + 4 = 7\n#### 7"):
        rows = [{**ROWS[0], "meta": {"answer": gold}}] * 3
        assert score("answer", said, rows).tolist() == [1.0, 0.0, 0.0]
    for unknown in ({}, {"answer": [7]}, {"answer": True}, {"answer": "seven"}):
        with pytest.raises(UserError, match="final answer"):
            score("answer", said, [{**ROWS[0], "meta": unknown}] * 3)


def test_every_prompts_answer_is_read_before_the_first_step(tmp_path):
    problems = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(100)]
    problems[70]["answer"] = "seventy-one"
    for name in ("prompts", "eval_data"):
        files = {"prompts": problems[:50], "eval_data": problems[:50], name: problems}
        files = {flag: write_lines(tmp_path / f"{flag}.jsonl", lines) for flag, lines in files.items()}
        config = train_grpo.Config(reward="0.5*answer - length", eval_prompts=1000, **files)
        with pytest.raises(UserError, match=r"70 \+ 1.*seventy-one"):
            read_prompts(config, TOKENIZER, 64)
        assert read_prompts(replace(config, reward="length"), TOKENIZER, 64)


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
    torch.nn.init.constant_(model.score.weight, 3e38)  # finite itself, its sums are not
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
