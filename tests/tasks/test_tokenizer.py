from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from manyhands.errors import DataError
from manyhands.plan.tasks import Tokenizer
from manyhands.tasks.tokenizer import END, UNKNOWN, encode, make_tokenizer

TEXTS = ["def naïve(x):\n    return '€😀'\n" * 20, "", f"a {END} inside\t\r\n\0 text " * 9, "last"]


@pytest.mark.parametrize("kind", ["byte", "character", "bpe"])
def test_text_comes_back_and_each_document_ends(kind: str) -> None:
    tokenizer = make_tokenizer(Tokenizer(kind=kind, vocabulary_size=300), TEXTS)
    end = tokenizer.end_id
    encoded = list(encode(tokenizer, TEXTS))
    assert len(encoded) == len(TEXTS)
    for text, ids in zip(TEXTS, encoded, strict=True):
        assert ids[-1] == end
        assert end not in ids[:-1], "the end of a text is not what looks like it inside"
        assert tokenizer.fast.decode(ids[:-1].tolist()) == text


def test_bytes_are_their_own_ids() -> None:
    tokenizer = make_tokenizer(Tokenizer(kind="byte"), TEXTS)
    assert tokenizer.size == 257
    text = "".join(map(chr, range(1, 700)))
    (ids,) = encode(tokenizer, [text])
    assert bytes(ids[:-1].astype(np.uint8)) == text.encode()


def test_characters_are_those_of_the_training_text() -> None:
    tokenizer = make_tokenizer(Tokenizer(kind="character"), ["hello"])
    assert tokenizer.size == 4 + 2
    (ids,) = encode(tokenizer, ["hole?"])
    assert tokenizer.fast.token_to_id(UNKNOWN) == ids[-2]
    assert [tokenizer.fast.id_to_token(int(i)) for i in ids] == ["h", "o", "l", "e", UNKNOWN, END]


def test_bpe_has_the_wanted_size_and_is_shorter_than_bytes() -> None:
    tokenizer = make_tokenizer(Tokenizer(kind="bpe", vocabulary_size=280), TEXTS)
    assert tokenizer.size == 280
    (ids,) = encode(tokenizer, TEXTS[:1])
    assert len(ids) < 0.7 * len(TEXTS[0].encode())
    with pytest.raises(DataError, match="vocabulary_size is 256"):
        make_tokenizer(Tokenizer(kind="bpe", vocabulary_size=256), TEXTS)


def test_the_same_text_gives_the_same_tokenizer_with_any_number_of_threads() -> None:
    program = (
        "import hashlib, random; from manyhands.tasks.tokenizer import make_tokenizer;"
        "from manyhands.plan.tasks import Tokenizer; g = random.Random(1);"
        "texts = [' '.join(''.join(g.choices('abcdef', k=4)) for _ in range(400)) for _ in range(40)];"
        "s = make_tokenizer(Tokenizer(kind='bpe', vocabulary_size=500), texts).fast.to_str();"
        "print(hashlib.sha256(s.encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"RAYON_NUM_THREADS": n},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for n in ("1", "2", "7")
    }
    assert len(digests) == 1
