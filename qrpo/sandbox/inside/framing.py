"""Messages on a pipe: four bytes of length, then so many bytes."""

import os
import struct

__all__ = ["Reader", "complete_frames", "frame", "write_frame"]

_LENGTH = struct.Struct("<I")


def frame(payload: bytes) -> bytes:
    """The payload with its length before it."""
    return _LENGTH.pack(len(payload)) + payload


def write_frame(fd: int, payload: bytes) -> None:
    """Write one message, however large."""
    data = memoryview(frame(payload))
    while data:
        data = data[os.write(fd, data) :]


def complete_frames(data: bytes | bytearray, at_most: int) -> list[bytes]:
    """The first messages in `data`; what follows a whole message and is none itself is left out."""
    frames: list[bytes] = []
    place = 0
    while len(frames) < at_most and place + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, place)
        place += _LENGTH.size
        if place + length > len(data):
            break
        frames.append(bytes(data[place : place + length]))
        place += length
    return frames


class Reader:
    """Reads messages from a file descriptor; EOFError where it ends before the message does."""

    def __init__(self, fd: int):
        self._fd = fd

    def frame(self) -> bytes:
        """The next message."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return self._exactly(length)

    def text(self) -> str:
        """The next message as text."""
        return self.frame().decode("utf-8", "surrogatepass")

    def _exactly(self, count: int) -> bytes:
        pieces = []
        while count:
            piece = os.read(self._fd, min(count, 1 << 20))
            if not piece:
                raise EOFError("the pipe ended within a message")
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)
