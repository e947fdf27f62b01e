"""Pages in a real browser that call the API from another origin (`tests/run --browser`).

One server has two origins, 127.0.0.1 and localhost, and only the first may call.
"""

from pathlib import Path

import pytest
import relay_gateway
import sim_engine
from aiohttp import web
from chromium import Pages, served, visit
from relay_gateway import gateway

from mmd.config import Gateway

pytestmark = pytest.mark.browser

_PAGE = """<!doctype html><title>mmd</title><script>
const api = "http://127.0.0.1:PORT";
const question = {messages: [{role: "user", content: "one two three four"}]};
const post = (body, headers) => fetch(api + "/v1/chat/completions", {
  method: "POST",
  headers: {"Content-Type": "application/json", "Authorization": "Bearer key", ...headers},
  body: JSON.stringify({...question, ...body}),
});
async function stream() {
  const answer = await post({model: "m", stream: true});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", pieces = 0;
  for (let piece; !(piece = await reader.read()).done; pieces++) text += piece.value;
  return {status: answer.status, text, pieces};
}
async function error() {
  const answer = await post({model: "none"});
  return {status: answer.status, code: (await answer.json()).error.code};
}
async function late() {
  const answer = await post({model: "sleepy"}, {"X-MMD-Wait": "0"});
  return {status: answer.status, retry: answer.headers.get("Retry-After")};
}
async function list() {
  return (await (await fetch(api + "/v1/models")).json()).data.map(model => model.id);
}
const socket = () => new Promise((resolve, reject) => {
  const opened = new WebSocket(api.replace("http", "ws") + "/echo");
  opened.onopen = () => opened.send("hello");
  opened.onmessage = message => resolve(message.data);
  opened.onerror = () => reject(new TypeError("no WebSocket"));
});
async function main() {
  const report = {origin: location.origin};
  for (const work of [stream, error, late, list, socket])
    report[work.name] = await work().catch(failure => ({refused: failure.name}));
  await fetch("/report", {method: "POST", body: JSON.stringify(report)});
}
main();
</script>"""


async def echo(request: web.Request) -> web.WebSocketResponse:
    answers = web.WebSocketResponse()
    await answers.prepare(request)
    async for message in answers:
        await answers.send_str(str(message.data))
    return answers


@pytest.mark.parametrize("workers", [0, 2], ids=["alone", "workers"])
def test_a_page_of_a_named_origin_may_call_and_another_may_not(tmp_path: Path, workers: int) -> None:
    profiles = [tmp_path / "named", tmp_path / "other"]
    for profile in profiles:
        profile.mkdir()

    async def check() -> None:
        pages = Pages(_PAGE)
        async with sim_engine.serving(tmp_path), served(pages) as port:
            settings = Gateway(cors_origins=(f"http://127.0.0.1:{port}",))
            endpoints = {"m": f"unix:{tmp_path}/engine.sock", "sleepy": f"unix:{tmp_path}/none.sock"}
            routes = (web.get("/echo", echo),)
            async with gateway(endpoints, settings=settings, ready=("m",), workers=workers, routes=routes) as running:
                pages.api_port = running.port
                told = await visit(pages, profiles[0], f"http://127.0.0.1:{port}/")
                assert told["stream"]["status"] == 200
                assert told["stream"]["text"].startswith("data: {")
                assert told["stream"]["text"].endswith("data: [DONE]\n\n")
                assert told["error"] == {"status": 404, "code": "model_not_found"}
                assert told["late"] == {"status": 504, "retry": "60"}
                assert told["list"] == ["m", "adapter-of-m", "sleepy", "adapter-of-sleepy"]
                assert told["socket"] == "hello"
                assert told["origin"] == f"http://127.0.0.1:{port}"
                told = await visit(pages, profiles[1], f"http://localhost:{port}/")
                refused = {"refused": "TypeError"}
                assert told == {
                    "origin": f"http://localhost:{port}",
                    **dict.fromkeys(("stream", "error", "late", "list", "socket"), refused),
                }
                assert running.in_flight == 0

    relay_gateway.run(check())
