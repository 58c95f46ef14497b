"""The tokenizer: byte-level BPE in Qwen2's manner, trained here or loaded from a `tokenizer.json`.

Qwen2's tokenizer (Qwen2 Technical Report, arXiv:2407.10671, section 2.1; its published `tokenizer.json`) is NFC,
a split by the regular expression below, and byte-level BPE, so that there is no text that it cannot write.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_davinci.data.jsonl import Fields
from megatron_davinci.data.text_inputs import read_documents
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.files import write_atomically, write_json

EOD = "<|endoftext|>"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALLEST_VOCABULARY = 256 + 1  # every byte, and the end of a document


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Made by `Tokenizer.load`.

    Attributes:
        vocab_size: The largest id plus 1, added tokens included: what an embedding must hold.
        eod_id: The id that ends a document.
        sha256: Of the bytes of `tokenizer.json`, in hexadecimal.
        content: Those bytes.
        own_end: Whether `eod_id` is the tokenizer's own end, and not one that a user or a source has named.
    """

    vocab_size: int
    eod_id: int
    sha256: str
    _backend: tokenizers.Tokenizer = field(repr=False, compare=False)
    content: bytes = field(default=b"", repr=False, compare=False)
    own_end: bool = True

    @property
    def eod_token(self) -> str:
        """The name of the token that ends a document."""
        name = self._backend.id_to_token(self.eod_id)
        assert name is not None  # `load` has looked it up
        return name

    @classmethod
    def load(cls, path: Path, eod_token: str | None = None, *, eod_id: int | None = None) -> Tokenizer:
        """Loads `tokenizer.json`, or the one in a folder; nothing is downloaded.

        Args:
            path: The file, or the folder that holds it and perhaps `tokenizer_config.json`.
            eod_token: What ends a document. If not given: `<|endoftext|>` where the vocabulary has it, else
                the `eos_token` of `tokenizer_config.json`.
            eod_id: Its id, in place of its name.

        Raises:
            DataError: The file is missing, is no tokenizer, or has no end-of-document token.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        return cls._of(_bytes_of(file), file, eod_token, eod_id)

    @classmethod
    def _of(cls, raw: bytes, file: Path, eod_token: str | None, wanted_id: int | None = None) -> Tokenizer:
        backend, eod_id = _backend(raw, file, eod_token, wanted_id)
        largest = max(backend.get_vocab(with_added_tokens=True).values())
        return cls(
            largest + 1,
            eod_id,
            hashlib.sha256(raw).hexdigest(),
            backend,
            raw,
            eod_token is None and wanted_id is None,
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text, int32 `[length]`, without an end-of-document token.

        A special token's name that is written in a text is encoded as the characters it consists of. Otherwise
        a web page that mentions `<|endoftext|>` would end the document. Runs on all cores; `TOKENIZERS_PARALLELISM`
        and `RAYON_NUM_THREADS` say otherwise.
        """
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The characters of `text` that each of its tokens stands for: first, and one past the last."""
        spans: list[tuple[int, int]] = self._backend.encode(text, add_special_tokens=False).offsets
        return spans

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name, special ones too; None if there is none of that name."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def decode(self, ids: Sequence[int] | NDArray[np.integer], *, special: bool = True) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: Token ids.
            special: Whether special tokens are in it, by their names.
        """
        text: str = self._backend.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=not special)
        return text


class LateTokenizer:
    """A tokenizer that another process has loaded and checked: loaded here when it is first asked to encode.

    Args:
        file: The `tokenizer.json`.
        vocab_size: What that process has found.
        eod_token: Likewise.

    Attributes:
        vocab_size: The largest id plus 1, added tokens included.
        eod_token: The name of the token that ends a document.
        content: The bytes of the file.

    Raises:
        DataError: The file cannot be read.
    """

    def __init__(self, file: Path, vocab_size: int, eod_token: str) -> None:
        self._file, self.vocab_size, self.eod_token = file, vocab_size, eod_token
        self.content = _bytes_of(file)

    @cached_property
    def _loaded(self) -> Tokenizer:
        return Tokenizer._of(self.content, self._file, self.eod_token)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """As `Tokenizer.encode_batch`."""
        return self._loaded.encode_batch(texts)


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            "The tokenizer cannot be read.",
            where=file,
            found=error.strerror,
            expected="a tokenizer.json of the Hugging Face tokenizers library",
            do="train one, or copy one from a model's folder",
        ) from error


def from_gpt2_files(vocab: Path, merges: Path) -> Tokenizer:
    """The tokenizer of a `vocab.json` and a `merges.txt`, as GPT-2 was published and Megatron-LM takes it.

    Raises:
        DataError: One of them cannot be read, or they do not make a tokenizer with `<|endoftext|>`.
    """
    try:
        model = models.BPE.from_file(os.fspath(vocab), os.fspath(merges))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise DataError(
            "The files of a GPT-2 tokenizer cannot be read.",
            where=f"{vocab}, {merges}",
            found=error,
            expected="vocab.json and merges.txt",
        ) from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if EOD in tokenizer.get_vocab():
        tokenizer.add_special_tokens([tokenizers.AddedToken(EOD, special=True, normalized=False)])
    return Tokenizer._of(tokenizer.to_str().encode(), vocab, EOD)


def _backend(
    raw: bytes, file: Path, eod_token: str | None, wanted_id: int | None
) -> tuple[tokenizers.Tokenizer, int]:
    try:
        content: dict[str, Any] = json.loads(raw)
        added = content.get("added_tokens") or []
        names = {token["content"]: token for token in added}
        tokenizer = tokenizers.Tokenizer.from_str(raw.decode())
    except Exception as error:  # the tokenizers library raises bare Exception
        raise DataError(
            "The tokenizer file is damaged, or is something else.",
            where=file,
            found=f"{type(error).__name__}: {error}",
            expected="a tokenizer.json of the Hugging Face tokenizers library",
            do="copy it again, or train one",
        ) from error
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for token, entry in names.items():
        # The library numbers added tokens anew when the file's ids leave gaps, and so gives an id twice.
        if vocabulary.get(token) != entry.get("id"):
            raise DataError(
                "An added token does not get the id that the tokenizer file says.",
                where=f"{file}, added token {token!r}",
                found=f"id {vocabulary.get(token)} when loaded",
                expected=f"id {entry.get('id')}",
                do="put the token with its id into the model's vocabulary too",
            )
    if wanted_id is not None and (eod_token := tokenizer.id_to_token(wanted_id)) is None:
        eod_token = f"token {wanted_id}"
    name = eod_token or (
        EOD if EOD in vocabulary else _configured_eos(file.with_name("tokenizer_config.json"))
    )
    if name is None or name not in vocabulary:
        raise DataError(
            "The tokenizer has no end-of-document token.",
            where=file,
            found=f"no {name or EOD!r} among its {len(vocabulary)} tokens",
            expected=f"{EOD!r}, or the eos_token that tokenizer_config.json names",
            do="name the token that ends a document",
        )
    if name in names and not names[name].get("special"):
        # An added token that is not special is found in text whatever the settings.
        names[name]["special"] = True
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    eod_id = vocabulary[name]
    if eod_id in tokenizer.encode(name, add_special_tokens=False).ids:
        raise DataError(
            "The end-of-document token is a piece of ordinary text to this tokenizer.",
            where=file,
            found=f"{name!r} in a text becomes id {eod_id}",
            expected="a special token, which no text can contain",
            do="name another token as the end of a document, or add one",
        )
    return tokenizer, eod_id


def _configured_eos(file: Path) -> str | None:
    """`eos_token` of a `tokenizer_config.json`, which writes it as a string or as an added token."""
    try:
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError("The tokenizer_config.json cannot be read.", where=file, found=error) from error
    name = eos.get("content") if isinstance(eos, dict) else eos
    return name if isinstance(name, str) else None


def train_bpe(files: Sequence[Path], vocab_size: int, out: Path, text_field: str = "text") -> Path:
    """Trains a byte-level BPE tokenizer and writes `tokenizer.json` and `tokenizer_config.json` into `out`.

    The same files give the same bytes. `<|endoftext|>` is the only special token and has the last id, as in
    Qwen2. Both files are loaded by `transformers.AutoTokenizer` as they are.

    Args:
        files: JSON lines, plain, `.gz` or `.zst`, or Parquet.
        vocab_size: How many tokens there are in all: 256 bytes, merges, and the end of a document.
        out: The folder to write to; it is made if it is not there.
        text_field: The field that holds the text.

    Returns:
        `out`.

    Raises:
        ConfigError: `vocab_size` is less than 257.
        DataError: A file is not JSONL with texts, or the texts have too few distinct words for `vocab_size`.
        EnvironmentProblem: The disk is full or failing.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            "The vocabulary is too small for byte-level BPE.",
            where="vocab_size",
            found=vocab_size,
            expected=f"at least {SMALLEST_VOCABULARY}: every byte, and the end of a document",
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files, text_field), trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(EOD, special=True, normalized=False)])
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            "The texts are too few for the vocabulary.",
            where=", ".join(map(str, files)) or "no files",
            found=f"{tokenizer.get_vocab_size()} tokens until no pair was left to merge",
            expected=f"vocab_size = {vocab_size}",
            do="give more text, or ask for a smaller vocabulary",
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD,
        "pad_token": EOD,
        "bos_token": None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    write_json(out / "tokenizer_config.json", config)
    write_atomically(out / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    return out


def _texts(files: Sequence[Path], text_field: str) -> Iterator[str]:
    for file in files:
        for document in read_documents(file, Fields(text_field)):
            yield document.text
