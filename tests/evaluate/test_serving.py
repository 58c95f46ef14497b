"""Our models behind OpenAI's API: the words of the engine, refusals in OpenAI's form, a queue with an end."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from megatron_davinci.cli import serve
from megatron_davinci.cli.convert_to_hf import export
from megatron_davinci.cli.main import main
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.evaluate.endings import ends
from megatron_davinci.evaluate.sampling import Draw, Sampling
from megatron_davinci.evaluate.serving.pieces import Pieces, text_of
from megatron_davinci.evaluate.serving.requests import Refusal, asked
from megatron_davinci.evaluate.serving.server import Server, Settings
from tests.evaluate import models

PROMPTS = [
    "river stone",
    "The lamp",
    "garden winter paper music",
    "b",
    "window bread silver morning letter bridge",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    models.write_run(root)
    return root


def options(model: Path, **changes) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    given = parser.parse_args([str(model), "train.threads=1", "train.precision=fp32", "--port", "0"])
    return argparse.Namespace(**vars(given) | changes)


@contextmanager
def running(writer, **settings) -> Iterator[Server]:
    server = Server(writer, Settings(**{"name": "tiny", "port": 0} | settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(root) -> Iterator[Server]:
    with serve.loaded(options(root / "run")) as (writer, name), running(writer) as server:
        assert name == "run@0"
        yield server


@pytest.fixture(scope="module")
def exported(root) -> Path:
    return export(str(root / "run"), root / "hf", verify=False)


def post(server: Server, path: str = "completions", **body) -> httpx.Response:
    return httpx.post(f"{server.url}/{path}", json={"model": "tiny"} | body, timeout=60)


def completed(server: Server, prompt: str, **more) -> str:
    found = post(server, prompt=prompt, max_tokens=24, **{"temperature": 0} | more).json()
    return found["choices"][0]["text"]


def test_answers_are_the_engines_alone_or_in_company(served):
    writer = served.writer
    ids = [one.tolist() for one in writer.tokenizer.encode_batch(PROMPTS)]
    tokens = writer._engine.generate(
        ids, lambda number, so_far: so_far[-1] == writer.tokenizer.eod_id, [24] * len(ids)
    )
    expected = [writer.tokenizer.decode(one, special=False) for one in tokens]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: completed(served, prompt), PROMPTS)) == expected
    together = post(served, prompt=PROMPTS, max_tokens=24, temperature=0).json()
    assert [choice["text"] for choice in together["choices"]] == expected
    assert together["usage"] == {
        "prompt_tokens": sum(map(len, ids)),
        "completion_tokens": sum(map(len, tokens)),
        "total_tokens": sum(map(len, ids)) + sum(map(len, tokens)),
    }
    said = [
        {"role": "system", "content": "river"},
        {"role": "user", "content": [{"type": "text", "text": "stone"}]},
    ]
    chat = post(served, "chat/completions", messages=said, max_tokens=8, temperature=0).json()
    assert chat["object"] == "chat.completion" and chat["choices"][0]["finish_reason"] == "length"
    [choice] = post(served, prompt="river\n\nstone\n\n", max_tokens=8, temperature=0).json()["choices"]
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": choice["text"]}
    [listed] = httpx.get(f"{served.url}/models").json()["data"]
    assert listed["id"] == "tiny" and listed["max_model_len"] == models.LENGTH


def test_a_text_ends_where_it_was_asked_to(served):
    whole = completed(served, PROMPTS[0])
    stop = whole[5:8]
    [choice] = post(served, prompt=PROMPTS[0], max_tokens=24, temperature=0, stop=[stop, "\0"]).json()[
        "choices"
    ]
    assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"


def of_bytes(folder: Path) -> Tokenizer:
    """A tokenizer with a token for each byte."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def test_a_special_token_ends_a_text_by_its_name(tmp_path):
    tokenizer = of_bytes(tmp_path)
    tokens = [*tokenizer.encode_batch(["ab"])[0].tolist(), tokenizer.id_of("<|im_end|>")]
    assert ends(tokenizer, tokens, ["<|im_end|>"])
    assert text_of(tokenizer, tokens, ["<|im_end|>"]) == ("ab", "stop")
    assert text_of(tokenizer, tokens, ["x"]) == ("ab", "length")


def test_an_export_says_what_its_checkpoint_says(served, exported):
    expected = [completed(served, prompt) for prompt in PROMPTS]
    drawn = completed(served, PROMPTS[2], temperature=1.0, seed=5)
    with serve.loaded(options(exported)) as (writer, name), running(writer) as server:
        assert name == "hf" and writer.longest == models.LENGTH
        found = post(server, prompt=PROMPTS, max_tokens=24, temperature=0).json()["choices"]
        assert [choice["text"] for choice in found] == expected
        assert completed(server, PROMPTS[2], temperature=1.0, seed=5) == drawn


@pytest.mark.parametrize(
    "what,said", [("lacking", "found:    no model.layers.1.mlp"), ("torn", "cannot be loaded")]
)
def test_a_folder_that_lacks_weights_is_not_served(exported, tmp_path, capsys, what, said):
    """transformers would draw them at random."""
    shutil.copytree(exported, tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    if what == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        weights = load_file(path)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, path, metadata={"format": "pt"})
    assert main(["serve", str(tmp_path / "hf"), "--port", "0", "train.threads=1"]) == 2
    assert said in capsys.readouterr().err


def test_a_seed_decides_what_is_drawn(served):
    def drawn(prompt, seed):
        return completed(served, prompt, temperature=1.0, seed=seed)

    alone = [drawn(PROMPTS[2], seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: drawn(PROMPTS[2], seed), range(4))) == alone
    assert len(set(alone)) == 4
    assert completed(served, PROMPTS[2], temperature=1.0, top_p=1e-6) == completed(served, PROMPTS[2])


def test_a_seed_draws_otherwise_for_another_prompt():
    def seeds(**body):
        given = {"model": "m", "max_tokens": 1, **body}
        found = asked(given, False, "m", 99, lambda text: list(text.encode()), lambda body: None)
        return [one.sampling.seed for one in found]

    [one, other, again] = seeds(prompt=["river", "rivers", "river"], seed=7)
    assert one == again != other and [one] == seeds(prompt="river", seed=7) != seeds(prompt="river", seed=8)
    many = seeds(prompt=[f"question {number}" for number in range(400)], seed=0)
    several = seeds(prompt=["river"] * 5)
    assert len(set(several)) == 5 and several != seeds(prompt=["river"] * 5), (
        "without a seed each is drawn anew"
    )
    yes = sum(Draw([Sampling(1.0, 1.0, seed)])([0], torch.zeros(1, 2)).item() for seed in many)
    assert 140 < yes < 260, "of 400 draws of two that are as likely"


def test_tokens_come_as_often_as_they_are_likely():
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draw = Draw([Sampling(1.0, 1.0, 3), Sampling(1.0, 0.75, 3), Sampling(2.0, 1.0, 3), Sampling()])
    rows = shares.log().repeat(4, 1)
    rows[0, 3] = float("-inf")
    found = np.array([draw([0, 1, 2, 3], rows).tolist() for _ in range(2000)])
    frequencies = [np.bincount(found[:, text], minlength=4) / len(found) for text in range(4)]
    hot = shares.sqrt().numpy() / shares.sqrt().sum().item()
    expected = [[0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], [0.625, 0.375, 0, 0], hot, [1, 0, 0, 0]]
    assert np.abs(np.array(frequencies) - expected).max() < 0.04
    rows[1, 0] = float("nan")
    assert draw([0, 1], rows[:2]).tolist()[1] == -1
    least = Draw([Sampling(1e-310, 1.0, seed) for seed in range(8)])
    assert least(range(8), torch.tensor([[5.0, 7.0, 7.0, 1.0]]).repeat(8, 1)).unique().tolist() == [1, 2]


@pytest.mark.parametrize(
    "body,status,param,code",
    [
        ({"prompt": "x", "model": "other"}, 404, "model", "model_not_found"),
        ({"prompt": "river " * 200}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": "x", "max_tokens": 1000}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": ""}, 400, "prompt", None), ({"prompt": 3}, 400, "prompt", None), ({}, 400, "prompt", None),
        ({"prompt": "x", "stream": "yes"}, 400, "stream", None), ({"prompt": "x", "n": 2}, 400, "n", None),
        ({"prompt": "x", "stream": True, "model": "other"}, 404, "model", "model_not_found"),
        ({"prompt": "x", "stream_options": 1}, 400, "stream_options", None),
        ({"prompt": "x", "temperature": 9}, 400, "temperature", None),
        ({"prompt": "x", "seed": "a"}, 400, "seed", None), ({"prompt": "x", "stop": [""]}, 400, "stop", None),
        ({"prompt": "x", "temperature": float("inf")}, 400, "temperature", None),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens", None),
        ({"prompt": "x", "response_format": {"type": "xml"}}, 400, "response_format", None),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, 400, "response_format", None),
        ({"prompt": "x", "structured_outputs": {"regex": "("}}, 400, "structured_outputs", None),
        ({"prompt": "x", "structured_outputs": {"choice": []}}, 400, "structured_outputs", None),
        ({"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}, 400, "structured_outputs", None),
        ({"prompt": "x", "structured_outputs": {"json": {"type": "objekt"}}}, 400, "structured_outputs", None),
        ({"prompt": "x", "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, 400,
         "structured_outputs", None),
        ({"prompt": "x", "top_k": 5}, 400, "top_k", None), ({"prompt": "x", "top_p": 0}, 400, "top_p", None),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(served, body, status, param, code):
    raw = json.dumps({"model": "tiny"} | body)
    found = httpx.post(f"{served.url}/completions", content=raw, timeout=60)
    error = found.json()["error"]
    assert (found.status_code, error["param"], error["code"]) == (status, param, code) and error["message"]
    if code == "context_length_exceeded":
        assert f"context is {models.LENGTH} tokens" in error["message"]


@pytest.mark.parametrize("body", [{"prompt": "a\ud800b"}, {"prompt": "x", "stop": ["\ud83d"]}])
def test_half_a_character_is_refused_and_nobody_else_is_hurt(served, body):
    raw = json.dumps({"model": "tiny"} | body)
    found = httpx.post(f"{served.url}/completions", content=raw, timeout=60)
    assert found.status_code == 400 and "half a surrogate pair" in found.json()["error"]["message"]
    assert completed(served, "x")


def test_bodies_and_paths_that_are_none(served):
    for content in (b"{", b"[1]", b"\xff"):
        found = httpx.post(f"{served.url}/completions", content=content)
        assert found.status_code == 400 and "JSON" in found.json()["error"]["message"]
    assert httpx.post(f"{served.url}/embeddings", json={}).status_code == 404
    assert httpx.get(f"{served.url}/what").status_code == 404
    for messages in (
        [],
        "x",
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": [{"type": "image"}]}],
    ):
        assert post(served, "chat/completions", messages=messages).status_code == 400
    nobody_measured = httpx.post(f"{served.url}/completions", content=iter([b"{}"]))
    assert nobody_measured.status_code == 411
    most = post(
        served, "chat/completions", messages=[{"role": "user", "content": "x"}], max_completion_tokens=0
    )
    assert most.json()["error"]["param"] == "max_completion_tokens"
    for refused in (httpx.put(f"{served.url}/models"), httpx.options(f"{served.url}/models")):
        assert refused.status_code == 501 and "method" in refused.json()["error"]["message"]
    for path in ("models?limit=1", "models/%74iny"):
        assert httpx.get(f"{served.url}/{path}").status_code == 200


def spoken(server: Server, raw: bytes) -> bytes:
    """What the server answers until it closes the connection."""
    with socket.create_connection(server._http.server_address, timeout=30) as connection:
        connection.sendall(raw)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_who_speaks_an_older_http_is_understood(served):
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 2, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    head, _, said = spoken(served, head + body).partition(b"\r\n\r\n")
    assert b"chunked" not in head and said.startswith(b"data: {") and said.endswith(b"data: [DONE]\n\n")
    error = spoken(served, b"POST /v1/completions HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n")
    assert error.startswith(b"HTTP/1.1 411") and b"Connection: close" in error


def events(server: Server, path: str = "completions", **body) -> list[dict]:
    """What is streamed, without the last event, which is that it is done."""
    body = {"model": "tiny", "stream": True} | body
    with httpx.stream("POST", f"{server.url}/{path}", json=body, timeout=60) as response:
        assert response.headers["content-type"] == "text/event-stream"
        parts = response.read().decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""] and all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_pieces_put_together_are_the_answer(served):
    whole = completed(served, PROMPTS[0])
    for more in ({}, {"temperature": 1.0, "seed": 3}, {"stop": [whole[5:8], "\0"]}):
        asked = {"prompt": PROMPTS[:3], "max_tokens": 24, "temperature": 0} | more
        expected, found = (
            post(served, **asked).json(),
            events(served, **asked, stream_options={"include_usage": True}),
        )
        assert found.pop()["usage"] == expected["usage"] and len(found) > 6
        for number, choice in enumerate(expected["choices"]):
            mine = [each["choices"][0] for each in found if each["choices"][0]["index"] == number]
            assert "".join(each["text"] for each in mine) == choice["text"]
            assert [each["finish_reason"] for each in mine][-2:] == [None, choice["finish_reason"]]
    messages = [{"role": "user", "content": "river"}]
    asked = {"messages": messages, "max_tokens": 8, "temperature": 0}
    chat = post(served, "chat/completions", **asked).json()["choices"][0]["message"]
    deltas = [each["choices"][0]["delta"] for each in events(served, "chat/completions", **asked)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == chat["content"]


@pytest.mark.parametrize("until", [[], ["\0"], ["Weg 199"], ["x", "🌧\ufe0f. Weg 3"]])
def test_each_token_of_a_stream_is_decoded_a_few_times_whatever_the_length(tmp_path, monkeypatch, until):
    """A token is a byte: most characters are not whole when it comes, and some never become so."""
    tokenizer = of_bytes(tmp_path)
    end = tokenizer.id_of("<|im_end|>")
    texts = [f"Fluß, 雨, 🌧\ufe0f. Weg {number}" for number in range(200)]
    tokens = [token for ids in tokenizer.encode_batch(texts) for token in [*ids.tolist(), end, ids[4]]]
    whole, finish = text_of(tokenizer, tokens, until)
    decoded, decode = [], Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, **how: decoded.append(len(ids)) or decode(self, ids, **how)
    )
    pieces = Pieces(tokenizer, until)
    found = [pieces.add(token) for token in tokens]
    assert sum(decoded) < 20 * len(tokens)
    rest, ended = pieces.rest()
    assert "".join(found) + rest == whole and ended == finish
    assert sum(map(len, found)) > 0.9 * len(whole) - 20 and "\ufffd" in whole


def test_a_stream_that_fails_says_so_and_is_not_done(served):
    writer = Held(served)
    writer.go.set()
    with running(writer) as server:
        for writer.said in ([5, -1], []):
            found = httpx.post(
                f"{server.url}/completions", json={"model": "tiny", "prompt": "x", "stream": True}
            )
            last = found.text.strip().split("\n\n")[-1]
            assert (
                found.status_code == 200
                and "server_error" in json.loads(last.removeprefix("data: "))["error"]["type"]
            )


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_an_answer_has_the_form_that_it_was_asked_to(served, exported, temperature):
    schema = {"type": "object", "properties": {"a": {"enum": ["river", "stone"]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    forms = [
        ({"structured_outputs": {"regex": r"<t>[a-z ]{3,9}[.?]</t>"}}, r"<t>[a-z ]{3,9}[.?]</t>"),
        ({"structured_outputs": {"choice": ["YES", "NO"]}}, "YES|NO"),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]/ "y"'}}, r"x\dy"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
         r'\s*\{\s*"a"\s*:\s*"(river|stone)"\s*\}\s*'),
    ]  # fmt: skip
    with serve.loaded(options(exported)) as (writer, _), running(writer) as server:
        for form, expected in forms:
            for one in (served, server):
                found = post(
                    one, prompt="river", max_tokens=60, temperature=temperature, seed=1, **form
                ).json()
                [choice] = found["choices"]
                assert re.fullmatch(expected, choice["text"]) and choice["finish_reason"] == "stop"
            if temperature:
                pieces = events(served, prompt="river", max_tokens=60, seed=1, **form)
                whole = post(served, prompt="river", max_tokens=60, seed=1, **form).json()["choices"][0][
                    "text"
                ]
                assert "".join(each["choices"][0]["text"] for each in pieces) == whole


class Held:
    """A writer that writes when it is let, to see what waits meanwhile."""

    def __init__(self, served: Server) -> None:
        self.tokenizer, self.longest, self.forms = served.writer.tokenizer, 64, served.writer.forms
        self.begun, self.go, self.written = threading.Event(), threading.Event(), []
        self.said: list[int] = [5, 6]

    def write(self, asked, told=None):
        self.begun.set()
        self.go.wait(30)
        if told is not None:
            told(0, 5)
        self.written += [one.most for one in asked]
        if not self.said:
            raise RuntimeError("out of memory")
        return [list(self.said) for _ in asked]


def test_no_more_wait_than_agreed_and_who_left_is_not_answered(served):
    writer = Held(served)
    with running(writer, waiting=2, batch=1) as server, ThreadPoolExecutor(8) as pool:
        first = pool.submit(post, server, prompt="x", max_tokens=1)
        assert writer.begun.wait(30)
        place = server._http.server_address
        with socket.create_connection(place) as leaving:
            body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 2}).encode()
            leaving.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            while not server.queue._jobs:
                time.sleep(0.01)
        second = pool.submit(post, server, prompt="x", max_tokens=3)
        while len(server.queue._jobs) < 2:
            time.sleep(0.01)
        never = post(server, prompt=["x"] * 3, max_tokens=4)
        assert never.status_code == 400 and "at most 2 may wait" in never.json()["error"]["message"]
        refused = post(server, prompt="x", max_tokens=4)
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["code"] == "overloaded"
        writer.go.set()
        assert first.result().status_code == second.result().status_code == 200
        assert writer.written == [1, 3], "nobody waited for 2"
        for writer.said, words in (([5, -1], "not numbers"), ([], "out of memory")):
            failed = post(server, prompt="x", max_tokens=5)
            assert failed.status_code == 500 and words in failed.json()["error"]["message"]
        server.stop()
    with pytest.raises(Refusal, match="being stopped"):
        server.queue.put([])


def test_a_key_that_is_asked_for(served):
    with running(Held(served), key="secret", body_bytes=100) as server:
        assert httpx.get(f"{server.url}/models").status_code == 401
        assert post(server, prompt="x").json()["error"]["code"] == "invalid_api_key"
        shown = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{server.url}/models", headers=shown).status_code == 200
        large = httpx.post(f"{server.url}/completions", json={"prompt": "x" * 200}, headers=shown)
        assert large.status_code == 413 and "at most 100" in large.json()["error"]["message"]


def test_the_command_serves_until_it_is_told_to_end(exported, capfd, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    seen = []

    def ask() -> None:
        said, began = "", time.monotonic()
        while "http" not in said and time.monotonic() - began < 60:
            time.sleep(0.05)
            said += capfd.readouterr().out
        url = said.split()[1].rstrip(",")
        seen.append(httpx.get(f"{url}/models", headers={"Authorization": "Bearer secret"}).json())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    words = ["serve", str(exported), "--port", "0", "--name", "mine", "--key-variable", "MY_KEY"]
    assert main([*words, "train.threads=1"]) == 0
    thread.join(10)
    assert seen[0]["data"][0]["id"] == "mine"


@pytest.mark.parametrize(
    "words,said",
    [
        (["--port", "70000"], "0 to 65,535"), (["--batch", "0"], "1 to 4,096"),
        (["parallel.tensor=2"], "has one rank"),
        (["--key-variable", "NO_KEY"], "NO_KEY"), (["model.num_layers=2"], "no such setting"),
        (["train.precision=[x"], "not valid YAML"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(root, capsys, words, said):
    assert main(["serve", str(root / "run"), *words]) == 2
    assert said in capsys.readouterr().err
