"""Compression of a piece of a tensor: its bytes sorted by their place in an element, then Zstandard.

Sign, exponent and leading digits of neighbouring floats are alike, their last digits are noise; sorting the bytes puts what
is alike side by side (as Blosc's shuffle does). numpy and zstandard are imported when first needed only: most
checkpoints are not compressed, and an agent needs neither.
"""

from __future__ import annotations

LEVEL = 1
"""Of Zstandard's levels the fastest regular one: the noise in weights does not reward more work."""


def compress(data: memoryview, item_bytes: int) -> bytes:
    """``data`` as one frame, which has a checksum and its content's size."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    return compressor.compress(_sorted_by_place(data, item_bytes))


def decompress_into(target: memoryview, frame: memoryview, item_bytes: int) -> None:
    """Undo ``compress``; ``target`` has exactly the size of the content.

    Raises:
        ValueError: the frame is none, or is of other content; no more memory than ``target`` has is used for it.
    """
    import numpy as np
    import zstandard

    try:
        told = zstandard.frame_content_size(frame)
        if told != target.nbytes:
            raise ValueError(f"its frame is of {told} bytes instead of {target.nbytes}")
        data = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"it cannot be decompressed: {error}") from None
    planes = np.frombuffer(data, np.uint8).reshape(item_bytes, -1)
    np.copyto(np.frombuffer(target, np.uint8).reshape(-1, item_bytes), planes.T)


def _sorted_by_place(data: memoryview, item_bytes: int) -> memoryview:
    import numpy as np

    if item_bytes == 1:
        return data
    items = np.frombuffer(data, np.uint8).reshape(-1, item_bytes)
    return np.ascontiguousarray(items.T).data.cast("B")
