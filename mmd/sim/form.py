"""Bodies that are forms: multipart/form-data."""

from dataclasses import dataclass

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from mmd.sim.call import MAX_BODY_BYTES
from mmd.sim.errors import BadRequestError

__all__ = ["Form", "Upload", "read_form"]


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a form."""

    name: str
    filename: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """A multipart/form-data body; of a field that comes twice the last value counts."""

    fields: dict[str, str]
    files: tuple[Upload, ...]


async def read_form(request: web.Request) -> Form:
    """The body, which must be multipart/form-data; BadRequestError."""
    if request.content_type != "multipart/form-data":
        raise BadRequestError(f"the body must be multipart/form-data, not {request.content_type}")
    fields: dict[str, str] = {}
    files: list[Upload] = []
    size_bytes = 0
    try:
        reader = await request.multipart()
        while (part := await reader.next()) is not None:
            if not isinstance(part, BodyPartReader) or part.name is None:
                raise BadRequestError("the form has a part without a name, or in several parts")
            content = bytes(await part.read())
            size_bytes += len(content)
            if size_bytes > MAX_BODY_BYTES:
                raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, size_bytes)
            if part.filename is None:
                fields[part.name] = content.decode(errors="replace")
            else:
                files.append(Upload(part.name, part.filename, content))
    except (ValueError, HttpProcessingError) as error:
        raise BadRequestError(f"the form cannot be read: {error}") from None
    return Form(fields, tuple(files))
