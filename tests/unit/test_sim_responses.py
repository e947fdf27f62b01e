"""The simulated engine's responses: remembered, found again, in the background, cancelled, deleted."""

import asyncio
from pathlib import Path

import openai
import pytest
from sim_engine import Clients, events_of, get, post, until, with_clients

SAID = "I am m, a simulated model. You said: hello there"


def test_a_response_is_found_again_until_it_is_deleted(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        responses = clients.openai.responses
        made = await responses.create(model="m", input="hello there", instructions="Be brief.")
        assert (made.output_text, made.status, made.instructions) == (SAID, "completed", "Be brief.")
        assert made.usage is not None
        assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.total_tokens) == (4, 10, 14)
        assert await responses.retrieve(made.id) == made
        await responses.delete(made.id)
        with pytest.raises(openai.NotFoundError, match=f"Response with id '{made.id}' not found"):
            await responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            await responses.delete(made.id)
        unstored = await responses.create(model="m", input="hello there", store=False)
        with pytest.raises(openai.NotFoundError):
            await responses.retrieve(unstored.id)

    with_clients(tmp_path, body)


def test_a_streamed_response_is_found_again(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        sent = {"model": "m", "input": "hello there", "stream": True, "max_output_tokens": 3}
        async with clients.http.post("/v1/responses", json=sent) as answer:
            events = await events_of(answer)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        last = events[-1]
        assert (last["type"], last["response"]["incomplete_details"]) == (
            "response.incomplete",
            {"reason": "max_output_tokens"},
        )
        name = last["response"]["id"]
        found = await clients.openai.responses.retrieve(name)
        assert (found.output_text, found.status) == ("I am m,", "incomplete")
        async with clients.http.get(f"/v1/responses/{name}?stream=true&starting_after=4") as answer:
            assert await events_of(answer) == events[5:]

    with_clients(tmp_path, body)


def test_a_response_continues_another(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        first = await clients.openai.responses.create(model="m", input="hello there")
        second = await clients.openai.responses.create(model="m", input="and now", previous_response_id=first.id)
        assert second.usage is not None
        assert second.usage.input_tokens == 12 + 2
        with pytest.raises(openai.NotFoundError):
            await clients.openai.responses.create(model="m", input="and now", previous_response_id="resp_none")

    with_clients(tmp_path, body)


def test_a_response_in_the_background(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        responses = clients.openai.responses
        made = await responses.create(model="m", input="hello there", background=True)
        assert (made.status, clients.engine.in_flight) == ("queued", 1)
        assert (await responses.retrieve(made.id)).status == "in_progress"
        text = "".join(
            [
                event.delta
                async for event in await responses.retrieve(made.id, stream=True)
                if event.type == "response.output_text.delta"
            ]
        )
        assert text == SAID
        done = await responses.retrieve(made.id)
        assert (done.status, done.output_text, clients.engine.in_flight) == ("completed", SAID, 0)
        with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
            await responses.cancel(made.id)
        with pytest.raises(openai.BadRequestError, match="stored"):
            await responses.create(model="m", input="hello there", background=True, store=False)

    with_clients(tmp_path, body, "--tokens-per-second", "20")


def test_a_response_in_the_background_outlives_its_client(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        sent = {"input": "hello there", "background": True, "stream": True}
        async with clients.http.post("/v1/responses", json=sent) as answer:
            await answer.content.readline()
            name = (await answer.content.readline()).split(b'"id": "')[1].split(b'"')[0].decode()
        assert clients.engine.in_flight == 1
        await until(lambda: clients.engine.in_flight == 0)
        assert (await get(clients.http, f"/v1/responses/{name}"))["status"] == "completed"

    with_clients(tmp_path, body, "--tokens-per-second", "50")


def test_a_response_is_cancelled(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        responses = clients.openai.responses
        made = await responses.create(model="m", input="hello there", background=True)
        following = asyncio.ensure_future(follow(clients, made.id))
        await until(lambda: clients.engine.in_flight == 2)
        assert (await responses.cancel(made.id)).status == "cancelled"
        assert "response.completed" not in await following
        assert clients.engine.in_flight == 0
        assert (await responses.cancel(made.id)).status == "cancelled", "it is so already"
        assert (await responses.retrieve(made.id)).status == "cancelled"
        other = await responses.create(model="m", input="hello there", background=True)
        await responses.delete(other.id)
        assert clients.engine.in_flight == 0

    with_clients(tmp_path, body, "--tokens-per-second", "1")


async def follow(clients: Clients, name: str) -> list[str]:
    async with clients.http.get(f"/v1/responses/{name}?stream=true") as answer:
        return [str(event["type"]) for event in await events_of(answer)]


@pytest.mark.parametrize("mode", ["abort", "wait"])
def test_a_sleep_counts_a_response_in_the_background(tmp_path: Path, mode: str) -> None:
    async def body(clients: Clients) -> None:
        made = await clients.openai.responses.create(model="m", input="hello there", background=True)
        await post(clients.http, f"/sleep?mode={mode}")
        assert clients.engine.in_flight == 0
        await post(clients.http, "/wake_up")
        found = await clients.openai.responses.retrieve(made.id)
        assert found.status == ("completed" if mode == "wait" else "failed")
        assert (found.error is None) == (mode == "wait")

    with_clients(tmp_path, body, "--tokens-per-second", "50")


def test_a_client_that_leaves_before_its_response_has_a_place_takes_it_along(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        await post(clients.http, "/sleep")
        asking = asyncio.ensure_future(post(clients.http, "/v1/responses", input="a", background=True))
        await asyncio.wait([asking], timeout=0.1)
        asking.cancel()
        await asyncio.wait([asking])
        await asyncio.sleep(0.05)
        await post(clients.http, "/wake_up")
        await asyncio.sleep(0.05)
        assert (clients.engine.in_flight, clients.engine.served) == (0, 0)

    with_clients(tmp_path, body)


def test_the_first_response_in_the_background_is_refused_when_told(tmp_path: Path) -> None:
    async def body(clients: Clients) -> None:
        with pytest.raises(openai.InternalServerError, match="warm-up"):
            await clients.openai.responses.create(model="m", input="a", background=True)
        assert (await clients.openai.responses.create(model="m", input="a", background=True)).status == "queued"

    with_clients(tmp_path, body, "--refuse-warm-up")
