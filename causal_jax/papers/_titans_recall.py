"""Recall beyond the window, trained at one length and asked at others: the models of the entry.

    k v among noise in the first half | noise | the keys again, each followed by its value

Ablations of one layer are one program: a condition holds some of its parameters where the ablated
layer has them by construction (a gate's logit at -30: eta, alpha < 1e-13; the convolution at the
identity), so all conditions begin alike and see the same batches.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.attention import Dense
from causal_jax.data.tasks.key_value import KeyValue
from causal_jax.memory import Deep, Delta
from causal_jax.models.decoder import Decoder
from causal_jax.models.titans import layer
from causal_jax.nn.mac import MAC
from causal_jax.nn.titans import MAG
from causal_jax.papers import _sequences as sequences
from causal_jax.paths import map_named
from causal_jax.training.optimizer import AdamW, Schedule

# what is taken away from the memory alone; "no momentum" is Gated DeltaNet (a, beta / a, a v)
CONDITIONS: dict[str, tuple[str, ...]] = {
    "LMM": (),
    "no momentum": ("eta",),
    "no decay": ("alpha",),
    "no convolution": ("conv",),
    "DeltaNet": ("eta", "alpha"),
}
_SHUT = -30.0
# what multiplies attention by memory adds noise to the stream at first: larger embeddings (and a
# second moment that forgets, which was found by trying)
NOISY = MAC | MAG


@dataclasses.dataclass(frozen=True)
class Recall:
    """Sizes of the problem and of the models.

    Attributes:
        length, pairs, symbols: of the task; as many keys as values as noise tokens.
        window: of attention, and tokens of a MAC segment and of an anchored chunk.
        layers, width: of the models, one head.
        persistent: learned tokens.
        steps, batch, lr: of training.
        tests: rows per length.
        longer: lengths of evaluation, as multiples of the trained one.
    """

    length: int = 64
    pairs: int = 4
    symbols: int = 16
    window: int = 8
    layers: int = 2
    width: int = 32
    persistent: int = 4
    steps: int = 2000
    batch: int = 32
    lr: float = 5e-3
    tests: int = 256
    longer: tuple[int, ...] = (1, 2, 4)

    def task(self, length: int = 0) -> KeyValue:
        """The problem at a length; 0: the trained one."""
        n = self.symbols
        return KeyValue(length or self.length, self.pairs, keys=n, values=n, noise=n)

    def mixers(self) -> dict[str, Any]:
        """Every kind of layer by name."""
        chunk = 2 * self.window
        exact = Delta(tile=16)
        make = functools.partial(layer, persistent=self.persistent)
        return {
            "LMM": make("lmm", exact),
            "window alone": Dense(window=self.window - 1),
            "MAG": make("mag", exact, window=self.window),
            "MAL": make("mal", exact, window=self.window),
            "MAC": make("mac", exact, window=chunk),
            "anchored": make("lmm", Deep(depth=1, around="none", anchor=chunk)),
            "deep, anchored": make("lmm", Deep(depth=2, anchor=chunk)),
            "no persistent": layer("lmm", exact, persistent=0),
        }

    def decoder(self, mixer: Any) -> Decoder:
        """The model around a layer."""
        return Decoder(
            vocab=self.task().vocab, layers=self.layers, width=self.width, heads=1,
            attention=(mixer,), context=self.length * max(self.longer), tied=False,
            embed_std=1.0 if isinstance(mixer, NOISY) else 0.2,
        )  # fmt: skip

    def train(self, name: str, seeds: int, conditions: tuple[str, ...] = ("LMM",), **say: Any):
        """Trained parameters of every seed, and accuracy [seeds, conditions, records, lengths]."""
        mixer, task = self.mixers()[name], self.task()
        spec = self.decoder(mixer)
        count, rows = len(conditions), self._rows()
        fixed = [CONDITIONS[c] for c in conditions]

        def given(key, run):
            which = run % count
            parts = sorted({part for f in fixed for part in f})
            return {p: jnp.asarray([p in f for f in fixed])[which] for p in parts}

        def held(params, constants):
            return map_named(lambda n, leaf: _held(n, leaf, constants), params)

        def loss(params, key, constants):
            sequence, asked = task.draw(key, self.batch)
            model = sequences.model_of(spec, held(params, constants))
            return sequences.asked_nll(model(sequence[:, :-1]), sequence, asked)

        def measure(params, key, constants):
            model = sequences.model_of(spec, held(params, constants))
            right = (jnp.argmax(model(rows["tokens"]), -1) == rows["targets"]) * rows["weights"]
            by_length = right.sum(-1).reshape(len(self.longer), -1).mean(-1) / self.pairs
            return {"accuracy": by_length}

        params, seen = sequences.train_loss(
            spec, loss, self.optimizer(mixer), self.steps, seeds * count, paired=count, given=given,
            measure=measure, every=max(self.steps // 4, 1), **say,
        )  # fmt: skip
        shape = (seeds, count, *seen["accuracy"].shape[1:])
        return params, {
            "accuracy": seen["accuracy"].reshape(shape),
            "loss": seen["loss"].reshape(seeds, count, -1),
            "parameters": spec.param_count(),
        }

    def optimizer(self, mixer: Any) -> AdamW:
        """Cosine to a tenth; no decay."""
        schedule = Schedule("cosine", warmup=min(50, self.steps // 4), final=0.1)
        b2 = 0.95 if isinstance(mixer, NOISY) else 0.999
        return AdamW(lr=self.lr, b2=b2, weight_decay=0.0, schedule=schedule)

    def _rows(self) -> dict[str, jax.Array]:
        """Rows of every length, filled up behind: what stands behind is not seen."""
        longest, batches = self.length * max(self.longer), []
        for multiple in self.longer:
            made = self.task(self.length * multiple).batch(10**6, range(self.tests))
            behind = ((0, 0), (0, longest - self.length * multiple))
            batches.append({n: np.pad(made[n], behind) for n in ("tokens", "targets", "weights")})
        return {n: jnp.asarray(np.concatenate([b[n] for b in batches])) for n in batches[0]}


def _held(name: str, leaf: jax.Array, constants: dict[str, jax.Array]) -> jax.Array:
    """A parameter as its condition has it."""
    for part, shut in constants.items():
        if f"/gates/{part}/" in name:
            value = jnp.full_like(leaf, _SHUT if name.endswith("/b") else 0.0)
        elif part == "conv" and "/conv/" in name:  # [..., W, channels]: the token itself
            value = jnp.zeros_like(leaf).at[..., -1, :].set(1.0)
        else:
            continue
        leaf = jnp.where(shut, value, leaf)
    return leaf
