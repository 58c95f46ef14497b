"""Steps that ask a model: many documents at a time, each answer kept on disk before it is used, order as it was.

Such a step is a pure function of the document and of the answers in its file: what a run was stopped over and asked
again gives the same documents, and a document's life is told again from the file, without the model.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar, NamedTuple

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin import forms, provenance
from megatron_davinci.darwin.answers import Answer, Answers, question_key
from megatron_davinci.darwin.chunks import Measure, characters
from megatron_davinci.darwin.endpoint import Client, Endpoint, Trouble, api_key
from megatron_davinci.darwin.prompts import Prompt, load_prompt, mark_for
from megatron_davinci.darwin.step import Outcome, Step, StepParameters
from megatron_davinci.darwin.watching import Note

# Counts of steps that say by name what was not used.
_JUDGED = ("unused answers/", "pairs/", "answers/", "dialogues/", "checks/", "worlds/", "aims/")
_HELD = 16_000_000  # characters of documents that wait for answers, beyond which no further one is taken


class AskingParameters(StepParameters):
    """What every step takes that asks a model.

    Attributes:
        endpoint: The model.
        prompt: Name of a prompt, or a prompt file (`.yaml`).
        answers: File of the answers, on a local disk. Recipes may share one.
        tries: Most answers to one question that are judged; each further one has another seed.
    """

    endpoint: Endpoint
    prompt: str
    answers: Path = Path("answers.sqlite")
    tries: int = Field(default=2, gt=0)


class Expected(NamedTuple):
    """A question that a step will ask about a document, before any is asked.

    Attributes:
        kind: Questions of one kind have answers of like length.
        messages: Of the chat.
        passage: The text that it is about.
        share: Tokens of the answer for one of the passage, where none is known; a supposition.
        times: How many there will be of it, about.
        supposed: Whether its words are a supposition too: it has answers in it that nobody has given yet.
        form: Of the answer, as the step tells it to a server that holds answers to one; None for none.
    """

    kind: str
    messages: list[dict[str, Any]]
    passage: str
    share: float
    times: float = 1.0
    supposed: bool = False
    form: str | None = None


class StreamStep(Step):
    """A step that sees documents as a stream, and hands them on in order when they are done.

    Attributes:
        processes: Among which limits are divided; set before the step is opened.
        told: File to write down in how far it is; set likewise; None for none.
        which: 1, and one more for each step of its name before it in the recipe that looks at a source which it
            looks at; what the step makes is named by it.
    """

    processes: int = 1
    told: Path | None = None
    which: int = 1

    def apply_all(
        self, documents: Iterator[Document], looks_at: Callable[[Document], bool]
    ) -> Iterator[tuple[Document, Outcome | None]]:
        """Every document in order, with what the step says of it; None for one that it does not look at."""
        raise NotImplementedError

    def derived(
        self,
        document: Document,
        name: str,
        text: str,
        notes: dict[str, Any],
        source: str | None,
        fields: dict[str, Any] | None = None,
        kept: Sequence[str] = ("licence", "labels"),
    ) -> Document:
        """A document that the step made of another one, with the history of that and the step's own entry.

        Args:
            document: That one.
            name: Follows its identifier; behind a number where the step is not the first of its name.
            text: What was made.
            notes: For the entry, behind the identifier of what it was made of.
            source: That it is written as; None for the document's.
            fields: Further fields of the record.
            kept: Fields that it takes over, where they are there.
        """
        metadata = document.metadata
        made = Document(
            text=text,
            id=f"{document.id}/{name}" if self.which == 1 else f"{document.id}/{self.which}-{name}",
            metadata={
                **{key: metadata[key] for key in kept if key in metadata},
                "source": source or metadata["source"],
                **(fields or {}),
                "darwin": copy.deepcopy(metadata["darwin"]),
            },
        )
        provenance.append(
            made,
            {
                "name": self.name, "level": self.level, "version": self.version, "parameters": self.hash,
                "model": self.model, "result": "made", "sha": provenance.text_hash(text),
                "characters": len(text), "notes": {"of": document.id, **notes},
            },
        )  # fmt: skip
        return made

    def requests(self) -> dict[str, int]:
        """Requests by what came of them, which differ from run to run."""
        raise NotImplementedError


class Asking(StreamStep):
    """Asks a model. Sub-classes write `process`.

    Attributes:
        tasks: Of prompts that the step can use.
        asks_all: Whether it asks for all of its tries, and not for the next one where an answer is unusable.
    """

    edits = True
    asks_all: ClassVar[bool] = False
    tasks: ClassVar[frozenset[str]]
    parameters: AskingParameters
    _client: Client | None = None
    _answers: Answers | None = None
    _fixed: Prompt | None = None

    @property
    def prompt(self) -> Prompt:
        """The prompt, read once."""
        if self._fixed is None:
            self._fixed = load_prompt(self.parameters.prompt, self.base, self.tasks)
        return self._fixed

    def check(self) -> None:
        """Read the prompt, and look for the key.

        Raises:
            ConfigError: A prompt cannot be used, or there is no key.
        """
        _ = self.prompt
        api_key(self.parameters.endpoint)

    def files(self) -> dict[str, Any]:
        """The wording of the prompt in place of its name, and of the endpoint only what decides answers."""
        return {"prompt": self.prompt.described, "endpoint": self.parameters.endpoint.decides}

    def whereabouts(self) -> dict[str, Any]:
        """Where the model was, and its answers are."""
        return {"url": self.parameters.endpoint.url, "answers": str(self.parameters.answers.absolute())}

    def undecided(self) -> set[str]:
        """Parameters that decide nothing."""
        return {"sources", "answers"}

    @classmethod
    def restored(cls, settings: dict[str, Any], whereabouts: dict[str, Any]) -> Asking:
        """The step that a corpus's manifest describes, with the answers that it had."""
        described, where = settings["prompt"], dict(whereabouts)
        endpoint = {"url": where.pop("url"), **settings["endpoint"]}
        known = {name: value for name, value in settings.items() if name in cls.Parameters.model_fields}
        given = {**known, "prompt": described["name"], "endpoint": endpoint, **where}
        step = cls(cls.Parameters.model_validate(given))
        step._fixed = Prompt(**described)
        return step

    def find_model(self) -> str:
        """As the server calls it."""
        return self.parameters.endpoint.model

    def open(self) -> None:
        """Start the loop that asks."""
        self._begin(asks=True)

    def _begin(self, asks: bool) -> None:
        self._note = Note(self.told if asks else None)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def begin() -> None:
            self._answers = Answers(self.parameters.answers, read_only=not asks)
            self._client = Client(self.parameters.endpoint, self.processes) if asks else None
            self._waiting: dict[bytes, asyncio.Task[Answer]] = {}

        try:
            self._submit(begin()).result()
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Give up what is still asked, and let go of the file."""

        async def end() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._client is not None:
                await self._client.close()
            if self._answers is not None:
                self._answers.close()

        self._submit(end()).result()
        self._end()
        self._note.write()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def apply(self, document: Document) -> Outcome:
        """One document by itself."""
        outcome: Outcome = self._submit(self.process(document)).result()
        return outcome

    def replay(self, document: Document) -> Outcome:
        """One document by the answers that are there, without the model.

        A question without an answer has none, as it had when the document was made; the text's hash tells if not.
        """
        self._begin(asks=False)
        try:
            return self.apply(document)
        finally:
            self.close()

    def apply_all(
        self, documents: Iterator[Document], looks_at: Callable[[Document], bool]
    ) -> Iterator[tuple[Document, Outcome | None]]:
        """All documents in order, a few of which are asked about at a time."""
        waiting: deque[tuple[Document, Future[Outcome] | None]] = deque()
        held, most = 0, 2 * self.parameters.endpoint.concurrency
        for document in documents:
            waiting.append(
                (document, self._submit(self._processed(document)) if looks_at(document) else None)
            )
            held += len(document.text)
            while waiting and (held > _HELD or len(waiting) > most or _is_done(waiting[0][1])):
                done, future = waiting.popleft()
                held -= len(done.text)
                yield done, None if future is None else future.result()
        for done, future in waiting:
            yield done, None if future is None else future.result()

    async def _processed(self, document: Document) -> Outcome:
        outcome = await self.process(document)
        unused = {
            f"unused/{key.partition('/')[2]}": count
            for key, count in (outcome.counts or {}).items()
            if key.startswith(_JUDGED) and not key.endswith("/accepted")
        }
        self._note.add({"characters": len(document.text), **unused})
        return outcome

    def requests(self) -> dict[str, int]:
        """Requests of this process."""
        return {} if self._client is None else dict(self._client.counts)

    async def process(self, document: Document) -> Outcome:
        """What the step says of a document."""
        raise NotImplementedError

    def expected(self, document: Document) -> Iterator[Expected]:
        """The questions that it will ask about a document, in their first try."""
        raise NotImplementedError

    def suppose(self, document: Document) -> None:
        """Give a document a text to plan further steps by, where the one that it has is none."""

    async def answer(
        self,
        messages: list[dict[str, Any]],
        attempt: int,
        spent: Counter[str],
        form: str | None = None,
    ) -> Answer:
        """The answer to a question: the one on disk, or one that lies there before it is returned.

        Args:
            messages: Of the chat.
            attempt: The try at the same question, from 0 on.
            spent: Counts of tokens, which the answer's are added to.
            form: Regular expression of an answer that can be read, for servers that hold answers to one.

        Raises:
            Trouble: There is none.
        """
        endpoint = self.parameters.endpoint
        asked = {"messages": messages, "attempt": attempt, **endpoint.fields_of(form)}
        key = question_key({**endpoint.decides, **asked})
        assert self._answers is not None
        found = self._answers.get(key)
        if found is None:
            if self._client is None:
                raise Trouble("no_answer", "the file of answers has none")
            task = self._waiting.get(key)
            if task is None:  # who asks the same meanwhile waits for it
                task = self._waiting[key] = asyncio.ensure_future(self._ask(key, messages, attempt, form))
                task.add_done_callback(lambda _: self._waiting.pop(key, None))
            found = await asyncio.shield(task)
        else:
            self._note.add({"known": 1})
        spent["prompt_tokens"] += found.prompt_tokens
        spent["completion_tokens"] += found.completion_tokens
        return found

    async def _ask(
        self, key: bytes, messages: list[dict[str, Any]], attempt: int, form: str | None
    ) -> Answer:
        assert self._client is not None and self._answers is not None
        try:
            answer = self._answers.put(key, await self._client.ask(messages, attempt, form))
        finally:
            troubles = {kind: count for kind, count in self._client.counts.items() if kind != "answered"}
            self._note.counts |= Counter({f"trouble/{kind}": count for kind, count in troubles.items()})
        tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        self._note.add({"answered": 1, **tokens})
        return answer

    async def tagged(
        self, text: str, attempt: int, spent: Counter[str], form: str = forms.ANY, **slots: str
    ) -> tuple[str | None, str]:
        """The answer to the step's prompt about a text, out of its tags, between which `form` says what may stand; or
        None, and why.
        """
        mark = mark_for(text, *slots.values())
        messages = self.prompt.messages(passage=text, mark=mark, **slots)
        try:
            answer = await self.answer(messages, attempt, spent, forms.within(mark, form))
        except Trouble as trouble:
            return None, trouble.kind
        return between(answer, mark)


def between(answer: Answer, mark: str) -> tuple[str | None, str]:
    """What stands between an answer's last pair of tags, after any thinking aloud; or None, and why not."""
    if answer.finish == "length":
        return None, "cut_off"
    begin, end = answer.text.rfind(f"<{mark}>"), answer.text.rfind(f"</{mark}>")
    if begin < 0 or end < begin:
        return None, "no_tags"
    return answer.text[begin + len(mark) + 2 : end].strip(), ""


def _is_done(future: Future[Outcome] | None) -> bool:
    return future is None or future.done()


def measure_of(tokenizer: Path | None) -> Measure:
    """Tokens by a tokenizer, or characters."""
    if tokenizer is None:
        return characters
    from megatron_davinci.data.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)

    def tokens(texts: Sequence[str]) -> Sequence[int]:
        return [len(ids) for ids in loaded.encode_batch(list(texts))]

    return tokens
