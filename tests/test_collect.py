"""Votes become labels; a reward model's votes are its probabilities, an AI's have no position bias."""

import math
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import by, compared

import collect
from nanoalign import UserError, feedback, rewards
from nanoalign.checkpoint import save
from nanoalign.feedback import ai_votes, ask_for_judgement, choice_logprobs
from nanoalign.model import GPT, GPTConfig
from nanoalign.rows import read_rows, write_rows
from nanoalign.scalar import ScalarGPT
from nanoalign.tokenizer import get_tokenizer

ROOT = Path(__file__).parents[1]
TOKENIZER = get_tokenizer("world")
SMALL = GPTConfig(vocab_size=TOKENIZER.vocab_size, context=64, layers=1, width=16, heads=2)


# ------------------------------------------------------------------------------------- votes → labels


def decided(*votes, **flags):
    """The one pair made of a comparison with these votes: chosen, probability; None: it is left out."""
    named = [(f"a{i}", p) for i, p in enumerate(votes)]
    pairs = collect.decide(compared(1, named), **flags)
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
    assert 0.01 < min(votes) < max(votes) < 0.99 and np.std(votes) > 0.005  # and not all alike


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


def test_a_policy_is_sampled_and_a_reward_model_then_a_person_vote_on_the_same_pairs(rm, tmp_path, capsys):
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

    record = out.replace(".jsonl", ".votes.jsonl")
    voted = read_rows(record, "compared")
    for c in voted:
        c["votes"].insert(0, {"annotator": "human", "p": 1.0, "swapped": True})
        del c["votes"][1:]
    write_rows(record, voted)
    collect.main(collect.Config(out=out, annotator=config.annotator, resume=True))
    both = read_rows(out, "pairs")
    assert [pair["prompt"] for pair in both] == [pair["prompt"] for pair in pairs]
    assert both[0]["meta"]["annotators"] == ["human", config.annotator]
    collect.main(collect.Config(out=out, annotator=config.annotator, resume=True))  # has voted on all
    assert read_rows(out, "pairs") == both


def test_a_persons_vote_given_while_a_model_votes_is_not_lost(rm, tmp_path, monkeypatch):
    out, record = str(tmp_path / "mine.jsonl"), str(tmp_path / "mine.votes.jsonl")
    write_rows(record, compared(3))
    original = collect.rm_votes

    def meanwhile(*args):
        write_rows(record, compared(3, [("human", 0.5)]))
        return original(*args)

    monkeypatch.setattr(collect, "rm_votes", meanwhile)
    with pytest.raises(UserError, match="changed by another run"):
        collect.main(collect.Config(out=out, annotator=f"rm:{rm[1]}", resume=True))
    assert by(read_rows(record, "compared"), "human") == [0.5] * 3 and not Path(out).exists()


def test_where_no_vote_decides_nothing_is_written(rm, tmp_path):
    out, record = str(tmp_path / "mine.jsonl"), str(tmp_path / "mine.votes.jsonl")
    write_rows(record, compared(3, [("human:ann", 0.5)]))
    with pytest.raises(UserError, match="no pair to write"):
        collect.main(collect.Config(out=out, annotator=f"rm:{rm[1]}", resume=True, min_agreement=1.0))
    assert not Path(out).exists()


# ------------------------------------------------------------------------------------- a function


@pytest.fixture
def mine(tmp_path):
    """mine(annotator, …) → run on three prompts by a policy of random words; the path of the pairs."""
    torch.manual_seed(0)
    policy, prompts = str(tmp_path / "sft.pt"), str(tmp_path / "p.jsonl")
    save(policy, GPT(SMALL), stage="sft", tokenizer=TOKENIZER, config=collect.Config(), step=1)
    write_rows(prompts, [{"prompt": f"Hi {i}", "meta": {"kind": "mine"}} for i in range(3)])

    def mine(annotator, **flags):
        out = str(tmp_path / "mine.jsonl")
        flags = {"samples": 3, "max_new_tokens": 4, **flags}
        collect.main(collect.Config(policy, prompts, out, annotator, **flags))
        return out

    return mine


def function(tmp_path, body):
    """An annotator of that body, in a file; its name."""
    (tmp_path / "own.py").write_text(f"def own(rows, drawn, pairs, flags):\n{body}\n")
    return f"{tmp_path}/own.py:own"


def test_the_annotator_of_the_docstring_votes_for_what_is_shorter(mine, tmp_path):
    example = collect.__doc__[collect.__doc__.index("    def shorter") :].split("\n\n")[0]
    (tmp_path / "own.py").write_text(textwrap.dedent(example))
    out = mine(f"{tmp_path}/own.py:shorter")
    compared = read_rows(out.replace(".jsonl", ".votes.jsonl"), "compared")
    assert len(compared) == 9 and {v["annotator"] for c in compared for v in c["votes"]} == {"shorter"}
    for pair in read_rows(out, "pairs"):
        assert len(pair["chosen"]) <= len(pair["rejected"]) and pair["meta"]["kind"] == "mine"
    assert not (tmp_path / "mine.thumbs.jsonl").exists()
    assert len(read_rows(mine(f"{tmp_path}/own.py:shorter", rank=False), "pairs")) == 3


def test_a_functions_thumbs_are_written_and_what_it_refuses_is_refused_before_sampling(
    mine, tmp_path, monkeypatch
):
    thumb = '{"prompt": rows[0]["prompt"], "completion": "x", "label": True, "meta": {}}'
    vote = 'c["votes"].append({"annotator": "own", "p": 1})'
    body = "    compared = [c for r, t in zip(rows, drawn) for *_, c in pairs(r, t)]\n"
    body += f"    for c in compared: {vote}\n    return compared, [{thumb}]"
    mine(function(tmp_path, body))
    (row,) = read_rows(str(tmp_path / "mine.thumbs.jsonl"), "labelled")
    assert row["label"] is True and row["completion"] == "x"

    monkeypatch.setattr(collect, "respond", None)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="not these"):
        mine(
            function(tmp_path / "a", "    from nanoalign import UserError\n    raise UserError('not these')")
        )
    with pytest.raises(UserError, match=r"own\.py:own failed: ZeroDivisionError"):
        mine(function(tmp_path / "b", "    1 / 0"))


def test_a_function_whose_votes_are_none_is_one_sentence(mine, tmp_path):
    body = "    found = [c for r, t in zip(rows, drawn) for *_, c in pairs(r, t)]\n"
    body += "    for c in found: c['votes'].append({'annotator': 'own', 'p': 2})\n    return found, []"
    with pytest.raises(UserError, match=r"own\.py:own failed: RowError: field .votes."):
        mine(function(tmp_path, body))


def test_for_a_person_the_comparisons_are_written_and_the_command_to_go_on_is_printed(mine, tmp_path, capsys):
    out = mine("human")
    record = out.replace(".jsonl", ".votes.jsonl")
    rows = read_rows(record, "compared")
    assert len(rows) == 9 and not any(c["votes"] for c in rows) and not Path(out).exists()
    said = capsys.readouterr().out
    assert f"9 pairs wait in {record}" in said
    assert f"\npython -m lab.annotate --votes {record} --out {out}\n" in said


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
    votes = ai_votes(path, rows, torch.device("cpu"), ["Be kind."], seed=0)
    for c, p in zip(rows, votes):
        odds = (log_odds(model, c, "Be kind.", (0, 1)) - log_odds(model, c, "Be kind.", (1, 0))) / 2
        assert p == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-5)
    assert np.std(votes) > 0.05


def test_a_judge_that_consults_itself_adds_its_log_odds_of_writing_the_one_and_not_the_other(ai):
    (model, path), rows = ai(), babble(20)

    def log_likelihood(c, text):
        asked, said = TOKENIZER.prompt(c["prompt"]), TOKENIZER.response(text)
        logp = model(torch.from_numpy(np.append(asked, said))[None])[0].log_softmax(-1)
        return sum(logp[len(asked) + i - 1, token].item() for i, token in enumerate(said))

    rows[0]["ended"] = [True, False]
    votes = ai_votes(path, rows, torch.device("cpu"), ["Be kind."], seed=0, own=0.3)
    for c, p in zip(rows[1:], votes[1:]):
        odds = (log_odds(model, c, "Be kind.", (0, 1)) - log_odds(model, c, "Be kind.", (1, 0))) / 2
        odds += 0.3 * (log_likelihood(c, c["responses"][0]) - log_likelihood(c, c["responses"][1]))
        assert p == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-4)
    assert votes[0] == 1


def test_averaging_both_orders_removes_a_planted_position_bias_exactly(ai, capsys):
    rows, none = babble(40), ai()
    fair = ai_votes(none[1], rows, torch.device("cpu"), PRINCIPLES, seed=0)
    one_order = float(re.search(r"first: ([+-][\d.]+) in one order", capsys.readouterr().out)[1])
    for bias in (3.0, -3.0):
        model, path = ai(bias)
        biased = ai_votes(path, rows, torch.device("cpu"), PRINCIPLES, seed=0)
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


def test_the_error_of_a_judges_log_odds_does_not_shrink_with_copies_of_a_pair(ai, capsys):
    """Pairs of a prompt share its responses, so they are no independent ones."""
    path, rows = ai()[1], babble(24)
    found = []
    for copies in (1, 5):
        ai_votes(path, rows * copies, torch.device("cpu"), ["Be kind."], seed=0)
        found.append(re.search(r"± (\S+) over both", capsys.readouterr().out)[1])
    assert found[0] == found[1] and float(found[0]) > 0


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
    ai_votes(ai()[1], compared(150), torch.device("cpu"), PRINCIPLES, seed=0)
    collect.rm_votes(rm[1], compared(150), torch.device("cpu"))
    assert shown == [["judge", 300, 300]] * 2


def test_a_principle_is_drawn_for_every_pair_and_both_orders_are_asked_by_it(monkeypatch, ai):
    asked, path = [], ai()[1]

    def choice_logprobs(model, tokenizer, requests):
        asked.append([messages[0]["content"] for (*messages,) in requests])
        return torch.zeros(len(requests), 2)

    monkeypatch.setattr(feedback, "choice_logprobs", choice_logprobs)
    for seed in (0, 0, 1):
        ai_votes(path, compared(60), torch.device("cpu"), PRINCIPLES, seed)
    drawn = [[re.search(r"B\? (.*)\n", text)[1] for text in texts] for texts in asked]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0][::2] == drawn[0][1::2]
    assert all(10 < drawn[0][::2].count(principle) < 30 for principle in PRINCIPLES)
    assert asked[0][0].endswith("\nA: good 0\nB: bad 0") and asked[0][1].endswith("\nA: bad 0\nB: good 0")


def test_an_unfinished_response_loses_to_a_finished_one_and_a_request_too_long_is_skipped(ai):
    path, rows = ai()[1], compared(4)
    rows[0]["ended"], rows[1]["ended"] = [False, True], [True, False]
    rows[2]["responses"][1] = "word " * 100
    votes = ai_votes(path, rows, torch.device("cpu"), PRINCIPLES, seed=0)
    assert votes[:3] == [0, 1, None] and 0 < votes[3] < 1
    with pytest.raises(UserError, match="judges no pair"):
        ai_votes(path, rows[2:3], torch.device("cpu"), PRINCIPLES, seed=0)


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


def test_a_judge_that_consults_itself_votes_under_a_name_of_its_own(ai, tmp_path):
    path, out = ai()[1], str(tmp_path / "by_ai.jsonl")
    write_rows(str(tmp_path / "p.jsonl"), [{"prompt": f"Hi {i}"} for i in range(3)])
    flags = {"out": out, "annotator": f"ai:{path}", "constitution": str(ROOT / "constitution.txt")}
    collect.main(collect.Config(path, str(tmp_path / "p.jsonl"), max_new_tokens=4, **flags))
    collect.main(collect.Config(resume=True, own=0.3, **flags))
    for c in read_rows(out.replace(".jsonl", ".votes.jsonl"), "compared"):
        assert [vote["annotator"] for vote in c["votes"]] == [f"ai:{path}", f"ai:{path} --own 0.3"]
    for who, own in (("world", 1.0), ("rm:x.pt", 1.0), ("ai:x.pt", -1.0), ("ai:x.pt", math.nan)):
        with pytest.raises(UserError, match="--own is a weight above 0, of ai:PATH"):
            collect.main(collect.Config(annotator=who, own=own, out=out))


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
