"""`from_pretrained`: the same logits as transformers, whatever the format; clear errors."""

import json
import pathlib
import subprocess
import sys
import textwrap

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants as hub_constants
from safetensors.numpy import load_file, save_file

from nqkv_jax.models import LanguageModel, from_pretrained
from nqkv_jax.models.checkpoint import (
    Checkpoint,
    CheckpointFileError,
    CheckpointNotFoundError,
    open_checkpoint,
)
from nqkv_jax.models.weights import CheckpointError

TOKENS = np.random.default_rng(0).integers(0, 120, (2, 9))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the oracle is transformers on torch")


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers", reason="the oracle is transformers on torch")


@pytest.fixture(scope="module")
def opt(transformers, torch):
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=120, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3,
    )  # fmt: skip
    return randomised(torch, transformers.OPTForCausalLM(config))


@pytest.fixture(scope="module")
def llama(transformers, torch):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return randomised(torch, transformers.LlamaForCausalLM(config))


def randomised(torch, model):
    """Biases and norms are drawn too: zeros and ones would hide a tensor in the wrong place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def oracle(model, tokens=TOKENS):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def assert_same_logits(path, model, tolerance=1e-4):
    lm = from_pretrained(path, dtype="float32", progress=False)
    logits = lm.logits(TOKENS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, oracle(model), atol=tolerance, rtol=0)
    assert lm.num_parameters == sum(p.numel() for p in model.parameters())
    return lm


def write_bin(folder, model, state=None, shards=1, name="pytorch_model.bin"):
    """What transformers before version 5 saved."""
    import torch

    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    state = model.state_dict() if state is None else state
    if shards == 1:
        torch.save(state, folder / name)
        return folder
    names, index = list(state), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save({n: state[n] for n in names[i::shards]}, folder / file)
        index |= dict.fromkeys(names[i::shards], file)
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture(params=["opt", "llama"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
def test_safetensors(tmp_path, model, sharded):
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    lm = assert_same_logits(tmp_path, model)
    assert isinstance(lm, LanguageModel)
    assert lm.tokenizer is None
    assert lm.name == str(tmp_path)
    assert lm.eos_ids == {2}


@pytest.mark.parametrize("shards", [1, 3])
def test_bin(tmp_path, model, shards):
    assert_same_logits(write_bin(tmp_path, model, shards=shards), model)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["model.", ""], ids=["model.decoder", "decoder"])
@pytest.mark.parametrize("head", [False, True], ids=["no-head", "tied-head"])
def test_spellings_of_opt(tmp_path, opt, torch, suffix, prefix, head):
    """Published OPT checkpoints with and without the outer prefix, and with or without the head."""
    state = {n: t for n, t in opt.state_dict().items() if n != "lm_head.weight"}
    state = {prefix + n.removeprefix("model."): t for n, t in state.items()}
    if head:
        state["lm_head.weight"] = state[prefix + "decoder.embed_tokens.weight"]
    if suffix == "bin":
        write_bin(tmp_path, opt, state)
    else:
        opt.config.save_pretrained(tmp_path)
        save_file({n: t.numpy() for n, t in state.items()}, tmp_path / "model.safetensors")
    assert_same_logits(tmp_path, opt)


def test_left_over_keys_of_llama(tmp_path, llama, torch):
    """Old conversions saved a constant of RoPE as if it were a weight."""
    state = llama.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert_same_logits(write_bin(tmp_path, llama, state), llama)


def test_head_that_is_not_tied_after_all(tmp_path, opt):
    state = opt.state_dict() | {}
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(CheckpointFileError, match=r"set tie_word_embeddings to false"):
        from_pretrained(write_bin(tmp_path, opt, state), progress=False)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.float16, None])
def test_dtypes(tmp_path, llama, torch, stored, dtype):
    state = {n: t.to(getattr(torch, stored)) for n, t in llama.state_dict().items()}
    lm = from_pretrained(write_bin(tmp_path, llama, state), dtype=dtype, progress=False)
    expected = jnp.dtype(jnp.float32 if dtype is None else dtype)  # the tests run on a CPU
    assert lm.dtype == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.model)} == {expected}
    logits = lm.logits(TOKENS)
    assert logits.dtype == jnp.float32
    scale = np.abs(oracle(llama)).max()
    np.testing.assert_allclose(logits, oracle(llama), atol=0.05 * scale, rtol=0)


@pytest.mark.parametrize("dtype", ["float3", "float64", "int8", "fp16", 5])
def test_wrong_dtype(dtype):
    with pytest.raises(ValueError, match=r"one of float32, bfloat16, float16, or None; got"):
        from_pretrained("no/such/model/yet", dtype=dtype)


@pytest.mark.parametrize("device", ["cpu", 0, [], jax.sharding.PartitionSpec()])
def test_wrong_device(device):
    with pytest.raises(
        ValueError, match=r"must be a jax\.Device .*, a sharding, a function .*; got"
    ):
        from_pretrained("no/such/model/yet", device=device)


def test_device(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    device = jax.devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    for where in (device, sharding, lambda path, shape: sharding):
        lm = from_pretrained(tmp_path, dtype="float32", device=where, progress=False)
        assert all(leaf.sharding.device_set == {device} for leaf in jax.tree.leaves(lm.model))
    for where, dtype in ((device, jnp.float32), (lambda path, shape: device, jnp.bfloat16)):
        assert from_pretrained(tmp_path, device=where, progress=False).dtype == dtype


def test_gguf(tmp_path, llama):
    """A GGUF file as llama.cpp's converter writes it: its names, and Q and K rows interleaved."""
    gguf = pytest.importorskip("gguf", reason="writing .gguf files needs the package gguf")
    config = llama.config
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab"] + [f"token{i}" for i in range(3, config.vocab_size)])
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in llama.state_dict().items():
        array = tensor.numpy()
        for kind, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if f"{kind}_proj" in name:
                halves = array.reshape(heads, 2, -1, array.shape[-1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        half = "gate_proj" in name  # one kind of another type, to be converted
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(new_name, array.astype(np.float16 if half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lm = assert_same_logits(tmp_path, llama, tolerance=2e-2)  # float16 gates
    assert lm.tokenizer.vocab_size == config.vocab_size
    for name, array in open_checkpoint(tmp_path).tensors():
        if "gate_proj" not in name:
            np.testing.assert_array_equal(array, llama.state_dict()[name].numpy(), err_msg=name)


# --- what the model checks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_llama(folder, hidden=32, ffn=64, layers=1)
    return from_pretrained(folder, progress=False)


def write_llama(folder: pathlib.Path, *, hidden, ffn, layers, vocab=128, layers_per_shard=1):
    """Random weights, without torch."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32) * 0.02

    shards = []
    for i in range(layers):
        layer = {"mlp.gate_proj": draw(ffn, hidden), "mlp.up_proj": draw(ffn, hidden)}
        layer |= {"mlp.down_proj": draw(hidden, ffn), "input_layernorm": draw(hidden)}
        layer |= {f"self_attn.{p}_proj": draw(hidden, hidden) for p in "qkvo"}
        layer["post_attention_layernorm"] = draw(hidden)
        shards.append({f"model.layers.{i}.{n}.weight": array for n, array in layer.items()})
    shards[0] |= {"model.embed_tokens.weight": draw(vocab, hidden)}
    shards[0] |= {"model.norm.weight": draw(hidden)}
    for first in range(0, layers, layers_per_shard):
        for other in shards[first + 1 : first + layers_per_shard]:
            shards[first] |= other
    shards, index = shards[::layers_per_shard], {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(
        json.dumps(
            dict(
                model_type="llama", vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn,
                num_hidden_layers=layers, num_attention_heads=hidden // 16,
                num_key_value_heads=hidden // 16, max_position_embeddings=32,
                tie_word_embeddings=True, rms_norm_eps=1e-5,
            )
        )
    )  # fmt: skip


def test_logits_check_their_input(tiny):
    assert tiny.logits([[1, 2, 3]]).shape == (1, 3, 128)
    for bad, message in (
        ([[1, 2], [3]], r"one length; got lengths \[2, 1\]. Pad them on the right"),
        ([1, 2], r"\[batch, tokens\].*got shape \(2,\)"),
        ([[]], "at least one of each"),
        ([[0] * 33], r"has 32 positions; got 33 tokens"),
        ([[1, 128]], r"must be in \[0, 128\).*got 128 at position \(0, 1\)"),
        ([[-1]], "got -1"),
        ([[1.5]], "must be integers; got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.logits(bad)


def test_logits_trace_once(tiny):
    from nqkv_jax.models import loading

    tiny.logits([[1, 2, 3, 4, 5]])
    before = loading._logits._cache_size()
    for ids in ([[5, 4, 3, 2, 1]], np.ones((1, 5), np.int64), jnp.zeros((1, 5), jnp.int32)):
        tiny.logits(ids)
    assert loading._logits._cache_size() == before


def test_language_model_is_frozen_and_short(tiny):
    with pytest.raises(AttributeError):
        tiny.name = "other"
    assert len(repr(tiny)) < 1000


# --- checkpoints that do not fit


def test_all_faults_in_one_error(tmp_path):
    write_llama(tmp_path, hidden=32, ffn=64, layers=2)
    path = tmp_path / "model-00002-of-00002.safetensors"
    state = load_file(path)
    layer = "model.layers.1."
    state["model.model.norm.weight"] = state.pop(layer + "input_layernorm.weight")
    state[layer + "self_attn.q_proj.weight"] = np.ones((32, 31), np.float32)
    state[layer + "mlp.up_proj.weight"] = np.ones((64, 32), np.int32)
    del state[layer + "mlp.down_proj.weight"]
    save_file(state, path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors",
                                   layer + "mlp.gate_proj.weight": path.name}})
    )  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(tmp_path, progress=False)
    error = caught.value
    assert sorted(error.missing) == [
        layer + "input_layernorm.weight", layer + "mlp.down_proj.weight"
    ]  # fmt: skip
    assert error.unexpected == ["model.model.norm.weight"]
    assert len(error.misfits) == 2
    for part in (
        *error.missing,
        *error.unexpected,
        "expected shape (32, 32), got (32, 31)",
        "int32",
    ):
        assert part in str(error)


def test_truncated_shard_is_found_before_any_weight_is_read(tmp_path):
    write_llama(tmp_path, hidden=32, ffn=64, layers=2)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointFileError, match=r"00002-of-00002\.safetensors.*truncated"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointFileError, match=r"00002-of-00002\.safetensors.*truncated"):
        from_pretrained(tmp_path)


def test_bad_names(tmp_path, monkeypatch):
    with pytest.raises(CheckpointNotFoundError, match="existing folder"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError, match=r"must hold weights.*it holds nothing"):
        from_pretrained(tmp_path)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointNotFoundError, match="Without a network") as caught:
        from_pretrained("facebook/opt-125m")
    assert "\n" not in str(caught.value)


def test_a_check_sees_the_model_before_its_weights_are_read(tmp_path, monkeypatch):
    write_llama(tmp_path, hidden=32, ffn=64, layers=1)
    seen = []
    lm = from_pretrained(tmp_path, dtype="bfloat16", progress=False, check=seen.append)
    (outline,) = seen
    shapes = lambda lm: [(a.shape, a.dtype) for a in jax.tree.leaves(lm.params)]
    assert shapes(outline) == shapes(lm)
    assert isinstance(jax.tree.leaves(outline.params)[0], jax.ShapeDtypeStruct)
    assert (outline.config, outline.name, outline.dtype) == (lm.config, lm.name, lm.dtype)
    # What runs the model in the abstract can be tried.
    tokens = jax.ShapeDtypeStruct((1, 3), np.int32)
    logits, _ = jax.eval_shape(outline.apply, outline.params, tokens)
    assert logits.shape == (1, 3, lm.config.vocab_size)

    # Before weights come from the hub, too: what they would be is not there.
    fetched = []

    def snapshot_download(name, *, allow_patterns):
        fetched.append("model.safetensors" in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    from_pretrained("owner/name", progress=False, check=lambda lm: fetched.append("checked"))
    assert fetched == [False, "checked", True]

    def refuse(lm):
        raise ValueError("it does not fit")

    monkeypatch.setattr(Checkpoint, "tensors", lambda _: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="it does not fit"):
        from_pretrained(outline.name, check=refuse)


def test_unknown_architecture(tmp_path):
    write_llama(tmp_path, hidden=32, ffn=64, layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(
        ValueError,
        match=r"model_type must be one of gemma2, gemma3, gemma3_text, llama,.*got 'mamba'",
    ):
        from_pretrained(tmp_path)


# --- memory and progress


def test_peak_host_memory(tmp_path):
    """Four shards of 16 MiB: beside the model, about one of them is in memory, not all."""
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("measuring the peak of a part of a program needs Linux's /proc")
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()
    write_llama(tmp_path / "large", hidden=256, ffn=1024, layers=16, layers_per_shard=4)
    write_llama(tmp_path / "small", hidden=32, ffn=64, layers=1)
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    program = """
        import gc, sys, jax
        from nqkv_jax.models import from_pretrained

        def resident(key):
            lines = open("/proc/self/status").read().splitlines()
            return next(1024 * int(l.split()[1]) for l in lines if l.startswith(key))

        from_pretrained(sys.argv[1] + "/small")        # starts JAX
        gc.collect()
        open("/proc/self/clear_refs", "w").write("5")  # the peak counts from now
        before = resident("VmRSS")
        lm = from_pretrained(sys.argv[1] + "/large", dtype=sys.argv[2])
        jax.block_until_ready(jax.tree.leaves(lm.model))
        print(resident("VmHWM") - before, sum(x.nbytes for x in jax.tree.leaves(lm.model)))
    """
    for dtype, share in (("float32", 1.0), ("bfloat16", 0.5)):
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), dtype]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, model = map(int, result.stdout.split())
        print(f"{dtype}: {peak / 2**20:.1f} MiB above the start, for {model / 2**20:.1f} MiB")
        assert result.stderr == ""  # no progress bar where there is no terminal
        assert abs(model - share * size) < 0.01 * size
        # A few tensors in practice, of 1 MiB; but allocators need not give back what is free.
        assert peak - model < size / 4
