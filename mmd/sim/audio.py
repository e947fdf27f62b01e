"""OpenAI's audio: speech is a hum of as long as its text takes; a transcription tells which bytes arrived."""

import base64
import hashlib
import io
import math
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from mmd.sim.call import Call, inference
from mmd.sim.errors import BadRequestError
from mmd.sim.events import send_events
from mmd.sim.form import Form, read_form
from mmd.sim.generate import AbortedError, Pace, collect, generate
from mmd.sim.jobs import Job
from mmd.sim.text import count_tokens, fraction

__all__ = ["speech", "transcriptions", "translations", "voices"]

_VOICES = ("alloy", "echo", "fable", "nova", "onyx", "shimmer")

_RATE = 8000
"""Samples a second, of 16 bits, in one channel."""
_TOKEN_SAMPLES = 400
_HUM_HZ = 220

_FALLBACK_BYTES_PER_S = 16_000
"""How long an upload is that is no WAV: 128 kbit/s, what MP3s often have."""

_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")


@dataclass(frozen=True, slots=True)
class Recording:
    """An uploaded file."""

    text: str
    """What is heard in it: its name, its size, its digest."""
    duration_s: float


async def speech(request: web.Request) -> web.StreamResponse:
    """POST /v1/audio/speech."""
    async with inference(request) as call:
        text = call.body.get("input")
        if not isinstance(text, str) or not text:
            raise BadRequestError("input: a string is required", param="input")
        if call.body.get("stream_format") == "sse":
            return await send_events(request, _speech_events(call, text))
        raw = call.body.get("response_format") == "pcm"
        # No other format is made: like some versions of vLLM-Omni it answers with WAV, and says so.
        answer = web.StreamResponse(headers={"Content-Type": "audio/pcm" if raw else "audio/wav"})
        tokens = count_tokens(text)
        header = b"" if raw else _wav_header(2 * _TOKEN_SAMPLES * tokens)
        answer.content_length = len(header) + 2 * _TOKEN_SAMPLES * tokens
        await answer.prepare(request)
        await answer.write(header)
        try:
            async for chunk in _hum(call, text):
                await answer.write(chunk)
            await answer.write_eof()
        except AbortedError:  # too late for a status: what is missing of the length tells the client
            if request.transport is not None:
                request.transport.abort()
        return answer


async def _speech_events(call: Call, text: str) -> AsyncIterator[Mapping[str, Any]]:
    yield {
        "type": "speech.audio.delta",
        "audio": base64.b64encode(_wav_header(2 * _TOKEN_SAMPLES * count_tokens(text))).decode(),
    }
    async for chunk in _hum(call, text):
        yield {"type": "speech.audio.delta", "audio": base64.b64encode(chunk).decode()}
    tokens = count_tokens(text)
    usage = {"input_tokens": tokens, "output_tokens": tokens, "total_tokens": 2 * tokens}
    yield {"type": "speech.audio.done", "usage": usage}


async def _hum(call: Call, text: str) -> AsyncIterator[bytes]:
    """The samples of one token after the other, at the model's pace; another text hums another tone."""
    pace, step = Pace(call.engine), 2 * math.pi * _HUM_HZ * (1 + fraction(text)) / _RATE
    chunk = struct.pack(f"<{_TOKEN_SAMPLES}h", *(int(8000 * math.sin(step * place)) for place in range(_TOKEN_SAMPLES)))
    for _ in range(count_tokens(text)):
        await pace.tick()
        yield chunk


def _wav_header(size_bytes: int) -> bytes:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, _RATE, 2 * _RATE, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", 36 + size_bytes, b"WAVE") + form + struct.pack("<4sI", b"data", size_bytes)


async def transcriptions(request: web.Request) -> web.StreamResponse:
    """POST /v1/audio/transcriptions."""
    return await _listen(request, "transcribe")


async def translations(request: web.Request) -> web.StreamResponse:
    """POST /v1/audio/translations."""
    return await _listen(request, "translate")


async def _listen(request: web.Request, task: str) -> web.StreamResponse:
    form = await read_form(request)
    async with inference(request, form.fields) as call:
        recording, kind = _recording(form), form.fields.get("response_format") or "json"
        if kind not in _FORMATS:
            raise BadRequestError(
                f"response_format: expected one of {', '.join(_FORMATS)}, got {kind}", param="response_format"
            )
        job = Job(model=call.model, prompt=recording.text, prompt_tokens=math.ceil(recording.duration_s))
        if form.fields.get("stream", "").lower() in {"true", "1"}:
            return await send_events(request, _transcript_events(call, job), done=True)
        (result,) = await collect(call.engine, [job])
        if result.finish_reason == "abort":
            raise AbortedError
        language = "english" if task == "translate" else form.fields.get("language") or "en"
        match kind:
            case "json":
                usage = {"type": "duration", "seconds": math.ceil(recording.duration_s)}
                return web.json_response({"text": result.text, "usage": usage})
            case "verbose_json":
                return web.json_response(_verbose(result.text, result.tokens, recording, language) | {"task": task})
            case "text":
                return web.Response(text=f"{result.text}\n")
            case _:
                return web.Response(text=_subtitles(result.text, recording.duration_s, kind))


async def _transcript_events(call: Call, job: Job) -> AsyncIterator[Mapping[str, Any]]:
    text, tokens = "", 0
    async for _, said in generate(call.engine, [job]):
        text, tokens = text + said.text, tokens + said.tokens
        if said.text:
            yield {"type": "transcript.text.delta", "delta": said.text}
    counts = {"input_tokens": job.prompt_tokens, "output_tokens": tokens, "total_tokens": job.prompt_tokens + tokens}
    yield {"type": "transcript.text.done", "text": text, "usage": {"type": "tokens"} | counts}


def _recording(form: Form) -> Recording:
    upload = next((one for one in form.files if one.name == "file"), None)
    if upload is None:
        raise BadRequestError("file: Field required", param="file")
    digest = hashlib.sha256(upload.content).hexdigest()[:16]
    text = f"{upload.filename}, {len(upload.content)} bytes, sha256 {digest}"
    return Recording(text, _duration_s(upload.content))


def _duration_s(content: bytes) -> float:
    import wave  # only here, and rarely

    try:
        with wave.open(io.BytesIO(content)) as sound:
            return float(sound.getnframes() / sound.getframerate())
    except (wave.Error, EOFError, ZeroDivisionError):
        return len(content) / _FALLBACK_BYTES_PER_S


def _verbose(text: str, tokens: int, recording: Recording, language: str) -> dict[str, Any]:
    segment = {
        "id": 0,
        "seek": 0,
        "start": 0.0,
        "end": recording.duration_s,
        "text": text,
        "tokens": list(range(tokens)),
        "temperature": 0.0,
        "avg_logprob": 0.0,
        "compression_ratio": 1.0,
        "no_speech_prob": 0.0,
    }
    usage = {"type": "duration", "seconds": math.ceil(recording.duration_s)}
    return {"text": text, "language": language, "duration": recording.duration_s, "segments": [segment], "usage": usage}


def _subtitles(text: str, duration_s: float, kind: str) -> str:
    comma = "," if kind == "srt" else "."
    times = f"{_clock(0, comma)} --> {_clock(duration_s, comma)}"
    return f"1\n{times}\n{text}\n\n" if kind == "srt" else f"WEBVTT\n\n{times}\n{text}\n\n"


def _clock(seconds: float, comma: str) -> str:
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{comma}{milliseconds:03}"


async def voices(request: web.Request) -> web.StreamResponse:
    """GET /v1/audio/voices."""
    async with inference(request, request.query):
        return web.json_response({"voices": list(_VOICES), "uploaded_voices": []})
