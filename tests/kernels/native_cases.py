"""Cases for check.cc: weights in lanes, x, and what comes out, all from the words of core.h and in float64.

Nothing of qjax is used here but its written formats, so that both cannot be wrong in the same way.

    python tests/kernels/native_cases.py FILE

A file is b"QJAXCASE", then cases: int64 kind, a name (int64 length, bytes), int64s (their number, then they), blobs
(their number, then each as its length and bytes). check.cc says what a kind's numbers and blobs are.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MATMUL, DENSE, ATTENTION, TO_LANES, RMS_NORM, SWIGLU, ROPE = range(7)
FLOATS, GROUPS, TOKENS = range(3)
F16, F32, E8M0, Q2_K, Q3_K, Q4_K, Q6_K, IQ4_XS, BF16, PACKED = range(10)
INTEGERS, E4M3, E5M2, VALUES = range(4)
SUB_BYTES = {Q2_K: 16, Q3_K: 12, Q4_K: 12, Q6_K: 16, IQ4_XS: 6}
LANES, STEP, SUPER_BLOCK = 16, 32, 256
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

Case = tuple[int, str, Sequence[int], Sequence[np.ndarray]]


def ceil(n: int, unit: int) -> int:
    return -(-n // unit)


def pack_lanes(codes: np.ndarray, width: int) -> np.ndarray:
    """One plane of `width` bits from codes [16 T, 32 S]: uint8 [T, S, width, 64]."""
    tiles, steps = codes.shape[0] // LANES, codes.shape[1] // STEP
    # Column 4 * (v + width * p) + c of a step.
    split = codes.reshape(tiles, LANES, steps, 8 // width, width, 4)
    shifts = (width * np.arange(8 // width))[:, None, None]
    vectors = (split << shifts).sum(3)  # [T, lane, S, v, c]
    return vectors.transpose(0, 2, 3, 1, 4).reshape(tiles, steps, width, 64).astype(np.uint8)


def side_by_side(rows: np.ndarray) -> np.ndarray:
    """[16 T, n] -> [T, n, 16]."""
    return np.ascontiguousarray(rows.reshape(-1, LANES, rows.shape[1]).transpose(0, 2, 1))


def sub_scales(kind: int, sub: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Integers of the groups [rows, blocks * n] of a super-block's bytes [rows, blocks, B]."""
    b = [sub[..., i].astype(np.int64) for i in range(sub.shape[-1])]
    less = None
    if kind == Q2_K:
        scale, less = [x & 15 for x in b], [x >> 4 for x in b]
    elif kind == Q3_K:
        low = [x & 15 for x in b[:8]] + [x >> 4 for x in b[:8]]
        scale = [(low[j] | ((b[8 + j % 4] >> 2 * (j // 4)) & 3) << 4) - 32 for j in range(16)]
    elif kind == Q4_K:
        scale = [x & 63 for x in b[:4]] + [(b[8 + j] & 15) | (b[j] >> 6) << 4 for j in range(4)]
        less = [x & 63 for x in b[4:8]] + [(b[8 + j] >> 4) | (b[4 + j] >> 6) << 4 for j in range(4)]
    elif kind == Q6_K:
        scale = [np.where(x > 127, x - 256, x) for x in b]
    else:
        high = b[0] | b[1] << 8
        scale = [(((b[2 + j // 2] >> 4 * (j % 2)) & 15) | ((high >> 2 * j) & 3) << 4) - 32 for j in range(8)]
    rows = len(sub)
    stacked = np.stack(scale, -1).reshape(rows, -1)
    return stacked, None if less is None else np.stack(less, -1).reshape(rows, -1)


@dataclass
class Weight:
    """A random weight: its facts, its leaves in lanes, and its numbers in float64."""

    widths: tuple[int, ...]
    rows: int
    columns: int
    group: int
    kind: int
    offset: int = 0
    minimum: bool = False
    zero: bool = False
    table: tuple[int, ...] = ()
    values: int = INTEGERS
    seed: int = 0
    leaves: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        tiles, steps = ceil(self.rows, LANES), ceil(self.columns, STEP)
        out = tiles * LANES
        groups = 2 * steps if self.group == 16 else ceil(self.columns, self.group)
        codes = rng.integers(0, 1 << sum(self.widths), (out, steps * STEP))
        if self.values in (E4M3, E5M2):
            # None that is no number, or infinite.
            codes &= ~np.where((codes & 0x78) == 0x78, 0x40, 0)
        self.floats16 = np.zeros(16, np.float32)
        packed: list[np.ndarray] = []
        self.packing = (0, 1, 0.0)
        planes, shift = [], 0
        for width in self.widths:
            planes.append(pack_lanes((codes >> shift) & ((1 << width) - 1), width))
            shift += width
        unused = np.arange(out)[:, None] >= self.rows

        def floats(count: int, dtype: type, size: float) -> np.ndarray:
            values = (size * rng.standard_normal((out, count))).astype(dtype)
            values[rng.random(values.shape) < 0.02] = 0
            values[rng.random(values.shape) < 0.02] = dtype(3e-7)  # subnormal in float16
            # What is computed of rows that are not there must stay there.
            return np.where(unused, dtype("nan"), values)

        scale_leaf: np.ndarray
        zero = rng.integers(0, 1 << sum(self.widths), (out, groups)).astype(np.uint8)
        low = low_leaf = sub_leaf = None
        if self.kind == PACKED:
            scale_leaf = rng.integers(0, 256, (out, groups)).astype(np.uint8)
            table, block, supers = rng.standard_normal(256).astype(np.float32), 8, groups // 8 + 2
            of_block = (0.02 * rng.standard_normal((out, supers))).astype(np.float32)
            start = rng.integers(0, 8, (out, 1)).astype(np.uint8)
            self.packing = (supers, block, 0.25)
            at = (start + np.arange(groups)) // block
            scale = table[scale_leaf].astype(np.float64) * np.take_along_axis(of_block, at, 1) + 0.25
            packed = [table, side_by_side(of_block), side_by_side(start)]
        elif self.kind == BF16:
            scale_leaf = (0.02 * rng.standard_normal((out, groups))).astype(np.float32).view(np.uint32) >> 16
            scale_leaf = scale_leaf.astype(np.uint16)
            scale = (scale_leaf.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        elif self.kind == E8M0:
            scale_leaf = rng.integers(110, 130, (out, groups)).astype(np.uint8)
            scale_leaf[rng.random(scale_leaf.shape) < 0.03] = 0
            scale_leaf[rng.random(scale_leaf.shape) < 0.03] = 1
            scale = np.ldexp(1.0, scale_leaf.astype(np.int64) - 128)
        elif self.kind in SUB_BYTES:
            blocks = self.columns // SUPER_BLOCK
            scale_leaf = floats(blocks, np.float16, 1e-3)
            sub = rng.integers(0, 256, (out, blocks, SUB_BYTES[self.kind])).astype(np.uint8)
            integers, less = sub_scales(self.kind, sub)
            sub_leaf = sub.reshape(out, -1)
            each = integers.shape[1] // blocks
            scale = np.repeat(scale_leaf.astype(np.float64), each, 1) * integers
            if less is not None:
                low_leaf = floats(blocks, np.float16, 1e-2)
                low = -np.repeat(low_leaf.astype(np.float64), each, 1) * less
        else:
            dtype = np.float16 if self.kind == F16 else np.float32
            scale_leaf = floats(groups, dtype, 0.02)
            scale = scale_leaf.astype(np.float64)
            if self.minimum:
                low_leaf = floats(groups, dtype, 0.2)
                low = low_leaf.astype(np.float64)
        numbers = [scale_leaf, sub_leaf, low_leaf, zero if self.zero else None]
        self.leaves = [*planes, *(side_by_side(leaf) for leaf in numbers if leaf is not None), *packed]

        def spread(of_groups: np.ndarray) -> np.ndarray:
            return np.repeat(of_groups, self.group, 1)[: self.rows, : self.columns].astype(np.float64)

        codes = codes[: self.rows, : self.columns]
        values = np.array(self.table)[codes] if self.table else self.numbers(codes, rng)
        taken = self.offset + (spread(zero) if self.zero else 0)
        base = 0 if low is None else spread(low)
        self.floats = spread(scale) * (values - taken) + base
        # What is added and taken on the way there: rounding is relative to it.
        self.sizes = np.abs(spread(scale)) * (np.abs(values) + taken) + np.abs(base)
        self.has = (low_leaf is not None, sub_leaf is not None, self.zero)

    def numbers(self, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What codes without a table stand for; of small floats, by their definition."""
        if self.values == INTEGERS:
            return codes
        if self.values == VALUES:
            self.floats16 = rng.standard_normal(16).astype(np.float32)
            return self.floats16.astype(np.float64)[codes]
        bits, bias = (3, 7) if self.values == E4M3 else (2, 15)
        sign, exponent, fraction = codes >> 7, (codes >> bits) & (127 >> bits), codes & ((1 << bits) - 1)
        whole = np.where(exponent > 0, fraction + (1 << bits), fraction)
        return np.ldexp(np.where(sign, -1.0, 1.0) * whole, np.maximum(exponent, 1) - bias - bits)

    def facts(self) -> list[int]:
        widths = (*self.widths, 0)[:2]
        return [
            *(self.rows, self.columns, self.group, len(self.widths), *widths, self.offset, self.kind),
            *(bool(self.table), *self.has),
            *(self.table or (0,) * 16),
            *(self.values, *self.packing[:2], int(256 * self.packing[2])),
            *self.floats16.view(np.int32).tolist(),
        ]


def activations(rows: int, columns: int, seed: int) -> np.ndarray:
    """Rows of x, each eighth of a kind; which kind is first depends on the seed."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, columns)) * np.exp(rng.normal(0, 2, (rows, 1)))).astype(np.float32)
    for row in range(rows):
        match (row + seed) % 8:
            case 2:
                x[row, rng.integers(columns)] = np.nan
            case 3:
                x[row, rng.integers(columns)] = rng.choice([np.inf, -np.inf])
            case 4:
                x[row] = 0
            case 5:
                x[row, ::2] = 0
                x[row, : columns // 2] = np.float32(1e-39)
            case 6:
                x[row] = np.float32(-3.5)  # halves, rounded to even
                x[row, ::STEP] = 127
    return x


def rounded(x: np.ndarray) -> np.ndarray:
    """x as int8 in groups of 32 columns, in float64; NaN where a group is not finite."""
    rows, columns = x.shape
    filled = np.zeros((rows, ceil(columns, STEP) * STEP), np.float32)
    filled[:, :columns] = x
    groups = filled.reshape(rows, -1, STEP)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scale = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
        inverse = np.where(scale > np.float32(1e-37), np.float32(1) / scale, np.float32(0)).astype(np.float32)
        whole = np.rint(groups * inverse).astype(np.float64)
        known = np.isfinite(groups).all(-1, keepdims=True)
        return np.where(known, whole * scale, np.nan).reshape(rows, -1)[:, :columns]


def rounded_rows(x: np.ndarray, fixed: np.ndarray | None) -> np.ndarray:
    """x as int8 with a scale a row, in float64; NaN where a row has no scale."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scale = np.abs(x).max(1, keepdims=True) / np.float32(127.5) if fixed is None else fixed
        scale = np.where(scale == 0, np.float32(1), scale)
        whole = np.clip(np.rint((x / scale).astype(np.float32)), -128, 127).astype(np.float64)
        return np.where(np.isfinite(scale), whole * scale, np.nan)


@dataclass
class Way:
    """How x is changed before it is multiplied."""

    rounding: int
    columns: np.ndarray | None = None
    input_scale: np.ndarray | None = None
    x_scale: np.ndarray | None = None

    def leaves(self) -> list[np.ndarray | None]:
        return [self.columns, self.input_scale, self.x_scale]

    def of(self, x: np.ndarray) -> np.ndarray:
        if self.input_scale is not None:
            x = x / self.input_scale
        if self.columns is not None:
            x = x[:, self.columns]
        return {FLOATS: lambda: x, GROUPS: lambda: rounded(x), TOKENS: lambda: rounded_rows(x, self.x_scale)}[
            self.rounding
        ]()


def ways(weights: Sequence[Weight], seed: int) -> list[Way]:
    """Plain ones, and by turns one that changes x in other ways too."""
    rng = np.random.default_rng(seed)
    columns = weights[0].columns
    found = [Way(FLOATS), Way(GROUPS)]
    order, scale = rng.permutation(columns).astype(np.int32), rng.uniform(0.5, 2, columns).astype(np.float32)
    changes = [(order, None), (None, scale), (order, scale)][seed % 3]
    if any(w.values for w in weights):
        return [Way(FLOATS), Way(FLOATS, *changes)]
    whole = all(w.kind in (F16, F32, E8M0, BF16) and not w.has[0] and w.group != 16 for w in weights)
    if whole:
        found.append(Way(TOKENS, x_scale=np.array([0.05], np.float32) if seed % 2 else None))
    return [*found, Way((FLOATS, GROUPS, TOKENS)[seed // 3 % (3 if whole else 2)], *changes)]


def expected(x: np.ndarray, floats: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """x @ floats.T, and what its rounding is relative to; NaN in rows of x that are not finite."""
    finite = np.isfinite(x).all(1, keepdims=True)
    x = np.where(finite, x, 0).astype(np.float64)
    return [np.where(finite, x @ floats.T, np.nan), np.abs(x) @ sizes.T]


def matmul(weights: Sequence[Weight], rows: int, seed: int) -> Case:
    first = weights[0]
    x = activations(rows, first.columns, seed)
    numbers = [len(weights), rows, first.columns, *(fact for w in weights for fact in w.facts())]
    results: list[np.ndarray] = []
    found = ways(weights, seed)
    numbers.append(len(found))
    for way in found:
        numbers += [way.rounding, *(leaf is not None for leaf in way.leaves())]
        changed = way.of(x)
        results += [leaf for leaf in way.leaves() if leaf is not None]
        results += [array for w in weights for array in expected(changed, w.floats, w.sizes)]
    facts = ("widths", "rows", "columns", "group", "kind", "offset", "minimum", "zero", "table", "values")
    names = [" ".join(f"{name}={getattr(w, name)}" for name in facts if getattr(w, name)) for w in weights]
    return MATMUL, " | ".join(names), numbers, [x, *(leaf for w in weights for leaf in w.leaves), *results]


FORMS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    *(((8,), ()), ((4,), ()), ((4,), TABLE), ((4, 1), ()), ((4, 2), ()), ((2,), ()), ((2, 1), ())),
)
COLUMNS = {
    16: (16, 256, 48, 32, 1040),
    32: (32, 256, 96, 1280),
    64: (64, 256, 96, 768),
    128: (128, 768, 160, 1280),
    0: (16, 40, 256, 48, 1056, 37),  # one group a row
}
ROWS = (16, 1, 90, 15, 17)


def matmuls() -> Iterator[Case]:
    seeds = itertools.count()
    rows_of, m_of = itertools.cycle(ROWS), itertools.cycle((13, 40, 8))
    columns_of = {group: itertools.cycle(columns) for group, columns in COLUMNS.items()}
    variants = ({}, {"offset": 1}, {"minimum": True}, {"zero": True}, {"minimum": True, "zero": True, "offset": 1})
    for (widths, table), kind, group, variant in itertools.product(FORMS, (F16, F32, E8M0), COLUMNS, variants):
        if kind == E8M0 and variant.get("minimum"):
            continue
        if "offset" in variant:
            # Tables hold signed numbers and have no offset.
            variant = {**variant, "offset": 0 if table else 1 << (sum(widths) - 1)}
            if variant == {"offset": 0}:
                continue
        columns, seed = next(columns_of[group]), next(seeds)
        weight = Weight(widths, next(rows_of), columns, group or columns, kind, table=table, seed=seed, **variant)
        yield matmul([weight], next(m_of), seed)
    two_level = (
        *((Q2_K, (2,), 0, ()), (Q3_K, (2, 1), 4, ()), (Q4_K, (4,), 0, ()), (Q4_K, (4, 1), 0, ())),
        *((Q6_K, (4, 2), 32, ()), (Q6_K, (8,), 128, ()), (IQ4_XS, (4,), 0, TABLE), (Q3_K, (4,), 8, ())),
    )
    for (kind, widths, offset, table), columns, rows in itertools.product(two_level, (256, 768, 1536), (90, 15)):
        seed, group = next(seeds), 16 if kind in (Q2_K, Q3_K, Q6_K) else 32
        weight = Weight(widths, rows, columns, group, kind, offset=offset, table=table, seed=seed)
        yield matmul([weight], next(m_of), seed)
    floats = (((8,), E4M3), ((8,), E5M2), ((4,), VALUES))
    for (widths, values), kind, group in itertools.product(floats, (F16, F32, BF16, PACKED), COLUMNS):
        columns, seed = next(columns_of[group]), next(seeds)
        weight = Weight(widths, next(rows_of), columns, group or columns, kind, values=values, seed=seed)
        yield matmul([weight], next(m_of), seed)
    for group in COLUMNS:
        columns, seed = next(columns_of[group]), next(seeds)
        yield matmul([Weight((8,), 33, columns, group or columns, BF16, offset=128, seed=seed)], next(m_of), seed)
    # Enough rows for several tasks, and weights of all kinds that share x.
    for widths, group in (((8,), 32), ((4, 2), 16), ((2,), 64)):
        seed = next(seeds)
        yield matmul([Weight(widths, 500, 768, group, F16, minimum=True, seed=seed)], 13, seed)
    for columns in (256, 768):
        seed = next(seeds)
        together = [
            Weight((4,), 90, columns, 32, Q4_K, seed=seed),
            Weight((8,), 17, columns, 32, F16, offset=128, seed=seed + 1000),
            Weight((4, 2), 250, columns, 16, Q6_K, offset=32, seed=seed + 2000),
            Weight((4,), 1, columns, 32, E8M0, table=TABLE, seed=seed + 3000),
            Weight((2, 1), 15, columns, columns, F32, zero=True, seed=seed + 4000),
            Weight((4, 1), 16, columns, 128, F16, minimum=True, seed=seed + 5000),
        ]
        yield matmul(together, 40, seed)


def denses() -> Iterator[Case]:
    for seed, (rows, columns, bf16) in enumerate(itertools.product((1, 17, 90), (5, 32, 300), (0, 1))):
        rng = np.random.default_rng(seed)
        w = rng.standard_normal((rows, columns)).astype(np.float32)
        if bf16:
            bits = (w.view(np.uint32) >> 16).astype(np.uint16)
            floats = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        else:
            bits = w.astype(np.float16)
            floats = bits.astype(np.float64)
        x = activations(13, columns, seed)
        results = expected(x, floats, np.abs(floats))
        yield DENSE, f"dense rows={rows} columns={columns} bf16={bf16}", [13, rows, columns, bf16], [x, bits, *results]


def attentions() -> Iterator[Case]:
    shapes = ((1, 1, 4, 4, 70, 64), (2, 5, 8, 2, 100, 32), (1, 40, 6, 1, 130, 80), (1, 3, 2, 2, 1, 16))
    for seed, (shape, kind, window) in enumerate(itertools.product(shapes, (0, 1, 2, 3), (0, 1, 33))):
        batch, seq, heads, kv_heads, slots, dim = shape
        rng = np.random.default_rng(seed)
        q = (2 * rng.standard_normal((batch, seq, heads, dim))).astype(np.float32)
        held = rng.standard_normal((2, batch, kv_heads, slots, dim)).astype(np.float32)
        scales: list[np.ndarray] = []
        if kind == 3:
            stored = rng.integers(-127, 128, held.shape).astype(np.int8)
            scales = list(rng.uniform(0, 0.02, held.shape[:-1]).astype(np.float32))
            held = stored.astype(np.float64) * np.stack(scales)[..., None]
        elif kind == 1:
            stored = (held.view(np.uint32) >> 16).astype(np.uint16)
            held = (stored.astype(np.uint32) << 16).view(np.float32)
        else:
            stored = held.astype(np.float16 if kind == 0 else np.float32)
            held = stored
        k, v = np.repeat(held.astype(np.float64), heads // kv_heads, 2)
        positions = rng.integers(0, max(1, slots - seq + 1), (batch, 1)) + np.arange(seq)
        positions = np.minimum(positions, slots - 1).astype(np.int32)
        ages = positions[:, None, :, None] - np.arange(slots)
        seen = (ages >= 0) & ((ages < window) if window else True)
        scores = np.einsum("bshd,bhtd->bhst", q.astype(np.float64), k) / np.sqrt(dim)
        weights = np.exp(np.where(seen, scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("bhst,bhtd->bshd", weights, v)
        size = np.einsum("bhst,bhtd->bshd", weights, np.abs(v)) * (4 + np.abs(scores).max())
        name = f"attention shape={shape} kind={kind} window={window}"
        yield ATTENTION, name, [*shape, window, kind], [q, stored[0], stored[1], positions, *scales, out, size]


def to_lanes() -> Iterator[Case]:
    layouts = ((8, 1), (4, 16), (4, 32), (4, 64), (4, 1), (2, 32), (2, 8), (1, 32), (1, 4))
    for seed, ((width, stride), rows, chunks) in enumerate(itertools.product(layouts, (1, 16, 33), (1, 3))):
        rng = np.random.default_rng(seed)
        columns = chunks * max(stride * 8 // width, 8)
        data = rng.integers(0, 256, (rows, columns * width // 8)).astype(np.uint8)
        flip = 128 if width == 8 and seed % 2 else 0
        # Codes of a chunk: first the lowest bits of all its bytes, then the next.
        split = data.reshape(rows, -1, 1, stride).astype(np.int64)
        shifts = (width * np.arange(8 // width))[:, None]
        codes = ((split >> shifts) & ((1 << width) - 1)).reshape(rows, columns)
        filled = np.zeros((ceil(rows, LANES) * LANES, ceil(columns, STEP) * STEP), np.int64)
        filled[:rows, :columns] = codes
        name = f"to_lanes width={width} stride={stride} rows={rows} columns={columns} flip={flip}"
        result = pack_lanes(filled, width) ^ np.uint8(flip)
        yield TO_LANES, name, [rows, columns, width, stride, flip], [data, result]


def elementwise() -> Iterator[Case]:
    # The last of each is enough for several tasks.
    for seed, (rows, n) in enumerate(((1, 1), (1, 16), (3, 37), (2, 64), (40, 1000))):
        x, up = activations(rows, n, seed), activations(rows, n, seed + 1)
        weight = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
        wide = x.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            normed = wide / np.sqrt((wide**2).mean(1, keepdims=True) + np.float32(1e-5)) * weight
            yield RMS_NORM, f"rms_norm rows={rows} n={n}", [rows, n], [x, weight, normed, np.abs(normed)]
            gate, factor = (np.where(np.isfinite(a), a, np.nan).astype(np.float64) for a in (x, up))
            gated = gate / (1 + np.exp(-gate)) * factor
            size = np.abs(gated) + 1e-30 * np.abs(gate * factor)
        yield SWIGLU, f"swiglu rows={rows} n={n}", [rows, n], [x, up, gated, size]
    shapes = ((1, 1, 2, 1), (3, 5, 24, 8), (1, 4, 64, 32), (40, 12, 80, 40), (2, 2, 16, 0))
    for seed, ((tokens, heads, dim, half), interleaved) in enumerate(itertools.product(shapes, (0, 1))):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((tokens, heads, dim)).astype(np.float32)
        angles = rng.uniform(0, 600, (tokens, half))
        cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        first = np.arange(half) * (2 if interleaved else 1)
        second = first + (1 if interleaved else half)
        turned, size = x.astype(np.float64), np.abs(x).astype(np.float64)
        a, b, c, s = x[..., first], x[..., second], cosine[:, None].astype(np.float64), sine[:, None].astype(np.float64)
        turned[..., first], turned[..., second] = a * c - b * s, a * s + b * c
        size[..., first] = size[..., second] = np.abs(a) + np.abs(b)
        name = f"rope tokens={tokens} heads={heads} dim={dim} half={half} interleaved={interleaved}"
        yield ROPE, name, [tokens, heads, dim, half, interleaved], [x, cosine, sine, turned, size]


def write(path: Path) -> None:
    with path.open("wb") as file:

        def number(n: int) -> None:
            file.write(np.int64(n).tobytes())

        file.write(b"QJAXCASE")
        for kind, name, numbers, blobs in itertools.chain(matmuls(), denses(), attentions(), to_lanes(), elementwise()):
            number(kind)
            number(len(name.encode()))
            file.write(name.encode())
            number(len(numbers))
            file.write(np.array(numbers, np.int64).tobytes())
            number(len(blobs))
            for blob in blobs:
                number(blob.nbytes)
                file.write(np.ascontiguousarray(blob).tobytes())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
