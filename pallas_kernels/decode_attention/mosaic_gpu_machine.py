"""The GPU that a kernel is traced for."""

from typing import NamedTuple

import jax

# By compute capability: of a multiprocessor, in KiB, 1 of which is reserved for every program.
SHARED_MEMORY = {
    (8, 0): 164, (8, 6): 100, (8, 7): 164, (8, 9): 100, (9, 0): 228, (10, 0): 228, (10, 3): 228,
}  # fmt: skip


class Machine(NamedTuple):
    capability: tuple[int, int]
    multiprocessors: int

    @property
    def shared_memory(self) -> int:
        """Bytes of a multiprocessor."""
        return SHARED_MEMORY[self.capability] * 2**10

    @property
    def bulk_copies(self) -> bool:
        """Whether it copies boxes of arrays at the word of one thread."""
        return self.capability >= (9, 0)

    @property
    def has_wgmma(self) -> bool:
        return self.capability == (9, 0)

    @property
    def stores_matrices(self) -> bool:
        """Whether warps store matrices transposed (`stmatrix`)."""
        return self.capability >= (9, 0)


H100 = Machine((9, 0), 132)


def machine() -> Machine:
    """That of the mesh if it says (to compile for another machine), or the first one at hand; an
    H100 where there is none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if not hasattr(device, "compute_capability"):
        try:
            device = jax.local_devices(backend="cuda")[0]
        except RuntimeError:  # there is none
            return H100
    major, minor = map(int, device.compute_capability.split("."))
    return Machine((major, minor), device.core_count)
