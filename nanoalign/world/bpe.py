"""Train the world's byte-level BPE once and store it in tiktoken's file format: python -m nanoalign.world.bpe

Byte-pair encoding (Sennrich et al. 2016) over bytes: start from the 256 bytes, and again and again merge the
neighbouring pair that is most frequent in the text. Any Unicode text can be encoded. What is stored stays as
it is when the text changes a little: checkpoints know the vocabulary by its name.
"""

import base64
import random
from collections import Counter
from itertools import pairwise

import regex  # comes with tiktoken

from nanoalign.files import write_text
from nanoalign.tokenizer import SPECIALS, WORLD_BPE, WORLD_PATTERN
from nanoalign.world.feedback import criticism, judgement
from nanoalign.world.text import answer, documents, request

VOCAB_SIZE = 2048 - len(SPECIALS)  # so that the model's vocabulary is a round number


def train(texts, vocab_size: int, pattern: str) -> list[bytes]:
    """The vocabulary in rank order: 256 bytes, then a merged token per step (ties: what sorts first)."""
    counts = Counter(piece for text in texts for piece in regex.findall(pattern, text))
    pieces = [[bytes([b]) for b in piece.encode()] for piece in counts]
    weights = list(counts.values())
    vocabulary = [bytes([b]) for b in range(256)]
    while len(vocabulary) < vocab_size:
        pairs = Counter()
        for piece, weight in zip(pieces, weights):
            for pair in pairwise(piece):
                pairs[pair] += weight
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        vocabulary.append(best[0] + best[1])
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == best:
                    piece[i : i + 2] = [vocabulary[-1]]
                i += 1
    return vocabulary


def sample_text(count: int = 30_000, seed: int = 0):
    """Web text, lessons in feedback, and requests and answers of the world, both splits."""
    rng = random.Random(seed)
    for _ in range(count):
        yield from (row["text"] for row in documents(rng))
        row = request(rng, held_out=rng.random() < 0.2)
        yield f" {row['prompt']}\n {answer(row, rng)}"
        if rng.random() < 0.1:
            yield from (" " + message["content"] for message in rng.choice((criticism, judgement))(rng))


def main() -> None:
    """Write the vocabulary file."""
    vocabulary = train(sample_text(), VOCAB_SIZE, WORLD_PATTERN)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(vocabulary)]
    write_text(WORLD_BPE, "\n".join(lines) + "\n")
    print(f"wrote {len(vocabulary)} tokens to {WORLD_BPE}")


if __name__ == "__main__":
    main()
