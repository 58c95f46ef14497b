"""Text to a source: shards of token ids and the manifest that names them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from megatron_davinci.data import finished, tokenize_job
from megatron_davinci.data.encode_part import OnError
from megatron_davinci.data.fast_bpe import Backend, Encoder, choose, first_difference, nasty_texts
from megatron_davinci.data.finished import Tokenized as Tokenized
from megatron_davinci.data.indexed import token_dtype
from megatron_davinci.data.job_plan import Plan, describe
from megatron_davinci.data.jsonl import Fields, document_of
from megatron_davinci.data.manifest import Manifest, Shard, problem_lines
from megatron_davinci.data.proof import NotTheReference, Proof
from megatron_davinci.data.sidecar import write_sidecars
from megatron_davinci.data.text_inputs import PIECE_BYTES, Piece, find, pieces_of, read
from megatron_davinci.data.tokenize_job import Job, Progress, clear, keep_tokenizer, opened
from megatron_davinci.data.tokenize_worker import Hands, InProcess, Processes
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.files import disk_errors, fsync_folder
from megatron_davinci.platform.cores import usable_cores

SHARD_TOKENS = 1_000_000_000
LONGEST_PACKED = 1 << 24  # packing has a list for each room that a sequence may have left
# Below this a job takes less time than starting processes.
ALONE_BYTES = 8 << 20
# The sample on which encoders are compared: so many pieces, so many characters of each.
SAMPLE_PIECES = 32
SAMPLE_CHARACTERS = 16_000


@dataclass(frozen=True)
class Options:
    """What decides the result of a job beside its inputs and its tokenizer.

    Attributes:
        fields: What records' fields are called. With fields of question and answer there is a mask.
        shard_tokens: A shard is closed before the document that would make it longer. A document is never parted:
            one that is longer than this is a shard by itself. Shuffled shards have about this many.
        append_eod: End each document with the end-of-document token.
        keep_empty: An empty text is a document without tokens, and not passed over.
        shuffle: Seed of a global order of documents; None keeps theirs.
        pack: Sequence length for best-fit packing (`data.packing`); None puts documents one after the other.
        dtype: Of the tokens; by default the narrowest that holds the vocabulary.
    """

    fields: Fields = field(default=Fields())
    shard_tokens: int = SHARD_TOKENS
    append_eod: bool = True
    keep_empty: bool = False
    shuffle: int | None = None
    pack: int | None = None
    dtype: str | None = None

    def check(self) -> None:
        """Raise if they are impossible.

        Raises:
            ConfigError: One is out of range, or two do not go together.
        """
        if self.shard_tokens < 1:
            raise ConfigError(
                "A shard holds at least one token.", where="shard_tokens", found=self.shard_tokens
            )
        if self.pack is not None and not 2 <= self.pack <= LONGEST_PACKED:
            raise ConfigError(
                "A packed sequence holds at least two tokens, and not more than a machine packs.",
                where="pack",
                found=self.pack,
                expected=f"2 to {LONGEST_PACKED:,}: the configuration's sequence_length",
            )
        if (self.fields.prompt is None) != (self.fields.response is None):
            raise ConfigError(
                "Questions have answers.",
                where="prompt_field, response_field",
                found=f"{self.fields.prompt!r}, {self.fields.response!r}",
                expected="the names of both fields, or of none",
            )


def tokenize(
    inputs: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    out_folder: Path,
    name: str,
    domain: str,
    options: Options | None = None,
    *,
    workers: int | None = None,
    backend: Backend = "auto",
    on_error: OnError = "stop",
    restart: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Tokenized:
    """Writes `out_folder/manifest.json` and `out_folder/shard-NNNNN.{bin,idx}` (and `.mask`) from text files.

    The bytes do not depend on `workers`. Work lies in a folder beside `out_folder` that is renamed to it at the end,
    so that `out_folder` is never there in part; if the job ends before, the same call goes on where it was. Memory
    is that of a batch of texts for each worker, or of the longest document.

    Args:
        inputs: Files or patterns, in order: JSON lines, plain, `.gz` or `.zst`, or Parquet.
        tokenizer: What encodes the texts; its digest is in the manifest.
        out_folder: The folder to make. It may exist if it is empty; a link is followed.
        name: The source's name, for the manifest.
        domain: The domain that reports group it by, for the manifest.
        options: What decides the result.
        workers: Processes; by default one for each core, and none beside this for small inputs.
        backend: `auto` takes gigatoken if it can, and if it gives the ids of `tokenizers` on a sample of these very
            documents and on strings known to be hard.
        on_error: `stop` at a bad record, or `skip` it, count it and keep it in `quarantine.jsonl`.
        restart: Do away with what an unfinished job has left.
        progress: Called with the bytes of input that this call has read, and how many it has to read.
        say: Told in one line what a user should know; by default it goes to standard error.

    Returns:
        What was made.

    Raises:
        ConfigError: The options are impossible, their dtype does not hold the vocabulary, or `backend` is
            `gigatoken` and does not know this tokenizer.
        DataError: A record is bad (the error names file and line), or an input was changed meanwhile; there is no
            document, or no question with its answer where fields of both were named; `out_folder` has something in
            it, or an unfinished job there is another one.
        EnvironmentProblem: The disk is full or failing, a library is missing, or a worker died.
    """
    options = options or Options()
    options.check()
    if workers is not None and workers < 1:
        raise ConfigError("A job needs a worker.", where="--workers", found=workers, expected="1 or more")
    say = say or (lambda line: print(line, file=sys.stderr))
    if not out_folder.name:
        raise DataError(
            "The place for a source has no name.",
            where=out_folder,
            expected="a folder that can be made, such as data/web",
        )
    if out_folder.is_symlink():
        # A folder cannot take a link's name, and the link may lead to another disk.
        out_folder = Path(os.path.realpath(out_folder))
    folder = out_folder.with_name(f".{out_folder.name}.tokenizing")
    files = find(inputs)
    dtype = token_dtype(options.dtype, tokenizer.vocab_size)
    done = finished.found(folder, out_folder, name, domain, _plan(files, tokenizer, "", dtype, options))
    if done is not None:
        with opened(folder, restart=False):
            finished.remove(folder)
        return done
    if out_folder.exists() and not (out_folder.is_dir() and not any(out_folder.iterdir())):
        raise DataError(
            "The place for a source is taken.",
            where=out_folder,
            expected="a path where nothing is, or an empty folder",
            do="choose another folder, or remove this one",
        )
    if os.path.ismount(out_folder):
        raise DataError(
            "A source cannot have the place of a disk that is mounted.",
            where=out_folder,
            do=f"choose a folder on that disk, such as {out_folder / name}",
        )
    empty = _empty_manifest(name, domain, tokenizer, dtype, options)
    pieces = [piece for file in files for piece in pieces_of(file, options.fields, PIECE_BYTES)]
    if workers is None:
        small = sum(piece.size for piece in pieces) < ALONE_BYTES
        workers = 1 if small else usable_cores()
    workers = min(workers, len(pieces))
    work = _Work(folder, tokenizer, backend, pieces, options, workers, on_error, progress, say)
    with opened(folder, restart):
        # A job that goes on trusts its encoder only after it has been compared once more.
        begun = (folder / "plan.json").exists()
        try:
            keep_tokenizer(folder, tokenizer)
            encoder, shards = work.done(
                lambda encoder: _plan(files, tokenizer, encoder, dtype, options), at_once=not begun
            )
            job = work.job
            assert job is not None
            if not shards:
                raise DataError(
                    f"The domain {domain!r} has no documents.",
                    where="\n".join(map(str, files)) or "no input files",
                    found="no line with a text",
                    expected="at least one document",
                    do="check the input files and the field's name",
                )
            if options.fields.prompt is not None and all(part.pairs == 0 for part in job.parts.values()):
                work.worthless, begun = True, False
                raise _no_pairs(files, options.fields)
            manifest = Manifest(**{**dict(empty), "shards": tuple(shards)})
            job.plan.refuse_changed_inputs()
            bad, cut = job.write_quarantine(folder / "out" / tokenize_job.QUARANTINE)
            if options.pack is None and not options.keep_empty:
                write_sidecars(folder / "out", manifest, pieces, options.fields, options.shuffle)
            manifest.save(folder / "out")
            made = Tokenized(manifest, encoder, sum(part.empty for part in job.parts.values()), bad, cut)
            finished.note(folder, job.plan, made)
            with disk_errors(out_folder, "naming a source"):
                fsync_folder(folder / "out")
                os.replace(folder / "out", out_folder)
                fsync_folder(out_folder.parent)
        except BaseException:
            work.close()  # before what it writes into goes
            if not begun and not work.has_made_something:
                shutil.rmtree(folder, ignore_errors=True)
            elif work.job is not None:
                say(f"Finished work is kept in {folder}; the same command goes on from there.")
            raise
        finally:
            work.close()
        finished.remove(folder)
    return made


@dataclass
class _Work:
    """What is done in a job's folder, which is locked: by whom, and by which encoder."""

    folder: Path
    tokenizer: Tokenizer
    backend: Backend
    pieces: Sequence[Piece]
    options: Options
    workers: int
    on_error: OnError
    progress: Progress | None
    say: Callable[[str], None]
    job: Job | None = None
    worthless: bool = False
    _pool: InProcess | Processes | None = None
    _proof: Proof | None = None

    def done(self, plan_by: Callable[[str], Plan], *, at_once: bool) -> tuple[str, list[Shard]]:
        """Make the shards, by an encoder that gives the reference's ids.

        Args:
            plan_by: The plan of the job with an encoder of this name.
            at_once: The encoder may be compared with the reference while it is used.

        Returns:
            The encoder's name, and the shards.
        """
        if self.workers > 1:
            # They get ready meanwhile.
            self._pool = Processes(self.folder, self.workers, self.tokenizer, self.backend)
        encoder, reason = choose(self.tokenizer, self.backend)
        if reason is not None:
            self.say(reason)
        try:
            if encoder.name.startswith("gigatoken"):
                compare = partial(_difference, encoder, self.tokenizer, self.pieces, self.options.fields)
                if at_once and self.workers > 1:
                    self._proof = Proof(self.folder, compare)
                elif (difference := compare()) is not None:
                    raise NotTheReference(difference)
            return encoder.name, self._run(encoder, plan_by)
        except NotTheReference as error:
            self._proof = None
            if self.backend == "gigatoken":
                self.job = None
                raise DataError(
                    "gigatoken does not give the reference's ids.",
                    found=error,
                    do="use --backend tokenizers",
                ) from None
            self.say(f"{error} Encoding by tokenizers, which is many times slower.")
        if self.job is not None:
            self.close()
            clear(self.folder)
            keep_tokenizer(self.folder, self.tokenizer)
            self._pool = Processes(self.folder, self.workers, self.tokenizer, "tokenizers")
        encoder = choose(self.tokenizer, "tokenizers")[0]
        return encoder.name, self._run(encoder, plan_by)

    def _run(self, encoder: Encoder, plan_by: Callable[[str], Plan]) -> list[Shard]:
        kind: Backend = "gigatoken" if encoder.name.startswith("gigatoken") else "tokenizers"
        self.job = Job(self.folder, plan_by(encoder.name), self.pieces)
        if self._pool is None:
            self._pool = InProcess(Hands(self.folder, self.tokenizer, encoder))
        return self.job.run(self._pool, kind, self.on_error, self.progress, self._proof)

    @property
    def has_made_something(self) -> bool:
        """Whether there is a part that is worth keeping."""
        if self.worthless or self.job is None:
            return False
        if not any(part.documents for part in self.job.parts.values()):
            return False
        if self._proof is not None:
            try:
                self._proof.look(wait=True)
            except NotTheReference:
                return False
        return True

    def close(self) -> None:
        """End who is at work."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _empty_manifest(
    name: str, domain: str, tokenizer: Tokenizer, dtype: np.dtype, options: Options
) -> Manifest:
    """The manifest before there is a shard: a name that it cannot have is to cost nobody a job."""
    try:
        return Manifest(
            name=name,
            domain=domain,
            dtype=dtype.name,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id if options.append_eod else None,
            tokenizer_sha256=tokenizer.sha256,
            shards=(),
            packed=options.pack,
        )
    except ValidationError as error:
        raise ConfigError(
            "A source cannot have this manifest.",
            where="name, domain",
            found="\n".join(problem_lines(error)),
            do="name both, in characters of Unicode",
        ) from error


def _no_pairs(files: Sequence[Path], fields: Fields) -> DataError:
    """What is wrong where all would carry loss, and somebody has said which tokens are to carry none."""
    return DataError(
        "No record is a question with its answer.",
        where="\n".join(map(str, files)),
        found=f"no record with the fields {fields.prompt!r} and {fields.response!r}",
        expected="at least one, beside plain text if that is mixed in",
        do="name the fields by --prompt-field and --response-field; for plain text leave both out",
    )


def _plan(
    files: Sequence[Path], tokenizer: Tokenizer, encoder: str, dtype: np.dtype, options: Options
) -> Plan:
    return Plan(
        inputs=[describe(file) for file in files],
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod_token=tokenizer.eod_token,
        eod_id=tokenizer.eod_id,
        encoder=encoder,
        dtype=dtype.name,
        fields=options.fields,
        shard_tokens=options.shard_tokens,
        piece_bytes=PIECE_BYTES,
        append_eod=options.append_eod,
        keep_empty=options.keep_empty,
        shuffle=options.shuffle,
        pack=options.pack,
    )


def _difference(
    encoder: Encoder, tokenizer: Tokenizer, pieces: Sequence[Piece], fields: Fields
) -> str | None:
    """Where an encoder differs from the reference on a sample of the input or on hard strings; None if nowhere."""
    places, texts = _sample(pieces, fields)
    hard = nasty_texts(tokenizer)
    difference = first_difference(encoder, tokenizer, texts + hard)
    if difference is None:
        return None
    at = difference.text
    where = (
        places[at] if at < len(places) else f"built-in string {at - len(places)} {(texts + hard)[at][:20]!r}"
    )
    return (
        f"{encoder.name} differs from tokenizers at {where}, character {difference.character}: "
        f"id {difference.found} against {difference.expected}."
    )


def _sample(pieces: Sequence[Piece], fields: Fields) -> tuple[list[str], list[str]]:
    """Texts from all over the input, and where each is from."""
    places: list[str] = []
    texts: list[str] = []
    step = max(1, -(-len(pieces) // SAMPLE_PIECES))
    for piece in pieces[::step]:
        left = SAMPLE_CHARACTERS
        for record in read(piece, fields):
            if left <= 0 or isinstance(record.content, DataError):
                break
            where = f"{piece.path}, {record.number} from {piece.first:,} on"
            try:
                document = document_of(record.content, fields, where)
            except DataError:
                continue  # the job meets it again, and says so
            for text in (document.text, document.response):
                if text:
                    places.append(where)
                    texts.append(text[:left])
                    left -= len(text)
                    if left <= 0:
                        break
    return places, texts


def tokenize_jsonl(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    out_folder: Path,
    name: str,
    domain: str,
    text_field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> Manifest:
    """`tokenize` of plain text with few options.

    Raises:
        ConfigError: As `tokenize`.
        DataError: As `tokenize`.
        EnvironmentProblem: As `tokenize`.
    """
    options = Options(Fields(text_field), shard_tokens)
    return tokenize(inputs, tokenizer, out_folder, name, domain, options, progress=progress).manifest
