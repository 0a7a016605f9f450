"""Rotary and friends against the published formulas, coded a second time and plainly here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax.errors import InputError
from causal_jax.positions import (
    Linear,
    Llama3,
    Rotary,
    YaRN,
    alibi_slopes,
    frequencies,
    rotate,
    sinusoidal,
)

B, T, N, H = 2, 9, 3, 32
LLAMA31 = Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
YARN = YaRN(factor=4.0, original_context=4096)

SPECS = {
    "plain": Rotary(),
    "llama3 base": Rotary(base=500000.0),
    "neox": Rotary(fraction=0.25),
    "interleaved": Rotary(interleaved=True),
    "interleaved half": Rotary(fraction=0.5, interleaved=True),
    "linear": Rotary(scaling=Linear(4.0)),
    "llama3": Rotary(base=500000.0, scaling=LLAMA31),
    "yarn": Rotary(scaling=YARN),
    "yarn neox": Rotary(fraction=0.5, scaling=YARN),
}
EACH = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def draw(seed, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (B, T, N, H)).astype(dtype)


def at(*positions):
    return jnp.broadcast_to(jnp.asarray(positions)[None], (B, len(positions)))


# ---- oracles: one pair at a time, Python floats, from the papers


def oracle_frequency(spec, i, width):
    f = spec.base ** (-2 * i / width)
    s = spec.scaling
    if isinstance(s, Linear):
        return f / s.factor
    if isinstance(s, Llama3):
        wavelength = 2 * math.pi / f
        if wavelength < s.original_context / s.high_freq_factor:
            return f
        if wavelength > s.original_context / s.low_freq_factor:
            return f / s.factor
        smooth = (s.original_context / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        return (1 - smooth) * f / s.factor + smooth * f
    if isinstance(s, YaRN):

        def correction_dim(rotations):
            return (width * math.log(s.original_context / (rotations * 2 * math.pi))) / (
                2 * math.log(spec.base)
            )

        low = max(math.floor(correction_dim(s.beta_fast)), 0)
        high = min(math.ceil(correction_dim(s.beta_slow)), width - 1)
        gamma = 1 - min(max((i - low) / (high - low), 0.0), 1.0)
        return gamma * f + (1 - gamma) * f / s.factor
    return f


def oracle_rotate(x, positions, spec):
    x, out = np.asarray(x, np.float64), np.array(x, np.float64)
    width = int(spec.fraction * x.shape[-1])
    gain = 0.1 * math.log(spec.scaling.factor) + 1 if isinstance(spec.scaling, YaRN) else 1.0
    for i in range(width // 2):
        p, q = (2 * i, 2 * i + 1) if spec.interleaved else (i, i + width // 2)
        z = x[..., p] + 1j * x[..., q]
        angle = np.asarray(positions, np.float64) * oracle_frequency(spec, i, width)
        z = z * gain * np.exp(1j * angle)[..., None]
        out[..., p], out[..., q] = z.real, z.imag
    return out


@EACH
def test_frequencies_are_the_published_ones(spec):
    width = int(spec.fraction * 128)
    want = [oracle_frequency(spec, i, width) for i in range(width // 2)]
    np.testing.assert_allclose(frequencies(spec, 128), want, rtol=1e-12)


@EACH
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_rotate_is_the_published_rotation(spec, jit):
    x = draw(0)
    positions = jax.random.randint(jax.random.key(1), (B, T), 0, 4000)
    f = jax.jit(rotate, static_argnums=2) if jit else rotate
    np.testing.assert_allclose(f(x, positions, spec), oracle_rotate(x, positions, spec), atol=2e-3)
    near = at(*range(T))
    np.testing.assert_allclose(f(x, near, spec), oracle_rotate(x, near, spec), atol=1e-5)


def test_known_values():
    # Llama 3.1 8B: head 128, base 5e5. The fast pair is kept, the slowest is 8 times slower.
    f = frequencies(Rotary(base=500000.0, scaling=LLAMA31), 128)
    plain = frequencies(Rotary(base=500000.0), 128)
    assert f[0] == 1.0
    np.testing.assert_allclose(f[-1], plain[-1] / 8)
    kept = int((f == plain).sum())
    slowed = int(np.isclose(f, plain / 8, rtol=1e-12).sum())
    # wavelength 2 pi 5e5^(i/64): below 8192/4 up to i = 28.2, above 8192/1 from i = 35.0
    assert (kept, slowed) == (29, 29)
    # YaRN on Llama 2: 4096 positions, base 1e4, head 128: the ramp runs from pair 20 to pair 46.
    g = frequencies(Rotary(scaling=YaRN(16.0, 4096)), 128)
    ratio = g / frequencies(Rotary(), 128)
    assert (ratio[:21] == 1).all()
    assert (ratio[21:46] < 1).all()
    np.testing.assert_allclose(ratio[46:], 1 / 16)
    np.testing.assert_allclose(YaRN(16.0, 4096).gain(), 1.2772588722239782)
    # DeepSeek-V3: mscale = mscale_all_dim leaves q and k as they are
    assert YaRN(40.0, 4096, mscale=1.0, mscale_all_dim=1.0).gain() == 1.0
    np.testing.assert_allclose(YaRN(40.0, 4096, mscale=0.707).gain(), 1 + 0.0707 * math.log(40))
    np.testing.assert_allclose(
        YaRN(40.0, 4096, mscale_all_dim=0.5).gain(),
        (1 + 0.1 * math.log(40)) / (1 + 0.05 * math.log(40)),
    )
    assert YaRN(40.0, 4096, attention_factor=1.5).gain() == 1.5


def test_untruncated_ramp():
    # gpt-oss: head 64, base 150000, factor 32 over 4096; the ramp ends where the formula says
    s = YaRN(32.0, 4096, truncate=False)
    ratio = frequencies(Rotary(base=150000.0, scaling=s), 64) / frequencies(
        Rotary(base=150000.0), 64
    )
    low, high = (32 * math.log(4096 / (2 * math.pi * r)) / math.log(150000.0) for r in (32, 1))
    slowed = np.clip((np.arange(32) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(ratio, slowed / 32 + 1 - slowed, rtol=1e-12)
    assert not np.allclose(ratio, frequencies(Rotary(150000.0, scaling=YaRN(32.0, 4096)), 64))


@EACH
def test_scores_depend_on_the_distance_only(spec):
    q, k = draw(2)[:, :1], draw(3)[:, :1]

    def score(m, n):
        return (rotate(q, at(m), spec) * rotate(k, at(n), spec)).sum(-1)

    for shift in (1, 50, 1000):
        np.testing.assert_allclose(score(7 + shift, 3 + shift), score(7, 3), rtol=1e-3, atol=2e-3)
    assert jnp.abs(score(8, 3) - score(7, 3)).max() > 1e-2


@EACH
def test_norms_are_kept_up_to_the_gain(spec):
    x, positions = draw(4), at(*range(100, 100 + T))
    y, width = rotate(x, positions, spec), spec.width(H)
    gain = 1.0 if spec.scaling is None else spec.scaling.gain()
    norm = lambda a: jnp.linalg.norm(a[..., :width], axis=-1)  # noqa: E731
    np.testing.assert_allclose(norm(y), gain * norm(x), rtol=1e-5)
    assert (y[..., width:] == x[..., width:]).all()


@EACH
def test_position_zero_turns_nothing(spec):
    x, width = draw(5), spec.width(H)
    gain = 1.0 if spec.scaling is None else spec.scaling.gain()
    y = rotate(x, jnp.zeros((B, T), jnp.int32), spec)
    np.testing.assert_allclose(y[..., :width], gain * x[..., :width], rtol=1e-6)


def test_pairings_are_a_permutation_apart():
    x, positions = draw(6), at(*range(T))
    order = np.arange(H).reshape(2, H // 2).T.ravel()  # half-split -> interleaved
    want = rotate(x, positions, Rotary())[..., order]
    np.testing.assert_allclose(rotate(x[..., order], positions, Rotary(interleaved=True)), want)


def test_a_factor_of_one_changes_nothing():
    for scaling in (Linear(1.0), Llama3(factor=1.0), YaRN(1.0, 4096)):
        np.testing.assert_allclose(
            frequencies(Rotary(scaling=scaling), 64), frequencies(Rotary(), 64), rtol=1e-15
        )
        assert scaling.gain() == 1.0


def test_linear_scaling_is_slower_positions():
    x, positions = draw(7), at(*range(0, 4 * T, 4))
    slow = rotate(x, positions, Rotary(scaling=Linear(4.0)))
    np.testing.assert_allclose(slow, rotate(x, positions // 4, Rotary()), atol=1e-6)
    np.testing.assert_allclose(slow, rotate(x, positions / 4, Rotary()), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_computed_in_fp32_returned_in_the_dtype_of_x(dtype):
    x, positions = draw(8, dtype), at(*range(3000, 3000 + T))
    y = rotate(x, positions, Rotary(fraction=0.5))
    assert y.dtype == dtype
    want = rotate(x.astype(jnp.float32), positions, Rotary(fraction=0.5)).astype(dtype)
    assert (y == want).all()


def test_positions_may_be_shared_by_the_batch_or_restart():
    x = draw(9)
    spec = Rotary()
    one = rotate(x, jnp.arange(T)[None], spec)
    assert (one == rotate(x, at(*range(T)), spec)).all()
    restart = rotate(x, at(0, 1, 2, 3, 4, 0, 1, 2, 3), spec)
    assert (restart[:, :5] == one[:, :5]).all()
    np.testing.assert_allclose(restart[:, 5:], rotate(x[:, 5:], at(0, 1, 2, 3), spec), atol=1e-6)


def test_the_gradient_turns_back():
    x, positions = draw(10), at(*range(T))
    y, back = jax.vjp(lambda x: rotate(x, positions, Rotary()), x)
    np.testing.assert_allclose(back(y)[0], x, atol=1e-5)


def test_sinusoidal():
    positions = at(0, 1, 5, 100)
    e = sinusoidal(positions, 8)
    assert e.shape == (B, 4, 8)
    for t, p in enumerate((0, 1, 5, 100)):
        for i in range(4):
            angle = p / 10000 ** (2 * i / 8)
            np.testing.assert_allclose(e[0, t, 2 * i], math.sin(angle), atol=1e-5)
            np.testing.assert_allclose(e[1, t, 2 * i + 1], math.cos(angle), atol=1e-5)
    far = sinusoidal(jnp.arange(64)[None], 16)[0]  # products depend on the distance only
    gram = far @ far.T
    np.testing.assert_allclose(jnp.diagonal(gram, 3), jnp.full(61, gram[0, 3]), atol=1e-4)


def test_alibi_slopes():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16)[:4], [2**-0.5, 2**-1, 2**-1.5, 2**-2], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(1), [2**-8])
    twelve = [*(2.0**-i for i in range(1, 9)), *(2.0 ** -(i - 0.5) for i in range(1, 5))]
    np.testing.assert_allclose(alibi_slopes(12), twelve, rtol=1e-6)
    assert alibi_slopes(6).shape == (6,)


@pytest.mark.parametrize(
    ("head_dim", "fraction", "width"),
    [(80, 0.4, 32), (96, 0.25, 24), (10, 0.6, 6), (64, 1.0, 64), (80, 0.25, 20), (12, 1 / 3, 4)],
)
def test_fractions_that_work(head_dim, fraction, width):
    spec = Rotary(fraction=fraction)
    assert spec.width(head_dim) == width
    assert frequencies(spec, head_dim).shape == (width // 2,)
    np.testing.assert_allclose(frequencies(spec, head_dim), frequencies(Rotary(), width))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: frequencies(Rotary(), 33), "head_dim=33.*turns 33 dimensions"),
        (lambda: rotate(draw(0), at(*range(T)), Rotary(fraction=0.3)), "head_dim=32.*fraction=0.3"),
        (lambda: frequencies(Rotary(fraction=0.1), 8), "turns 0.8 dimensions"),
        (lambda: frequencies(Rotary(fraction=0.5), 6), "turns 3 dimensions"),
        (lambda: Rotary(base=1.0), "base=1.0"),
        (lambda: Rotary(fraction=0.0), "fraction=0.0"),
        (lambda: Rotary(fraction=1.5), "fraction=1.5"),
        (lambda: Linear(0.5), "factor=0.5: must be at least 1"),
        (lambda: Llama3(factor=0.9), "factor=0.9"),
        (lambda: Llama3(low_freq_factor=4.0, high_freq_factor=4.0), "must exceed low_freq_factor"),
        (lambda: Llama3(low_freq_factor=0.0), "low_freq_factor=0.0"),
        (lambda: Llama3(original_context=0), "original_context=0"),
        (lambda: YaRN(0.0, 4096), "factor=0.0"),
        (lambda: YaRN(2.0, 0), "original_context=0"),
        (lambda: YaRN(2.0, 4096, beta_fast=1.0, beta_slow=1.0), "must exceed beta_slow"),
        (lambda: YaRN(2.0, 4096, attention_factor=-1.0), "attention_factor=-1.0"),
        (lambda: YaRN(2.0, 4096, attention_factor=1.0, mscale=1.0), "excludes mscale"),
        (lambda: sinusoidal(at(0), 5), "width=5"),
        (lambda: alibi_slopes(0), "heads=0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_specs_are_values():
    assert Rotary(scaling=YaRN(2.0, 64)) == Rotary(scaling=YaRN(2.0, 64))
    assert len({Rotary(), Rotary(), Rotary(fraction=0.5)}) == 2
