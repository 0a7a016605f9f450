"""The decoder-only transformer: one spec for the Llama, Qwen, Gemma, GPT-2 and NeoX shapes.

    h_0 = E[tokens] (+ P[positions]);  h_{l+1} = block_l(h_l);  logits = W_out norm(h_L)

Sites: `embed`, `final` [B, T, D], `logits` [B, T, V], and per layer those of `nn.block` and
`nn.attention`, stacked on L.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax import masks
from causal_jax.attention import AttentionSpec, Dense
from causal_jax.errors import InputError
from causal_jax.linear_maps import matmul
from causal_jax.models._base import ModelSpec, models
from causal_jax.nn.attention import Attention
from causal_jax.nn.block import Block, dropout
from causal_jax.nn.linear import Embed, Linear
from causal_jax.nn.lora import LoRA, adapt
from causal_jax.nn.mixer import MixerSpec
from causal_jax.nn.mlp import MLP, ActivationName, is_gated
from causal_jax.nn.norm import NormName, make_norm
from causal_jax.nn.stack import Stack
from causal_jax.placement import with_batch
from causal_jax.positions import Rotary
from causal_jax.segments import DocLayout
from causal_jax.shapes import Array, Float, Int, Key
from causal_jax.taps import OFF, Tap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Everything a decoder remembers of what it has read: a value to keep, copy and hand back.

    Attributes:
        layers: keys and values (a `KV`), or what a mixer keeps, per block of every segment.
        length: slots already written, the same for all rows. Writing past the last slot is the
            caller's error.
        start: first real slot of each row (left padding), or None where there is no padding.
        layout: of a prompt with unordered documents, or None.
    """

    layers: tuple[tuple[Any, ...], ...]
    length: Int[Array, ""]
    start: Int[Array, "B"] | None
    layout: DocLayout | None = None


@models.register("decoder")
@dataclasses.dataclass(frozen=True)
class Decoder(ModelSpec):
    """Sizes and switches of a decoder.

    Attributes:
        layers: number of layers (L).
        width: of the residual stream (D).
        heads: query heads (N).
        kv_heads: key and value heads (K); 0: as many as query heads.
        head_dim: width of a head (H); 0: width / heads.
        hidden: width of the feed-forward layers (F); 0: 8/3 width rounded up to 64 if gated,
            else 4 width.
        activation: of the feed-forward layers; the names with "glu" are gated.
        norm: "rms" or "layer".
        norm_eps: floor under the variance in every norm.
        attention: specs tiled over depth: (a,) for all layers, (a, b) for alternating ones, ...;
            a `MixerSpec` (`causal_jax.nn.mixer`) replaces attention altogether.
        rotary: rotary embedding of queries and keys, or None.
        learned_positions: whether a table of `context` positions is added to the embedding.
        qkv_bias: biases of the query, key and value projections.
        out_bias: bias of the attention's output projection.
        mlp_bias: biases of the feed-forward layers.
        qk_norm: RMS-normalise every query and key head (arXiv 2302.05442).
        post_norm: normalise what each branch adds to the residual stream (Gemma 2).
        parallel: attention and feed-forward layer read the same input (GPT-NeoX).
        tied: the output head is the embedding table.
        embed_scale: multiplies the embedding (Gemma: sqrt(width)).
        embed_std: of the tables as they are drawn; 0.02 is soon rewritten where the rate is high,
            and little beside what the first layers add.
        logits_soft_cap: c in c tanh(logits / c), or None.
        context: longest sequence the model is meant for.
        dropout: rate on the embedding and on every branch, in training only.
        dtype: of the computation; parameters are float32. "float64", to tell rounding from error,
            needs jax_enable_x64.
        remat: what the backward pass keeps of a layer: "none" (all), "dots", "full" (nothing).
        scan: stack equal layers and scan over them (compiles fast); False keeps every layer apart.
        lora: low-rank adapters on the linear maps of every block, or None.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int = 0
    head_dim: int = 0
    hidden: int = 0
    activation: ActivationName = "swiglu"
    norm: NormName = "rms"
    norm_eps: float = 1e-6
    attention: tuple[AttentionSpec, ...] = (Dense(),)
    rotary: Rotary | None = Rotary()
    learned_positions: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    parallel: bool = False
    tied: bool = True
    embed_scale: float = 1.0
    embed_std: float = 0.02
    logits_soft_cap: float | None = None
    context: int = 2048
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    scan: bool = True
    lora: LoRA | None = None

    def __post_init__(self):
        for name in ("layers", "width", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("vocab", "kv_heads", "head_dim", "hidden"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.heads % self.kv_count:
            raise ValueError(
                f"kv_heads must divide heads: {self.heads} heads, {self.kv_count} kv_heads"
            )
        if not self.head_dim and self.width % self.heads:
            raise ValueError(
                f"heads must divide width (or set head_dim): width {self.width}, {self.heads} heads"
            )
        if not self.attention:
            raise ValueError("attention must hold at least one spec, got ()")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for spec in self.attention:
            if "self-causal" not in spec.patterns:
                raise ValueError(f"attention {spec} cannot serve a causal decoder: {spec.patterns}")

    @property
    def kv_count(self) -> int:
        """K."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """H."""
        return self.head_dim or self.width // self.heads

    @property
    def hidden_width(self) -> int:
        """F."""
        if self.hidden:
            return self.hidden
        return -(-8 * self.width // 3 // 64) * 64 if is_gated(self.activation) else 4 * self.width

    def layer_specs(self) -> tuple[AttentionSpec, ...]:
        """One attention spec per layer: the pattern tiled over depth."""
        repeats = -(-self.layers // len(self.attention))
        return (self.attention * repeats)[: self.layers]

    def build(self, key: jax.Array) -> "DecoderModel":
        """The module with freshly drawn parameters."""
        return DecoderModel(self, rngs=nnx.Rngs(key))

    def flops_per_token(self, length: int) -> float:
        """Forward and backward (3 x forward): 2 per multiplying weight, and attention's own."""
        gates = 2 if is_gated(self.activation) else 1
        projections = self.width * self.head_width * 2 * (self.heads + self.kv_count)
        attending = sum(not isinstance(s, MixerSpec) for s in self.layer_specs())
        weights = attending * projections + self.width * self.vocab
        weights += self.layers * self.width * self.hidden_width * (gates + 1)
        h = self.head_width
        mixing = sum(s.cost(length, length, self.heads, h, h) for s in self.layer_specs()) / length
        return 3.0 * (2.0 * weights + mixing)

    def _block(self, spec: AttentionSpec, rngs: nnx.Rngs) -> Block:
        out_scale = (2 * self.layers) ** -0.5  # the residual stream keeps its variance over depth

        def norm():
            return make_norm(self.norm, self.width, self.norm_eps)

        mixer = spec.build if isinstance(spec, MixerSpec) else functools.partial(Attention, spec)
        attention = mixer(
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_count,
            head_dim=self.head_width,
            rotary=self.rotary,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            out_scale=out_scale,
            rngs=rngs,
        )
        mlp = MLP(
            self.width,
            self.hidden_width,
            self.activation,
            bias=self.mlp_bias,
            out_scale=out_scale,
            rngs=rngs,
        )
        block = Block(
            attention,
            mlp,
            norm(),
            norm(),
            post_norms=(norm(), norm()) if self.post_norm else None,
            parallel=self.parallel,
            dropout=self.dropout,
        )
        if self.lora is not None:
            adapt(block, self.lora, rngs=rngs)
        return block


class DecoderModel(nnx.Module):
    """The parameters of a `Decoder` and its forward passes."""

    def __init__(self, spec: Decoder, *, rngs: nnx.Rngs):
        if spec.dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
            raise InputError(
                "dtype='float64' needs jax_enable_x64 (or `with jax.enable_x64(True)`)"
            )
        if spec.vocab < 1:
            raise ValueError(f"vocab must be set before a model is built, got {spec.vocab}")
        self.spec = spec
        table = functools.partial(Embed, std=spec.embed_std, rngs=rngs)
        self.embed = table(spec.vocab, spec.width)
        self.positions = table(spec.context, spec.width) if spec.learned_positions else None
        self.stack = Stack(
            spec._block, spec.layer_specs(), scan=spec.scan, remat=spec.remat, rngs=rngs
        )
        self.norm = make_norm(spec.norm, spec.width, spec.norm_eps)
        self.head = None if spec.tied else Linear(spec.width, spec.vocab, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        mask: masks.Mask | None = None,
        layout: DocLayout | None = None,
        key: Key[Array, ""] | None = None,
        tap: Tap = OFF,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position, float32.

        Args:
            tokens: ids.
            segments: document ids; attention stays inside a document. None: one document per row.
            positions: for position embeddings; None: 0, 1, 2, ...
            mask: further restriction of who may attend to whom, and-ed with causality.
            layout: unordered documents, which then see each other (`causal_jax.segments`). With
                attention that places keys itself (`Pine`) in every layer their order changes
                nothing; other attention keeps the positions as given. Excludes segments and
                positions.
            key: switches dropout on.
            tap: reads and edits activations (`causal_jax.taps`).

        Raises:
            InputError: a layout beside segments or positions, or with learned positions.
        """
        h = self.hidden(
            tokens, segments=segments, positions=positions, mask=mask, layout=layout, key=key,
            tap=tap,
        )  # fmt: skip
        return tap("logits", self.unembed(h))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        mask: masks.Mask | None = None,
        layout: DocLayout | None = None,
        key: Key[Array, ""] | None = None,
        tap: Tap = OFF,
    ) -> Float[Array, "B T D"]:
        """The normalised output of the last layer: what `unembed` turns into logits."""
        allowed: masks.Mask = masks.Causal()
        if layout is not None:
            self._check_layout(layout, len(tokens), segments=segments, positions=positions)
            positions = jnp.maximum(jnp.arange(tokens.shape[1])[None] - layout.start[:, None], 0)
            allowed = layout.visible(tokens.shape[1])
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        if segments is not None:
            allowed = allowed & masks.Documents(segments)
        if mask is not None:
            allowed = allowed & mask
        keys = (None, None) if key is None else jax.random.split(key)
        x = dropout(self._embed(tokens, positions), self.spec.dropout, keys[0])
        x = tap("embed", with_batch(x))
        x = self.stack(
            x, mask=allowed, positions=positions, layout=layout, segments=segments, key=keys[1],
            tap=tap,
        )  # fmt: skip
        return tap("final", self.norm(x))

    def unembed(self, h: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in float32 (or wider), soft-capped where the spec says so."""
        table = self.embed.table[...].T if self.head is None else self.head.kernel[...]
        wide = jnp.promote_types(jnp.float32, h.dtype)
        logits = matmul(h, table.astype(h.dtype), preferred_element_type=wide)
        cap = self.spec.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def init_cache(
        self,
        batch: int,
        length: int,
        *,
        start: Int[Array, "B"] | None = None,
        layout: DocLayout | None = None,
    ) -> Cache:
        """An empty cache of `length` slots; `start` counts the padding in front of each row.

        A `layout` (which has its own start) makes it one of prompts with unordered documents: the
        first `extend` must read all of them, as they see each other.

        Raises:
            InputError: padding in front of attention that goes by absolute places; a layout beside
                start, or with learned positions.
        """
        if layout is not None:
            self._check_layout(layout, batch, start=start)
        if start is not None and not all(s.by_distance for s in self.spec.layer_specs()):
            raise InputError(
                f"start: attention {self.spec.attention} goes by absolute places, which padding in "
                "front moves; run rows of equal length together, without start"
            )
        layers = self.stack.init_cache(batch, length, jnp.dtype(self.spec.dtype))
        return Cache(layers, jnp.zeros((), jnp.int32), start, layout)

    def extend(
        self, tokens: Int[Array, "B T"], cache: Cache, *, tap: Tap = OFF
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Read T more tokens: prefill and single steps alike.

        Equals the full pass however the sequence is cut.

        Returns:
            logits [B, T, V] of the new positions, and the cache after them.
        """
        h, cache = self.extend_hidden(tokens, cache, tap=tap)
        return tap("logits", self.unembed(h)), cache

    def extend_hidden(
        self, tokens: Int[Array, "B T"], cache: Cache, *, tap: Tap = OFF
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """`extend` up to the final norm: a prefill needs the last position's logits only."""
        batch, new = tokens.shape
        positions = jnp.broadcast_to((cache.length + jnp.arange(new))[None], (batch, new))
        allowed: masks.Mask = masks.Causal()
        start, layout = cache.start, cache.layout
        if layout is not None:
            start, allowed = layout.start, layout.visible(cache.layers[0][0].k.shape[2])
        if start is not None:
            positions = jnp.maximum(positions - start[:, None], 0)
            allowed = allowed & ~masks.Prefix(start)
        x = tap("embed", self._embed(tokens, positions))
        x, layers = self.stack.extend(
            x,
            cache.layers,
            length=cache.length,
            mask=allowed,
            positions=positions,
            layout=layout,
            tap=tap,
        )
        return tap("final", self.norm(x)), dataclasses.replace(
            cache, layers=layers, length=cache.length + new
        )

    def unstacked(self) -> "DecoderModel":
        """The same model with every layer apart, as `scan=False` builds it."""
        out = nnx.merge(*nnx.split(self))
        out.spec = dataclasses.replace(self.spec, scan=False)
        out.stack = self.stack.unstacked()
        return out

    def _check_layout(self, layout: DocLayout, rows: int, **others: Array | None) -> None:
        if given := [name for name, value in others.items() if value is not None]:
            raise InputError(f"{given[0]}: a layout says where everything stands; expected None")
        if self.positions is not None:
            raise InputError("layout: learned positions are part of the input and cannot change")
        if len(layout.prefix) != rows:
            raise InputError(f"layout of {len(layout.prefix)} rows for {rows} rows of tokens")

    def _embed(self, tokens: Array, positions: Array) -> Array:
        dtype = jnp.dtype(self.spec.dtype)
        x = self.embed(tokens, dtype)
        if self.spec.embed_scale != 1.0:
            x = x * jnp.asarray(self.spec.embed_scale, dtype)
        return x if self.positions is None else x + self.positions(positions, dtype)
