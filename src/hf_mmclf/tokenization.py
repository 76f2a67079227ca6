"""A tokenizer from the Hub, a folder, a vocabulary file, or trained on the captions: with or without a download."""

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase


def load_tokenizer(
    source: str, texts: Iterable[str] = (), vocab_size: int = 8000
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

    Raises:
        `ValueError`: no captions to train on, or a vocabulary file without BERT's special tokens.
        `OSError`: a name that is neither a file, a folder nor on the Hub.
    """
    path = Path(source)
    if source == "train":
        texts = list(texts)
        if not texts:
            raise ValueError("tokenizer 'train' needs captions, but the training rows have none")
        tokenizer = BertTokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)
        return tokenizer, f"word pieces trained on {len(texts):,} training captions ({len(tokenizer):,} tokens)"
    if path.is_file():
        words = path.read_text(encoding="utf-8").splitlines()
        missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token not in words]
        if missing:
            raise ValueError(f"{source}: no vocabulary of word pieces: {', '.join(missing)} missing")
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        return tokenizer, f"word pieces of {path.name} ({len(tokenizer):,} tokens)"
    tokenizer = AutoTokenizer.from_pretrained(source)
    return tokenizer, f"{path.name if path.is_dir() else source} ({len(tokenizer):,} tokens)"
