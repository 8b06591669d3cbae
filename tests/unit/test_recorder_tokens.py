"""Texts of single tokens."""

# "bos_token" is no password, whatever its name says.
# ruff: noqa: S106

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvtrace_recorder.tokens.texts import BYTE_OF_CHAR, TokenTexts, show_bytes


def byte_level() -> Any:
    vocabulary = {char: index for index, char in enumerate(BYTE_OF_CHAR)}
    vocabulary |= {"\u0120t": 256, "\u0120the": 257, "<s>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u0120", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def sentence_piece() -> Any:
    vocabulary = {"<unk>": 0, "<s>": 1, "<0xE2>": 2, "\u2581the": 3, "ing": 4, "\n": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def test_byte_level_pieces_show_spaces_newlines_and_bytes() -> None:
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)

    def text(*pieces: str) -> list[str | None]:
        return [texts.of("", tokenizer.convert_tokens_to_ids(piece)) for piece in pieces]

    assert text("\u0120the", "\u010a", "a") == [" the", "\n", "a"]
    assert text("<s>") == ["<s>"]
    assert text("\u00e2") == ["<0xE2>"]


def test_sentence_pieces_keep_their_leading_space() -> None:
    texts = TokenTexts(sentence_piece())
    assert [texts.of("", i) for i in range(6)] == ["<unk>", "<s>", "<0xE2>", " the", "ing", "\n"]


def test_unknown_ids_and_models_have_no_text(tmp_path: Path) -> None:
    assert TokenTexts(byte_level()).of("", 10_000) is None
    assert TokenTexts().of("", 3) is None
    assert TokenTexts().of(str(tmp_path), 3) is None


def test_a_models_own_tokenizer_is_found_on_disk(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    assert TokenTexts().of(str(tmp_path), 257) == " the"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"abc", "abc"),
        ("\u20ac".encode(), "\u20ac"),
        (b"\xe2\x82", "<0xE2><0x82>"),
        (b"a\xff", "a<0xFF>"),
    ],
)
def test_bytes_are_shown_faithfully(raw: bytes, shown: str) -> None:
    assert show_bytes(raw) == shown
