"""Messages on a pipe: a length of four bytes, then the payload."""

import os
import struct

_LENGTH = struct.Struct("<I")
HEADER = _LENGTH.size


def frame(payload: bytes) -> bytes:
    """The payload, preceded by its length."""
    return _LENGTH.pack(len(payload)) + payload


def write_frames(fd: int, *payloads: bytes) -> None:
    """Write messages of any size."""
    data = memoryview(b"".join(map(frame, payloads)))
    while data:
        data = data[os.write(fd, data) :]


def frame_end(data: bytes | bytearray, start: int) -> int | None:
    """The end of the message at `start`; None while it is not complete."""
    if start + HEADER > len(data):
        return None
    end = start + HEADER + int(_LENGTH.unpack_from(data, start)[0])
    return end if end <= len(data) else None


class Reader:
    """Reads messages from a file descriptor; EOFError if it ends within a message."""

    def __init__(self, fd: int):
        self._file = open(fd, "rb", 1 << 16, closefd=False)  # noqa: SIM115

    def frame(self) -> bytes:
        """The next message."""
        return self._exactly(_LENGTH.unpack(self._exactly(HEADER))[0])

    def text(self) -> str:
        """The next message as text."""
        return self.frame().decode("utf-8", "surrogatepass")

    def _exactly(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError("the pipe ended within a message")
        return data
