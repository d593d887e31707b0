"""The chunks that a prompt goes through a model in, and the cache slots that it and what follows it take."""

from qjax.models.cache import KVCache, grow_cache

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


def with_room(cache: KVCache, length: int, context: int) -> KVCache:
    """The cache itself, or one of twice the slots (no more than the context has) if `length` positions fill it."""
    if length < cache.slots:
        return cache
    return grow_cache(cache, max(min(2 * cache.slots, _whole_units(context)), cache.slots + SLOT_UNIT))
