"""Where a token stands: rotary embeddings with their context extensions, sinusoids, ALiBi slopes.

Rotary (Su et al., arXiv:2104.09864) turns pair i of a head by the angle position * f_i,

    (a, b) -> (a cos - b sin, b cos + a sin),    f_i = base^(-2i/R),  i = 0 .. R/2 - 1,

so that q(m) . k(n) depends on m - n only. A pair is (x_i, x_{i+R/2}) by default (GPT-NeoX, Llama in
transformers) or (x_2i, x_2i+1) with `interleaved` (RoFormer, GPT-J, llama files of llama.cpp). The
two are one permutation of the rows of W_q and W_k apart. With `fraction` < 1 only the first
R = fraction * H dimensions are turned (GPT-NeoX 0.25, Phi-2 0.4).

To read further than it was trained, a model slows its pairs down (`scaling`). All of these depend
on the pair alone, so a cache of rotated keys stays valid while a text grows:

    Linear   f / s                                    position interpolation, arXiv:2306.15595
    Llama3   fast pairs kept, slow ones f / s, a ramp over the wavelength between, arXiv:2407.21783
    YaRN     the same ramp over the pair's number, and q, k times 0.1 ln s + 1, arXiv:2309.00071

Positions are absolute token numbers, one per token and example; anything goes that the caller finds
useful: restarting in packed documents, re-assigned to retrieved passages, fractional.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Float, Int

__all__ = [
    "Linear",
    "Llama3",
    "Rotary",
    "YaRN",
    "alibi_slopes",
    "frequencies",
    "rotate",
    "rotation",
    "sinusoidal",
    "turn",
]


def _require(holds: bool, name: str, value, rule: str):
    if not holds:
        raise InputError(f"{name}={value!r}: {rule}")


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al., arXiv:2306.15595): f / factor."""

    factor: float

    def __post_init__(self):
        _require(self.factor >= 1, "factor", self.factor, "must be at least 1 (1 = unchanged)")

    def apply(self, f: np.ndarray, base: float) -> np.ndarray:
        """Frequencies [R/2] -> frequencies [R/2]."""
        return f / self.factor

    def gain(self) -> float:
        """What cos and sin are multiplied with."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's rule (arXiv:2407.21783): by the turns a pair makes in the original context.

    With r = original_context * f / 2 pi: f if r > high_freq_factor, f / factor if
    r < low_freq_factor, else (1 - w) f / factor + w f with w = (r - low) / (high - low).
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        _require(self.factor >= 1, "factor", self.factor, "must be at least 1 (1 = unchanged)")
        low, high = self.low_freq_factor, self.high_freq_factor
        _require(low > 0, "low_freq_factor", low, "must be positive")
        _require(high > low, "high_freq_factor", high, f"must exceed low_freq_factor={low}")
        _require_context(self.original_context)

    def apply(self, f: np.ndarray, base: float) -> np.ndarray:
        """Frequencies [R/2] -> frequencies [R/2]."""
        turns = self.original_context * f / (2 * np.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0, 1)
        return (1 - kept) * f / self.factor + kept * f

    def gain(self) -> float:
        """What cos and sin are multiplied with."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class YaRN:
    """YaRN (Peng et al., arXiv:2309.00071): a ramp from kept to slowed pairs, and a temperature.

    Pair p(r) = R ln(original_context / 2 pi r) / (2 ln base) makes r turns in the original context.
    Up to pair p(beta_fast) f is kept, from p(beta_slow) on it is f / factor, linear between. cos
    and sin are multiplied with the gain m = 0.1 ln(factor) + 1, the scores therefore with m^2.

    As in the reference code the ends of the ramp are rounded outwards; `truncate=False` leaves
    them as they are (gpt-oss). `attention_factor` replaces the gain. DeepSeek's gain is
    m(mscale) / m(mscale_all_dim), m(c) = 0.1 c ln(factor) + 1; its attention also multiplies its
    scale by m(mscale_all_dim)^2, which must be asked of the attention.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _require(self.factor >= 1, "factor", self.factor, "must be at least 1 (1 = unchanged)")
        _require_context(self.original_context)
        slow, fast = self.beta_slow, self.beta_fast
        _require(slow > 0, "beta_slow", slow, "must be positive")
        _require(fast > slow, "beta_fast", fast, f"must exceed beta_slow={slow}")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "must be positive")
        if self.attention_factor is not None:
            given = self.mscale is not None or self.mscale_all_dim is not None
            rule = "excludes mscale and mscale_all_dim"
            _require(not given, "attention_factor", self.attention_factor, rule)

    def apply(self, f: np.ndarray, base: float) -> np.ndarray:
        """Frequencies [R/2] -> frequencies [R/2]."""
        width = 2 * len(f)
        low, high = (
            width * math.log(self.original_context / (2 * math.pi * turns)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low = max(low, 0)
        high = max(low, min(high, width - 1))
        ramp = (np.arange(len(f)) - low) / (high - low if high != low else 1e-3)
        slowed = np.clip(ramp, 0, 1)
        return slowed * f / self.factor + (1 - slowed) * f

    def gain(self) -> float:
        """What cos and sin are multiplied with."""
        if self.attention_factor is not None:
            return self.attention_factor
        over = self._m(0.0 if self.mscale_all_dim is None else self.mscale_all_dim)
        return self._m(1.0 if self.mscale is None else self.mscale) / over

    def _m(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


def _require_context(original_context):
    _require(original_context >= 1, "original_context", original_context, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary embedding: base, turned fraction of each head, scaling for long contexts, pairing."""

    base: float = 10000.0
    fraction: float = 1.0
    scaling: Linear | Llama3 | YaRN | None = None
    interleaved: bool = False

    def __post_init__(self):
        _require(self.base > 1, "base", self.base, "must exceed 1")
        _require(0 < self.fraction <= 1, "fraction", self.fraction, "must be in (0, 1]")

    def width(self, head_dim: int) -> int:
        """R, the number of dimensions that are turned."""
        width = self.fraction * head_dim
        whole = round(width)
        if whole < 2 or whole % 2 or abs(width - whole) > 1e-6 * head_dim:
            raise InputError(
                f"head_dim={head_dim} with fraction={self.fraction} turns {width:g} dimensions: "
                "must be an even number, at least 2"
            )
        return whole


def frequencies(spec: Rotary, head_dim: int) -> np.ndarray:
    """Angle per position of each pair, after scaling.

    Args:
      spec: the embedding. head_dim: H, the width of a head.
    Returns: [R/2] float64, radians per token, R = spec.width(head_dim).
    Raises: InputError if R is not an even number.
    """
    width = spec.width(head_dim)
    f = spec.base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    return f if spec.scaling is None else spec.scaling.apply(f, spec.base)


def rotation(
    positions: Int[Array, "#B T"] | Float[Array, "#B T"], spec: Rotary, head_dim: int
) -> tuple[Float[Array, "#B T 1 R"], Float[Array, "#B T 1 R"]]:
    """What `turn` multiplies with: cos and sin of every pair's angle, times the scaling's gain.

    A model asks once and turns the queries and keys of all its layers with the same tables:
    computing them costs more than using them.

    Args:
      positions: absolute token numbers. spec: the embedding. head_dim: H, the width of a head.
    Returns: cos and sin, float32, one column per pair.
    Raises: InputError if the number of turned dimensions is not even.
    """
    f = jnp.asarray(frequencies(spec, head_dim), dtype=jnp.float32)
    gain = 1.0 if spec.scaling is None else spec.scaling.gain()
    angle = positions.astype(jnp.float32)[..., None, None] * f[None, None, None]
    return jnp.cos(angle) * gain, jnp.sin(angle) * gain


def turn(
    x: Float[Array, "B T N H"],
    tables: tuple[Float[Array, "#B T 1 R"], Float[Array, "#B T 1 R"]],
    spec: Rotary,
) -> Float[Array, "B T N H"]:
    """Turn the heads of queries or keys by the angles of `rotation`; in fp32 (or wider), back in
    x.dtype.
    """
    cos, sin = tables
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    turned = turned.astype(jnp.promote_types(jnp.float32, x.dtype))
    if spec.interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = jnp.split(turned, 2, axis=-1)
    parts = a * cos - b * sin, b * cos + a * sin
    if spec.interleaved:
        turned = jnp.stack(parts, axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(parts, axis=-1)
    turned = turned.astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


def rotate(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "#B T"] | Float[Array, "#B T"],
    spec: Rotary,
) -> Float[Array, "B T N H"]:
    """Turn the heads of queries or keys to their positions; in fp32, returned in x.dtype.

    Args:
      x: queries or keys. positions: absolute token numbers. spec: the embedding.
    Returns: x, turned (and times the scaling's gain); dimensions from R on as they were.
    Raises: InputError if the number of turned dimensions is not even.
    Source: Su et al., arXiv:2104.09864.
    """
    return turn(x, rotation(positions, spec, x.shape[-1]), spec)


def sinusoidal(
    positions: Int[Array, "B T"] | Float[Array, "B T"], width: int, base: float = 10000.0
) -> Float[Array, "B T D"]:
    """The fixed embedding of the first Transformer: sin and cos in turn, to be added to the input.

    E[2i] = sin(position * base^(-2i/width)), E[2i+1] = cos of the same.

    Args:
      positions: token numbers. width: D, even. base: longest wavelength over 2 pi.
    Returns: float32.
    Raises: InputError if width is odd.
    Source: Vaswani et al., arXiv:1706.03762.
    """
    _require(width >= 2 and width % 2 == 0, "width", width, "must be even, at least 2")
    f = jnp.asarray(base ** (-np.arange(0, width, 2) / width), dtype=jnp.float32)
    angle = positions.astype(jnp.float32)[..., None] * f[None, None]
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions.shape, width)


def alibi_slopes(heads: int) -> Float[Array, "N"]:
    """Slopes of ALiBi: head n adds -slope_n * (query position - key position) to its scores.

    For N a power of two slope_n = 2^(-8 n / N), n = 1 .. N. Else the slopes of the power of two
    P below, then every other one of those of 2P, from the first.

    Args:
      heads: N.
    Returns: float32.
    Raises: InputError if heads < 1.
    Source: Press et al., arXiv:2108.12409, and its code for N not a power of two.
    """
    _require(heads >= 1, "heads", heads, "must be at least 1")
    power = 2 ** (heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    extra = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return jnp.asarray(np.concatenate([slopes, extra[: heads - power]]), dtype=jnp.float32)
