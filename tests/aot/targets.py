"""Compile-only devices for a machine without an accelerator. Import before anything imports jax."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import sys

os.environ.update(
    JAX_PLATFORMS="cpu",  # no real TPU or GPU is opened
    CUDA_VISIBLE_DEVICES="",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_SKIP_MDS_QUERY="1",  # there is no metadata server
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the cases of the other tests

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_machine import Machine

jax.config.update("jax_platforms", "cpu")  # if jax was imported before the variable was set

# Topology and device kind, as libtpu calls them.
TPUS = {
    "v5e": ("v5e:2x2", "TPU v5 lite"),
    "v6e": ("v6e:2x2", "TPU v6 lite"),
    "tpu7x": ("tpu7x:2x2x1", "TPU7x"),
}
TRITON = "__gpu$xla.gpu.triton"  # of custom calls


@dataclasses.dataclass(frozen=True)
class Gpu(AbstractDevice):
    """That is not there, with what programs ask of one."""

    compute_capability: str = "9.0"
    core_count: int = 132
    threads: int = 2048  # of a multiprocessor
    lanes: int = 128  # of a multiprocessor, for float32
    shared_memory: int = 228  # KiB of a multiprocessor
    bandwidth: int = 3352  # GB per second
    l2: int = 50  # MiB
    memory: int = 80  # GB
    clock: float = 1.98  # GHz

    @property
    def machine(self) -> Machine:
        """What the GPU kernel plans for."""
        return Machine(tuple(map(int, self.compute_capability.split("."))), self.core_count)

    @property
    def config(self) -> str:
        major, minor = self.compute_capability.split(".")
        cuda13 = importlib.util.find_spec("jax_cuda13_plugin") is not None
        version = "major: 13 minor: 0" if cuda13 else "major: 12 minor: 9"
        shared = self.shared_memory * 2**10
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {self.threads}
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared - 1024}
  core_count: {self.core_count}  fpus_per_core: {self.lanes}  clock_rate_ghz: {self.clock}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}000000000  l2_cache_size: {self.l2 * 2**20}
  device_memory_size: {self.memory}000000000
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
device_description_str: "{self.device_kind}"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ {version} }}
"""


_gpu = functools.partial(Gpu, num_cores=1, platform="gpu")
GPUS = {
    "h100": _gpu("NVIDIA H100 80GB HBM3"),
    "b200": _gpu(
        "NVIDIA B200", compute_capability="10.0", core_count=148,
        bandwidth=8000, l2=126, memory=180, clock=1.96,
    ),
    "a100": _gpu(
        "NVIDIA A100-SXM4-80GB", compute_capability="8.0", core_count=108, lanes=64,
        shared_memory=164, bandwidth=2039, l2=40, clock=1.41,
    ),
    "l4": _gpu(
        "NVIDIA L4", compute_capability="8.9", core_count=58, threads=1536, shared_memory=100,
        bandwidth=300, l2=48, memory=24, clock=2.04,
    ),
}  # fmt: skip


def _placed(target: str) -> tuple[SingleDeviceSharding, AbstractDevice]:
    if target in TPUS:
        name, kind = TPUS[target]
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    else:
        device = GPUS[target]
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=device.config, topology="1x1x1"
        )
    return SingleDeviceSharding(topology.devices[0]), device


def compile_for(target: str, jitted, *args):
    """Compiles a jitted function for one of `TPUS` or `GPUS`; of array arguments only shape and
    dtype are read."""
    sharding, device = _placed(target)

    def place(a):
        if not hasattr(a, "shape"):
            return a
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jitted.trace(*jax.tree.map(place, args)).lower().compile()


def of_command_line() -> tuple[str, list[str]]:
    """The GPU that the arguments begin with, or h100; and the other arguments."""
    target, *rest = sys.argv[1:] or ["h100"]
    return (target, rest) if target in GPUS else ("h100", sys.argv[1:])


def calls(compiled, target: str, kernel: str = "") -> int:
    """Custom calls in a program: of a target that begins so, by the kernel of a name."""
    lines = compiled.as_text().splitlines()
    found = [line for line in lines if f'custom_call_target="{target}' in line]
    return sum(bool(re.search(rf'op_name="[^"]*{kernel}', line)) for line in found)
