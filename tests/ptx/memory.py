"""Memory of a thread block: global, shared with its barriers, and tensor copies between them."""

import ctypes
import dataclasses

import numpy as np

SHARED_BASE = 1024  # of the window; what lies below is the driver's
KNOWN = np.uint64(1 << 63)
BANKS = 32  # of shared memory, each of which delivers 4 bytes in a cycle


class Global:
    """Buffers of the process, at their own addresses; nothing else may be read or written."""

    def __init__(self, arrays: list[np.ndarray]):
        self.buffers = [(a.ctypes.data, a.reshape(-1).view(np.uint8)) for a in arrays]

    def add(self, address: int, size: int) -> None:
        data = (ctypes.c_uint8 * size).from_address(address)
        self.buffers.append((address, np.frombuffer(data, np.uint8)))

    def find(self, first: int, last: int) -> tuple[np.ndarray, int]:
        """The buffer that has the bytes first ... last - 1, and its address."""
        for start, data in self.buffers:
            if start <= first and last <= start + data.size:
                return data, start
        raise IndexError(f"no buffer has the bytes {first:#x} to {last:#x}")

    def _index(self, addresses, size):
        if np.any(addresses % size):
            raise IndexError(f"expected addresses that are multiples of {size}; got {addresses}")
        data, start = self.find(int(addresses.min()), int(addresses.max()) + size)
        return data, (addresses.astype(np.int64) - start)[:, None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """uint8[n, size]"""
        data, index = self._index(addresses, size)
        return data[index]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """uint8[n, size]"""
        data, index = self._index(addresses, values.shape[1])
        data[index] = values


def conflicts(addresses: np.ndarray, size: int) -> int:
    """Cycles that threads of a warp wait as others want other words of a bank. Of 8 bytes each, 16
    threads have a turn; of 16 bytes, 8."""
    turns = np.array_split(
        addresses, range(128 // max(size, 4), len(addresses), 128 // max(size, 4))
    )
    words = [np.unique(a[:, None] // 4 + np.arange(max(size // 4, 1))) for a in turns]
    return sum(int(np.bincount(w % BANKS).max()) - 1 for w in words)


class Shared:
    """Shared memory, which knows what warps wrote that the asynchronous units may not see yet, and
    counts conflicts."""

    def __init__(self, size: int):
        self.conflicts = 0
        self.data = np.full(SHARED_BASE + size, 0xFF, np.uint8)  # NaN
        # A bit for each warp, and `KNOWN` for what all know of, as a barrier came after it.
        self.unfenced = np.zeros(SHARED_BASE + size, np.uint64)

    def _index(self, addresses: np.ndarray, size: int) -> np.ndarray:
        addresses = addresses.astype(np.int64)
        low, high = addresses.min(), addresses.max() + size
        if low < SHARED_BASE or high > self.data.size or np.any(addresses % size):
            raise IndexError(
                f"expected addresses of shared memory, {SHARED_BASE} to {self.data.size} and "
                f"multiples of {size}; got {addresses}"
            )
        return addresses[:, None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """uint8[n, size]"""
        self.conflicts += conflicts(addresses, size)
        return self.data[self._index(addresses, size)]

    def store(self, addresses: np.ndarray, values: np.ndarray, warp: int) -> None:
        """uint8[n, size]"""
        self.conflicts += conflicts(addresses, values.shape[1])
        index = self._index(addresses, values.shape[1])
        self.data[index] = values
        self.unfenced[index] |= np.uint64(1 << warp)

    def meet(self) -> None:
        """At a barrier."""
        self.unfenced[self.unfenced > 0] = KNOWN

    def fence(self, warp: int) -> None:
        """What the warp wrote or knows of is seen by tensor cores and copies."""
        self.unfenced &= ~(KNOWN | np.uint64(1 << warp))

    def asynchronous_load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """By a tensor core or a copy."""
        index = self._index(addresses, size)
        if self.unfenced[index].any():
            raise RuntimeError(
                "what a thread wrote is read by an asynchronous unit without a fence"
            )
        return self.data[index]

    def asynchronous_store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        index = self._index(addresses, values.shape[1])
        self.data[index], self.unfenced[index] = values, 0


def swizzle(addresses: np.ndarray, span: int) -> np.ndarray:
    """Where the bytes lie, of rows of `span` (32, 64 or 128; 16 for none) bytes: the number of a
    chunk of 16 bytes is combined with that of the line of 128 bytes."""
    return addresses ^ (((addresses >> 7) & (span // 16 - 1)) << 4)


@dataclasses.dataclass
class Barrier:
    """An mbarrier: of arrivals and of bytes that are to come."""

    count: int

    def __post_init__(self):
        self.waiting, self.bytes, self.phase = self.count, 0, 0

    def _next(self) -> None:
        if self.waiting < 0:
            raise RuntimeError(f"more than {self.count} arrivals at a barrier")
        if not self.waiting and not self.bytes:
            self.waiting, self.phase = self.count, self.phase ^ 1

    def arrive(self, arrivals: int, bytes_to_come: int) -> None:
        self.bytes += bytes_to_come
        self.waiting -= arrivals
        self._next()

    def complete(self, size: int) -> None:
        self.bytes -= size
        self._next()

    def passed(self, parity: int) -> bool:
        """Has the phase of that parity ended?"""
        return self.phase != parity


# By their numbers in Mosaic's `mosaic_gpu_init_tma_desc`.
ITEM_BYTES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2}


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """Of a tensor copy; axes begin with the slowest, strides are in elements.

    Raises:
      ValueError: the driver would refuse it.
    """

    address: int
    item_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    swizzle: int
    box: tuple[int, ...]

    def __post_init__(self):
        inner = self.box[-1] * self.item_bytes
        strides = [s * self.item_bytes for s in self.strides[:-1]]
        if (
            self.address % 16
            or not 1 <= len(self.sizes) <= 5
            or self.strides[-1] != 1
            or any(s % 16 or s >= 2**40 for s in strides)
            or not all(1 <= b <= 256 for b in self.box)
            or inner % 16
            or (self.swizzle > 16 and inner > self.swizzle)
        ):
            raise ValueError(f"no descriptor of a tensor copy: {self}")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.item_bytes

    def load(self, memory: Global, coordinates: list[int]) -> np.ndarray:
        """uint8[bytes]: the box from `coordinates` (the fastest axis first), zeros outside."""
        index, inside = np.zeros(self.box, np.int64), np.ones(self.box, bool)
        for axis, first in enumerate(reversed(coordinates)):
            along = [1] * len(self.box)
            along[axis] = self.box[axis]
            places = (first + np.arange(self.box[axis])).reshape(along)
            inside = inside & (places >= 0) & (places < self.sizes[axis])
            index = index + places * self.strides[axis]
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True)) + 1
        data, start = memory.find(self.address, self.address + last * self.item_bytes)
        offsets = (self.address - start) + np.where(inside, index, 0) * self.item_bytes
        elements = data[offsets[..., None] + np.arange(self.item_bytes)]
        return np.where(inside[..., None], elements, 0).astype(np.uint8).reshape(-1)

    def leave(self, shared: Shared, address: int, data: np.ndarray) -> None:
        """Swizzled, in shared memory."""
        if address % 128:
            raise IndexError(f"expected a multiple of 128 to copy to; got {address}")
        chunks = swizzle(address + 16 * np.arange(data.size // 16), self.swizzle)
        shared.asynchronous_store(chunks, data.reshape(-1, 16))
