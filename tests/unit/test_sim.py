"""The simulated engine's API: OpenAI's answers, vLLM's sleep and wake, and memory that runs out."""

import asyncio
import base64
import json
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import openai
import pytest
from aiohttp.test_utils import TestServer
from sim_engine import CHAT, arguments, data_of, until, with_engine

from mmd.sim.api import make_app
from mmd.sim.engine import Engine
from mmd.sim.ledger import Ledger
from mmd.sim.options import parse

GIB = 1 << 30


def on_gpu(size_gib: float) -> tuple[str, ...]:
    return ("--vram", str(int(size_gib * GIB)), "--gpus", "0", "--gpu-memory", f"0={24 * GIB}")


def held(directory: Path) -> dict[int, float]:
    sums: Counter[int] = Counter()
    for allocation in Ledger(directory / "sim").read():
        sums[allocation.gpu] += allocation.bytes
    return {gpu: size / GIB for gpu, size in sums.items()}


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_deterministic(tmp_path: Path, stream: bool) -> None:
    async def body(client: aiohttp.ClientSession, engine: Engine) -> None:
        async with client.post("/v1/chat/completions", json=CHAT | {"stream": stream}) as answer:
            assert answer.status == 200
            if stream:
                data = await data_of(answer)
                assert data[-1] == "[DONE]"
                chunks = [json.loads(event) for event in data[:-1]]
                assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
                assert "usage" not in chunks[-1]
                text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
                reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
                assert reasons == [None] * (len(chunks) - 1) + ["stop"]
            else:
                choice = (await answer.json())["choices"][0]
                assert choice["finish_reason"] == "stop"
                text = choice["message"]["content"]
        assert text == "I am m, a simulated model. You said: hello there"

    with_engine(tmp_path, body)


@pytest.mark.parametrize(
    ("limits", "tokens", "reason"),
    [
        ({"max_tokens": 3}, 3, "length"),
        ({"max_completion_tokens": 2}, 2, "length"),
        ({"max_tokens": 500}, 10, "stop"),
        ({"max_tokens": 40, "ignore_eos": True}, 40, "length"),
        ({"min_tokens": 30}, 30, "length"),
    ],
)
def test_limits(tmp_path: Path, limits: dict[str, object], tokens: int, reason: str) -> None:
    async def body(client: aiohttp.ClientSession, engine: Engine) -> None:
        async with client.post("/v1/chat/completions", json=CHAT | limits) as answer:
            data = await answer.json()
        assert data["usage"] == {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": 2 + tokens}
        assert data["choices"][0]["finish_reason"] == reason

    with_engine(tmp_path, body)


def test_a_real_client_understands_everything(tmp_path: Path) -> None:
    async def run() -> None:
        engine = Engine(parse(arguments(tmp_path)))
        await engine.load()
        async with (
            TestServer(make_app(engine)) as server,
            openai.AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key="-", max_retries=0) as client,
        ):
            assert [model.id async for model in client.models.list()] == ["m"]
            completion = await client.completions.create(model="m", prompt=["one", "two"], max_tokens=2)
            assert [(choice.index, choice.text) for choice in completion.choices] == [(0, "I am"), (1, "I am")]
            usages = [
                chunk.usage.completion_tokens
                async for chunk in await client.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": "x"}],
                    stream=True,
                    max_tokens=4,
                    stream_options={"include_usage": True},
                )
                if chunk.usage
            ]
            assert usages == [4]
            vectors = await client.embeddings.create(model="m", input=["a", "b", "a"], dimensions=8)
            assert vectors.data[0].embedding == vectors.data[2].embedding != vectors.data[1].embedding
            assert sum(value * value for value in vectors.data[0].embedding) == pytest.approx(1, abs=1e-5)
            response = await client.responses.create(model="m", input="hello")
            assert response.output_text == "I am m, a simulated model. You said: hello"
            async with client.responses.stream(model="m", input="hello") as stream:
                assert (await stream.get_final_response()).output_text == response.output_text
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])

    asyncio.run(run())


def test_embeddings_base64_equal_floats(tmp_path: Path) -> None:
    async def body(client: aiohttp.ClientSession, engine: Engine) -> None:
        vectors = []
        for encoding in ("float", "base64"):
            async with client.post("/v1/embeddings", json={"input": "a", "encoding_format": encoding}) as answer:
                vectors.append((await answer.json())["data"][0]["embedding"])
        assert struct.unpack("<64f", base64.b64decode(vectors[1])) == pytest.approx(vectors[0])

    with_engine(tmp_path, body)


@pytest.mark.parametrize(
    ("path", "sent", "status", "words"),
    [
        ("/v1/chat/completions", "{", 400, "JSON decode error"),
        ("/v1/chat/completions", "[]", 400, "must be a JSON object"),
        ("/v1/chat/completions", '{"model": "m"}', 400, "messages"),
        ("/v1/chat/completions", '{"messages": [{"content": 3}]}', 400, "content"),
        ("/v1/completions", '{"model": "m"}', 400, "prompt"),
        ("/v1/completions", '{"prompt": "a", "max_tokens": 0}', 400, "at least 1"),
        ("/v1/completions", '{"prompt": "a", "n": 0}', 400, "n: expected"),
        ("/v1/completions", '{"prompt": "a", "stop": 3}', 400, "stop: a string"),
        ("/v1/embeddings", '{"model": "m"}', 400, "input"),
        ("/v1/responses", '{"input": []}', 400, "input"),
        ("/v1/chat/completions", '{"model": "x"}', 404, "`x` does not exist"),
        ("/sleep?level=7", "", 400, "level must be"),
        ("/collective_rpc", '{"method": "other"}', 400, "not simulated"),
    ],
)
def test_bad_requests(tmp_path: Path, path: str, sent: str, status: int, words: str) -> None:
    async def body(client: aiohttp.ClientSession, engine: Engine) -> None:
        async with client.post(path, data=sent) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (status, status)
            assert words in error["message"]
            assert error["type"] == ("NotFoundError" if status == 404 else "BadRequestError")

    with_engine(tmp_path, body)


def test_unknown_routes_answer_as_fastapi_does(tmp_path: Path) -> None:
    async def body(client: aiohttp.ClientSession, engine: Engine) -> None:
        async with client.post("/v1/nothing", json={}) as answer:
            assert (answer.status, await answer.json()) == (404, {"detail": "Not Found"})
        async with client.get("/v1/completions") as answer:
            assert answer.status == 405

    with_engine(tmp_path, body)


def test_the_rate_paces_the_output(tmp_path: Path) -> None:
    async def body(client: aiohttp.ClientSession, engine: Engine) -> None:
        started = time.monotonic()
        async with client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 6}) as answer:
            await answer.read()
        assert 0.28 < time.monotonic() - started < 2

    with_engine(tmp_path, body, "--tokens-per-second", "20")


def test_a_client_that_goes_away_frees_its_slot(tmp_path: Path) -> None:
    async def body(client: aiohttp.ClientSession, engine: Engine) -> None:
        async with client.post("/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
            await answer.content.readline()
            assert engine.in_flight == 1
            async with client.get("/metrics") as metrics:
                assert 'vllm:num_requests_running{model_name="m"} 1' in await metrics.text()
        await until(lambda: engine.in_flight == 0)

    with_engine(tmp_path, body, "--tokens-per-second", "1")


async def post(client: aiohttp.ClientSession, path: str, **json_body: object) -> dict[str, object]:
    async with client.post(path, json=json_body) as answer:
        assert answer.status == 200, await answer.text()
        found: dict[str, object] = await answer.json()
        return found


async def says(client: aiohttp.ClientSession) -> str:
    async with client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}) as answer:
        return str((await answer.json())["choices"][0]["text"])


def test_sleep_frees_and_wake_allocates(tmp_path: Path) -> None:
    async def body(client: aiohttp.ClientSession, engine: Engine) -> None:
        assert held(tmp_path) == {0: 20}
        assert await post(client, "/sleep?level=1") == {"status": "sleeping", "level": 1}
        assert held(tmp_path) == {0: pytest.approx(1)}
        assert await post(client, "/sleep?level=2") == {"status": "sleeping", "level": 2}
        assert held(tmp_path) == {0: pytest.approx(1)}, "from level 1 to 2 in place is not possible"
        async with client.get("/is_sleeping") as answer:
            assert await answer.json() == {"is_sleeping": True}
        async with client.get("/health") as answer:
            assert answer.status == 200
        assert (await post(client, "/wake_up?tags=nonsense"))["status"] == "sleeping"
        assert (await post(client, "/wake_up"))["status"] == "awake"
        assert held(tmp_path) == {0: 20}
        assert await says(client) == "I am"

    with_engine(tmp_path, body, *on_gpu(20))


def test_level_2_needs_its_sequence(tmp_path: Path) -> None:
    async def body(client: aiohttp.ClientSession, engine: Engine) -> None:
        await post(client, "/sleep?level=2")
        assert held(tmp_path) == {0: pytest.approx(0.4)}
        assert (await post(client, "/wake_up"))["status"] == "awake"
        assert await says(client) == "!!", "woken without its weights"
        await post(client, "/sleep?level=2")
        async with client.post("/collective_rpc", json={"method": "reload_weights"}) as answer:
            assert answer.status == 500, "no memory for them yet"
        assert (await post(client, "/wake_up?tags=weights"))["status"] == "sleeping"
        assert await post(client, "/collective_rpc", method="reload_weights") == {"results": [None]}
        assert (await post(client, "/wake_up?tags=kv_cache"))["status"] == "awake"
        assert await says(client) == "I am"

    with_engine(tmp_path, body, *on_gpu(20))


def test_a_request_to_a_sleeper_is_held_silently(tmp_path: Path) -> None:
    async def body(client: aiohttp.ClientSession, engine: Engine) -> None:
        await post(client, "/sleep")
        waiting = asyncio.ensure_future(says(client))
        done, _ = await asyncio.wait([waiting], timeout=0.2)
        assert not done
        assert engine.in_flight == 0
        await post(client, "/wake_up")
        assert await waiting == "I am"

    with_engine(tmp_path, body)


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_sleep_modes(tmp_path: Path, mode: str) -> None:
    async def body(client: aiohttp.ClientSession, engine: Engine) -> None:
        stream = asyncio.ensure_future(post(client, "/v1/chat/completions", **CHAT))
        await until(lambda: engine.in_flight == 1)
        await post(client, f"/sleep?mode={mode}")
        if mode == "keep":
            assert engine.in_flight == 1
            await post(client, "/wake_up")
        answer = json.dumps(await stream)
        assert ('"abort"' in answer) == (mode == "abort")

    with_engine(tmp_path, body, "--tokens-per-second", "20")


def test_faults_of_sleep_and_wake(tmp_path: Path) -> None:
    async def fails(client: aiohttp.ClientSession, engine: Engine) -> None:
        for path in ("/sleep", "/wake_up"):
            async with client.post(path) as answer:
                assert answer.status == 500

    async def keeps(client: aiohttp.ClientSession, engine: Engine) -> None:
        await post(client, "/sleep")
        assert held(tmp_path) == {0: 20}

    with_engine(tmp_path, fails, "--sleep-fails", "--wake-fails")
    with_engine(tmp_path, keeps, *on_gpu(20), "--sleep-keeps-memory")


def test_faults_of_requests(tmp_path: Path) -> None:
    async def refuses(client: aiohttp.ClientSession, engine: Engine) -> None:
        statuses = []
        for _ in range(2):
            async with client.post("/v1/completions", json={"prompt": "x"}) as answer:
                statuses.append(answer.status)
        assert statuses == [500, 200]

    async def unhealthy(client: aiohttp.ClientSession, engine: Engine) -> None:
        statuses = []
        for _ in range(2):
            async with client.get("/health") as answer:
                statuses.append(answer.status)
            await says(client)
        assert statuses == [200, 503]

    async def stalls(client: aiohttp.ClientSession, engine: Engine) -> None:
        await says(client)
        with pytest.raises(TimeoutError):
            await client.get("/health", timeout=aiohttp.ClientTimeout(0.2))

    with_engine(tmp_path, refuses, "--refuse-warm-up")
    with_engine(tmp_path, unhealthy, "--unhealthy-after-requests", "1")
    with_engine(tmp_path, stalls, "--stall-after-requests", "1")


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start mmd-sim as a process; killed when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def start(*extra: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mmd.sim.server", *arguments(tmp_path, *extra)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def status_of_post(directory: Path, path: str, **json_body: object) -> int:
    """The status of one request to the engine in another process."""

    async def ask() -> int:
        connector = aiohttp.UnixConnector(str(directory / "engine.sock"))
        async with (
            aiohttp.ClientSession("http://m", connector=connector) as client,
            client.post(path, json=json_body) as answer,
        ):
            return answer.status

    return asyncio.run(ask())


def wait_until_serving(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert any("Application startup complete" in line for line in process.stdout)


def test_process_logs_its_load_and_stops_on_sigterm(spawn: Callable[..., subprocess.Popen[str]]) -> None:
    process = spawn("--load-time", "0.1")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Application startup complete" in line:
            break
    log = "".join(lines)
    assert "Starting to load model m" in log
    assert "Loading safetensors checkpoint shards:  50% Completed | 5/10" in log
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_process_stops_at_once_though_a_client_is_connected(
    tmp_path: Path, spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    process = spawn()
    wait_until_serving(process)

    async def connected() -> None:
        connector = aiohttp.UnixConnector(str(tmp_path / "engine.sock"))
        async with (
            aiohttp.ClientSession("http://m", connector=connector) as client,
            client.ws_connect("/v1/realtime", timeout=aiohttp.ClientWSTimeout(ws_close=5)) as socket,
        ):
            assert (await socket.receive_json())["type"] == "session.created"
            process.send_signal(signal.SIGTERM)
            assert (await socket.receive(timeout=3)).type is aiohttp.WSMsgType.CLOSE

    asyncio.run(connected())
    assert process.wait(3) == 0


def test_process_that_does_not_fit_dies_of_it(spawn: Callable[..., subprocess.Popen[str]]) -> None:
    first = spawn(*on_gpu(20))
    wait_until_serving(first)
    second = spawn(*on_gpu(5))
    output, _ = second.communicate(timeout=20)
    assert second.returncode == 1
    assert "CUDA out of memory" in output
    first.kill()
    first.wait()
    wait_until_serving(spawn(*on_gpu(24)))


def test_process_that_cannot_wake_dies_of_it(tmp_path: Path, spawn: Callable[..., subprocess.Popen[str]]) -> None:
    process = spawn(*on_gpu(20))
    wait_until_serving(process)
    assert status_of_post(tmp_path, "/sleep") == 200
    claim = Ledger(tmp_path / "sim").claim(10 * GIB, owner="test", totals={0: 24 * GIB})
    with pytest.raises(aiohttp.ServerDisconnectedError):
        status_of_post(tmp_path, "/wake_up")
    claim.release()
    assert process.wait(10) == 1


def test_process_exits_during_load_when_told(spawn: Callable[..., subprocess.Popen[str]]) -> None:
    process = spawn("--exit-during-load", "3")
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 3
    assert "told to exit while loading" in output


def test_process_dies_after_requests_and_ignores_sigterm(tmp_path: Path, spawn: Callable[..., subprocess.Popen[str]]) -> None:
    process = spawn("--die-after-requests", "1", "--ignore-sigterm")
    wait_until_serving(process)
    process.send_signal(signal.SIGTERM)
    assert status_of_post(tmp_path, "/v1/completions", prompt="x") == 200
    with pytest.raises(aiohttp.ServerDisconnectedError):
        status_of_post(tmp_path, "/v1/completions", prompt="x")
    assert process.wait(10) == 1


@pytest.mark.parametrize("argv", [["--model", "m"], ["--model", "m", "--port", "1", "--vram", "5", "--gpus", "1"]])
def test_wrong_arguments(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
