"""Votes become labels; a reward model's votes are its probabilities; no vote of a person is ever lost."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import collect
from nanoalign import UserError, feedback, human, rewards
from nanoalign.checkpoint import save
from nanoalign.comparisons import calibration, report
from nanoalign.feedback import ask_for_judgement, choice_logprobs
from nanoalign.model import GPT, GPTConfig, ScalarGPT
from nanoalign.rows import read_rows, write_rows
from nanoalign.tokenizer import get_tokenizer
from nanoalign.world.judge import judge
from nanoalign.world.people import against_judge

ROOT = Path(__file__).parents[1]
TOKENIZER = get_tokenizer("world")
SMALL = GPTConfig(vocab_size=TOKENIZER.vocab_size, context=64, layers=1, width=16, heads=2)


def compared(count, votes=()):
    """Comparisons of "good {i}" and "bad {i}", with the same votes each: (annotator, p)."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "responses": [f"good {i}", f"bad {i}"],
            "ended": [True, True],
            "votes": [{"annotator": name, "p": p} for name, p in votes],
            "meta": {},
        }
        for i in range(count)
    ]


def by(comparisons, name):
    """That annotator's p of every comparison; "none" where it has not voted."""
    return [next((v["p"] for v in c["votes"] if v["annotator"] == name), "none") for c in comparisons]


# ------------------------------------------------------------------------------------- votes → labels


def decided(*votes, **flags):
    """The one pair made of a comparison with these votes: chosen, probability; None: it is left out."""
    named = [(f"a{i}", p) for i, p in enumerate(votes)]
    pairs = collect.decide(compared(1, named), collect.Config(**flags))
    return (pairs[0]["chosen"].split()[0], pairs[0].get("probability", 1)) if pairs else None


def test_most_votes_choose_and_their_share_is_the_probability():
    assert decided(1.0) == ("good", 1) and decided(0.0, 0.0) == ("bad", 1)
    assert decided(1.0, 1.0, 0.0) == ("good", 0.6667) and decided(0.0, 1.0, 0.0, 0.0) == ("bad", 0.75)
    assert decided(0.5, 1.0) == ("good", 0.75)  # half a vote each
    assert decided(0.3) == ("bad", 0.7)  # a reward model's
    assert decided(0.5)[1] == decided(1.0, 0.0)[1] == 0.5


def test_a_skipped_comparison_has_no_label_and_a_skip_beside_votes_does_not_count():
    assert decided() is None and decided(None) is None
    assert decided(None, 0.0) == ("bad", 1)


def test_low_agreement_is_left_out_and_hard_labels_have_no_ties():
    assert decided(1.0, 1.0, 0.0, min_agreement=0.7) is None
    assert decided(1.0, 1.0, 0.0, min_agreement=0.6) == ("good", 0.6667)
    assert decided(1.0, 0.0, min_agreement=0.51) is None and decided(1.0, 0.0, soft=False) is None
    assert decided(0.0, 1.0, 0.0, soft=False) == ("bad", 1)


def test_the_report_names_agreement_and_kappas_of_overlapping_votes(capsys):
    rows = compared(40)
    for i, c in enumerate(rows):  # the crosstable 20, 5, 10, 15 has kappa 0.4
        first = i < 20, i < 10 or 20 <= i < 24
        c["votes"] = [{"annotator": name, "p": float(p)} for name, p in zip(("ann", "bob"), first)]
    rows[0]["votes"].append({"annotator": "cy", "p": None})
    report(rows)
    out = capsys.readouterr().out
    observed, chance = 26 / 40, 0.5 * 14 / 40 + 0.5 * 26 / 40
    assert f"ann and bob agree on 65.0% of 40, Cohen's κ {(observed - chance) / (1 - chance):.2f}" in out
    assert "40 comparisons with several votes: two votes agree on 65.0%" in out
    assert re.search(r"^cy +0 +0 +– +–$", out, re.M) and "cy agree" not in out


def test_two_ties_agree_and_a_tie_and_a_winner_do_not(capsys):
    report(compared(2, [("ann", 0.5), ("bob", 0.5)]) + compared(2, [("ann", 0.5), ("bob", 1.0)]))
    out = capsys.readouterr().out
    assert "4 comparisons with several votes: two votes agree on 50.0%" in out
    assert re.search(r"^ann +4 +4 +– +–$", out, re.M)  # too few votes to say what sways somebody
    assert re.search(r"^bob +4 +2 +– +–$", out, re.M)


def test_the_report_finds_an_annotator_who_likes_what_is_long_and_one_who_likes_what_comes_first(capsys):
    rng, rows = np.random.default_rng(0), compared(3000)
    for c in rows:
        c["responses"] = ["word " * n for n in rng.integers(1, 30, 2)]
        tens = (len(c["responses"][0].split()) - len(c["responses"][1].split())) / 10
        swapped = bool(rng.random() < 0.5)
        for name, x in (("long", 0.7 * tens), ("first", -0.9 if swapped else 0.9)):
            p = float(rng.random() < 1 / (1 + np.exp(-x)))
            c["votes"].append({"annotator": name, "p": p, "swapped": swapped})
    report(rows)
    out = capsys.readouterr().out
    first, long = (
        [float(x) for x in re.search(rf"^{name} .*?([+-]\S+) ± \S+ +([+-]\S+) ± ", out, re.M).groups()]
        for name in ("first", "long")
    )
    assert first == pytest.approx([0.9, 0.0], abs=0.12) and long == pytest.approx([0.0, 0.7], abs=0.12)


# ------------------------------------------------------------------------------------- a reward model


@pytest.fixture
def rm(tmp_path):
    """A reward model with scores of its own, normalised by a standard deviation of 3; its path."""
    torch.manual_seed(0)
    model = ScalarGPT(SMALL)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    path = tmp_path / "rm.pt"
    extra = {"normalisation": {"mean": 0.0, "std": 3.0}}
    save(path, model, stage="rm", tokenizer=TOKENIZER, config=collect.Config(), step=1, **extra)
    return model, str(path)


def test_a_reward_models_vote_is_its_bradley_terry_probability_at_the_scale_of_training(rm):
    model, path = rm
    rows = compared(20)
    votes = collect.rm_votes(path, rows, torch.device("cpu"))
    for c, p in zip(rows, votes):
        a, b = (
            model(torch.from_numpy(np.append(TOKENIZER.prompt(c["prompt"]), TOKENIZER.response(text)))[None])
            for text in c["responses"]
        )
        assert p == pytest.approx(1 / (1 + np.exp(-3 * (a[0, -1] - b[0, -1]).item())), abs=1e-5)
    assert 0.01 < min(votes) < max(votes) < 0.99 and np.std(votes) > 0.01


def test_an_unfinished_response_loses_whatever_it_scores_and_two_of_a_kind_are_scored(rm):
    rows = [{**compared(1)[0], "ended": [a, b]} for a in (True, False) for b in (True, False)]
    both, lost, won, none = collect.rm_votes(rm[1], rows, torch.device("cpu"))
    assert (lost, won) == (1, 0) and both == none and 0 < both < 1


def test_a_prompt_too_long_for_the_reward_model_is_skipped(rm):
    rows = compared(2)
    rows[1]["prompt"][0]["content"] = "word " * 100
    kept, skipped = collect.rm_votes(rm[1], rows, torch.device("cpu"))
    assert kept is not None and skipped is None
    with pytest.raises(UserError, match="scores no response"):
        collect.rm_votes(rm[1], rows[1:], torch.device("cpu"))


def test_a_policy_is_sampled_and_a_reward_model_then_a_person_vote_on_the_same_pairs(
    rm, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(0)
    policy, out = str(tmp_path / "sft.pt"), str(tmp_path / "mine.jsonl")
    save(policy, GPT(SMALL), stage="sft", tokenizer=TOKENIZER, config=collect.Config(), step=1)
    prompts = [*(f"Hi {i}" for i in range(3)), "word " * 100]  # nothing of the world's; no room for the last
    write_rows(str(tmp_path / "p.jsonl"), [{"prompt": p, "meta": {"kind": "mine"}} for p in prompts])
    config = collect.Config(
        policy, str(tmp_path / "p.jsonl"), out, f"rm:{rm[1]}", samples=3, max_new_tokens=4
    )
    collect.main(config)
    assert "9 pairs of 3 prompts (0 more: alike)" in capsys.readouterr().out
    pairs = read_rows(out, "pairs")
    assert len(pairs) == 9 and all(0.5 <= pair["probability"] <= 1 for pair in pairs)
    assert pairs[0]["meta"] == {"kind": "mine", "annotators": [config.annotator]}

    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n" * 9))
    collect.main(collect.Config(out=out, annotator="human", resume=True))
    assert "9 comparisons with several votes" in capsys.readouterr().out
    both = read_rows(out, "pairs")
    assert [pair["prompt"] for pair in both] == [pair["prompt"] for pair in pairs]
    assert both[0]["meta"]["annotators"] == [config.annotator, "human"]
    collect.main(collect.Config(out=out, annotator=config.annotator, resume=True))  # has voted on all
    assert read_rows(out, "pairs") == both


# ------------------------------------------------------------------------------------- an AI

PRINCIPLES = ["Be kind.", "Be true.", "Be short."]


@pytest.fixture
def ai(tmp_path):
    """ai(bias) → a judge of random taste that adds `bias` to the logit of "A" whatever it reads; its path."""

    def ai(bias=0.0):
        torch.manual_seed(0)
        config = GPTConfig(TOKENIZER.vocab_size, 128, 2, 16, 2, norm="layernorm", tied=False)
        model = GPT(config)
        with torch.no_grad():
            for weight in (*model.blocks.parameters(), *model.embed.parameters(), model.head.weight):
                weight.normal_(std=1.5 if weight.dim() == 2 else 1.0)
            model.head.weight.mul_(0.2)
            model.norm.weight[0], model.norm.bias[0] = 0, 1  # so that the first feature is always 1
            model.head.weight[:, 0] = 0
            model.head.weight[TOKENIZER.encode(" A")[0], 0] = bias
        path = str(tmp_path / f"ai{bias}.pt")
        save(path, model, stage="sft", tokenizer=TOKENIZER, config=collect.Config(), step=1)
        return model, path

    return ai


def log_odds(model, c, principle, order):
    """ℓ(a, b) of one request, from all logits of one sequence: the softmax over the two answers by hand."""
    (question,), texts = c["prompt"], [c["responses"][i] for i in order]
    text = f"Which answer is better, A or B? {principle}\nQuestion: {question['content']}"
    text += f"\nA: {texts[0]}\nB: {texts[1]}"
    logits = model(torch.from_numpy(TOKENIZER.prompt([{"role": "user", "content": text}]))[None])[0, -1]
    p = logits.softmax(-1)[[TOKENIZER.encode(" A")[0], TOKENIZER.encode(" B")[0]]].double()
    p = p / p.sum()
    return (p[0].log() - p[1].log()).item()


def babble(count):
    """Comparisons of up to eight random words."""
    rng, rows = np.random.default_rng(0), compared(count)
    for c in rows:
        c["responses"] = [TOKENIZER.decode(rng.integers(300, 2000, rng.integers(1, 9))) for _ in "ab"]
    return rows


def test_an_ais_vote_is_the_softmax_over_the_two_answers_averaged_over_both_orders(ai):
    (model, path), rows = ai(), babble(30)
    votes = collect.ai_votes(path, rows, torch.device("cpu"), ["Be kind."], seed=0)
    for c, p in zip(rows, votes):
        odds = (log_odds(model, c, "Be kind.", (0, 1)) - log_odds(model, c, "Be kind.", (1, 0))) / 2
        assert p == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-5)
    assert np.std(votes) > 0.05


def test_averaging_both_orders_removes_a_planted_position_bias_exactly(ai, capsys):
    rows, none = babble(40), ai()
    fair = collect.ai_votes(none[1], rows, torch.device("cpu"), PRINCIPLES, seed=0)
    one_order = float(re.search(r"first: ([+-][\d.]+) in one order", capsys.readouterr().out)[1])
    for bias in (3.0, -3.0):
        model, path = ai(bias)
        biased = collect.ai_votes(path, rows, torch.device("cpu"), PRINCIPLES, seed=0)
        assert biased == pytest.approx(fair, abs=1e-5)
        out = capsys.readouterr().out
        before, after, error, torn = map(
            float,
            re.search(
                r"first: (\S+) in one order, (\S+) ± (\S+) over both; .* decides ([\d.]+)%", out
            ).groups(),
        )
        assert before == pytest.approx(one_order + bias, abs=0.011) and abs(after) < 4 * error + 0.01
        assert torn > 90  # in one order the bias decides nearly all
        shifted = log_odds(model, rows[0], PRINCIPLES[0], (0, 1)) - log_odds(
            none[0], rows[0], PRINCIPLES[0], (0, 1)
        )
        assert shifted == pytest.approx(bias, abs=1e-4)  # it is there


def test_the_names_of_the_answers_are_one_token_each_in_every_vocabulary(r50k):
    for tokenizer in (TOKENIZER, r50k):
        a, b = tokenizer.response("A"), tokenizer.response("B")
        assert len(a) == len(b) == 2 and a[0] != b[0] and a[1] == tokenizer.end
        assert [[a[0]], [b[0]]] == [tokenizer.encode(" A"), tokenizer.encode(" B")]


def test_requests_of_all_lengths_keep_their_order_whatever_the_batch(ai):
    model, asked = ai()[0], [ask_for_judgement(c["prompt"], *c["responses"], "Be kind.") for c in babble(20)]
    asked[4] = [{"role": "user", "content": "word " * 200}]
    one = choice_logprobs(model, TOKENIZER, asked)
    assert one.isnan().any(-1).nonzero().flatten().tolist() == [4]
    torch.testing.assert_close(choice_logprobs(model, TOKENIZER, asked, batch_size=3), one, equal_nan=True)
    assert choice_logprobs(model, TOKENIZER, asked[4:5]).isnan().all()


def test_judging_shows_how_far_it_is(ai, rm, monkeypatch):
    shown = []

    class Line:
        def __init__(self, what, total):
            shown.append([what, total, 0])

        def advance(self, count):
            shown[-1][2] += count

    for module in (feedback, rewards):
        monkeypatch.setattr(module, "Progress", Line)
    collect.ai_votes(ai()[1], compared(150), torch.device("cpu"), PRINCIPLES, seed=0)
    collect.rm_votes(rm[1], compared(150), torch.device("cpu"))
    assert shown == [["judge", 300, 300]] * 2


def test_a_principle_is_drawn_for_every_pair_and_both_orders_are_asked_by_it(monkeypatch, ai):
    asked, path = [], ai()[1]

    def choice_logprobs(model, tokenizer, requests):
        asked.append([messages[0]["content"] for (*messages,) in requests])
        return torch.zeros(len(requests), 2)

    monkeypatch.setattr(collect, "choice_logprobs", choice_logprobs)
    for seed in (0, 0, 1):
        collect.ai_votes(path, compared(60), torch.device("cpu"), PRINCIPLES, seed)
    drawn = [[re.search(r"B\? (.*)\n", text)[1] for text in texts] for texts in asked]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0][::2] == drawn[0][1::2]
    assert all(10 < drawn[0][::2].count(principle) < 30 for principle in PRINCIPLES)
    assert asked[0][0].endswith("\nA: good 0\nB: bad 0") and asked[0][1].endswith("\nA: bad 0\nB: good 0")


def test_an_unfinished_response_loses_to_a_finished_one_and_a_request_too_long_is_skipped(ai):
    path, rows = ai()[1], compared(4)
    rows[0]["ended"], rows[1]["ended"] = [False, True], [True, False]
    rows[2]["responses"][1] = "word " * 100
    votes = collect.ai_votes(path, rows, torch.device("cpu"), PRINCIPLES, seed=0)
    assert votes[:3] == [0, 1, None] and 0 < votes[3] < 1
    with pytest.raises(UserError, match="judges no pair"):
        collect.ai_votes(path, rows[2:3], torch.device("cpu"), PRINCIPLES, seed=0)


def test_a_judge_that_fails_loses_no_response(ai, tmp_path):
    path, out = ai()[1], str(tmp_path / "by_ai.jsonl")
    write_rows(str(tmp_path / "p.jsonl"), [{"prompt": f"Hi {i}"} for i in range(3)])
    flags = {"prompts": str(tmp_path / "p.jsonl"), "out": out, "max_new_tokens": 4}
    flags["constitution"] = str(ROOT / "constitution.txt")
    with pytest.raises(UserError, match="no checkpoint"):
        collect.main(collect.Config(path, annotator=f"ai:{tmp_path}/none.pt", **flags))
    sampled = [c["responses"] for c in read_rows(out.replace(".jsonl", ".votes.jsonl"), "compared")]
    collect.main(collect.Config(annotator=f"ai:{path}", resume=True, **flags))
    assert len(sampled) == 18
    assert [sorted((pair["chosen"], pair["rejected"])) for pair in read_rows(out, "pairs")] == [
        *map(sorted, sampled)
    ]


def test_an_ai_labels_the_pairs_of_any_prompts_softly_and_its_votes_stand_beside_others(ai, tmp_path, capsys):
    path, out = ai()[1], str(tmp_path / "by_ai.jsonl")
    write_rows(str(tmp_path / "p.jsonl"), [{"prompt": f"Hi {i}"} for i in range(3)])
    (tmp_path / "c.txt").write_text("Be kind.\n")
    flags = {"annotator": f"ai:{path}", "constitution": str(tmp_path / "c.txt")}
    config = collect.Config(path, str(tmp_path / "p.jsonl"), out, samples=3, max_new_tokens=4, **flags)
    collect.main(config)
    pairs = read_rows(out, "pairs")
    votes = by(read_rows(out.replace(".jsonl", ".votes.jsonl"), "compared"), config.annotator)
    assert len(pairs) == 9 and len({pair["probability"] for pair in pairs}) > 5
    assert [pair["probability"] for pair in pairs] == [round(max(p, 1 - p), 4) for p in votes]
    before = Path(out).read_bytes()
    collect.main(collect.Config(out=out, resume=True, **flags))  # it has voted on all
    assert Path(out).read_bytes() == before and "exact judge" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------- the labels' noise


def test_sureness_is_compared_with_the_share_that_is_right():
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    first = rng.random(200_000) < p
    bins = calibration(p, first)
    assert sum(count for *_, count in bins) == 200_000 and len(bins) == 5
    for k, (sure, share, _) in enumerate(bins):
        assert sure == pytest.approx(0.55 + 0.1 * k, abs=0.002) and share == pytest.approx(sure, abs=0.01)
    assert calibration(np.array([1.0, 0.0, 0.95]), np.array([True, True, False])) == [
        (pytest.approx((1 + 1 + 0.95) / 3), pytest.approx(1 / 3), 3)
    ]
    assert calibration(np.array([0.5, 0.5]), np.array([True, False])) == [(0.5, 0.5, 2)]


def test_labels_are_held_against_the_exact_judge_where_it_prefers_one(capsys):
    meta = {"kind": "fact", "relation": "capital", "subject": "France"}
    rows = compared(10, [("ai:x", 0.8)])
    for i, c in enumerate(rows):
        c["prompt"][0]["content"], c["meta"] = "What is the capital of France?", dict(meta)
        c["responses"] = ["Paris.", "Rome."] if i < 7 else ["Rome.", "Paris."]
    rows[7]["meta"] |= {"kind": "belief", "claimed": "Rome"}
    rows[8]["responses"], rows[8]["ended"] = ["Paris.", "Paris."], [False, True]  # the second is better
    rows[9]["responses"] = ["Rome.", "Berlin."]  # equally bad: says nothing
    assert judge(rows[8], "Paris.", False).utility < 1 == judge(rows[8], "Paris.").utility
    rows[0]["votes"] = [{"annotator": "ai:x", "p": 0.65}, {"annotator": "human", "p": 0.0}]
    rows[1]["votes"] = [{"annotator": "ai:x", "p": 0.5}]
    rows[2]["votes"] = [{"annotator": "ai:x", "p": None}]
    against_judge(rows, "ai:x")
    out = capsys.readouterr().out
    # of 8: right 0, 3 to 6; half right 1; wrong 7 and 8
    assert "ai:x: by the exact judge 68.8% of 8 labels are right (belief 0%, fact 79%)" in out
    assert "0.50 → 0.50 (1)  0.65 → 1.00 (1)  0.80 → 0.67 (6)   expected calibration error 0.144" in out
    against_judge(rows, "ai:y")
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------- a person


@pytest.fixture
def type_keys(monkeypatch):
    """type_keys(rows, keys, …) → annotate them with these lines as input; every saved state."""

    def type_keys(rows, keys, name="human", seed=0):
        states = []
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in keys.split())))
        human.annotate(rows, name, lambda: states.append(json.loads(json.dumps(rows))), seed)
        return states

    return type_keys


def test_a_key_says_which_of_the_shown_sides_is_better_and_the_order_is_recorded(type_keys, capsys):
    rows = compared(100)
    type_keys(rows, "1 2 " * 50)
    shown = re.findall(r"^(good|bad) (\d+) +│ (good|bad) \2", capsys.readouterr().out, re.M)
    assert len(shown) == 100
    for i, (c, (left, number, right)) in enumerate(zip(rows, shown)):
        (vote,) = c["votes"]
        assert int(number) == i and vote["swapped"] == (left == "bad") and left != right
        assert vote["p"] == float((left if i % 2 == 0 else right) == "good")
    swapped = [c["votes"][0]["swapped"] for c in rows]
    assert 30 < sum(swapped) < 70
    others = compared(100), compared(100)
    type_keys(others[0], "1 " * 100, seed=1), type_keys(others[1], "1 " * 100, name="human:ann")
    for other in others:  # drawn anew for another seed and for another person
        assert [c["votes"][0]["swapped"] for c in other] != swapped


def test_ties_and_skips_are_recorded_and_not_asked_again(type_keys, capsys):
    rows = compared(4)
    type_keys(rows, "t skip tie")
    assert by(rows, "human") == [0.5, None, 0.5, "none"]
    capsys.readouterr()
    type_keys(rows, "q")
    assert "4 of 4" in (out := capsys.readouterr().out) and "Question 3?" in out and "Question 1?" not in out


def test_every_key_is_saved_before_the_next_question(type_keys):
    states = type_keys(compared(3), "t u s t t u")
    counts = [sum(vote != "none" for vote in by(state, "human")) for state in states]
    assert counts == [1, 0, 1, 2, 3, 2]


def test_undo_takes_back_the_last_vote_also_of_an_earlier_session_and_only_ones_own(type_keys, capsys):
    rows = compared(3, [("human:ann", 1.0)])
    type_keys(rows, "t t")
    first = type_keys(rows, "u s u u u t")[0]  # back to the start, and no further
    assert by(first, "human") == [0.5, "none", "none"]  # it is saved too
    assert by(rows, "human") == [0.5, "none", "none"] and by(rows, "human:ann") == [1.0] * 3
    assert "no vote to take back" in capsys.readouterr().out


def test_the_last_vote_can_be_taken_back_too(type_keys, capsys):
    rows = compared(2)
    type_keys(rows, "t t u s")
    assert by(rows, "human") == [0.5, None]
    type_keys(rows, "u t")
    assert by(rows, "human") == [0.5, 0.5] and "all 2 comparisons have your vote" in capsys.readouterr().out


def test_an_undone_question_stands_in_the_same_order_again(type_keys, capsys):
    type_keys(compared(20), "1 u " * 10)
    shown = re.findall(r"^(good|bad) 0 ", capsys.readouterr().out, re.M)
    assert len(shown) == 11 and len(set(shown)) == 1


def test_other_keys_ask_again_and_change_nothing(type_keys, capsys):
    rows = compared(2)
    states = type_keys(rows, "3 10 left! q")
    assert states == [] and by(rows, "human") == ["none", "none"]
    assert capsys.readouterr().out.count("none of these keys") == 3


def test_ctrl_c_leaves_with_all_votes(monkeypatch):
    class Interrupted(io.StringIO):
        def readline(self):
            return super().readline() or signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "stdin", Interrupted("1\nt\n"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever a run before has put there
    rows, saved = compared(3), []
    human.annotate(rows, "human", lambda: saved.append(len(saved)))
    assert saved == [0, 1] and by(rows, "human")[1:] == [0.5, "none"]


def test_text_cannot_move_the_cursor_and_an_unfinished_response_is_marked(type_keys, capsys):
    rows = compared(1)
    rows[0]["responses"] = ["\x1b[2Jred\tapple\r\n\n  indented", "x" * 300]
    rows[0]["ended"] = [True, False]
    rows[0]["prompt"][0]["content"] = "clear\x1b[H\u202eme"
    type_keys(rows, "q")
    out = capsys.readouterr().out
    assert not set("\x1b\r\t\u202e") & set(out)
    assert "red" in out and "  indented" in out and out.count("[…]") == 1 and out.count("x") >= 300


def test_two_sessions_at_once_do_not_overwrite_each_others_votes(tmp_path, monkeypatch):
    out, record = str(tmp_path / "mine.jsonl"), str(tmp_path / "mine.votes.jsonl")
    write_rows(record, compared(3))

    class Meanwhile(io.StringIO):  # while the first person thinks, a second one votes
        def readline(self):
            monkeypatch.setattr(sys, "stdin", io.StringIO("t\nt\nt\n"))
            collect.main(collect.Config(out=out, annotator="human:ann", resume=True))
            return "t\n"

    monkeypatch.setattr(sys, "stdin", Meanwhile())
    with pytest.raises(UserError, match="changed by another run"):
        collect.main(collect.Config(out=out, annotator="human:bob", resume=True))
    assert by(read_rows(record, "compared"), "human:ann") == [0.5] * 3


def test_leaving_without_a_vote_is_no_mistake_and_writes_no_pairs(rm, tmp_path, monkeypatch, capsys):
    out, record = tmp_path / "mine.jsonl", tmp_path / "mine.votes.jsonl"
    write_rows(str(record), compared(3))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    collect.main(collect.Config(out=str(out), annotator="human", resume=True))
    assert not out.exists() and f"3 pairs wait in {record}: --resume" in capsys.readouterr().out
    write_rows(str(record), compared(3, [("human:ann", 0.5)]))
    with pytest.raises(UserError, match="no pair to write"):
        collect.main(collect.Config(out=str(out), annotator=f"rm:{rm[1]}", resume=True, min_agreement=1.0))


def test_without_a_standard_input_a_person_is_one_sentence_and_nobody_else_minds(tmp_path):
    out = f"{tmp_path}/x.jsonl"
    for who, said in (("human", "nobody to ask"), (f"rm:{tmp_path}/none.pt", "no checkpoint")):
        command = f"{sys.executable} collect.py --annotator {who} --policy {tmp_path}/none.pt --out {out} <&-"
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and said in done.stderr and done.stderr.startswith("error: ")


def test_a_killed_session_at_a_terminal_loses_no_key_and_the_next_one_goes_on(tmp_path, monkeypatch, capsys):
    """Keys without Enter through a pseudo-terminal; SIGKILL; then the rest line by line, with an undo."""
    out, record = str(tmp_path / "mine.jsonl"), str(tmp_path / "mine.votes.jsonl")
    write_rows(record, compared(6))
    command = ["collect.py", "--annotator", "human", "--resume", "--out", out]
    terminal, inner = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdin=inner, stdout=inner, stderr=inner
    )
    os.close(inner)
    screen = b""
    try:
        for asked, key in ((1, b"1"), (2, b"t"), (3, b"s"), (4, b"")):
            while f"Question {asked - 1}?".encode() not in screen or not screen.rstrip().endswith(b">"):
                assert select.select([terminal], [], [], 60)[0], screen  # it waits for more than a key
                screen += os.read(terminal, 4096)
            os.write(terminal, key)
            screen = screen if key == b"" else b""
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    before = read_rows(record, "compared")
    assert by(before, "human")[1:] == [0.5, None, "none", "none", "none"]

    monkeypatch.setattr(sys, "stdin", io.StringIO("u\n2\n1\n2\n1\n"))
    collect.main(collect.Config(out=out, annotator="human", resume=True))
    assert "Question 2?" in (printed := capsys.readouterr().out) and "Question 1?" not in printed
    after = read_rows(record, "compared")
    assert after[:2] == before[:2] and len(after) == 6
    keys = [1, 0.5, 0, 1, 0, 1]  # of the left side: what was typed in the end
    for c, key in zip(after, keys):
        (vote,) = c["votes"]
        assert vote["p"] == (1 - key if vote["swapped"] else key)
    pairs = read_rows(out, "pairs")
    assert len(pairs) == 6 and [pair.get("probability", 1) for pair in pairs] == [1, 0.5, 1, 1, 1, 1]
