"""The chunks that a prompt goes through a model in, and the cache slots that it and what follows it take."""

LARGE_CHUNK, SMALL_CHUNK = 512, 32
# What is left of a prompt goes through one padded large chunk rather than this many small ones.
SMALL_CHUNKS_AT_MOST = 6
SLOT_UNIT = 256


def chunk_sizes(length: int) -> list[int]:
    """The chunks that a prompt of this length is cut into."""
    sizes = []
    while length > 0:
        size = LARGE_CHUNK if length > SMALL_CHUNK * SMALL_CHUNKS_AT_MOST else SMALL_CHUNK
        sizes.append(size)
        length -= size
    return sizes


def slots_for(prompt: int, new: int) -> int:
    """Cache slots for a prompt with its padding and for `new` tokens, rounded up so that few sizes are compiled."""
    needed = max(prompt + new, sum(chunk_sizes(prompt)))
    return _whole_units(needed)


def _whole_units(slots: int) -> int:
    return -(-slots // SLOT_UNIT) * SLOT_UNIT


def slots_with_room(slots: int, length: int, context: int) -> int:
    """The slots of a cache that `length` positions do not fill: as many as it has, or twice that, or the context's."""
    if length < slots:
        return slots
    return max(min(2 * slots, _whole_units(context)), slots + SLOT_UNIT)
