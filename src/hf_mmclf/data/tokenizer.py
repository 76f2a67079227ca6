"""Tokenizers from the Hub, a folder or a vocabulary file, or trained on the texts of the training rows."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, BertTokenizer, PreTrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(
    source: str, texts: Iterable[str] = (), vocab_size: int = 8000, config: PreTrainedConfig | None = None
) -> tuple[PreTrainedTokenizerBase, str]:
    r"""
    Load or train a tokenizer.

    Args:
        source (`str`):
            `"train"` for word pieces in lower case that are learned from `texts`; a `vocab.txt` with one word piece a
            line; a folder written by `save_pretrained`; otherwise a name on the Hub.
        texts (`Iterable[str]`, *optional*):
            The texts of the training rows.
        vocab_size (`int`, *optional*, defaults to 8000):
            Largest vocabulary of a trained tokenizer.
        config (`PreTrainedConfig`, *optional*):
            The configuration of the model that a folder or a name belongs to. It tells the kind of the tokenizer if
            there is only a `vocab.txt` and a config older than `model_type`, as with TinyBERT and BERT-tiny.

    Returns:
        `tuple[PreTrainedTokenizerBase, str]`: The tokenizer, and where it comes from, in words.

    Raises:
        `ValueError`: If there are no texts to train on, or too many characters in them for `vocab_size`; if a
            vocabulary file is not that of a BERT; or if a tokenizer knows no words.
        `OSError`: If a name is neither a file nor a folder nor on the Hub.
    """
    path = Path(source)
    if source == "train":
        texts = list(texts)
        if not texts:
            raise ValueError("tokenizer 'train' needs texts, but the training rows have none")
        tokenizer = _train(texts, vocab_size)
        if len(tokenizer) > vocab_size:
            raise ValueError(f"--vocab_size is {vocab_size}, but the characters of these texts need {len(tokenizer)}")
        return tokenizer, f"word pieces trained on {len(texts):,} training texts ({len(tokenizer):,} tokens)"
    if path.is_file():
        text = path.read_text(encoding="utf-8").rstrip("\n")
        words = text.split("\n")  # not splitlines: a piece can be another line break
        [(word, count)] = Counter(words).most_common(1)
        if count > 1:
            raise ValueError(f"{source}: the word piece {word!r} occurs more than once")
        missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token not in words]
        if missing:
            raise ValueError(f"{source}: not a vocabulary of word pieces: {', '.join(missing)} missing")
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        return tokenizer, f"word pieces of {path.name} ({len(tokenizer):,} tokens)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, config=config)
    except (OSError, ValueError) as error:
        if not path.is_dir():
            raise
        raise ValueError(f"{source}: no tokenizer in this folder: {error}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{source}: its tokenizer knows special tokens only ({', '.join(tokenizer.get_vocab())}), so every word "
            "is unknown; name another one by --tokenizer"
        )
    return tokenizer, f"{path.name if path.is_dir() else source} ({len(tokenizer):,} tokens)"


def _train(texts: list[str], vocab_size: int) -> BertTokenizer:
    """Train word pieces as in BERT. The same texts give the same pieces.

    The trainer numbers the pieces "##x" of one character in the order of a hash table, which differs from run to run,
    and breaks ties by these numbers. As special tokens they get fixed numbers; the result has them as plain pieces.
    """
    blank = BertTokenizer()
    backend = blank.backend_tokenizer
    doubled = backend.normalizer.normalize_str(" ".join(2 * character for character in set("".join(texts))))
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(doubled)]
    continuing = sorted({f"##{character}" for word in words for character in word[1:]})
    trained = blank.train_new_from_iterator(texts, vocab_size, new_special_tokens=continuing, show_progress=False)
    return BertTokenizer(vocab=trained.get_vocab())
