"""The training loop, in the order in which things happen.

    recipe -> mesh -> folder -> data -> state (new or restored) -> steps -> validation, sample

What can be refused is refused before long work starts. The device never waits for the report: what
step n says is fetched when step n + 1 has been dispatched.
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from causal_jax import config
from causal_jax.data.batches import Batches
from causal_jax.data.pipeline import Prepared
from causal_jax.errors import InputError
from causal_jax.training import finish, folder, start, state, step
from causal_jax.training.checkpoint import Store, check_space
from causal_jax.training.recipe import Recipe
from causal_jax.training.report import Profiler, Reporter, check_tensorboard, peak_flops, say
from causal_jax.training.sharding import check_batch, describe, make_mesh, put_batch
from causal_jax.training.stop import StopRequest


class NotFinite(Exception):
    """Too many steps in a row had a loss or gradient that is not a number."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: steps behind the state.
        stopped: whether a signal ended it before its last step.
        validation: figures of the last validation ("loss", "bits_per_byte", ...).
        state: on the devices.
    """

    step: int
    stopped: bool
    validation: dict[str, float]
    state: state.State


def train(recipe: Recipe) -> Result:
    """Do what the recipe says, from the newest checkpoint in its folder or from the beginning.

    Args:
        recipe: with `workdir` set.

    Raises:
        InputError: what the user can put right.
        NotFinite: `recipe.skip` exceeded; the batch is in the folder.
    """
    if not recipe.workdir:
        raise InputError("workdir is empty: name the run folder")
    mesh = make_mesh(recipe.mesh)
    check_batch(mesh, recipe.data.batch, recipe.data.context, recipe.accumulate)
    if recipe.report.tensorboard:
        check_tensorboard()
    start.sources(recipe.start, recipe.model)  # refused now, if they do not exist
    _settle_flags()
    workdir = Path(recipe.workdir)
    with folder.locked(workdir), StopRequest() as stop, jax.set_mesh(mesh):
        store = Store(
            workdir / "checkpoints",
            keep=recipe.checkpoint.keep,
            keep_best=recipe.checkpoint.keep_best,
            say=lambda text: say(workdir, text),
        )
        store.clean()
        if store.steps():
            folder.check_unchanged(recipe, workdir)
        prepared = recipe.data.prepare(workdir)
        recipe = _resolve(recipe, prepared)
        check_batch(mesh, recipe.data.batch, recipe.data.context, recipe.accumulate)
        loop = Loop(recipe, workdir, mesh, prepared, store)
        folder.write_config(workdir, recipe)
        folder.note_start(workdir, recipe, loop.start)
        try:
            return loop.run(stop)
        except BaseException:
            with contextlib.suppress(Exception):
                store.wait()  # a checkpoint being written is still worth having
            raise
        finally:
            loop.reporter.close()


class Loop:
    """The parts of a run, made in order; `run` then does the steps."""

    def __init__(self, recipe: Recipe, workdir: Path, mesh: Mesh, prepared: Prepared, store: Store):
        self.recipe, self.workdir, self.mesh = recipe, workdir, mesh
        self.prepared, self.store = prepared, store
        self.figures: dict[str, float] = {}
        self.validated = -1
        self.bad = 0
        # Asked for first: a recipe that wants validation and holds nothing out must fail here.
        often, once = recipe.evaluation.batches, recipe.evaluation.final_batches
        self.held_out = prepared.validation(limit=often) if recipe.evaluation.every else None
        self.all_held_out = None if once == 0 else prepared.validation(limit=once)

        tx = recipe.optimizer.transformation()
        self.graph = state.graph_of(recipe.model)
        abstract, whole = state.state_of(recipe, mesh)
        check_space(workdir, state.size_in_bytes(abstract))
        self.data = iter(prepared.train)
        found = store.restore(abstract)
        begun = ""
        if found is None:
            params = None
            if given := start.sources(recipe.start, recipe.model):
                places = state.shardings_of(abstract)["params"]
                params, begun = start.parameters(
                    given, recipe.model, prepared.tokenizer, places, recipe.seed
                )
            self.state = state.new_state(
                recipe.model, tx, abstract, recipe.seed, trainable=recipe.trained, params=params
            )
        else:
            self.state, meta = found
            self.data.set_state(meta["data"])
        self.start = int(self.state["step"])
        self.step = step.step_of(recipe, abstract, mesh)
        self.evaluate = step.make_eval_step(self.graph, recipe.objective, mesh)
        self.profiler = Profiler(workdir / "profile", recipe.report.profile)
        self.reporter = self._reporter()
        self._introduce(state.size_in_bytes(abstract), whole, begun)

    def run(self, stop: StopRequest) -> Result:
        """All steps from where the state is to `recipe.steps`, or to a signal."""
        recipe, total = self.recipe, self.recipe.steps
        key = jax.random.fold_in(jax.random.key(recipe.seed), 1)  # key(seed) made the parameters
        pending: tuple[int, Any, Any] | None = None
        stopped = False
        for done in range(self.start + 1, total + 1):
            self.profiler.before(done, self.state)
            local = next(self.data)
            self.state, report = self.step(self.state, put_batch(self.mesh, local), key)
            if pending is not None:
                self._take_in(*pending)
            pending = (done, report, local)
            stopped = self._must_stop(stop, done)
            last = done == total
            validate = _due(done, recipe.evaluation.every) and not last
            save = _due(done, recipe.checkpoint.every) or last or stopped
            if validate or save:
                self._take_in(*pending)  # the records are complete up to every checkpoint
                pending = None
            if validate:
                self._validate(done, self.held_out)
            if last:
                self._validate(done, self.all_held_out, final=True)
            if save:
                self._save(done)
            if self.profiler.after(done, self.state):
                self.reporter.say(f"profile written to {self.profiler.folder}")
            if stopped:
                break
        self.store.wait()
        return self._end(stop if stopped else None)

    def _take_in(self, done: int, report: Any, local: Any) -> None:
        """Record a step; end the run after too many that were not finite."""
        if self.reporter.step(done, report):
            self.bad = 0
            return
        self.bad += 1
        if self.bad <= self.recipe.skip:
            self.reporter.say(f"step {done}: not finite, left out ({self.bad} in a row)")
            return
        path = self.workdir / f"not_finite_step{done}_process{jax.process_index()}.npz"
        np.savez(path, **local)
        raise NotFinite(
            f"step {done}: loss or gradient not finite {self.bad} times in a row (skip = "
            f"{self.recipe.skip}). The batch is in {path}. A lower learning rate, a longer warm-up "
            "or a lower clip usually helps; begin again in another --config.workdir"
        )

    def _validate(self, done: int, batches: Batches | None, *, final: bool = False) -> None:
        if batches is None:
            return
        begun = time.perf_counter()
        params, sums = state.averaged(self.state), {}
        for local in batches:
            metrics = jax.device_get(self.evaluate(params, put_batch(self.mesh, local)))
            for name, pair in metrics.items():
                sums[name] = np.asarray(pair, np.float64) + sums.get(name, 0.0)
        self.figures = {name: float(s / max(n, 1e-9)) for name, (s, n) in sums.items()}
        if batches.bytes and self.recipe.objective.likelihood:
            self.figures["bits_per_byte"] = batches.bits_per_byte(float(sums["loss"][0]))
        self.validated = done
        self.reporter.validation(done, self.figures, final=final)
        self.reporter.away(time.perf_counter() - begun)

    def _save(self, done: int) -> None:
        begun = time.perf_counter()
        meta = {
            "validation": self.figures["loss"] if self.validated == done else None,
            "config": config.to_json(self.recipe),
            "data": self.data.get_state(),
            "source": self.prepared.fingerprint,
            "tokenizer": self.prepared.tokenizer.fingerprint(),
        }
        self.store.save(done, self.state, meta)
        self.reporter.away(time.perf_counter() - begun)

    def _must_stop(self, stop: StopRequest, done: int) -> bool:
        # several processes have to agree, which costs a message: only now and then
        alone = jax.process_count() == 1
        return (alone or done % self.recipe.report.every == 0) and stop.agreed()

    def _end(self, stop: StopRequest | None) -> Result:
        recipe, done = self.recipe, int(self.state["step"])
        stopped = stop is not None and done < recipe.steps
        if stopped and stop is not None:
            by = stop.signal.name if stop.signal else "a signal to another process"
            lines = [
                f"{by}: saved at step {done} of {recipe.steps}; the same command goes on from there"
            ]
        else:
            lines = [] if done > self.start else [f"nothing to do: step {done} is reached"]
            lines += finish.baselines(recipe, self.prepared, self.figures)
            lines += finish.sample(recipe, self.prepared, self.graph, self.state)
            lines.append(f"done: step {done}; run folder {self.workdir}")
        for line in lines:
            self.reporter.say(line)
        return Result(done, stopped, self.figures, self.state)

    def _reporter(self) -> Reporter:
        recipe, context = self.recipe, self.recipe.data.context
        tokens = recipe.data.batch * context
        stream = self.prepared.streams.get("validation")
        peak = recipe.report.peak_flops or peak_flops(self.mesh.devices.flat[0])
        return Reporter(
            self.workdir,
            recipe.report,
            start=self.start,
            total=recipe.steps,
            tokens=tokens,
            flops=tokens * recipe.model.flops_per_token(context),
            bytes_per_token=self.prepared.validation_bytes / stream.pairs
            if stream is not None and stream.pairs and recipe.objective.likelihood
            else None,
            peak=None if peak is None else peak * self.mesh.size,
        )

    def _introduce(self, size: int, whole: list[str], begun: str) -> None:
        recipe = self.recipe
        self.reporter.say(
            f"{type(recipe.model).__name__}: {state.param_count(self.state):,} parameters, state "
            f"{size / 2**20:.1f} MiB; {describe(self.mesh)}; {recipe.data.batch} x "
            f"{recipe.data.context} tokens a step; config {config.fingerprint(recipe)}"
        )
        for line in whole:
            self.reporter.say(f"note: {line}")
        for line in begun.splitlines():
            self.reporter.say(line)
        if self.start:
            self.reporter.say(f"going on from step {self.start}")


def _resolve(recipe: Recipe, prepared: Prepared) -> Recipe:
    """Fill in what only the data knows: the vocabulary, and a task's own length."""
    model: Any = recipe.model
    if model.vocab == 0:
        model = dataclasses.replace(model, vocab=prepared.vocab)
    prepared.check_vocab(model.vocab)
    limit, context = getattr(model, "context", None), prepared.config.context
    if limit is not None and context > limit:
        raise InputError(f"data.context = {context} is longer than model.context = {limit}")
    return dataclasses.replace(recipe, model=model, data=prepared.config)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _settle_flags() -> None:
    """grain reads an absl flag, which outside absl's own entry point must be marked as parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
