"""The text of single tokens, spaces and bytes shown as they are."""

from __future__ import annotations

from typing import Any


class TokenTexts:
    """Texts of token ids by model.

    Parameters
    ----------
    tokenizer : transformers tokenizer, optional
        Used for every model; without it each model's own is looked up on this machine, once, when
        its first token is asked for. Nothing is downloaded.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self._given = _Vocabulary(tokenizer) if tokenizer is not None else None
        self._found: dict[str, _Vocabulary | None] = {}

    def of(self, source: str, token_id: int) -> str | None:
        """Text of a token of the model that came from `source`; None where unknown."""
        vocabulary = self._given
        if vocabulary is None:
            if source not in self._found:
                self._found[source] = _look_up(source)
            vocabulary = self._found[source]
        return None if vocabulary is None else vocabulary.text(token_id)


class _Vocabulary:
    """One tokenizer's pieces, each turned to text once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._is_byte_level = _is_byte_level(tokenizer)
        self._texts: dict[int, str | None] = {}

    def text(self, token_id: int) -> str | None:
        if token_id not in self._texts:
            self._texts[token_id] = self._make(token_id)
        return self._texts[token_id]

    def _make(self, token_id: int) -> str | None:
        try:
            piece = self._tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, ValueError, OverflowError):
            piece = None
        if not isinstance(piece, str):
            return None
        if token_id in self._special:
            return piece
        if self._is_byte_level and all(char in BYTE_OF_CHAR for char in piece):
            return show_bytes(bytes(BYTE_OF_CHAR[char] for char in piece))
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")


def _look_up(source: str) -> _Vocabulary | None:
    if not source:
        return None
    from transformers import AutoTokenizer

    try:
        return _Vocabulary(AutoTokenizer.from_pretrained(source, local_files_only=True))
    except Exception:  # noqa: BLE001 - a tokenizer is a comfort: the trace is whole without texts
        return None


def _is_byte_level(tokenizer: Any) -> bool:
    # Byte-level BPE writes a space as this letter and has a piece for each byte.
    space = tokenizer.convert_tokens_to_ids("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}")
    if not isinstance(space, int) or space == tokenizer.unk_token_id:
        return False
    return bool(tokenizer.decode([space]) == " ")


def show_bytes(raw: bytes) -> str:
    """UTF-8 as text; bytes that are not valid UTF-8 by themselves as `<0xE2>`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("utf-8", errors="surrogateescape").translate(_ESCAPED)


#: What `surrogateescape` makes of a byte that is no UTF-8.
_ESCAPED = {0xDC00 + byte: f"<0x{byte:02X}>" for byte in range(0x80, 0x100)}


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for 256 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


BYTE_OF_CHAR = _byte_of_char()
