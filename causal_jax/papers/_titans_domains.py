"""The paper's other domains, small: a series forecast and strings classified, memory or attention.

The models differ in their mixing layer alone: LMM, or causal attention to everything, of equal
width, depth, heads, feed-forward layers, batches and steps.

The series is real: the highest temperature of every day in Seattle, 2012 to 2015, as the package
`vega-datasets` has it. A model reads normalised values, x_t -> E_0 x_t + E_1, and at every day
forecasts the next `horizon` days.
"""

import csv
import dataclasses
import functools
import importlib.resources
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax import masks
from causal_jax.attention import Dense
from causal_jax.data.tasks.motif_order import MotifOrder as MotifTask
from causal_jax.memory import Delta
from causal_jax.models.decoder import Decoder
from causal_jax.models.titans import layer
from causal_jax.papers import _sequences as sequences
from causal_jax.papers._base import Row, require
from causal_jax.training.optimizer import AdamW, Schedule


def temperatures() -> np.ndarray:
    """Highest temperature of every day in Seattle from 2012 to 2015, degrees Celsius, [1461].

    Raises:
        InputError: the package is not there.
    """
    require("vega_datasets", "pip install 'causal_jax[papers]'")
    file = importlib.resources.files("vega_datasets") / "_data" / "seattle-weather.csv"
    with file.open(encoding="utf-8") as lines:
        return np.array([float(row["temp_max"]) for row in csv.DictReader(lines)])


@dataclasses.dataclass(frozen=True)
class _Domain:
    """What both have: sizes and training.

    Attributes:
        layers, width: of the models, one head.
        steps, batch, lr: of training.
        tests: rows of the evaluation.
    """

    layers: int = 2
    width: int = 32
    steps: int = 300
    batch: int = 16
    lr: float = 3e-3
    tests: int = 256

    def mixers(self) -> dict[str, Any]:
        """The two that are compared."""
        return {"LMM": layer("lmm", Delta(tile=32)), "attention": Dense()}

    def decoder(self, mixer: Any, vocab: int, length: int) -> Decoder:
        """The model around a layer."""
        return Decoder(
            vocab=vocab, layers=self.layers, width=self.width, heads=1, attention=(mixer,),
            context=length, tied=False,
        )  # fmt: skip

    def optimizer(self) -> AdamW:
        """Cosine to a tenth."""
        schedule = Schedule("cosine", warmup=min(30, self.steps // 4), final=0.1)
        return AdamW(lr=self.lr, weight_decay=0.0, schedule=schedule)


@dataclasses.dataclass(frozen=True)
class Forecast(_Domain):
    """Two weeks of temperatures ahead.

    Attributes:
        length: days read.
        horizon: days forecast.
    """

    length: int = 64
    horizon: int = 14

    title: ClassVar = "forecasting"

    def measure(self, seeds: int) -> dict[str, Any]:
        """Errors on the last fifth of the days, [seeds, 2]: MSE and MAE, of normalised values."""
        series = temperatures()
        border = int(0.8 * len(series))
        series = (series - series[:border].mean()) / series[:border].std()
        told, asked = self._windows(series, border, len(series))
        pick = np.linspace(0, len(told) - 1, self.tests).astype(int)
        told, asked = told[pick], asked[pick]
        out: dict[str, Any] = {"ridge": self._ridge(series[:border], told, asked)}
        out["last value"] = _errors(np.repeat(told[:, -1:], self.horizon, 1), asked)
        for name, mixer in self.mixers().items():
            out[name] = self._trained(mixer, series[:border], told, asked, seeds)
        return out

    def _windows(self, series: np.ndarray, start: int, end: int):
        """(what is read [n, length], what follows [n, horizon]) with all that follows in range."""
        whole = np.lib.stride_tricks.sliding_window_view(
            series[max(start - self.length, 0) : end], self.length + self.horizon
        )
        return whole[:, : self.length], whole[:, self.length :]

    def _ridge(self, train: np.ndarray, told: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """One linear map from all that is read to all that follows, by least squares."""
        x, y = self._windows(train, 0, len(train))
        ones = lambda a: np.concatenate([a, np.ones_like(a[:, :1])], 1)  # noqa: E731
        x = ones(x)
        weights = np.linalg.solve(x.T @ x + 1.0 * np.eye(x.shape[1]), x.T @ y)
        return _errors(ones(told) @ weights, asked)

    def _trained(self, mixer: Any, train, told, asked, seeds: int) -> np.ndarray:
        spec = self.decoder(mixer, self.horizon, self.length)
        values = jnp.asarray(train, jnp.float32)
        told, asked = (jnp.asarray(a, jnp.float32) for a in (told, asked))

        def forecast(params, x):
            model = sequences.model_of(spec, params)
            table = model.embed.table[...]
            h = x[..., None] * table[None, None, 0] + table[None, None, 1]
            places = jnp.broadcast_to(jnp.arange(self.length)[None], x.shape)
            h = model.stack(h, mask=masks.Causal(), positions=places)
            return x[..., None] + model.unembed(model.norm(h))  # what is added to the last value

        def loss(params, key):
            begin = jax.random.randint(
                key, (self.batch, 1), 0, len(values) - self.length - self.horizon
            )
            whole = values[begin + jnp.arange(self.length + self.horizon)[None]]
            after = jnp.arange(self.length)[:, None] + 1 + jnp.arange(self.horizon)[None]
            return jnp.mean(jnp.square(forecast(params, whole[:, : self.length]) - whole[:, after]))

        def measure(params, key):
            apart = forecast(params, told)[:, -1] - asked
            return {"errors": jnp.stack([jnp.mean(apart**2), jnp.mean(jnp.abs(apart))])}

        _, seen = sequences.train_loss(
            spec, loss, self.optimizer(), self.steps, seeds, measure=measure
        )
        return seen["errors"][:, -1]

    def rows(self, claim: str, found: dict[str, Any]) -> list[Row]:
        """The paper's sign: an error no larger than the baseline's."""
        ratio = found["LMM"][:, 0] / found["attention"][:, 0]
        return [
            Row.of_seeds(
                claim,
                f"MSE of LMM / of attention, {self.horizon} days ahead",
                ratio,
                1.0,
                "<=",
                paper="0.420 and 0.441 (ETTh1, against Simba)",
                baseline=float(found["attention"][:, 0].mean()),
                note=f"baseline: attention's MSE; LMM {found['LMM'][:, 0].mean():.3f}, linear map "
                f"{found['ridge'][0]:.3f}, the last value again {found['last value'][0]:.3f}",
            )
        ]


def _errors(forecast: np.ndarray, truth: np.ndarray) -> np.ndarray:
    apart = forecast - truth
    return np.array([np.square(apart).mean(), np.abs(apart).mean()])


@dataclasses.dataclass(frozen=True)
class MotifOrder(_Domain):
    """Which motif came first.

    Attributes:
        length: letters and the question.
    """

    length: int = 64

    title: ClassVar = "motifs"

    def measure(self, seeds: int) -> dict[str, Any]:
        """Accuracy of both models, [seeds]."""
        return {name: self._trained(mixer, seeds) for name, mixer in self.mixers().items()}

    def _trained(self, mixer: Any, seeds: int) -> np.ndarray:
        task = MotifTask(length=self.length)
        spec = self.decoder(mixer, task.vocab, self.length)

        def measure(params, key):
            sequence, asked = task.draw(key, self.tests)
            logits = sequences.model_of(spec, params)(sequence[:, :-1])
            return {"accuracy": sequences.asked_right(logits, sequence, asked)}

        draw = functools.partial(_drawn, task, self.batch)
        _, seen = sequences.train(spec, draw, self.optimizer(), self.steps, seeds, measure=measure)
        return seen["accuracy"][:, -1]

    def rows(self, claim: str, found: dict[str, Any]) -> list[Row]:
        """Within two points of attention, as on the paper's five sets (worse on one of them)."""
        return [
            Row.of_seeds(
                claim, "accuracy of LMM - of attention", found["LMM"] - found["attention"], -0.02,
                paper="Enhancer Cohn 75.2, Human Regulatory 89.3 (Transformer++ 89.9)",
                baseline=float(found["attention"].mean()), note="two classes: chance 0.5",
            )
        ]  # fmt: skip


def _drawn(task: MotifTask, rows: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    return task.draw(key, rows)
