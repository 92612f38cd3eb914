"""Reads the frames of ``runtime.control`` from an asyncio stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import UnionType
from typing import Any

from distroml.errors import UNDECODABLE
from distroml.runtime.control import FrameReader

READ_BYTES = 64 * 1024


class BadFrame(Exception):
    """The other side sent something that is not a frame of the expected kind."""


async def read_messages(reader: asyncio.StreamReader, kind: UnionType) -> AsyncIterator[Any]:
    """Yield messages of ``kind`` until the other side closes; a torn last frame is dropped.

    Raises:
        BadFrame: a frame is too long or does not decode.
    """
    frames: FrameReader[Any] = FrameReader(kind)
    while True:
        try:
            data = await reader.read(READ_BYTES)
        except ConnectionError:
            return
        if not data:
            return
        try:
            messages = frames.feed(data)
        except UNDECODABLE as error:
            raise BadFrame(str(error)) from None
        for message in messages:
            yield message
