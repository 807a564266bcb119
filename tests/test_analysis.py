"""Analyses of keys and values: the statistics, the errors of schemes, and what is said of them."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats
from tiny_language_model import TinyLM

import nqkv_jax as nq
from nqkv_jax.analysis import (
    Magnitudes,
    magnitudes,
    normality,
    plots,
    report,
    scheme_errors,
    spectra,
)
from nqkv_jax.analysis.activations import record
from nqkv_jax.analysis.errors import ROUNDING, LayerError, SchemeErrors
from nqkv_jax.analysis.magnitudes import check_layers
from nqkv_jax.analysis.normality import (
    VIEWS,
    block_statistics,
    expected_order,
    normalise_shift_normalise,
    views,
)
from nqkv_jax.analysis.spectra import LayerSpectra, Spectrum
from nqkv_jax.analysis.spectra import draw as draw_spectra
from nqkv_jax.models import LanguageModel, families

LM = TinyLM.random()
TOKENS = np.random.default_rng(1).integers(0, 256, 48).astype(np.int32)
RNG = np.random.default_rng(0)


# Statistics of blocks ----------------------------------------------------------------------------


def test_normal_blocks_pass_at_the_level_of_the_test():
    found = block_statistics(RNG.standard_normal((4000, 64)))
    assert found.passing == pytest.approx(0.95, abs=0.015)
    assert abs(found.skewness) < 0.02 and abs(found.excess_kurtosis) < 0.25
    # Elements of a block are standardised by the block itself, which pulls extremes in a little.
    np.testing.assert_allclose(found.ordered, expected_order(64), atol=0.05)
    assert (found.blocks, found.block_size) == (4000, 64)


def test_other_blocks_do_not():
    # Shares of nqkv.md, 6.2: Laplace at n = 64 and at n = 256, for which more is found.
    assert block_statistics(RNG.laplace(size=(2000, 64))).passing == pytest.approx(0.42, abs=0.05)
    heavy = block_statistics(RNG.laplace(size=(1000, 256)))
    assert heavy.passing == pytest.approx(0.02, abs=0.015) and heavy.excess_kurtosis > 1.5
    skewed = block_statistics(RNG.exponential(size=(500, 64)))
    assert skewed.passing < 0.05 and skewed.skewness > 1


@settings(max_examples=20, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.booleans())
def test_the_test_does_not_see_affine_maps(shift, scale, flip):
    x = np.random.default_rng(3).standard_t(6, size=(50, 40))
    moved = block_statistics((-1 if flip else 1) * scale * x + shift)
    found = block_statistics(x)
    assert moved.passing == found.passing
    np.testing.assert_allclose(moved.excess_kurtosis, found.excess_kurtosis, rtol=1e-6, atol=1e-9)


def test_statistics_against_one_block_at_a_time():
    x = RNG.standard_t(5, size=(60, 50)) + 3
    found = block_statistics(x.astype(np.float32))
    x = x.astype(np.float32).astype(np.float64)
    assert found.passing == np.mean([stats.normaltest(row).pvalue > 0.05 for row in x])
    np.testing.assert_allclose(found.skewness, np.median([stats.skew(row) for row in x]))


def test_constant_blocks_do_not_pass():
    x = RNG.standard_normal((10, 40))
    x[:5] = 7.1  # whose mean is not 7.1 exactly, in floating point
    assert block_statistics(x).passing == block_statistics(x[5:]).passing / 2
    nothing = block_statistics(np.zeros((3, 40)))
    assert nothing.passing == 0 and np.isnan(nothing.excess_kurtosis)


@pytest.mark.parametrize("shape", [(0, 64), (4, 19), (64,), (2, 3, 40)])
def test_blocks_must_be_long_enough(shape):
    with pytest.raises(ValueError, match="at least 20 elements"):
        block_statistics(np.zeros(shape))


def test_views_cut_where_they_say():
    """Channels of different scales: normal along tokens, and within a token only standardised."""
    scales = np.exp(2 * RNG.standard_normal(96))
    found = views(RNG.standard_normal((300, 96)) * scales + 5 * scales, block_size=48, stretch=100)
    assert found["tokens"].passing < 0.2 and found["tokens"].excess_kurtosis > 1
    assert found["standardised"].passing > 0.9 and found["channels"].passing > 0.9
    assert {v: (s.blocks, s.block_size) for v, s in found.items()} == dict(
        tokens=(600, 48), standardised=(600, 48), channels=(288, 100), nsn=(600, 48),
        nsn_hadamard=(600, 48),
    )  # fmt: skip
    # And the other way round: tokens of different scales.
    turned = views(RNG.standard_normal((96, 96)) * scales[:, None], block_size=96, stretch=96)
    assert turned["tokens"].passing > 0.85 and turned["channels"].passing < 0.2


def test_what_nsnquant_makes_normal():
    """Means of channels and norms of tokens go; scales of channels only by the rotation."""
    tokens, scales = np.exp(RNG.standard_normal((250, 1))), np.exp(0.8 * RNG.standard_normal(96))
    x = tokens * (RNG.standard_normal((250, 96)) * scales + 5 * RNG.standard_normal(96) ** 3)
    found = views(x, block_size=48, stretch=50, head_dim=32)
    assert found["tokens"].passing < 0.1 and found["nsn"].passing < 0.5
    assert found["nsn_hadamard"].passing > 0.85
    even = views(x / scales, block_size=96, stretch=50, head_dim=32)
    assert even["tokens"].passing < 0.1 and even["nsn"].passing > 0.9
    # RoPE comes before the Hadamard transform: it sees heads that are normalised.
    seen = []
    views(x, block_size=48, stretch=100, head_dim=32, rotate=lambda x: seen.append(x) or x)
    (heads,) = seen
    assert heads.shape == (200, 3, 32)
    np.testing.assert_allclose(np.mean(heads**2, axis=-1), 1)


def test_nsn_in_one_line_per_step():
    x = RNG.standard_normal((2, 40, 3, 32)) + 2
    x[1, 7, 2] = 0
    found = normalise_shift_normalise(x)
    for window in range(2):
        for head in range(3):
            rows = x[window, :, head].copy()
            for step in range(2):
                for row in rows:
                    row /= np.linalg.norm(row) / np.sqrt(32) or 1
                if not step:
                    rows -= rows.mean(axis=0)
            np.testing.assert_allclose(found[window, :, head], rows, atol=1e-12)


@pytest.mark.parametrize("sizes, message", [
    (dict(block_size=48, stretch=400), "stretch must be at least 20 and at most .* 300; got 400"),
    (dict(block_size=48, stretch=10), "stretch must be at least 20"),
    (dict(block_size=40), "must divide the 96 channels.*got 40"),
    (dict(block_size=16), "at least 20; got 16"),
    (dict(block_size=192), "must divide the 96 channels.*got 192"),
])  # fmt: skip
def test_views_refuse(sizes, message):
    with pytest.raises(ValueError, match=message):
        views(np.zeros((300, 96)), **sizes)


# What is recorded --------------------------------------------------------------------------------


def test_record_is_what_the_model_computes():
    layer = record(LM, TOKENS)[0]
    weights = {k: np.asarray(v, np.float64) for k, v in LM.params["layers"][0].items()}
    x = np.asarray(LM.params["embed"], np.float64)[TOKENS]
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-6)
    k, v = np.split(x @ weights["kv"], 2, axis=1)
    np.testing.assert_allclose(layer.sides["keys"], k, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.sides["values"], v, rtol=1e-4, atol=1e-4)
    # RoPE turns pairs of channels i, i + 16 of each head.
    pairs = k.reshape(-1, 2, 2, 16)
    turned = pairs[:, :, 0] + 1j * pairs[:, :, 1]
    turned = turned * np.exp(1j * np.outer(np.arange(48), 1e4 ** -np.linspace(0, 1, 16)))[:, None]
    expected = np.stack([turned.real, turned.imag], axis=2).reshape(-1, 64)
    np.testing.assert_allclose(layer.sides["rotated_keys"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [
    np.zeros(1, int), np.zeros(513, int), np.zeros((2, 4), int), np.zeros(8), np.array([3, 256]),
    np.array([3, -1]),
])  # fmt: skip
def test_record_refuses(tokens):
    with pytest.raises(
        ValueError, match=r"analysis: .*(2 to 512 token ids|in \[0, 256\)|integers)"
    ):
        record(LM, tokens)


# Magnitudes --------------------------------------------------------------------------------------


def test_outlier_channels_and_first_token():
    x = np.ones((10, 20), np.float32)
    x[:, 3], x[:, 7], x[:, 9] = 3.9, 5, 10
    x[0] *= 3
    found = Magnitudes(absolute=x)
    np.testing.assert_array_equal(found.outlier_channels, [9, 7])
    energy = [1] * 17 + [3.9**2, 25, 100]
    assert found.outlier_energy == pytest.approx(125 / sum(energy))
    assert found.first_over_median == pytest.approx(3)
    np.testing.assert_allclose(found.norms, np.linalg.norm(x, axis=1), rtol=1e-6)
    empty = Magnitudes(absolute=np.zeros((4, 8), np.float32))
    assert empty.outlier_energy == 0 and np.isnan(empty.first_over_median)


def test_layers_that_are_drawn():
    assert check_layers(None, 30) == [0, 15, 29] and check_layers(None, 1) == [0]
    assert check_layers([4, 2], 5) == [4, 2]
    for wrong in ([5], [-1], []):
        with pytest.raises(ValueError, match=r"0\.\.4"):
            check_layers(wrong, 5)


# Errors of schemes -------------------------------------------------------------------------------


def test_errors_against_numpy():
    """NQKV: every token is decoded, the current one too; attention in float64."""
    found = scheme_errors(LM, TOKENS, ["nqkv:block_size=32", "none"], progress=False)
    assert [r.stored_bits for r in found] == [4.5, 32]
    for layer, error, exact in zip(
        record(LM, TOKENS), found[0].layers, found[1].layers, strict=True
    ):
        quantizer = nq.BlockQuantizer(nq.codebooks.normal_float(4), block_size=32)
        keys, values = np.asarray(layer.rotated_keys), np.asarray(layer.values)
        pair = nq.dequantize(nq.quantize((jnp.asarray(keys), jnp.asarray(values)), quantizer))
        relative = lambda a, b: np.sum((a - b) ** 2, dtype=np.float64) / np.sum(a**2)
        assert error.keys == pytest.approx(relative(keys, np.asarray(pair[0])), rel=1e-4)
        assert error.values == pytest.approx(relative(values, np.asarray(pair[1])), rel=1e-4)

        queries = np.asarray(layer.rotated_queries, np.float64)[0]

        def attention(k, v, q=queries):
            scores = np.einsum("hgsd,thd->hgst", q, np.float64(k))
            scores = np.where(np.tri(48, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            return np.einsum("hgst,thd->hgsd", weights, np.float64(v))

        expected = relative(attention(keys, values), attention(*pair))
        assert error.output == pytest.approx(expected, rel=1e-3)
        assert exact.keys == exact.values == 0 and exact.output < ROUNDING


def test_errors_of_what_is_encoded():
    """With states, unrotated keys, and tokens that are kept and do not count."""
    names = ["squat:group_size=16,residual=16,block=8,keys=unrotated", "int2:group_size=16,sinks=1"]
    kept, coarse = scheme_errors(LM, TOKENS, names, progress=False)
    for layer in kept.layers + coarse.layers:
        assert 0 < layer.keys < 0.5 and 0 < layer.values < 0.5
    assert kept.median("output") < coarse.median("output")
    # 2 bits for 16 numbers on both: the tokens that squat keeps make its values no better.
    assert kept.median("values") == pytest.approx(coarse.median("values"), rel=0.2)


@pytest.mark.parametrize("names, message", [
    (["kivi"], "kivi encodes no keys of a text of 48 tokens"),
    (["nqkv:block_size=48"], "block_size"),
    (["nothing"], "unknown scheme"),
    ([], "at least one scheme"),
])  # fmt: skip
def test_errors_refuse(names, message):
    with pytest.raises(ValueError, match=message):
        scheme_errors(LM, TOKENS, names, progress=False)


# Words -------------------------------------------------------------------------------------------


def test_words_on_normality_follow_the_numbers():
    normal = RNG.standard_normal((200, 64))
    scales = np.exp(1.5 * RNG.standard_normal(64))
    cut = lambda x: views(x, block_size=64, stretch=50)
    said = " ".join(
        report.describe_normality([dict(keys=cut(normal), values=cut(normal * scales))])
    )
    keys, values = said.split("**Values**")
    assert "may be taken for normal" in keys and "premise fails" not in keys
    assert "make no difference" in keys
    assert "premise fails" in values and "means and scales of their own" in values
    assert "a scale per channel meets nearly normal numbers" in values
    laplace = RNG.laplace(size=(200, 64)) ** 3
    said = " ".join(report.describe_normality([dict(keys=cut(laplace), values=cut(normal))]))
    keys, values = said.split("**Values**")
    assert "not normal over time either" in keys
    assert "not what its codebook supposes" in keys and "codebook for normal numbers" in values


def test_words_on_magnitudes_follow_the_numbers():
    flat = np.abs(RNG.standard_normal((40, 32))).astype(np.float32)
    outliers, sink = flat.copy(), flat.copy()
    outliers[:, 5] = 50
    sink[0] *= 0.01
    of = lambda k, v: [dict(keys=Magnitudes(absolute=k), values=Magnitudes(absolute=v))]
    said = " ".join(report.describe_magnitudes(of(outliers, sink)))
    assert "are a matter of the keys" in said
    assert "in the one layer less than half, as is known" in said
    assert "Outliers among the 32 channels of the keys, with" in said and "channel: 1; they" in said
    said = " ".join(report.describe_magnitudes(of(flat, outliers)))
    assert "are a matter of the values, unlike" in said and "less than half" not in said
    assert "do not differ" in " ".join(report.describe_magnitudes(of(flat, flat)))
    assert "an outlier token" in " ".join(report.describe_magnitudes(of(flat, 1 / sink)))


@pytest.mark.parametrize(
    "values, rank", [([2.0, 2.0, 0.0], 2), ([2.0, 1.0], 1.25), ([0.0, 0.0], 0)]
)
def test_stable_ranks(values, rank):
    assert Spectrum(values=np.array(values, np.float32)).stable_rank == pytest.approx(rank)


def test_words_on_spectra_follow_the_numbers():
    one = lambda *norms: LayerSpectra(
        **dict(zip(("key_weight", "value_weight", "keys", "values"),
                   (Spectrum(values=np.array([n])) for n in norms), strict=True))
    )  # fmt: skip
    larger, smaller = one(2.0, 1.0, 6.0, 2.0), one(1.0, 2.0, 3.0, 4.0)
    said = " ".join(report.describe_spectra([larger, larger]))
    assert "||K|| > ||V|| in all layers; K is 3.0 times" in said and "can stand for" in said
    said = " ".join(report.describe_spectra([larger, one(1.0, 2.0, 6.0, 2.0)]))
    assert "in 1 of 2 layers" in said and "cannot stand for" in said
    said = " ".join(report.describe_spectra([smaller]))
    assert "||K|| > ||V|| in no layer" in said and "does not follow here" in said


def test_words_on_errors_follow_the_numbers():
    def of(name, keys, values, output):
        layer = LayerError(keys=keys, values=values, output=output)
        return SchemeErrors(scheme=name, stored_bits=4.0, layers=(layer,))

    said = report.describe_errors([of("a", 0.1, 0.1, 0.3), of("b", 0.2, 0.2, 0.1)])
    assert said[0].startswith("`b`") and "closest to the exact one with `b`" in said[2]
    assert "both are larger with `b` than with `a`" in said[3]
    said = report.describe_errors([of("a", 0.1, 0.1, 0.05), of("b", 0.2, 0.2, 0.1)])
    assert "with `a`" in said[2] and said[3].startswith("No scheme is better at attention")
    assert len(report.describe_errors([of("a", 0.1, 0.1, 0.05)])) == 1


# Nothing ------------------------------------------------------------------------------------------


@functools.cache
def without_some(layers, zero):
    """A Llama of so many layers; the projections to keys or values in `zero` are zero."""
    config = dataclasses.replace(
        families.presets["smollm2-135m"], num_layers=layers, hidden_size=64, num_heads=2,
        num_kv_heads=2, head_dim=32, ffn_size=64, vocab_size=256, max_positions=64,
    )  # fmt: skip
    model = families.build(config)
    for layer in model.layers:
        kernel = layer.qkv.kernel[...]
        for side, place in (("keys", slice(-128, -64)), ("values", slice(-64, None))):
            kernel = kernel.at[:, place].multiply(float(side not in zero))
        layer.qkv.kernel[...] = kernel
    return LanguageModel(model=model, config=config, tokenizer=None, name="zero", dtype=jnp.float32)


@pytest.mark.parametrize(
    "layers, zero",
    [
        (1, ()),
        (2, ("keys", "values")),
        *(pytest.param(2, (side,), marks=pytest.mark.more) for side in ("keys", "values")),
    ],
)
def test_figures_and_words_of_nothing(layers, zero, tmp_path, monkeypatch):
    """Without a warning, which would be an error here."""
    pytest.importorskip("matplotlib")
    lm, saved = without_some(layers, zero), {}
    save = lambda figure, path, data: (figure.savefig(path), saved.update({path.stem: data}))
    monkeypatch.setattr(plots, "save", save)
    cut = functools.partial(normality, stretch=24)
    monkeypatch.setattr(report, "normality", cut)
    text = report.write(lm, TOKENS, tmp_path, names=["int4", "none"], progress=False).read_text()
    assert "nan" not in text and "inf" not in text
    assert ("V is zero" in text) == ("values" in zero)
    assert ("The keys of the median token are zero" in text) == ("keys" in zero)
    constant = "all blocks of 64 channels of one token are constant"
    assert (f"**Values**: {constant}" in text) == ("values" in zero)
    for name, array in ((n, a) for figure in saved.values() for n, a in figure.items()):
        # Blocks of a constant have no order.
        nothing = name.endswith(".ordered") and any(side in name for side in zero)
        assert np.isfinite(array).all() != nothing, name


def test_layers_that_are_zero_have_no_part_in_the_decay():
    pytest.importorskip("matplotlib")
    some, none = Spectrum(values=np.array([4.0, 1.0])), Spectrum(values=np.zeros(2))
    layer = lambda s: LayerSpectra(key_weight=s, value_weight=s, keys=s, values=none)
    data = draw_spectra([layer(some), layer(none)], "x")[1]
    np.testing.assert_allclose(data["keys.decay"], [1, 0.25])
    np.testing.assert_array_equal(data["values.decay"], 0)


def test_lines_of_one_layer_can_be_seen():
    pytest.importorskip("matplotlib")
    one = Spectrum(values=np.array([4.0, 1.0]))
    layer = LayerSpectra(key_weight=one, value_weight=one, keys=one, values=one)
    axes = draw_spectra([layer], "x")[0].axes[0]
    assert {line.get_marker() for line in axes.lines} == {"o"}
    ticks = draw_spectra([layer] * 2, "x")[0].axes[0].get_xticks()
    assert all(tick == int(tick) for tick in ticks)


@pytest.mark.parametrize("tokens", [[], [1], [1.5] * 20, [[1, 2]], [256] * 20, [-1] * 20])
def test_spectra_refuse(tokens):
    with pytest.raises(ValueError, match=r"^analysis: "):
        spectra(without_some(1, ()), np.array(tokens))


# Models ------------------------------------------------------------------------------------------


def test_normality_and_magnitudes_of_a_model():
    layers = normality(LM, TOKENS, block_size=32, stretch=24, progress=False)
    assert len(layers) == 2 and list(layers[0]) == ["keys", "rotated_keys", "values"]
    assert tuple(layers[0]["keys"]) == VIEWS and layers[0]["keys"]["tokens"].blocks == 2 * 48
    # What NSNQuant codes of keys: rotated at their positions, then transformed.
    layer = record(LM, TOKENS)[0]
    keys = normalise_shift_normalise(np.float64(layer.keys).reshape(2, 24, 2, 32)).reshape(
        48, 2, 32
    )
    coded = np.asarray(layer.rotary(jnp.asarray(keys, jnp.float32), jnp.arange(48)))
    coded = coded @ linalg.hadamard(32)
    expected = block_statistics(coded.reshape(-1, 32))
    assert layers[0]["keys"]["nsn_hadamard"].passing == expected.passing
    found = magnitudes(LM, TOKENS)[1]
    # RoPE turns pairs of channels: the norm of a token stays.
    np.testing.assert_allclose(found["keys"].norms, found["rotated_keys"].norms, rtol=1e-5)


@pytest.mark.slow
def test_smollm2_is_normal_along_tokens_and_not_within(smollm2, shared_data):
    """nqkv.md, 6.2, layers 0/7/15/22/29: keys 0-2 % within a token, 61-88 % along tokens."""
    text = (shared_data / "wikitext-2-raw" / "wiki.test.nonblank.txt").read_text(encoding="utf-8")
    tokens = smollm2.tokenizer.encode(text[:20000], add_special_tokens=False)[:4096]
    layers = normality(smollm2, np.asarray(tokens, np.int32), progress=False)
    layers = [layers[i] for i in (0, 7, 15, 22, 29)]
    share = lambda side, view: [layer[side][view].passing for layer in layers]
    assert max(share("rotated_keys", "tokens")) < 0.03
    assert 0.6 < min(share("rotated_keys", "channels") + share("values", "channels"))
    assert max(share("rotated_keys", "channels") + share("values", "channels")) < 0.9
    assert min(share("values", "standardised")) > 0.8
