"""The simulated engine's numbers, sounds, pictures and WebSocket, for real clients."""

import asyncio
import base64
import io
import json
import struct
import time
import wave
import zlib
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sim_engine import Clients, data_of, get, post, until, with_clients


def wav(seconds: float) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(int(16000 * seconds)))
    return buffer.getvalue()


def is_png(content: bytes) -> bool:
    """Every chunk has its checksum, and the pixels are as many as its header says."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(content):
        (size,) = struct.unpack_from(">I", content, place)
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", content, place + 8 + size) == (zlib.crc32(kind + data),)
        chunks[kind] = data
        place += 12 + size
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    return bool(len(zlib.decompress(chunks[b"IDAT"])) == height * (1 + 3 * width)) and b"IEND" in chunks


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/reranking", "/v1/reranking"])
def test_rerank(tmp_path: Path, path: str) -> None:
    async def body(clients: Clients) -> None:
        documents = ["the weather", "what a panda is", {"text": "a bear"}, [{"type": "text", "text": "panda"}]]
        sent = {"model": "m", "query": "what is a panda", "documents": documents}
        found = await post(clients.http, path, **sent)
        assert found["results"][0]["index"] == 1
        assert found["results"][0]["document"] == {"text": "what a panda is"}
        scores = [result["relevance_score"] for result in found["results"]]
        assert scores == sorted(scores, reverse=True)
        assert found["usage"] == {"prompt_tokens": 4 * 4 + 2 + 4 + 2 + 1, "total_tokens": 25}
        best = await post(clients.http, path, **sent, top_n=1, return_documents=False)
        assert best["results"] == [{"index": 1, "relevance_score": scores[0]}]

    with_clients(tmp_path, body)


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_score(tmp_path: Path, path: str) -> None:
    async def body(clients: Clients) -> None:
        found = await post(clients.http, path, text_1="a b", text_2=["a b", "c d"])
        assert [one["index"] for one in found["data"]] == [0, 1]
        assert found["data"][0]["score"] > 0.9 > 0.1 > found["data"][1]["score"]
        assert found["usage"]["prompt_tokens"] == 8
        pairs = await post(clients.http, path, queries=["a", "b"], documents=["a", "b"])
        assert len(pairs["data"]) == 2
        async with clients.http.post(path, json={"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}) as answer:
            assert answer.status == 400

    with_clients(tmp_path, body)


def test_classes_and_poolings(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        classes = (await post(clients.http, "/classify", input=["a", "b"]))["data"]
        assert all(sum(one["probs"]) == pytest.approx(1) and one["num_classes"] == 2 for one in classes)
        assert all(one["label"] == f"LABEL_{one['probs'].index(max(one['probs']))}" for one in classes)
        (pooled,) = (await post(clients.http, "/pooling", input="a"))["data"]
        (embedded,) = (await post(clients.http, "/v1/embeddings", input="a"))["data"]
        assert (pooled["object"], pooled["data"]) == ("pooling", embedded["embedding"])
        talk = await post(clients.http, "/pooling", messages=[{"role": "user", "content": "a"}])
        assert talk["data"] == [pooled]

    with_clients(tmp_path, body)


def test_texts_take_time(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        started = time.monotonic()
        await post(clients.http, "/v1/embeddings", input=["a", "b", "c", "d"])
        assert 0.18 < time.monotonic() - started < 1

    with_clients(tmp_path, body, "--tokens-per-second", "20")


def test_speech(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        speech = clients.openai.audio.speech
        spoken = await speech.create(model="m", voice="alloy", input="four words are here")
        with wave.open(io.BytesIO(spoken.content)) as sound:
            assert (sound.getnframes() / sound.getframerate(), sound.getnchannels()) == (0.2, 1)
            samples = sound.readframes(9999)
        assert spoken.response.headers["content-type"] == "audio/wav"
        raw = await speech.create(model="m", voice="alloy", input="four words are here", response_format="pcm")
        assert raw.content == samples
        other = await speech.create(model="m", voice="alloy", input="they are other words", response_format="pcm")
        assert other.content != samples
        sent = {"model": "m", "input": "two words", "stream_format": "sse"}
        async with clients.http.post("/v1/audio/speech", json=sent) as answer:
            events = [json.loads(data) for data in await data_of(answer)]
        assert events[-1]["usage"] == {"input_tokens": 2, "output_tokens": 2, "total_tokens": 4}
        with wave.open(io.BytesIO(b"".join(base64.b64decode(event["audio"]) for event in events[:-1]))) as sound:
            assert sound.getnframes() == 800
        assert "alloy" in (await get(clients.http, "/v1/audio/voices?model=m"))["voices"]

    with_clients(tmp_path, body)


def test_speech_that_a_sleep_cuts_off(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        async with clients.http.post("/v1/audio/speech", json={"input": "many words " * 50}) as answer:
            await answer.content.readany()
            await post(clients.http, "/sleep")
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        async with clients.http.post("/wake_up"):
            pass
        asking = asyncio.ensure_future(clients.http.post("/v1/embeddings", json={"input": ["a"] * 50}))
        await until(lambda: clients.engine.in_flight == 1)
        await post(clients.http, "/sleep")
        async with await asking as answer:
            assert answer.status == 500
            assert "put to sleep" in await answer.text()

    with_clients(tmp_path, body, "--tokens-per-second", "20")


def test_transcription(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        transcriptions, sound = clients.openai.audio.transcriptions, ("talk.wav", wav(2.5))
        heard = await transcriptions.create(model="m", file=sound)
        assert heard.text.startswith("I am m, a simulated model. You said: talk.wav, 40044 bytes, sha256 ")
        assert heard.usage is not None
        assert heard.usage.to_dict() == {"type": "duration", "seconds": 3}
        assert (await transcriptions.create(model="m", file=sound, response_format="text")).strip() == heard.text
        lines = (await transcriptions.create(model="m", file=sound, response_format="srt")).splitlines()
        assert lines[:3] == ["1", "00:00:00,000 --> 00:00:02,500", heard.text]
        vtt = await transcriptions.create(model="m", file=sound, response_format="vtt")
        assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:02.500\n")
        verbose = await transcriptions.create(model="m", file=sound, response_format="verbose_json", language="de")
        assert (verbose.text, verbose.language, float(verbose.duration)) == (heard.text, "de", 2.5)
        assert verbose.segments is not None
        assert [(segment.start, segment.end) for segment in verbose.segments] == [(0, 2.5)]
        events = [event async for event in await transcriptions.create(model="m", file=sound, stream=True)]
        assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == heard.text
        assert events[-1].type == "transcript.text.done"
        other = await transcriptions.create(model="m", file=("talk.wav", wav(2.5)[:-1] + b"x"))
        assert other.text != heard.text, "it tells which bytes arrived"
        form = aiohttp.FormData({"model": "m", "response_format": "verbose_json"})
        form.add_field("file", bytes(16000), filename="talk.mp3")
        async with clients.http.post("/v1/audio/translations", data=form) as answer:
            translated = await answer.json()
        assert "talk.mp3, 16000 bytes" in translated["text"]
        assert (translated["task"], translated["language"], translated["duration"]) == ("translate", "english", 1)

    with_clients(tmp_path, body)


@pytest.mark.parametrize(
    ("content_type", "sent", "words"),
    [
        ("application/json", b"{}", "multipart/form-data"),
        ("multipart/form-data", b"x", "cannot be read"),
        ("multipart/form-data; boundary=b", b"nothing of the kind", "cannot be read"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n',
            "file: ",
        ),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Type: text/plain\r\n\r\nm\r\n--b--\r\n", "without a name"),
        (
            "multipart/form-data; boundary=b",
            b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c--\r\n--b--\r\n",
            "form",
        ),
    ],
)
def test_forms_that_cannot_be_read(tmp_path: Path, content_type: str, sent: bytes, words: str) -> None:
    async def body(clients: Clients) -> None:
        path, headers = "/v1/audio/transcriptions", {"Content-Type": content_type}
        async with clients.http.post(path, data=sent, headers=headers) as answer:
            assert answer.status == 400
            assert words in (await answer.json())["error"]["message"]

    with_clients(tmp_path, body)


def test_pictures(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        images = clients.openai.images
        made = await images.generate(model="m", prompt="a red panda", n=2)
        pictures = [base64.b64decode(image.b64_json or "") for image in made.data or ()]
        assert len(set(pictures)) == 2
        assert all(map(is_png, pictures))
        assert made.usage is not None
        assert (made.usage.input_tokens, made.usage.output_tokens) == (3, 40)
        url = await images.generate(model="m", prompt="a red panda", response_format="url")
        assert url.data is not None
        assert (url.data[0].url or "").endswith(base64.b64encode(pictures[0]).decode())
        edited = await images.edit(model="m", prompt="a red panda", image=[("a.png", pictures[0]), ("b.png", pictures[1])])
        alone = await images.edit(model="m", prompt="a red panda", image=("a.png", pictures[0]), n=1)
        results = [base64.b64decode(answer.data[0].b64_json or "") for answer in (edited, alone) if answer.data]
        assert len({pictures[0], *results}) == 3
        assert all(map(is_png, results))

    with_clients(tmp_path, body)


def test_stable_diffusion(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        started = time.monotonic()
        made = await post(clients.http, "/sdapi/v1/txt2img", prompt="a panda", steps=4, batch_size=2)
        assert 0.18 < time.monotonic() - started < 1
        assert len(made["images"]) == 2
        assert is_png(base64.b64decode(made["images"][0]))
        assert json.loads(made["info"])["sd_model_name"] == "m"
        changed = await post(clients.http, "/sdapi/v1/img2img", prompt="a panda", steps=1, init_images=made["images"])
        assert changed["images"] != made["images"][:1]
        async with clients.http.post("/sdapi/v1/img2img", json={"prompt": "a panda"}) as answer:
            assert answer.status == 400

    with_clients(tmp_path, body, "--tokens-per-second", "20")


def say(text: str) -> dict[str, Any]:
    content = [{"type": "input_text", "text": text}]
    return {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": content}}


async def until_event(socket: aiohttp.ClientWebSocketResponse, last: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    while not events or events[-1]["type"] != last:
        events.append(await socket.receive_json(timeout=5))
    return events


def test_realtime(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        async with clients.http.ws_connect("/v1/realtime?model=m", protocols=["realtime"]) as socket:
            (created,) = await until_event(socket, "session.created")
            assert (created["session"]["model"], socket.protocol) == ("m", "realtime")
            await socket.send_json({"type": "session.update", "session": {"instructions": "Be brief."}})
            assert (await until_event(socket, "session.updated"))[-1]["session"]["instructions"] == "Be brief."
            for text in ("hello there", "once more"):
                await socket.send_json(say(text))
                await socket.send_json({"type": "response.create"})
                events = await until_event(socket, "response.done")
                deltas = "".join(event["delta"] for event in events if event["type"] == "response.text.delta")
                assert deltas == f"I am m, a simulated model. You said: {text}"
                assert [event["type"] for event in events[-2:]] == ["response.text.done", "response.done"]
                assert events[-2]["text"] == deltas
                assert events[-1]["response"]["status"] == "completed"
            assert events[-1]["response"]["usage"] == {"input_tokens": 6, "output_tokens": 10, "total_tokens": 16}
            for wrong in ("{", "[]", '{"type": "response.cancel"}', '{"type": "session.update"}', '{"type": "other"}'):
                await socket.send_str(wrong)
                assert (await socket.receive_json(timeout=5))["type"] == "error"
        with pytest.raises(aiohttp.WSServerHandshakeError) as error:
            await clients.http.ws_connect("/v1/realtime?model=x")
        assert error.value.status == 404
        async with clients.http.get("/v1/realtime") as answer:
            assert answer.status == 400

    with_clients(tmp_path, body)


def test_realtime_takes_a_place_while_it_answers(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        async with clients.http.ws_connect("/v1/realtime") as socket:
            await until_event(socket, "session.created")
            assert clients.engine.in_flight == 0
            await post(clients.http, "/sleep")
            await socket.send_json({"type": "response.create"})
            with pytest.raises(TimeoutError):
                await socket.receive(timeout=0.1)
        async with clients.http.ws_connect("/v1/realtime") as socket:
            await post(clients.http, "/wake_up")
            await socket.send_json(say("hello"))
            await socket.send_json({"type": "response.create"})
            await until_event(socket, "response.text.delta")
            assert clients.engine.in_flight == 1
            await socket.send_json({"type": "response.create"})
            assert "in progress" in (await until_event(socket, "error"))[-1]["error"]["message"]
            await socket.send_json({"type": "response.cancel"})
            assert (await until_event(socket, "response.done"))[-1]["response"]["status"] == "cancelled"
            assert clients.engine.in_flight == 0
            await socket.send_json({"type": "response.create"})
            await socket.send_json({"type": "response.cancel"})
            assert (await until_event(socket, "response.done"))[-1]["response"]["status"] == "cancelled"
            await socket.send_json({"type": "response.create"})
            await until_event(socket, "response.text.delta")
            await post(clients.http, "/sleep")
            assert (await until_event(socket, "response.done"))[-1]["response"]["status"] == "failed"
            await post(clients.http, "/wake_up")
            await socket.send_json({"type": "response.create"})
            await until_event(socket, "response.text.delta")
        await until(lambda: clients.engine.in_flight == 0)

    with_clients(tmp_path, body, "--tokens-per-second", "5")


def test_speech_frees_its_place_when_the_client_leaves(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        async with clients.http.post("/v1/audio/speech", json={"input": "many words " * 50}) as answer:
            await answer.content.readany()
            assert clients.engine.in_flight == 1
        await until(lambda: clients.engine.in_flight == 0)
        form = aiohttp.FormData()
        form.add_field("file", wav(1), filename="a.wav")
        asking = asyncio.ensure_future(clients.http.post("/v1/audio/transcriptions", data=form))
        await until(lambda: clients.engine.in_flight == 1)
        asking.cancel()
        await until(lambda: clients.engine.in_flight == 0)

    with_clients(tmp_path, body, "--tokens-per-second", "5")
