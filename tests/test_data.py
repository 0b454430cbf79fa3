"""Rows are read or refused with line and field; examples, blocks and batches hold what they should."""

import json

import numpy as np
import pytest
import torch

from nanoalign import UserError
from nanoalign.data import (
    BatchOrder,
    chat_examples,
    collate,
    join,
    labelled_examples,
    pair_examples,
    prompt_examples,
    without_ties,
)
from nanoalign.pieces import micro_batches
from nanoalign.rows import read_rows, write_rows
from nanoalign.tokenizer import get_tokenizer

WORLD = get_tokenizer("world")
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
MORE = {"role": "user", "content": "And?"}
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: "


@pytest.fixture
def file(tmp_path):
    """file(row or line, …) → the path of a JSONL file with those lines."""

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
        return str(path)

    return write


def pair(prompt, chosen, rejected, **meta):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "meta": meta}


COMPARED = {
    "responses": ["A", "B"], "ended": [True, False],
    "votes": [{"annotator": "human", "p": 0.5, "swapped": True}, {"annotator": "rm:x", "p": None}],
}  # fmt: skip

GOOD = [
    ("text", {"text": "Once."}, {"text": "Once."}),
    ("chat", {"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT], "meta": {}}),
    ("chat", {"prompt": "Hi", "completion": "Hello."}, {"messages": [USER, ASSISTANT], "meta": {}}),
    ("chat", {"prompt": [USER], "completion": "Hello."}, {"messages": [USER, ASSISTANT], "meta": {}}),
    ("chat", {"question": "Hi", "answer": "Hello."}, {"messages": [USER, ASSISTANT], "meta": {}}),
    ("chat", pair("Hi", "Hello.", "No.", kind="x"), {"messages": [USER, ASSISTANT], "meta": {"kind": "x"}}),
    ("pairs", {"prompt": "Hi", "chosen": "A", "rejected": "B"}, pair([USER], "A", "B")),
    ("pairs", pair([USER, ASSISTANT, MORE], "A", "B"), pair([USER, ASSISTANT, MORE], "A", "B")),
    ("pairs", pair("Hi", [ASSISTANT], [{**ASSISTANT, "content": "B"}]), pair([USER], "Hello.", "B")),
    ("pairs", pair([USER], [USER, ASSISTANT], [USER, {**ASSISTANT, "content": "B"}]),
     pair([USER], "Hello.", "B")),
    ("pairs", {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "B"}]},
     pair([USER], "Hello.", "B")),
    ("pairs", {"chosen": HH + "A", "rejected": HH + "B\n\n1. B"},
     pair([USER, ASSISTANT, MORE], "A", "B\n\n1. B")),
    ("pairs", {**pair("Hi", "A", "B"), "margin": 2.0, "probability": 0.75},
     {**pair([USER], "A", "B"), "margin": 2.0, "probability": 0.75}),
    ("pairs", {**pair("Hi", "B", "A"), "margin": -2.0, "probability": 0.25},  # turned round
     {**pair([USER], "A", "B"), "margin": 2.0, "probability": 0.75}),
    ("pairs", {"prompt": "Hi", "responses": ["B", "A"], "ranking": [2, 1], "meta": {"a": 1}},
     pair([USER], "A", "B", a=1)),
    ("compared", {**COMPARED, "prompt": "Hi", "meta": {"a": 1}},
     {**COMPARED, "prompt": [USER], "meta": {"a": 1}}),
    ("labelled", {"prompt": "Hi", "completion": "A", "label": False},
     {"prompt": [USER], "completion": "A", "label": False, "meta": {}}),
    ("steps", {"prompt": "Hi", "completions": ["1", "2", "3"], "labels": [True, 0.25, None]},
     {"prompt": [USER], "completions": ["1", "2", "3"], "labels": [1.0, 0.25, None], "meta": {}}),
    ("prompts", {"prompt": "Hi", "meta": {"a": 1}}, {"prompt": [USER], "meta": {"a": 1}}),
    ("prompts", {"prompt": [USER, ASSISTANT, MORE]}, {"prompt": [USER, ASSISTANT, MORE], "meta": {}}),
    ("prompts", {"question": "Hi", "answer": "#### 4"}, {"prompt": [USER], "meta": {"answer": "#### 4"}}),
    ("prompts", {"messages": [USER, ASSISTANT]}, {"prompt": [USER], "meta": {}}),
    ("prompts", {"chosen": HH + "A", "rejected": HH + "B"}, {"prompt": [USER, ASSISTANT, MORE], "meta": {}}),
]  # fmt: skip

BAD = [  # kind, row, what the message must name besides file and line
    ("text", {"txt": "Once."}, ["text", "string", "txt"]),
    ("text", {"text": None}, ["text", "string", "fields []"]),
    ("chat", {"prompt": "Hi"}, ["completion", "string"]),
    ("chat", {"completion": "Hello."}, ["prompt", "string or a list of messages"]),
    ("chat", {"messages": []}, ["messages"]),
    ("chat", {"messages": "Hi"}, ["messages", "assistant"]),
    ("chat", {"messages": [USER]}, ["messages", "assistant"]),
    ("chat", {"messages": [USER, "Hello."]}, ["messages", "message 1", "role"]),
    (
        "chat",
        {"messages": [USER, {"role": "robot", "content": "Beep"}]},
        ["message 1", "user|assistant", "robot"],
    ),
    ("chat", {"messages": [{"role": "user", "content": 3}, ASSISTANT]}, ["message 0", "content"]),
    ("chat", {"question": "Hi", "answer": 4}, ["answer", "string", "4"]),
    ("pairs", {"prompt": "Hi", "chosen": "A"}, ["rejected", "string"]),
    ("pairs", {"prompt": 1, "chosen": "A", "rejected": "B"}, ["prompt"]),
    ("pairs", {"prompt": [], "chosen": "A", "rejected": "B"}, ["prompt"]),
    ("pairs", {"chosen": "A", "rejected": "B"}, ["chosen", "Human:", "prompt"]),
    ("pairs", {"chosen": HH + "A", "rejected": HH.replace("Hi", "Ho") + "B"}, ["same prompt"]),
    ("pairs", {"chosen": HH + "A", "rejected": HH + "B\n\nHuman: why?"}, ["rejected", "assistant"]),
    ("pairs", pair("Hi", [USER], "B"), ["chosen", "assistant"]),
    ("pairs", {**pair("Hi", "A", "B"), "margin": "2"}, ["margin", "number", '"2"']),
    ("pairs", {**pair("Hi", "A", "B"), "margin": 10**400}, ["margin", "number"]),
    ("pairs", {**pair("Hi", "A", "B"), "probability": 1.5}, ["probability", "from 0 to 1", "1.5"]),
    ("pairs", {**pair("Hi", "A", "B"), "probability": True}, ["probability", "true"]),
    ("pairs", '{"prompt": "Hi", "chosen": "A", "rejected": "B", "probability": NaN}', ["probability"]),
    ("pairs", {"prompt": "Hi", "responses": "A", "scores": [1]}, ["responses", "list of strings"]),
    ("pairs", {"prompt": "Hi", "responses": ["A", 2], "scores": [1, 2]}, ["responses", "list of strings"]),
    ("pairs", {"prompt": "Hi", "responses": ["A", "B"]}, ["scores", "list of numbers"]),
    ("pairs", {"prompt": "Hi", "responses": ["A", "B"], "ranking": [1, "2"]}, ["ranking", "numbers"]),
    ("pairs", {"prompt": "Hi", "responses": ["A", "B"], "scores": [1]}, ["2 responses", "1 values"]),
    ("pairs", {"responses": ["A", "B"], "scores": [1, 2]}, ["prompt"]),
    ("compared", {**COMPARED, "prompt": "Hi", "responses": ["A"]}, ["responses", "two strings"]),
    ("compared", {**COMPARED, "prompt": "Hi", "ended": [1, 0]}, ["ended", "true or false"]),
    ("compared", {**COMPARED, "prompt": "Hi", "votes": None}, ["votes", "annotator"]),
    ("compared", {**COMPARED, "prompt": "Hi", "votes": [{"annotator": "human"}]}, ["votes", "p"]),
    ("compared", {**COMPARED, "prompt": "Hi", "votes": [{"annotator": 3, "p": 1}]}, ["votes", "string"]),
    ("compared", {**COMPARED, "prompt": "Hi", "votes": [{"annotator": "x", "p": 2}]}, ["votes", "0 to 1"]),
    (
        "compared",
        {**COMPARED, "prompt": "Hi", "votes": [{"annotator": "x", "p": 1, "swapped": 2}]},
        ["votes"],
    ),
    ("compared", COMPARED, ["prompt"]),
    ("labelled", {"prompt": "Hi", "completion": "A", "label": 1}, ["label", "true or false", "1"]),
    ("labelled", {"prompt": "Hi", "label": True}, ["completion", "string"]),
    ("labelled", {"prompt": "Hi", "chosen": "A"}, ["rejected", "string"]),
    ("labelled", {"question": "Hi", "answer": "#### 4"}, ["solution", "is_correct", "question"]),
    ("labelled", {"question": "Hi", "6b": {"solution": "4", "is_correct": "yes"}}, ["true or false", "yes"]),
    ("labelled", {"question": "Hi", "6b": {"solution": 4, "is_correct": True}}, ["string", "4"]),
    ("labelled", {"question": 3, "6b": {"solution": "4", "is_correct": True}}, ["question", "3"]),
    ("steps", {"prompt": "Hi", "completions": "1", "labels": [True]}, ["completions", "list"]),
    ("steps", {"prompt": "Hi", "completions": [], "labels": []}, ["completions"]),
    ("steps", {"prompt": "Hi", "completions": ["1"], "labels": [2]}, ["labels", "null"]),
    ("steps", {"prompt": "Hi", "completions": ["1", "2"], "labels": [True]}, ["2 steps", "1 labels"]),
    ("prompts", {"text": "Hi"}, ["prompt"]),
    ("prompts", {"messages": [ASSISTANT]}, ["prompt"]),
    ("prompts", {"prompt": "Hi", "meta": 3}, ["meta"]),
    ("chat", '{"prompt": "Hi", ', ["JSON"]),
    ("chat", '{"prompt": ' + "[" * 100_000, []),
    ("chat", '{"prompt": ' + "1" * 5_000 + "}", []),  # more digits than Python converts
    ("chat", '["Hi", "Hello."]', ["JSON object"]),
]


@pytest.mark.parametrize("kind, row, expected", GOOD, ids=range(len(GOOD)))
def test_every_accepted_form_is_read(file, kind, row, expected):
    assert read_rows(file(row), kind) == [expected]


@pytest.mark.parametrize("K", [2, 4, 7])
def test_a_ranking_of_k_gives_every_pair_once_the_better_rank_chosen(file, K):
    ranking = np.random.default_rng(K).permutation(K) + 1
    row = {"prompt": "Hi", "responses": [f"rank {r}" for r in ranking], "ranking": ranking.tolist()}
    pairs = read_rows(file(row), "pairs")
    found = sorted((p["chosen"], p["rejected"]) for p in pairs)
    assert len(pairs) == K * (K - 1) // 2
    assert found == [(f"rank {i}", f"rank {j}") for i in range(1, K + 1) for j in range(i + 1, K + 1)]
    assert not any("probability" in p for p in pairs)


def test_likert_scores_give_pairs_and_ties_and_an_unrated_response_takes_part_in_none(file):
    row = {"prompt": "Hi", "responses": ["A", "B", "C", "D", "E"], "scores": [4, 7, 4, None, 1]}
    sides = [(p["chosen"], p["rejected"], p.get("probability", 1)) for p in read_rows(file(row), "pairs")]
    assert sorted((*sorted(s[:2]), s[2]) for s in sides) == [
        ("A", "B", 1), ("A", "C", 0.5), ("A", "E", 1), ("B", "C", 1), ("B", "E", 1), ("C", "E", 1),
    ]  # fmt: skip
    assert all(row["scores"]["ABCDE".index(a)] >= row["scores"]["ABCDE".index(b)] for a, b, _ in sides)


def test_ties_are_left_out_where_a_side_must_be_right(file, capsys):
    tie, clear = {**pair("Hi", "A", "B"), "probability": 0.5}, {**pair("Hi", "A", "C"), "probability": 0.6}
    assert without_ties(read_rows(file(tie, clear), "pairs")) == read_rows(file(clear), "pairs")
    assert "1 ties of 2" in capsys.readouterr().out
    assert [row["label"] for row in read_rows(file(tie, clear), "labelled")] == [True, False]
    assert "1 rows (ties" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"all 1 .* ties"):
        without_ties([tie])


def labelled(prompt, completion, label, **meta):
    return {"prompt": prompt, "completion": completion, "label": label, "meta": meta}


@pytest.mark.parametrize(
    "row",
    [
        pair("Hi", "Hello.", "No.", source="x"),
        pair([USER], [ASSISTANT], [{**ASSISTANT, "content": "No."}], source="x"),
        {**pair("Hi", "Hello.", "No.", source="x"), "margin": 2.0},
    ],
)
def test_a_pair_is_read_as_a_thumb_up_and_a_thumb_down_of_one_prompt(file, row):
    up, down = labelled([USER], "Hello.", True, source="x"), labelled([USER], "No.", False, source="x")
    assert read_rows(file(row, row), "labelled") == [up, down, up, down]
    assert read_rows(file({"chosen": HH + "A", "rejected": HH + "B"}), "labelled") == [
        labelled([USER, ASSISTANT, MORE], "A", True),
        labelled([USER, ASSISTANT, MORE], "B", False),
    ]


def test_gsm8ks_model_solutions_are_read_as_a_labelled_row_each(file):
    row = {
        "question": "Hi", "ground_truth": "3 + 4 = 7 #### 7",
        "6b_finetuning": {"solution": "8", "is_correct": False},
        "6b_verification": {"solution": "3 + 4 = 7\nAnswer: 7", "is_correct": True},
        "175b_note": {"comment": "no solution here"},
    }  # fmt: skip
    due = [labelled([USER], "8", False), labelled([USER], "3 + 4 = 7\nAnswer: 7", True)]
    assert read_rows(file(row), "labelled") == due


@pytest.mark.parametrize("kind, row, names", BAD, ids=range(len(BAD)))
def test_a_bad_row_names_file_line_field_and_expectation(file, kind, row, names):
    good = next(row for good_kind, row, _ in GOOD if good_kind == kind)
    path = file(good, "", row)  # a blank line counts as a line
    with pytest.raises(UserError) as caught:
        read_rows(path, kind)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in [path, "line 3", "--skip-bad-rows", *names]), message


@pytest.mark.parametrize("kind, row, names", BAD, ids=range(len(BAD)))
def test_skip_bad_rows_drops_and_counts_them(file, capsys, kind, row, names):
    _, good, expected = next(case for case in GOOD if case[0] == kind)
    assert read_rows(file(good, row, good), kind, skip_bad_rows=True) == [expected, expected]
    assert "1 bad rows of 3" in capsys.readouterr().out


def test_a_file_of_bad_rows_only_is_an_error_even_when_they_are_skipped(file):
    with pytest.raises(UserError, match="no usable row"):
        read_rows(file({"a": 1}), "text", skip_bad_rows=True)


def test_a_missing_empty_or_undecodable_file_and_a_folder_are_user_errors(tmp_path):
    (tmp_path / "empty.jsonl").write_text(" \n\n")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "café"}'.encode("latin-1"))
    for name, key in [
        ("none.jsonl", "exist"),
        ("empty.jsonl", "empty"),
        ("latin.jsonl", "UTF-8"),
        ("", "read"),
    ]:
        path = str(tmp_path / name)
        with pytest.raises(UserError, match=key) as caught:
            read_rows(path, "text")
        assert path.rstrip("/") in str(caught.value)


def test_a_plain_text_file_is_one_text(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text('{"text": "not parsed"}\n\nnaïve\n', encoding="utf-8")
    assert read_rows(str(path), "text") == [{"text": '{"text": "not parsed"}\n\nnaïve\n'}]


def test_unicode_line_separators_do_not_end_a_row(file):
    assert read_rows(file('{"text": "a\u2028b\u0085c"}'), "text") == [{"text": "a\u2028b\u0085c"}]


def test_written_rows_read_back_and_a_failure_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "new" / "rows.jsonl")
    write_rows(path, [{"text": "naïve\n"}, {"text": "b"}])
    assert read_rows(path, "text") == [{"text": "naïve\n"}, {"text": "b"}]
    with pytest.raises(TypeError):
        write_rows(path, [{"text": "c"}, {"text": object()}])
    assert len(read_rows(path, "text")) == 2


def test_joining_scores_the_response_and_needs_room_for_one_token():
    prompt, response = np.array([1, 2, 3]), np.array([4, 5])
    for room, expected in [(9, [4, 5]), (5, [4, 5]), (4, [4])]:
        ids, mask = join(prompt, response, room)
        assert ids[mask].tolist() == expected and ids[~mask].tolist() == [1, 2, 3]
    assert join(prompt, response, 3) is None and join(prompt, response, 2) is None


def test_chosen_and_rejected_share_identical_prompt_ids_and_score_only_responses():
    row = pair([USER, ASSISTANT, MORE], " yes", "s")
    [(chosen, rejected)], _ = pair_examples([row], WORLD, 100)
    assert np.array_equal(chosen[0][~chosen[1]], rejected[0][~rejected[1]])
    assert np.array_equal(chosen[0][~chosen[1]], WORLD.prompt(row["prompt"]))
    scored = [WORLD.decode(ids[mask], specials=True) for ids, mask in (chosen, rejected)]
    assert scored == ["  yes<|end|>", " s<|end|>"]  # each with the space that `response` puts in front


def test_a_prompt_without_room_for_a_response_is_dropped_and_counted(capsys):
    long, short = "the " * 50, "Hi"
    kept, _ = pair_examples([pair([{**USER, "content": p}], "yes", "no") for p in (long, short)], WORLD, 20)
    assert len(kept) == 1 and "1 training pairs" in (out := capsys.readouterr().out) and "1 dropped" in out
    rows = [{"messages": [{**USER, "content": p}, ASSISTANT]} for p in (short, long)]
    assert len(chat_examples(rows, WORLD, 20)) == 1 and "1 dropped" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max-length"):
        chat_examples(rows[1:], WORLD, 20)


def test_labelled_examples_score_the_response_and_its_end_and_keep_their_rows(capsys):
    long = "the " * 50
    rows = [
        labelled([USER], "yes", True),
        labelled([{**USER, "content": long}], "dropped", True),  # no room for a response
        labelled([USER, ASSISTANT, MORE], " yes", False),
        labelled([USER], long, False),
    ]
    examples, kept = labelled_examples(rows, WORLD, 20)
    assert kept == [rows[0], rows[2], rows[3]]
    for (ids, mask), row in zip(examples, kept):
        assert np.array_equal(ids[~mask], WORLD.prompt(row["prompt"])) and len(ids) <= 20
        response = WORLD.response(row["completion"])
        assert np.array_equal(ids[mask], response[: 20 - (~mask).sum()])
        assert not mask[: (~mask).sum()].any()  # the prompt comes first
    assert [ids[-1] == WORLD.end for ids, _ in examples] == [True, True, False]  # the last was cut short
    out = capsys.readouterr().out
    assert "3 training labelled rows" in out and "1 truncated to 20" in out and "1 dropped" in out
    with pytest.raises(UserError, match="--max-length"):
        labelled_examples(rows[1:2], WORLD, 20)


def test_a_pair_that_truncation_makes_identical_is_dropped_and_counted(capsys):
    rows = [pair([USER], "a a a a a a a b", "a a a a a a a c"), pair([USER], "b", "a a a a a a a a")]
    [(chosen, rejected)], _ = pair_examples(rows, WORLD, 8)
    assert WORLD.decode(chosen[0]).endswith("b") and len(rejected[0]) == 8
    out = capsys.readouterr().out
    assert "1 dropped" in out and "1 truncated to 8" in out


def test_a_truncated_conversation_keeps_its_first_tokens_and_their_mask():
    ids, mask = WORLD.render([USER, ASSISTANT, MORE, ASSISTANT])
    [(short, short_mask)] = chat_examples([{"messages": [USER, ASSISTANT, MORE, ASSISTANT]}], WORLD, 9)
    assert np.array_equal(short, ids[:9]) and np.array_equal(short_mask, mask[:9])


def test_every_epoch_is_another_permutation():
    order = BatchOrder(np.arange(53) % 7, batch_size=5, seed=0)
    assert order.steps_per_epoch == 11
    epochs = [np.concatenate([order[11 * e + s] for s in range(11)]).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(53)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert max(len(order[s]) for s in range(11)) == 5


def test_the_order_depends_on_seed_and_step_alone_and_can_be_entered_anywhere():
    lengths = np.arange(53) % 7
    forward = [BatchOrder(lengths, 5, seed=3)[s].tolist() for s in range(33)]
    order = BatchOrder(lengths, 5, seed=3)
    np.random.seed(1)  # whatever the global state
    assert [order[s].tolist() for s in reversed(range(33))] == forward[::-1]
    assert [BatchOrder(lengths, 5, seed=4)[s].tolist() for s in range(33)] != forward


def test_rows_of_similar_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(1, 1000, 4096)
    order = BatchOrder(lengths, 32, seed=0)
    batches = [lengths[order[s]] for s in range(order.steps_per_epoch)]
    padding = 1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches)
    assert padding < 0.15  # 1/9 when sorted in pools of 8 batches; 1/2 unsorted
    longer = np.diff([batch.max() for batch in batches]) > 0
    assert 0.3 < longer.mean() < 0.7  # but within a pool no curriculum from short to long


@pytest.mark.parametrize("least", [1, 2, 3])
def test_a_last_batch_of_fewer_than_least_rows_joins_the_one_before_it(least):
    for size in range(least, 25):
        for batch_size in range(least, 8):
            order = BatchOrder(np.arange(size) % 5, batch_size, seed=0, least=least)
            steps, rest = divmod(size, batch_size)
            due = [batch_size] * steps + [rest] * (rest > 0)
            if len(due) > 1 and due[-1] < least:
                due[-2:] = [batch_size + rest]
            for epoch in range(2):
                batches = [order[epoch * order.steps_per_epoch + s] for s in range(order.steps_per_epoch)]
                assert sorted(map(len, batches)) == sorted(due) and min(map(len, batches)) >= least
                assert sorted(np.concatenate(batches).tolist()) == list(range(size))


def test_a_batch_size_of_zero_is_a_user_error():
    with pytest.raises(UserError, match="--batch-size"):
        BatchOrder([1, 2], 0, 0)


def test_micro_batches_partition_a_step():
    rows = np.arange(7)
    assert [m.tolist() for m in micro_batches(rows, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [m.tolist() for m in micro_batches(rows, 0)] == [rows.tolist()]


def test_a_token_budget_makes_the_fewest_pieces_of_rows_alike_in_length_that_keep_to_it():
    filled = micro_batches(np.arange(5), 0, [5, 9, 2, 5, 5], 15)
    assert [piece.tolist() for piece in filled] == [[2, 0, 3], [4], [1]]
    rng = np.random.default_rng(0)
    for budget in (1, 40, 100, 1000):
        for size in (0, 3):
            rows, lengths = rng.permutation(50)[:20], rng.integers(1, 60, 20)
            pieces = micro_batches(rows, size, lengths, budget)
            of = dict(zip(rows.tolist(), lengths.tolist()))
            flat = np.concatenate(pieces).tolist()
            assert sorted(flat) == sorted(rows.tolist())
            assert [of[i] for i in flat] == sorted(of.values())  # short ones first
            for piece, following in zip(pieces, [*pieces[1:], None]):
                longest = max(of[i] for i in piece)
                assert len(piece) == 1 or len(piece) * longest <= budget
                assert not size or len(piece) <= size
                if following is not None:  # the next row would not have fitted
                    assert len(piece) == size or (len(piece) + 1) * of[following[0]] > budget


def test_collating_pads_on_the_right_and_never_scores_padding():
    pad = 9
    examples = [
        (np.array([1, 2, pad]), np.array([False, True, True])),  # a response that holds the pad id is scored
        (np.array([pad]), np.array([False])),
        (np.array([5, 6, 7, 8]), np.array([False, False, True, True])),
    ]
    ids, mask = collate(examples, pad)
    assert ids.tolist() == [[1, 2, pad, pad], [pad] * 4, [5, 6, 7, 8]]
    assert mask.tolist() == [[False, True, True, False], [False] * 4, [False, False, True, True]]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool


def test_prompts_without_any_room_are_a_sentence_of_no_negative_number(capsys):
    with pytest.raises(UserError, match="beside a response 0 fit"):
        prompt_examples([{"prompt": [{"role": "user", "content": "Hi"}]}], get_tokenizer("world"), -272)
    assert "longer than 0 tokens" in capsys.readouterr().out
