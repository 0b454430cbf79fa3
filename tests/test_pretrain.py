"""Pretraining's blocks of text. Whole runs are in test_stages.py."""

import pytest

from nanoalign import UserError
from nanoalign.tokenizer import get_tokenizer
from train_pretrain import pack

WORLD = get_tokenizer("world")


def test_packing_predicts_every_token_but_the_first_exactly_once():
    texts = [" ".join("abcdefgh"), "", "i j k l m n o"]
    stream = [i for text in texts for i in (*WORLD.encode(text), WORLD.end)]
    for context in (2, 3, 4, 9):
        blocks = pack([{"text": text} for text in texts], WORLD, context)
        assert blocks.shape[1] == context
        predicted = blocks[:, 1:].flatten().tolist()
        assert predicted == stream[1 : 1 + len(predicted)]  # each once, in order, from its neighbour
        assert 0 <= len(stream) - 1 - len(predicted) < context - 1  # what cannot fill a block is left
        assert (blocks[:-1, -1] == blocks[1:, 0]).all()


def test_text_too_short_for_a_block_is_a_user_error():
    with pytest.raises(UserError, match="--context"):
        pack([{"text": "a b"}], WORLD, 100)


def test_texts_are_encoded_as_everywhere_a_million_spaces_too():
    text = "a" + " " * 1_000_000 + "b"
    assert pack([{"text": text}, {"text": "Once."}], WORLD, 2)[:, 0].tolist() == [
        *WORLD.encode(text), WORLD.end, *WORLD.encode("Once."),
    ]  # fmt: skip
