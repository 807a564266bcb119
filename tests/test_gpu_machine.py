"""What the GPU kernel plans for each GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from decode_attention_cases import CASES, arguments
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from nqkv_jax.pallas_kernels.decode_attention import decode_attention, mosaic_gpu_machine
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_machine import H100, Machine, machine
from nqkv_jax.pallas_kernels.decode_attention.mosaic_gpu_plan import make_plan

A100, L4, B200 = Machine((8, 0), 108), Machine((8, 9), 58), Machine((10, 0), 148)


@dataclasses.dataclass(frozen=True)
class Gpu(AbstractDevice):
    compute_capability: str = "8.9"
    core_count: int = 58


def test_it_is_the_one_that_a_program_is_compiled_for():
    assert machine() == H100  # there is no GPU
    device = Gpu(device_kind="NVIDIA L4", num_cores=1, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert machine() == L4
    assert machine() == H100


def plan(name: str, of: Machine, monkeypatch):
    monkeypatch.setattr(mosaic_gpu_machine, "H100", of)
    *_, key, value, _, _ = arguments(CASES[name], (1,), num_tiles=64)
    return make_plan(CASES[name].group, key, value, None, None)


def test_programs_share_the_memory_of_a_multiprocessor(monkeypatch):
    found = {of: plan("cubic4", of, monkeypatch) for of in (H100, B200, A100, L4)}
    for of, each in found.items():
        assert each.programs * (each.shared_bytes + 2**10) <= of.shared_memory
        assert each.bulk_copies == (of.capability >= (9, 0))
    # 64 KiB of codes for each, with room for two units; an L4 has 100 KiB, and room for one.
    assert [each.stages for each in found.values()] == [2, 2, 2, 1]
    assert [each.programs for each in found.values()] == [3, 3, 2, 2]
    # Splits are as many as there are programs at a time, or units.
    assert [each.slots for each in found.values()] == [396, 444, 216, 116]


def test_what_other_gpus_have_not(monkeypatch):
    q, key, value, lengths, _ = arguments(CASES["cubic4"], (10,), dtype=jnp.bfloat16)
    if jax.__version_info__ < (0, 11):
        pytest.skip("Mosaic GPU needs jax 0.11")
    for capability in ((7, 5), (12, 0)):
        monkeypatch.setattr(mosaic_gpu_machine, "H100", Machine(capability, 40))
        message = rf"of compute capability 8\.0, .* 10\.3; got {capability[0]}\.{capability[1]}"
        with pytest.raises(NotImplementedError, match=message):
            decode_attention(q, key, value, lengths, implementation="mosaic_gpu")
    monkeypatch.setattr(mosaic_gpu_machine, "H100", L4)
    many = dataclasses.replace(CASES["plus3"], head_dim=256, waves=256, group=16)
    q, key, value, lengths, _ = arguments(many, (10,))
    message = "at most 99 KiB of shared memory; head_dim 256 with 3 bits and 16 query .* take 160"
    with pytest.raises(NotImplementedError, match=message):
        decode_attention(q, key, value, lengths, implementation="mosaic_gpu")
