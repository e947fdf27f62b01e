"""The simulated engine's text routes: choices, stop sequences, messages, tokens, infill, adapters, for real clients."""

import asyncio
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from sim_engine import Clients, data_of, events_of, get, post, until, with_clients

from mmd.sim.api import RARE
from mmd.sim.text import count_tokens, pieces

SAID = "I am m, a simulated model. You said: hello there"
QUESTION: list[Any] = [{"role": "user", "content": "hello there"}]


def test_choices(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        chat = await clients.openai.chat.completions.create(model="m", messages=QUESTION, n=3, max_tokens=4)
        assert [(choice.index, choice.message.content) for choice in chat.choices] == [(i, "I am m, a") for i in range(3)]
        assert chat.usage is not None
        assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (2, 12)
        done = await clients.openai.completions.create(model="m", prompt=["a b", "c"], n=2, max_tokens=2)
        assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 8)
        texts = {0: "", 1: ""}
        stream = await clients.openai.chat.completions.create(model="m", messages=QUESTION, n=2, stream=True)
        order = []
        async for chunk in stream:
            order.append(chunk.choices[0].index)
            texts[order[-1]] += chunk.choices[0].delta.content or ""
        assert texts == {0: SAID, 1: SAID}
        assert all(one != other for one, other in pairwise(order)), "they are generated side by side"

    with_clients(tmp_path, body)


def test_choices_take_the_time_of_one(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        started = time.monotonic()
        await clients.openai.chat.completions.create(model="m", messages=QUESTION, n=4, max_tokens=6)
        assert 0.28 < time.monotonic() - started < 1

    with_clients(tmp_path, body, "--tokens-per-second", "20")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("simulated", "I am m, a ", "simulated"),
        ([" model. You", "there"], "I am m, a simulated", " model. You"),
        (["ted mo", " a "], "I am m,", " a "),
        (["said: goodbye", "no such words"], SAID, None),
        (["hello there, friend"], SAID, None),
        ([], SAID, None),
    ],
)
def test_stop_sequences(tmp_path: Path, stream: bool, stop: object, text: str, reason: str | None) -> None:
    async def body(clients: Clients) -> None:
        sent = {"messages": QUESTION, "stop": stop, "stream": stream, "stream_options": {"include_usage": True}}
        async with clients.http.post("/v1/chat/completions", json=sent) as answer:
            if stream:
                chunks = [json.loads(data) for data in (await data_of(answer))[:-1]]
                choices = [chunk["choices"][0] for chunk in chunks[:-1]]
                assert "".join(choice["delta"].get("content", "") for choice in choices) == text
                last, usage = choices[-1], chunks[-1]["usage"]
            else:
                found = await answer.json()
                last, usage = found["choices"][0], found["usage"]
                assert last["message"]["content"] == text
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", reason)
        assert usage["completion_tokens"] >= len(text.split())

    with_clients(tmp_path, body)


def test_messages(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        messages = clients.anthropic.messages
        whole = await messages.create(model="m", max_tokens=100, messages=QUESTION, system="Be brief.")
        assert [(block.type, block.text) for block in whole.content if block.type == "text"] == [("text", SAID)]
        assert (whole.stop_reason, whole.usage.input_tokens, whole.usage.output_tokens) == ("end_turn", 4, 10)
        cut = await messages.create(model="m", max_tokens=3, messages=QUESTION)
        assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
        stopped = await messages.create(model="m", max_tokens=100, messages=QUESTION, stop_sequences=["simulated"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "simulated")
        async with messages.stream(model="m", max_tokens=100, messages=QUESTION) as stream:
            assert "".join([text async for text in stream.text_stream]) == SAID
            final = await stream.get_final_message()
        assert (final.stop_reason, final.usage.input_tokens, final.usage.output_tokens) == ("end_turn", 2, 10)
        result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "it rains"}]}
        told: list[Any] = [{"role": "user", "content": [result]}]
        counted = await messages.count_tokens(model="m", messages=told)
        assert counted.input_tokens == 2
        with pytest.raises(anthropic.NotFoundError) as error:
            await messages.create(model="other", max_tokens=1, messages=QUESTION)
        assert error.value.body == {
            "type": "error",
            "error": {"type": "NotFoundError", "message": "The model `other` does not exist."},
        }

    with_clients(tmp_path, body)


def test_message_events(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        sent = {"model": "m", "max_tokens": 2, "messages": QUESTION, "stream": True}
        async with clients.http.post("/v1/messages", json=sent) as answer:
            kinds = [event["type"] for event in await events_of(answer)]
        assert kinds == [
            *("message_start", "content_block_start", "ping", "content_block_delta", "content_block_delta"),
            *("content_block_stop", "message_delta", "message_stop"),
        ]

    with_clients(tmp_path, body)


@pytest.mark.parametrize("text", ["hello there", "", "  two  words \n", "unbroken", "a\tb\nc", "\u00fc\u00df \U0001f600"])
def test_tokens_come_back_as_text(tmp_path: Path, text: str) -> None:
    async def body(clients: Clients) -> None:
        found = await post(clients.http, "/tokenize", model="m", prompt=text, return_token_strs=True)
        assert found["count"] == len(found["tokens"]) == count_tokens(text) == len(found["token_strs"])
        back = await post(clients.http, "/detokenize", model="m", tokens=found["tokens"])
        assert back["prompt"] == text
        of_llama = await post(clients.http, "/tokenize", content=text, with_pieces=True)
        assert "".join(token["piece"] for token in of_llama["tokens"]) == text
        assert [token["id"] for token in of_llama["tokens"]] == found["tokens"]
        assert (await post(clients.http, "/detokenize", tokens=[1, 2]))["content"] == "\ufffd\ufffd"

    assert "".join(pieces(text)) == text
    with_clients(tmp_path, body)


def test_completion_and_infill_of_llama_cpp(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        whole = await post(clients.http, "/completion", prompt="hello there", n_predict=-1)
        assert (whole["content"], whole["stop_type"], whole["tokens_predicted"]) == (SAID, "eos", 10)
        assert whole["tokens_evaluated"] == 2
        cut = await post(clients.http, "/completion", prompt="hello there", n_predict=2)
        assert (cut["content"], cut["stop_type"]) == ("I am", "limit")
        stopped = await post(clients.http, "/completion", prompt="hello", stop=["simulated"])
        assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", "simulated")
        both = await post(clients.http, "/completion", prompt=["a", "b"], n_predict=1)
        assert [one["index"] for one in both] == [0, 1]
        around = {"input_prefix": "def f(", "input_suffix": "): pass"}
        assert "def f( ): pass" in (await post(clients.http, "/infill", **around))["content"]
        async with clients.http.post("/infill", json=around | {"stream": True, "n_predict": 3}) as answer:
            events = [json.loads(data) for data in await data_of(answer)]
        assert [event["stop"] for event in events] == [False, False, False, True]
        assert "".join(event["content"] for event in events) == "I am m,"

    with_clients(tmp_path, body)


def test_props_tell_of_a_sleep(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        assert (await get(clients.http, "/props"))["is_sleeping"] is False
        await post(clients.http, "/sleep")
        assert (await get(clients.http, "/props?model=m"))["is_sleeping"] is True

    with_clients(tmp_path, body)


def test_adapters_are_models(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        cards = {card.id: card async for card in clients.openai.models.list()}
        assert list(cards) == ["m", "team/polite"]
        assert (cards["team/polite"].model_extra or {})["parent"] == "m"
        chat = await clients.openai.chat.completions.create(model="team/polite", messages=QUESTION)
        assert chat.model == "team/polite"
        assert (chat.choices[0].message.content or "").startswith("I am team/polite,")
        assert (await get(clients.http, "/props?model=team/polite"))["model_path"] == "/adapters/polite"
        with pytest.raises(openai.NotFoundError):
            await clients.openai.chat.completions.create(model="polite", messages=QUESTION)

    with_clients(tmp_path, body, "--lora", "team/polite=/adapters/polite")


POSTS = sorted({path for method, path, *_ in RARE if method == "POST" and "{" not in path} | {"/v1/completions"})
FORMS = {"/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits"}


@pytest.mark.parametrize("path", POSTS)
def test_every_route_names_the_model_that_is_not_there(tmp_path: Path, path: str) -> None:
    async def body(clients: Clients) -> None:
        if path in FORMS:
            request = clients.http.post(path, data=aiohttp.FormData({"model": "x"}, default_to_multipart=True))
        else:
            request = clients.http.post(path, json={"model": "x"})
        async with request as answer:
            error = (await answer.json())["error"]
            assert answer.status == 404
            assert error["type"] == "NotFoundError"
            assert error["message"] == "The model `x` does not exist."
            assert clients.engine.served == 0

    with_clients(tmp_path, body)


BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": QUESTION},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": QUESTION, "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": QUESTION},
    "/v1/embeddings": {"input": "a"},
    "/pooling": {"input": "a"},
    "/classify": {"input": "a"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/audio/speech": {"input": "a"},
    "/v1/images/generations": {"prompt": "a"},
    "/sdapi/v1/txt2img": {"prompt": "a"},
    "/sdapi/v1/img2img": {"prompt": "a", "init_images": ["b"]},
    "/completion": {"prompt": "a"},
    "/infill": {"input_prefix": "a", "input_suffix": "b"},
}


OPTIONS: tuple[str, ...] = (
    "model",
    "stream",
    "n",
    "stop",
    "stop_sequences",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n_predict",
)
OPTIONS += (
    "min_tokens",
    "system",
    "instructions",
    "previous_response_id",
    "store",
    "background",
    "stream_options",
    "dimensions",
)
OPTIONS += ("top_n", "steps", "batch_size", "response_format", "content", "messages", "init_images", "with_pieces", "voice")
JUNK: tuple[object, ...] = (
    None,
    True,
    0,
    -1,
    2.5,
    1 << 70,
    "2",
    "",
    "m",
    "\ud800",
    [],
    [None],
    [[{}]],
    {},
    {"text": [3]},
    [{"content": {}}],
)


@pytest.mark.parametrize("path", BODIES)
def test_no_route_stumbles_over_junk(tmp_path: Path, path: str) -> None:
    async def body(clients: Clients) -> None:
        for field in (*BODIES[path], *OPTIONS):
            for junk in JUNK:
                async with clients.http.post(path, json=BODIES[path] | {"max_tokens": 5, field: junk}) as answer:
                    assert answer.status in {200, 400, 404}, f"{field}: {junk!r}: {await answer.text()}"
                    await answer.read()
        assert clients.engine.in_flight == 0

    with_clients(tmp_path, body)


@pytest.mark.parametrize("path", BODIES)
def test_every_route_waits_while_the_engine_sleeps(tmp_path: Path, path: str) -> None:
    async def body(clients: Clients) -> None:
        first = await post(clients.http, path, **BODIES[path]) if path != "/v1/audio/speech" else None
        await post(clients.http, "/sleep")

        async def ask() -> tuple[int, bytes]:
            async with clients.http.post(path, json=BODIES[path]) as answer:
                return answer.status, await answer.read()

        waiting = asyncio.ensure_future(ask())
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        assert clients.engine.in_flight == 0
        await post(clients.http, "/wake_up")
        status, content = await waiting
        assert status == 200
        if first is not None:
            assert stable(json.loads(content)) == stable(first), "the same request has the same answer"

    with_clients(tmp_path, body)


@pytest.mark.parametrize("path", sorted(BODIES.keys() - {"/tokenize", "/detokenize", "/v1/messages/count_tokens"}))
def test_every_route_stops_when_its_client_leaves(tmp_path: Path, path: str) -> None:
    async def body(clients: Clients) -> None:
        asking = asyncio.ensure_future(post(clients.http, path, **BODIES[path]))
        await until(lambda: clients.engine.in_flight == 1)
        asking.cancel()
        await until(lambda: clients.engine.in_flight == 0)

    with_clients(tmp_path, body, "--tokens-per-second", "0.5")


def stable(found: object) -> object:
    """Without ids and times."""
    if isinstance(found, dict):
        return {key: stable(value) for key, value in found.items() if key not in {"id", "created", "created_at"}}
    return [stable(one) for one in found] if isinstance(found, list) else found
