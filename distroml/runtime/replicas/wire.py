"""What nodes say to each other about copies of checkpoint files; every message may be lost, doubled or late.

Whoever wants bytes asks for them, in pieces of bounded size: nobody is sent what it has no room for. ``Keep`` asks a
node to fetch a file by itself, so there is one way only in which a file travels.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from distroml.errors import UNDECODABLE, StoreError
from distroml.runtime.checkpoint.manifest import MAX_MANIFEST_BYTES
from distroml.runtime.checkpoint.shard_file import SHARD_FILE, Sha256

CHUNK_BYTES = 512 * 1024
"""What one ``Read`` may ask for: a report waits behind a few of these at most."""
MAX_FILES = 256
"""In one ``Have``."""
MAX_PATHS = 4096
"""In one ``Listing``."""
MAX_SOURCES = 64
MAX_PATH_CHARS = 512
MAX_PROBLEM_CHARS = 400
ABSENT = -1

_COPIED = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9_-]{0,62})/[A-Za-z0-9][A-Za-z0-9_-]{0,62}/checkpoints/ckpt_step_\d{8,12}/"
    rf"({SHARD_FILE}|manifest(\.g\d{{1,12}})?\.json)\Z"
)

Number = Annotated[int, Meta(ge=0, le=2**62)]
Size = Annotated[int, Meta(ge=0, le=2**62)]
Path = Annotated[str, Meta(min_length=1, max_length=MAX_PATH_CHARS)]
Node = Annotated[str, Meta(min_length=1, max_length=255)]
Problem = Annotated[str, Meta(max_length=4 * MAX_PROBLEM_CHARS)]


class File(Struct, frozen=True, array_like=True):
    """A file of a checkpoint, by what the log or a manifest says of it."""

    path: Path
    """Relative to the store's root."""
    sha256: Sha256
    """Of a shard: of its header, which has the hashes of all that follows. Of a manifest: of all of it."""
    size_bytes: Size | None = None
    """None: not known (a manifest's)."""

    @property
    def is_shard(self) -> bool:
        return self.path.endswith(".safetensors")


class Have(Struct, frozen=True, array_like=True, tag=1):
    """Which of these do you have?"""

    number: Number
    files: Annotated[tuple[File, ...], Meta(max_length=MAX_FILES)]


class Holds(Struct, frozen=True, array_like=True, tag=2):
    """Size of each file that was asked for, ``ABSENT`` where it is not there with this hash."""

    number: Number
    sizes: Annotated[
        tuple[Annotated[int, Meta(ge=ABSENT, le=2**62)], ...], Meta(max_length=MAX_FILES)
    ]


class Read(Struct, frozen=True, array_like=True, tag=3):
    """Send a part of a file."""

    number: Number
    path: Path
    offset: Size
    length: Annotated[int, Meta(ge=0, le=CHUNK_BYTES)]


class Part(Struct, frozen=True, array_like=True, tag=4):
    """A part of a file, shorter than asked for at its end."""

    number: Number
    data: Annotated[bytes, Meta(max_length=CHUNK_BYTES)]
    size_bytes: Annotated[int, Meta(ge=ABSENT, le=2**62)]
    """Of the whole file; ``ABSENT``: there is none."""


class Keep(Struct, frozen=True, array_like=True, tag=5):
    """Have a copy of this file: fetch it from one of ``sources``, unless you have it."""

    number: Number
    file: File
    sources: Annotated[tuple[Node, ...], Meta(max_length=MAX_SOURCES)]


class Working(Struct, frozen=True, array_like=True, tag=6):
    """What was asked for is under way."""

    number: Number
    come_bytes: Size = 0
    """Of files, to the node that says it since it began; the same for long: it does not get on. Of a ``Keep`` only."""


class Kept(Struct, frozen=True, array_like=True, tag=7):
    """The copy is there, verified and durable."""

    number: Number


class Failed(Struct, frozen=True, array_like=True, tag=8):
    """What was asked for could not be done."""

    number: Number
    problem: Problem


class Doubt(Struct, frozen=True, array_like=True, tag=9):
    """What you sent of this file had other bytes than it should: look, and drop it if it is broken. Not answered."""

    file: File


class List(Struct, frozen=True, array_like=True, tag=10):
    """Which files do you have below a directory ("": all), behind ``after`` in their order?"""

    number: Number
    directory: Annotated[str, Meta(max_length=MAX_PATH_CHARS)]
    after: Annotated[str, Meta(max_length=MAX_PATH_CHARS)]


class Listing(Struct, frozen=True, array_like=True, tag=11):
    number: Number
    paths: Annotated[tuple[Path, ...], Meta(max_length=MAX_PATHS)]
    """``MAX_PATHS`` of them: there may be more."""


Request = Have | Read | Keep | List
Answer = Holds | Part | Working | Kept | Failed | Listing
Message = Request | Answer | Doubt

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The body of a frame."""
    return _encoder.encode(message)


def decode(body: bytes) -> Message:
    """The message in a frame.

    Raises:
        ValueError: it is none, or names a file that no checkpoint has.
    """
    try:
        message = _decoder.decode(body)
        match message:
            case Have(files=files):
                for file in files:
                    check_file(file)
            case Keep(file=file) | Doubt(file=file):
                check_file(file)
    except (*UNDECODABLE, StoreError) as error:
        raise ValueError(f"it is not a message about copies: {error}") from None
    return message


def check_file(file: File) -> File:
    """``file``, if it is one that nodes keep copies of.

    Raises:
        StoreError: it is no shard or manifest in its place, or of a size that none has.
    """
    if not _COPIED.match(file.path):
        raise StoreError(f"{file.path!r} is not the place of a shard or a manifest.")
    if file.is_shard and file.size_bytes is None:
        raise StoreError(f"The size of {file.path} is not told.")
    if not file.is_shard and (file.size_bytes or 0) > MAX_MANIFEST_BYTES:
        raise StoreError(f"{file.path} is told to have {file.size_bytes} bytes.")
    return file


def job_of(path: str) -> str:
    """The id of the job whose file it is."""
    return path.partition("/")[0]
