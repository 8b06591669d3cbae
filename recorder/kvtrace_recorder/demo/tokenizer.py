"""Train the demo model's tokenizer: byte-level BPE with BOS at the start of every sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS = "<|bos|>"
EOS = "<|eos|>"
VOCAB_SIZE = 4096


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Learn the merges from `texts`.

    Numbers are split into single digits and every byte is in the vocabulary, so any text
    round-trips. BOS (id 0) is put in front by the post-processor; EOS (id 1) ends a document and
    pads a batch.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def encode_stream(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], batch: int = 256
) -> NDArray[np.uint16]:
    """All documents as one stream of ids ``[token]``, each ended by EOS and without BOS."""
    eos = tokenizer.eos_token_id
    pieces: list[NDArray[np.uint16]] = []
    iterator: Iterator[str] = iter(texts)
    while chunk := list(islice(iterator, batch)):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
        pieces += [np.array([*e.ids, eos], dtype=np.uint16) for e in encoded]
    return np.concatenate(pieces)


def save_stream(path: Path, ids: NDArray[np.uint16]) -> None:
    """Write ids so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, ids)
    temporary.replace(path)
