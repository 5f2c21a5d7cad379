"""Messages between the pool and its workers: a 4-byte length, then JSON."""

import json
import struct

_LENGTH = struct.Struct(">I")


def pack(message: dict) -> bytes:
    """One message as bytes. ValueError for NaN and infinities, TypeError for what JSON cannot hold."""
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Puts messages together again from whatever pieces the socket gave."""

    def __init__(self):
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict]:
        """Returns the messages that `data` completes."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                break
            messages.append(json.loads(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
        return messages
