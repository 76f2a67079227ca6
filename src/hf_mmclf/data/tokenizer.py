"""A tokenizer from the Hub, a folder, a vocabulary file, or trained on the captions: with or without a download."""

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, BertTokenizer, PreTrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(
    source: str, texts: Iterable[str] = (), vocab_size: int = 8000, config: PreTrainedConfig | None = None
) -> tuple[PreTrainedTokenizerBase, str]:
    r"""
    A tokenizer and a line that says which one it is.

    Args:
        source (`str`):
            `"train"` for word pieces (lower case) learned from `texts`; a `vocab.txt` with one word piece a line; a
            folder written by `save_pretrained`; else a name on the Hub.
        texts (`Iterable[str]`, *optional*):
            Training captions.
        vocab_size (`int`, *optional*, defaults to 8000):
            Largest vocabulary of a trained tokenizer.
        config (`PreTrainedConfig`, *optional*):
            Of the model that a folder or name belongs to. It says what kind of tokenizer that is where there is no
            more than a `vocab.txt` and a config older than `model_type`, as with TinyBERT and BERT-tiny.

    Raises:
        `ValueError`: no captions to train on, or a vocabulary file without BERT's special tokens.
        `OSError`: a name that is neither a file, a folder nor on the Hub.
    """
    path = Path(source)
    if source == "train":
        texts = list(texts)
        if not texts:
            raise ValueError("tokenizer 'train' needs captions, but the training rows have none")
        tokenizer = _train(texts, vocab_size)
        return tokenizer, f"word pieces trained on {len(texts):,} training captions ({len(tokenizer):,} tokens)"
    if path.is_file():
        words = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # not splitlines: pieces may be odd breaks
        if len(set(words)) < len(words):
            twice = next(word for i, word in enumerate(words) if word in words[:i])
            raise ValueError(f"{source}: the word piece {twice!r} is there twice")
        missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token not in words]
        if missing:
            raise ValueError(f"{source}: no vocabulary of word pieces: {', '.join(missing)} missing")
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        return tokenizer, f"word pieces of {path.name} ({len(tokenizer):,} tokens)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, config=config)
    except (OSError, ValueError) as error:
        if not path.is_dir():
            raise
        raise ValueError(f"{source}: no tokenizer in this folder: {error}") from error
    return tokenizer, f"{path.name if path.is_dir() else source} ({len(tokenizer):,} tokens)"


def _train(texts: list[str], vocab_size: int) -> BertTokenizer:
    """Word pieces of BERT's kind; the same texts give the same ones.

    The trainer numbers the pieces of one continuing character in the order of a hash table, another one in every run,
    and breaks ties by number. Given to it as special tokens they have fixed numbers; here they are plain pieces again.
    """
    blank = BertTokenizer()
    backend = blank.backend_tokenizer
    doubled = backend.normalizer.normalize_str(" ".join(2 * character for character in set("".join(texts))))
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(doubled)]
    continuing = sorted({f"##{character}" for word in words for character in word[1:]})
    trained = blank.train_new_from_iterator(texts, vocab_size, new_special_tokens=continuing, show_progress=False)
    return BertTokenizer(vocab=trained.get_vocab())
