"""What is decoded of a request's body. msgspec makes its classes of their annotations, which a compiled module has no more."""

from typing import Final

import msgspec

__all__ = ["Referring", "Routing", "decode_fields", "decode_referring", "decode_routing", "encode", "raw"]


class Routing(msgspec.Struct):
    """Fields that are not named here are skipped (and checked for their syntax) without making objects of them."""

    model: object = None
    stream: object = None


class Referring(msgspec.Struct):
    """What of an earlier answer a request goes on from."""

    previous_response_id: object = None


decode_referring: Final = msgspec.json.Decoder(Referring).decode
decode_routing: Final = msgspec.json.Decoder(Routing).decode
decode_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
encode: Final = msgspec.json.encode
raw: Final = msgspec.Raw
