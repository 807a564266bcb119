"""Compile-only devices for a machine without an accelerator. Import before anything imports jax."""

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

import importlib.util

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

jax.config.update("jax_platforms", "cpu")  # if jax was imported before the variable was set

# Topology and device kind, as libtpu calls them.
TPUS = {
    "v5e": ("v5e:2x2", "TPU v5 lite"),
    "v6e": ("v6e:2x2", "TPU v6 lite"),
    "tpu7x": ("tpu7x:2x2x1", "TPU7x"),
}
TRITON = "__gpu$xla.gpu.triton"  # of custom calls
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
"""


def _sharding(target: str) -> SingleDeviceSharding:
    if target in TPUS:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target][0])
    else:
        cuda13 = importlib.util.find_spec("jax_cuda13_plugin") is not None
        version = "major: 13 minor: 0" if cuda13 else "major: 12 minor: 9"
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=f"{H100}runtime_version {{ {version} }}",
            topology="1x1x1",
        )
    return SingleDeviceSharding(topology.devices[0])


def compile_for(target: str, jitted, *args):
    """Compiles a jitted function for v5e, v6e, tpu7x or h100; of array arguments only shape and
    dtype are read."""
    sharding = _sharding(target)

    def place(a):
        if not hasattr(a, "shape"):
            return a
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    kind, platform = (TPUS[target][1], "tpu") if target in TPUS else ("NVIDIA H100", "gpu")
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jitted.trace(*jax.tree.map(place, args)).lower().compile()


def calls(compiled, target: str, kernel: str = "") -> int:
    """Custom calls in a program: of a target that begins so, by the kernel of a name."""
    lines = compiled.as_text().splitlines()
    found = [line for line in lines if f'custom_call_target="{target}' in line]
    return sum(bool(re.search(rf'op_name="[^"]*{kernel}', line)) for line in found)
