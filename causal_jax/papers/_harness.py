"""Small trainings in memory: all seeds in one program, curves measured on the way, intervals.

The update is the training loop's own, made by the same `Optimizer`; there is no checkpoint and no
data pipeline: the loss draws its batch from a key, on the device.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.papers._base import Report
from causal_jax.shapes import Array, Float, Int, Key
from causal_jax.training.optimizer import Optimizer

Params = Any


def train(
    init: Callable[[Key[Array, ""]], Params] | Params,
    loss: Callable[..., Float[Array, ""]],
    optimizer: Optimizer,
    steps: int,
    seeds: int,
    *,
    paired: int = 1,
    given: Callable[[Key[Array, ""], Int[Array, ""]], Any] | None = None,
    measure: Callable[..., dict[str, Array]] | None = None,
    every: int | None = None,
    report: Report | None = None,
    span: tuple[float | int, float | int] = (0.0, 1.0),
    text: str = "training",
    together: bool = True,
    options: dict[str, Any] | None = None,
) -> tuple[Params, dict[str, np.ndarray]]:
    """Train one model per seed by `steps` updates theta <- theta - lr(t) (direction + decay theta).

    Args:
        init: key -> parameters (any pytree of arrays); or those of all seeds [seeds, ...], to go
            on from.
        loss: (parameters, key) -> scalar to minimise; the key, another one at every step, is what
            the batch is drawn from.
        optimizer: how.
        steps: number of updates.
        seeds: how many models, of keys 0 ... seeds - 1.
        paired: this many neighbours share a key (key s // paired), so that they begin alike and see
            the same batches: for conditions that are compared.
        given: (key, seed) -> arrays (any pytree) that stay as they are during a training, such as
            the vectors its data are made of; then `loss` and `measure` take them as third argument.
            A sweep over conditions is one program if the seed picks the condition.
        measure: (parameters, key) -> what to record, before the first update and every `every`.
        every: updates between two records; `steps` must be a multiple of it. None: record at the
            end only.
        report, span, text: where to say how far it is: this training is the part `span` of a run.
        together: all seeds in one vectorised program; False: one after another (large models).
        options: of the compiler, as `jax.jit` takes them.

    Returns:
        The parameters, stacked over seeds [seeds, ...], and the records {name: [seeds, records,
        ...]} with "step" [records] and "loss" [seeds, records], the mean training loss since the
        record before (nan in the first).
    """
    every = steps if every is None else every
    if steps % every:
        raise ValueError(f"steps {steps} is not a multiple of every {every}")
    transformation = optimizer.transformation()
    ready, fresh = not callable(init), cast(Callable[..., Params], init)
    record = measure or (lambda params, key, *constants: {})

    def begin(seed):
        keys = jax.random.split(jax.random.key(seed // paired), 2)
        params: Any = jax.tree.map(lambda x: x[seed], init) if ready else fresh(keys[0])
        constants = () if given is None else (given(jax.random.fold_in(keys[0], 1), seed),)
        return (params, transformation.init(params), jnp.int32(0)), (keys[1], constants)

    def advance(state, fixed, count):
        """`count` updates, then a record: of the mean loss on the way, and of what is measured."""

        key, constants = fixed

        def update(_, carry):
            (params, opt, t), total = carry
            batch = jax.random.fold_in(key, t)
            value, grads = jax.value_and_grad(loss)(params, batch, *constants)
            updates, opt = transformation.update(grads, opt, params)
            lr = optimizer.learning_rate(t, steps)
            params = jax.tree.map(lambda p, u: (p - lr * u).astype(p.dtype), params, updates)
            return (params, opt, t + 1), total + value.astype(jnp.float32)

        state, total = jax.lax.fori_loop(0, count, update, (state, jnp.float32(0.0)))
        # a key of its own at every record, apart from those of the batches
        look = jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), state[2])
        return state, record(state[0], look, *constants) | {"loss": total / count}

    start = jax.jit(jax.vmap(begin), compiler_options=options)
    go = jax.jit(
        jax.vmap(advance, in_axes=(0, 0, None)), donate_argnums=0, compiler_options=options
    )

    def run(group):
        """The final parameters and all records of some seeds."""
        state, fixed = start(group)
        seen = []
        for i in range(steps // every + 1):
            # the same program makes the first record, after no update
            state, found = go(state, fixed, jnp.int32(every if i else 0))
            seen.append(found)
            if report is not None and i:
                done = (int(group[0]) + group.size * i * every / steps) / seeds
                now = f"{text}, loss {float(found['loss'].mean()):.4f}"
                report.progress(span[0] + (span[1] - span[0]) * done, now)
        return state[0], jax.tree.map(lambda *xs: jnp.stack(xs, 1), *seen)

    groups = [jnp.arange(seeds)] if together else [jnp.arange(i, i + 1) for i in range(seeds)]
    params, records = jax.tree.map(lambda *xs: jnp.concatenate(xs), *map(run, groups))
    records = {name: np.asarray(value) for name, value in records.items()}
    return params, records | {"step": np.arange(0, steps + 1, every)}


def bootstrap(
    values: Float[np.ndarray, "n"],
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic of independent values.

    Args:
        values: [n].
        statistic: of values [n].
        level: coverage.
        draws: resamples with replacement.
        seed: of the resampling.

    Returns:
        (low, high).
    """
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    found = [statistic(np.asarray(values)[p]) for p in picks]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
