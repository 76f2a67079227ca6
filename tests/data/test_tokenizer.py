import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertTokenizer

from hf_mmclf.data import tokenizer as tokenization
from hf_mmclf.data.tokenizer import load_tokenizer

VOCABULARY = (
    Path(os.environ.get("HF_MMCLF_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    / "bert_vocab"
    / "vocab.txt"
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, "a", "horse", "cafe", "##s", "ride", ",", "don", "'", "t"]
TEXTS = [f"a {size} {animal} {deed}" for size in ("small", "tall") for animal in ("horse", "dog") for deed in
         ("walks", "walking", "jumps", "jumping", "sleeps", "sleeping")] * 3  # fmt: skip


def vocabulary(path, words, end="\n"):
    path.write_bytes("".join(word + end for word in words).encode())
    return str(path)


def test_trained_word_pieces_know_their_texts():
    tokenizer, description = load_tokenizer("train", iter(TEXTS), 200)
    assert description == f"word pieces trained on 72 training texts ({len(tokenizer)} tokens)"
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3, 4]
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (2, 3) and 1 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.tokenize("Horse DÓG") == tokenizer.tokenize("horse dog")
    assert tokenizer.tokenize("狗") == ["[UNK]"]
    assert set(tokenizer.all_special_tokens) == set(SPECIAL)


def test_vocab_size_bounds_a_trained_vocabulary():
    assert len(load_tokenizer("train", TEXTS, 50)[0]) == 50
    assert 50 < len(load_tokenizer("train", TEXTS, 8000)[0]) < 200
    with pytest.raises(ValueError, match="--vocab_size is 5, but the characters of these texts need [0-9]+"):
        load_tokenizer("train", TEXTS, 5)


def test_training_is_the_same_in_every_process():
    code = "import json, runpy, sys; load = runpy.run_path(sys.argv[1])['load_tokenizer']; "
    code += "print(json.dumps(load('train', json.load(sys.stdin), 50)[0].get_vocab()))"
    here = [load_tokenizer("train", TEXTS, 50)[0].get_vocab() for _ in range(5)]
    elsewhere = subprocess.run(
        [sys.executable, "-c", code, tokenization.__file__],  # without the package: its imports take seconds
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert all(vocab == json.loads(elsewhere.stdout) for vocab in here)


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path):
    tokenizer, _ = load_tokenizer("train", TEXTS, 50)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded, description = load_tokenizer(str(tmp_path / "saved"))
    assert description == "saved (50 tokens)"
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in (*TEXTS, "An ÜNKNOWN, café", ""):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_vocabulary_file_numbers_its_lines(tmp_path, end):
    tokenizer, description = load_tokenizer(vocabulary(tmp_path / "vocab.txt", PIECES, end))
    assert description == "word pieces of vocab.txt (14 tokens)"
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(PIECES)}


def test_the_last_line_of_a_vocabulary_may_lack_its_end(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES), encoding="utf-8")
    assert len(load_tokenizer(str(path))[0]) == 14


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("A horse", ["a", "horse"]),
        ("HORSES ride", ["horse", "##s", "ride"]),
        ("Cafés", ["cafe", "##s"]),  # accents fall
        ("a,horse don't", ["a", ",", "horse", "don", "'", "t"]),
        ("a zebra", ["a", "[UNK]"]),
        ("  a \n horse\t", ["a", "horse"]),
        ("", []),
    ],
)
def test_word_pieces_are_cut_as_in_bert_uncased(tmp_path, text, pieces):
    tokenizer, _ = load_tokenizer(vocabulary(tmp_path / "vocab.txt", PIECES))
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer(text)["input_ids"] == [PIECES.index(piece) for piece in ["[CLS]", *pieces, "[SEP]"]]


def test_odd_breaks_are_pieces_of_their_own(tmp_path):
    """A word piece may be a character that `str.splitlines` breaks at."""
    tokenizer, _ = load_tokenizer(vocabulary(tmp_path / "vocab.txt", [*SPECIAL, "\u2028", "\x85", "a"]))
    assert len(tokenizer) == 8 and tokenizer.convert_tokens_to_ids("a") == 7


@pytest.mark.skipif(not VOCABULARY.is_file(), reason=f"no {VOCABULARY}; HF_MMCLF_DATA names another place")
def test_the_real_vocabulary_of_bert():
    tokenizer, _ = load_tokenizer(str(VOCABULARY))
    assert len(tokenizer) == 30_522 and isinstance(tokenizer, BertTokenizer)
    assert tokenizer("a horse")["input_ids"] == [101, 1037, 3586, 102]
    assert tokenizer("A Hörse")["input_ids"] == [101, 1037, 3586, 102]
    assert tokenizer.tokenize("skateboarding") == ["skate", "##boarding"]
    assert tokenizer.pad_token_id == 0


def test_sources_that_give_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="'train' needs texts, but the training rows have none"):
        load_tokenizer("train", iter([]))
    with pytest.raises(ValueError, match=r"not a vocabulary of word pieces: \[CLS\], \[MASK\] missing"):
        load_tokenizer(vocabulary(tmp_path / "some.txt", ["[PAD]", "[UNK]", "[SEP]", "a"]))
    with pytest.raises(ValueError, match="the word piece 'a' occurs more than once"):
        load_tokenizer(vocabulary(tmp_path / "twice.txt", [*SPECIAL, "a", "b", "a"]))
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "none" / "vocab.txt"):
        with pytest.raises((OSError, ValueError), match=str(source)):
            load_tokenizer(str(source))
