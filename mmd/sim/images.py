"""Pictures, for OpenAI's and Stable Diffusion's web API: a tiny PNG in the colour of the prompt."""

import base64
import hashlib
import json
import struct
import time
import zlib
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from mmd.sim.call import Call, inference, json_body
from mmd.sim.errors import BadRequestError
from mmd.sim.fields import whole
from mmd.sim.form import read_form
from mmd.sim.generate import Pace
from mmd.sim.text import count_tokens

__all__ = ["edits", "generations", "image_to_image", "text_to_image"]

_PIXELS = 8
"""The picture's width and height, whatever was asked for."""
_STEPS = 20
"""Denoising steps, each of which takes a token's time."""
_MOST_STEPS = 1000
_MOST_PICTURES = 10


async def generations(request: web.Request) -> web.StreamResponse:
    """POST /v1/images/generations."""
    async with inference(request) as call:
        return await _answer(call, _prompt(call.body), b"")


async def edits(request: web.Request) -> web.StreamResponse:
    """POST /v1/images/edits."""
    form = await read_form(request)
    async with inference(request, form.fields) as call:
        given = [one.content for one in form.files if one.name in {"image", "image[]"}]
        if not given:
            raise BadRequestError("image: Field required", param="image")
        return await _answer(call, _prompt(call.body), b"".join(given))


async def _answer(call: Call, prompt: str, given: bytes) -> web.Response:
    """OpenAI's; base64 unless a `url` is asked for, which holds the picture itself."""
    number = whole(call.body, "n", default=1, highest=_MOST_PICTURES)
    await _draw(call, _STEPS)
    data = []
    for picture in _pictures(prompt, given, number):
        as_url = call.body.get("response_format") == "url"
        data.append({"url": f"data:image/png;base64,{picture}"} if as_url else {"b64_json": picture})
    prompt_tokens = count_tokens(prompt)
    usage = {
        "input_tokens": prompt_tokens + (_STEPS if given else 0),
        "input_tokens_details": {"text_tokens": prompt_tokens, "image_tokens": _STEPS if given else 0},
        "output_tokens": number * _STEPS,
        "total_tokens": prompt_tokens + (_STEPS if given else 0) + number * _STEPS,
    }
    return web.json_response({"created": int(time.time()), "output_format": "png", "data": data, "usage": usage})


async def text_to_image(request: web.Request) -> web.StreamResponse:
    """POST /sdapi/v1/txt2img."""
    async with inference(request) as call:
        return await _stable_diffusion(call, b"")


async def image_to_image(request: web.Request) -> web.StreamResponse:
    """POST /sdapi/v1/img2img."""
    body = await json_body(request)
    async with inference(request, body) as call:
        given = body.get("init_images")
        if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
            raise BadRequestError("init_images: a list of pictures in base64 is required", param="init_images")
        return await _stable_diffusion(call, "".join(given).encode(errors="replace"))


async def _stable_diffusion(call: Call, given: bytes) -> web.Response:
    prompt = str(call.body.get("prompt", ""))
    number = whole(call.body, "batch_size", default=1, highest=_MOST_PICTURES) * whole(
        call.body, "n_iter", default=1, highest=_MOST_PICTURES
    )
    await _draw(call, whole(call.body, "steps", default=_STEPS, highest=_MOST_STEPS))
    parameters = {name: value for name, value in call.body.items() if name != "init_images"}
    info = json.dumps({"prompt": prompt, "sd_model_name": call.model})
    return web.json_response({"images": _pictures(prompt, given, number), "parameters": parameters, "info": info})


async def _draw(call: Call, steps: int) -> None:
    pace = Pace(call.engine)
    for _ in range(steps):
        await pace.tick()


def _pictures(prompt: str, given: bytes, number: int) -> list[str]:
    """In base64. They depend on the prompt, on what is to be changed, and on their place."""
    seed = hashlib.sha256(prompt.encode(errors="replace") + b"\0" + given).digest()
    return [base64.b64encode(_png(hashlib.sha256(seed + bytes([place])).digest()[:3])).decode() for place in range(number)]


def _png(colour: bytes) -> bytes:
    """A square of one colour."""
    head = struct.pack(">IIBBBBB", _PIXELS, _PIXELS, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    rows = (b"\0" + colour * _PIXELS) * _PIXELS
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _prompt(body: Mapping[str, Any]) -> str:
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise BadRequestError("prompt: a string is required", param="prompt")
    return prompt
