"""The cache: where tokens are; that every way to append stores the same bits; bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH, EACH_SCHEME, HEAD_DIM, NUM_KV_HEADS, ROTARY, SCHEMES, make_cache, make_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import nqkv_jax as nq
from nqkv_jax.side import Window

# Of all laws below, so that they share compiled programs. The length ends within a group of every
# scheme, and a piece fills several.
MAX_LEN, PIECE = 120, 70


@functools.partial(jax.jit, static_argnames="rotary", donate_argnums=0)
def append(cache, k, v, num_new, rotary):
    """Appends to the only layer."""
    rotary = ROTARY if rotary else None
    if rotary is not None and cache.layers[0].rotated:
        k = rotary(k, cache.positions(k.shape[1]))
    # Some queries, three per KV head, for the schemes that look at them.
    queries = jnp.stack([k, jnp.roll(k, 1, axis=-1), v], axis=3)
    layer = cache.layers[0].append(k, v, num_new, rotary, queries)
    return nq.KVCache(layers=(layer,), scheme=cache.scheme)


def append_in_pieces(cache, k, v, lengths, piece, rotary=True):
    """Appends the first lengths[b] tokens of sequence b, `piece` at a time; pads are garbage."""
    lengths = np.asarray(lengths)
    for start in range(0, int(lengths.max()), piece):
        count = np.clip(lengths - start, 0, piece)
        cut = lambda a: np.full((a.shape[0], piece, *a.shape[2:]), 1e3, np.float32)
        parts = []
        for a in (k, v):
            part = cut(a)
            for b, n in enumerate(count):
                part[b, :n] = a[b, start : start + n]
            parts.append(jnp.asarray(part))
        cache = append(cache, *parts, jnp.asarray(count, jnp.int32), rotary)
    return cache


def test_every_registered_scheme_is_covered():
    assert {s.partition(":")[0] for s in SCHEMES} == set(nq.schemes.names())


def test_keys_in_another_dtype_are_refused():
    cache = make_cache("none", max_len=8, dtype=jnp.bfloat16)
    _, k, v = make_qkv(3)
    with pytest.raises(ValueError, match="its dtype, bfloat16; got float32 and float32"):
        cache.append(0, k, v, jnp.array([3, 3]), None)


def test_a_donated_cache_leaves_the_scheme_its_arrays():
    """Here one quantizer on both sides."""
    levels = jnp.linspace(-1, 1, 16, dtype=jnp.float32)
    quantizer = nq.quantizers.DenseSparseTokens(levels=levels, outliers=0)
    scheme = nq.schemes.LayerScheme(key=quantizer, value=quantizer)
    shape = nq.schemes.LayerShape(num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM)
    layer = scheme.init(shape, batch=BATCH, max_len=8, dtype=jnp.float32)
    _, k, v = make_qkv(3)
    append(nq.KVCache(layers=(layer,), scheme="own"), k, v, jnp.array([3, 3]), False)
    assert not levels.is_deleted()
    scheme.init(shape, batch=BATCH, max_len=8, dtype=jnp.float32)


@pytest.mark.optimized
@pytest.mark.parametrize("spec", EACH_SCHEME)
def test_append_one_by_one_equals_bulk_bit_for_bit(spec):
    _, k, v = make_qkv(109)
    lengths = [109, 70]
    one_by_one, bulk = (
        append_in_pieces(make_cache(spec, max_len=MAX_LEN), k, v, lengths, piece)
        for piece in (1, PIECE)
    )
    chex.assert_trees_all_equal(one_by_one, bulk)
    np.testing.assert_array_equal(one_by_one.lengths, lengths)


@pytest.mark.optimized
@pytest.mark.parametrize("spec", EACH_SCHEME)
def test_ragged_batch_equals_each_sequence_alone(spec):
    _, k, v = make_qkv(80)
    lengths = [80, 37]
    # Without the arrays of a calibrated quantizer, which all sequences share.
    own = lambda cache: [
        ([(s.sinks, s.body, s.residual, s.state) for s in (a.key, a.value)], a.lengths, a.overflow)
        for a in cache.layers
    ]
    batch = append_in_pieces(make_cache(spec, max_len=MAX_LEN), k, v, lengths, PIECE)
    for b, n in enumerate(lengths):
        cache = make_cache(spec, max_len=MAX_LEN, batch=1)
        alone = append_in_pieces(cache, k[b : b + 1], v[b : b + 1], [n], PIECE)
        row = jax.tree.map(lambda a, b=b: a[b : b + 1], own(batch))
        chex.assert_trees_all_equal(row, own(alone))


# With and without states, arrays that sequences share, sinks, a residual, groups of tokens.
KINDS = SCHEMES[6], SCHEMES[15], SCHEMES[19]


@pytest.mark.parametrize(
    "spec", [pytest.param(s, marks=[] if s in KINDS else pytest.mark.more) for s in SCHEMES]
)
def test_sequences_are_taken_and_reset(spec):
    """Bit for bit: what is taken goes on as it would have, and what is reset begins anew."""
    _, k, v = make_qkv(75)
    fill = lambda *args: append_in_pieces(*args, PIECE)
    go_on = lambda cache, rows: fill(cache, k[rows, 5:], v[rows, 5:], [70 - 3 * b for b in rows])
    half = lambda: fill(make_cache(spec, max_len=150), k, v, [75, 37])
    stored = lambda cache: [(a.key, a.value, a.lengths, a.overflow) for a in cache.layers]

    swapped = go_on(half().take([1, 0]), [1, 0])
    chex.assert_trees_all_equal(stored(swapped), stored(go_on(half(), [0, 1]).take([1, 0])))
    several = half().take(jnp.array([1, 1, 0]))
    assert several.batch == 3 and several.nbytes > half().nbytes
    chex.assert_trees_all_equal(stored(several.take([0, 2])), stored(half().take([1, 0])))

    # Of a body that is shorter again nothing is seen, so that it need not be as it was.
    anew, fresh = half().reset(jnp.array([True, False])), make_cache(spec, max_len=150)
    np.testing.assert_array_equal(anew.lengths, [0, 37])
    chex.assert_trees_all_equal(stored(anew.take([1])), stored(half().take([1])))
    states = lambda cache: [(a.key.state, a.value.state) for a in cache.layers]
    chex.assert_trees_all_equal(states(anew.take([0])), states(fresh.take([0])))
    q, k, v = make_qkv(90, seed=1)
    seen = []
    for cache in (half().reset(), fresh):
        out, cache = attend(q[:, :-1], k[:, :-1], v[:, :-1], cache, rotary=ROTARY)
        last, cache = attend(q[:, -1:], k[:, -1:], v[:, -1:], cache, rotary=ROTARY)
        seen.append((out, last, states(cache), cache.lengths, cache.overflow))
    chex.assert_trees_all_equal(*seen)


def test_which_sequences_can_be_taken_and_reset():
    cache = make_cache("nqkv", max_len=8)
    for wrong in ([], [[0, 1]], [0.5], [True], [2], [-1], 0):
        with pytest.raises(ValueError, match="take expects"):
            cache.take(wrong)
    for wrong in ([0, 1], [True], True):
        with pytest.raises(ValueError, match=r"bool\[2\], True for each sequence"):
            cache.reset(wrong)
    assert jax.jit(lambda cache, i: cache.take(i))(cache, jnp.array([1])).batch == 1


def test_a_cache_is_shown_in_a_line():
    shown = repr(make_cache("nqkv:bits=3", max_len=64, num_layers=3))
    assert shown == (
        "KVCache(scheme='nqkv:bits=3', layers=3, max_len=64, num_kv_heads=2, head_dim=32, "
        "dtype=float32, lengths=[0 0])"
    )
    one = make_cache("nqkv-plus", max_len=300).layers[0]
    assert len(repr(one)) < 300 and len(repr(one.key)) < 300


@pytest.mark.parametrize("spec", EACH_SCHEME)
def test_overflow_is_counted_and_leaves_the_cache_intact(spec):
    _, k, v = make_qkv(MAX_LEN + 15)
    empty = lambda: make_cache(spec, max_len=MAX_LEN)
    fill = lambda n: append_in_pieces(empty(), k[:, :n], v[:, :n], [n, n], PIECE)
    full = jax.tree.map(np.asarray, fill(MAX_LEN))
    # The last piece crosses the end: what fits is kept.
    crossing = fill(MAX_LEN + 5)
    np.testing.assert_array_equal(crossing.overflow, [5, 5])
    stored = lambda cache: (cache.layers[0].key, cache.layers[0].value, cache.lengths)
    chex.assert_trees_all_equal(stored(crossing), stored(full))
    # And once it is full nothing moves.
    more = append_in_pieces(crossing, k[:, -10:], v[:, -10:], [10, 3], PIECE)
    np.testing.assert_array_equal(more.overflow, [15, 8])
    chex.assert_trees_all_equal(stored(more), stored(full))
    message = rf"max_len={MAX_LEN} is too small.*\[15, 8\].*at least {MAX_LEN + 15} tokens"
    with pytest.raises(ValueError, match=message):
        more.check()
    assert full.check() is full


attend = jax.jit(nq.attend, static_argnames=("layer", "window"))


@given(st.integers(0, 3000), st.integers(0, 200), st.integers(1, 200))
@settings(max_examples=300, deadline=None)
def test_window_never_overfills_the_residual(tokens, keep, chunk):
    window = Window(keep=keep, chunk=chunk)
    encoded, before = window.encoded(tokens), window.encoded(max(tokens - 1, 0))
    assert encoded == int(window.encoded(jnp.int32(tokens)))
    assert encoded % chunk == 0 and 0 <= encoded - before <= chunk
    # The token just appended and everything not encoded before it fit into the ring.
    assert tokens - before <= max(window.capacity, 1)
    assert tokens - encoded >= min(keep, tokens)


WINDOWS = st.builds(Window, keep=st.integers(0, 12), chunk=st.integers(1, 8))


@given(WINDOWS, WINDOWS)
@settings(max_examples=100, deadline=None)
def test_a_side_that_does_not_lead_has_nothing_encoded_that_waits_on_the_other(side, other):
    # A token that is encoded at once is seen so.
    seen = lambda window, n, new: window.encoded(n + new * window.immediate)
    ahead = any(seen(side, n, i) > seen(other, n, i) for n in range(100) for i in (0, 1))
    assert side.leads(other) or not ahead
    keys, values = Window(chunk=128), Window(keep=128)
    assert keys.leads(values) and not values.leads(keys)


def test_kivi_residual_lengths():
    """kivi.md: after t tokens the key residual holds t mod R, the value residual min(t, R)."""
    layer = nq.schemes.get("kivi:residual=32").layer(
        nq.schemes.LayerShape(num_kv_heads=2, head_dim=32)
    )
    for t in (1, 31, 32, 33, 64, 65, 100):
        assert t - layer.key_window.encoded(t) == t % 32
        assert t - layer.value_window.encoded(t) == min(t, 32)


WAITING = ["kivi", "nqkv-plus", "squat:residual=64", "ott:skip_layers=0", "quanto:group_size=32"]


@pytest.mark.parametrize("spec", [*WAITING, "int4:sinks=9"])
@pytest.mark.parametrize("max_len", [1, pytest.param(7, marks=pytest.mark.more), 33])
def test_a_short_cache_takes_no_more_than_full_precision(spec, max_len):
    """Sinks and residual have no room for tokens that can never come."""
    short, long = (make_cache(spec, max_len=n) for n in (max_len, 300))
    room = max_len if spec in WAITING else min(max_len, 9)
    assert [s.exact.shape[1] for s in (short.layers[0].key, short.layers[0].value)] == [room] * 2
    assert short.nbytes <= make_cache("none", max_len=max_len).nbytes
    # Attention sees the same: a prompt of all but two tokens, these, and one that is too many.
    q, k, v = make_qkv(max_len + 1)
    prompt = max(max_len - 2, 1)
    for first, last in ((0, prompt), *((i, i + 1) for i in range(prompt, max_len + 1))):
        out, short = attend(*(a[:, first:last] for a in (q, k, v)), short)
        expected, long = attend(*(a[:, first:last] for a in (q, k, v)), long)
        if last <= max_len:
            np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_array_equal(short.lengths, [max_len] * BATCH)
    np.testing.assert_array_equal(short.overflow, [1] * BATCH)


def test_kivi_keys_are_not_encoded_one_token_at_a_time():
    """A per-channel group of one token has range 0 and would come out exact: silently too good."""
    _, k, v = make_qkv(64)
    cache = append_in_pieces(
        make_cache("kivi:residual=32", max_len=64), k, v, [64, 64], 1, rotary=False
    )
    side = cache.layers[0].key
    decoded = jax.vmap(jax.vmap(lambda p: side.quantizer.dequantize(p, nq.Context())))(side.body)
    error = np.abs(np.asarray(decoded).reshape(k.shape) - np.asarray(k))
    assert 0.05 < error.mean() < 0.5 and error.max() > 0.3


def test_bytes_are_those_of_the_live_arrays():
    before = {id(a) for a in jax.live_arrays()}
    cache = make_cache("nqkv:bits=3", max_len=64, num_layers=3)
    fresh = [a for a in jax.live_arrays() if id(a) not in before]
    assert sum(a.nbytes for a in fresh) == cache.nbytes
    # A float32 copy of one side of one layer alone would be larger than the whole cache is.
    assert cache.nbytes < 3 * 2 * BATCH * 64 * NUM_KV_HEADS * HEAD_DIM * 4 / 8
    assert cache.stored_bits == 3 + 16 / 64


def test_check_looks_at_every_layer():
    q, k, v = make_qkv(8)
    cache = make_cache("nqkv", max_len=8, num_layers=2)
    for layer in (0, 1):
        _, cache = attend(q, k, v, cache, layer=layer)
    assert cache.check() is cache
    _, forgotten = attend(q, k, v, make_cache("nqkv", max_len=8, num_layers=2), layer=1)
    with pytest.raises(
        ValueError, match=r"every layer to hold the same tokens.*\(0, 0\), \(8, 8\)"
    ):
        forgotten.check()


def test_check_is_not_for_traced_caches():
    with pytest.raises(ValueError, match=r"needs the lengths as numbers; .* check what comes back"):
        jax.jit(lambda cache: cache.check())(make_cache("none", max_len=8))


@pytest.mark.parametrize(
    "window", [dict(keep=-1), dict(chunk=0), dict(chunk=1.5), dict(keep="3"), dict(keep=True)]
)
def test_windows_are_whole_numbers(window):
    with pytest.raises(ValueError, match="expected keep >= 0 and chunk >= 1, whole numbers; got"):
        Window(**window)
    assert Window(keep=np.int64(3)) == Window(keep=3) and type(Window(keep=np.int8(3)).keep) is int


@pytest.mark.parametrize("spec", EACH_SCHEME)
def test_bits_and_bytes_add_up(spec):
    cache = make_cache(spec, max_len=4000)
    layer = cache.layers[0]
    elements = 2 * layer.num_kv_heads * layer.head_dim
    np.testing.assert_allclose(cache.token_bytes, cache.stored_bits * elements / 8, rtol=0.01)
    np.testing.assert_allclose(cache.effective_bits, cache.nbytes * 8 / (BATCH * 4000 * elements))
    rest = cache.nbytes - cache.token_bytes * BATCH * layer.key.capacity
    # Calibrated arrays do not grow with the tokens: codebooks may be larger than a short cache.
    rest -= sum(a.nbytes for a in jax.tree.leaves((layer.key.quantizer, layer.value.quantizer)))
    assert -0.01 * cache.nbytes < rest < 0.2 * cache.nbytes


def test_abstract_cache_counts_what_init_allocates():
    for spec in SCHEMES:
        sizes = dict(
            num_layers=2, batch=3, max_len=77, num_kv_heads=2, head_dim=32, dtype=jnp.bfloat16
        )
        abstract, real = nq.schemes.get(spec).abstract(**sizes), nq.schemes.get(spec).init(**sizes)
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, real)
        assert abstract.nbytes == real.nbytes == sum(a.nbytes for a in jax.tree.leaves(real))
        assert abstract.stored_bits == real.stored_bits


@pytest.mark.parametrize("spec", ["nqkv:sinks=4", "nqkv:residual=16,centre=True", "kivi"])
def test_a_cache_too_short_for_a_body_still_works(spec):
    q, k, v = make_qkv(3)
    cache = make_cache(spec, max_len=3)
    for t in range(3):
        now = slice(t, t + 1)
        out, cache = attend(q[:, now], k[:, now], v[:, now], cache, rotary=ROTARY)
    chex.assert_tree_all_finite(out)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(batch=0), "expected batch >= 1, a whole number; got 0"),
        (dict(max_len=-5), "expected max_len >= 1, a whole number; got -5"),
        (dict(head_dim=30), "multiple of|divide"),
    ],
)
def test_bad_sizes_are_refused(sizes, message):
    good = dict(num_layers=1, batch=1, max_len=8, num_kv_heads=2, head_dim=32)
    with pytest.raises(ValueError, match=message):
        nq.schemes.get("nqkv:bits=3,block_size=16").init(**(good | sizes))
