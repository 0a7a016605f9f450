"""Train a model: `python -m causal_jax.train --config F[:arg] [--config.a.b V] [--config.workdir DIR]`.

Everything a run does is in its recipe (`training/recipe.py`); this file is the order in which it is
done, to be read from top to bottom:

    recipe -> mesh -> folder -> data -> state (new or restored) -> steps -> validation, sample, curves

A run that finds its folder in use goes on from the newest checkpoint in it, exactly: same order of
the data, same bits. SIGTERM or SIGINT (Ctrl-C) saves and ends the process with exit code 0; the
same command goes on. Several processes (one per host): set JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID, or pass --distributed where JAX can find out by itself.

Exit codes: 0 done (or stopped by a signal and saved), 2 the user's input, 1 anything else.
"""

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causal_jax import config
from causal_jax.errors import InputError

if TYPE_CHECKING:  # a command that only prints help need not wait for JAX
    from causal_jax.training.recipe import Recipe

USAGE = """usage: python -m causal_jax.train --config F[:ARG] [--config.FIELD VALUE ...] [--distributed]

  --config F[:ARG]       a config file with get_config(ARG), or the folder of an earlier run
  --config.FIELD VALUE   change one field, e.g. --config.steps 200 --config.optimizer.lr 1e-3
  --config.workdir DIR   the run folder (default: runs/<name of the config>); a run in it goes on
  --distributed          one of several processes; JAX finds out the others
  --help                 with --config: all fields of that config, their values and meanings

example: python -m causal_jax.train --config configs/quickstart.py --config.steps 200"""


class NotFinite(Exception):
    """Too many steps in a row had a loss or gradient that is not a number."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    try:
        return _main(sys.argv[1:] if argv is None else list(argv))
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except NotFinite as e:
        print(f"stopped: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted, nothing saved since the last checkpoint", file=sys.stderr)
        return 1
    except Exception as e:
        from causal_jax.training.checkpoint import storage_fault

        fault = storage_fault(e)
        if fault is None:
            traceback.print_exc()
            return 1
        print(f"error: {fault}: {e}; run the same command again to go on", file=sys.stderr)
        return 2


def _main(argv: list[str]) -> int:
    spec, overrides, rest = config.take_words(argv)
    wants_help = "--help" in rest or "-h" in rest
    unknown = [w for w in rest if w not in ("--help", "-h", "--distributed")]
    if unknown:
        raise InputError(f"unknown argument {unknown[0]!r}\n{USAGE}")
    if spec is None:
        if wants_help:
            print(USAGE)
            return 0
        raise InputError(f"--config is missing\n{USAGE}")
    recipe = config.load(spec, overrides)
    if wants_help:
        print(f"{USAGE}\n\n{config.help_text(recipe)}")
        return 0
    from causal_jax.training.recipe import Recipe

    if not isinstance(recipe, Recipe):
        raise InputError(f"--config {spec} is a {type(recipe).__name__}, training needs a Recipe")
    if "--distributed" in rest or "JAX_COORDINATOR_ADDRESS" in os.environ:
        import jax

        jax.distributed.initialize()
    if not recipe.workdir:
        # a run folder goes on in itself
        default = spec if Path(spec).is_dir() else os.path.join("runs", config.name_of(spec))
        recipe = dataclasses.replace(recipe, workdir=default)
    train(recipe)
    return 0


def train(recipe: "Recipe") -> dict[str, Any]:
    """Do what the recipe says, from the newest checkpoint in its folder or from the beginning.

    Args:
        recipe: with `workdir` set.

    Returns:
        {"step": steps done, "stopped": whether a signal ended it, "validation": figures of the last
        validation, "folder": the run folder, "state": the state on the devices}.

    Raises:
        InputError: something the user can put right; before long work where that is possible.
        NotFinite: `recipe.skip` exceeded; the batch is in the folder.
    """
    import jax

    from causal_jax.training import folder as folders
    from causal_jax.training import report as reports
    from causal_jax.training.checkpoint import Store
    from causal_jax.training.sharding import check_batch, make_mesh
    from causal_jax.training.stop import StopRequest

    if not recipe.workdir:
        raise InputError("workdir is empty: name the run folder")
    mesh = make_mesh(recipe.mesh)
    check_batch(mesh, recipe.data.batch, recipe.data.context, recipe.accumulate)
    if recipe.report.tensorboard:
        reports.check_tensorboard()
    _quiet_grain()
    folder = Path(recipe.workdir)
    with folders.locked(folder), StopRequest() as stop, jax.set_mesh(mesh):
        store = Store(
            folder / "checkpoints",
            keep=recipe.checkpoint.keep,
            keep_best=recipe.checkpoint.keep_best,
            say=lambda text: reports.say(folder, text),
        )
        store.clean()
        saved = folders.saved_config(folder) if store.steps() else None
        if saved is not None:
            folders.check_unchanged(_fill(recipe, saved), saved, folder)
        prepared = recipe.data.prepare(folder)
        recipe = _resolve(recipe, prepared)
        check_batch(mesh, recipe.data.batch, prepared.config.context, recipe.accumulate)
        folders.write_config(folder, recipe)
        run = _Run(recipe, folder, mesh, prepared, store)
        try:
            return run.loop(stop)
        finally:
            run.reporter.close()


class _Run:
    """Everything between the recipe and the loop, made in order; then the loop."""

    def __init__(self, recipe: "Recipe", folder: Path, mesh: Any, prepared: Any, store: Any):
        import jax

        from causal_jax.training import state as states
        from causal_jax.training import step as steps
        from causal_jax.training.report import Reporter, peak_flops, say
        from causal_jax.training.sharding import describe

        self.recipe, self.folder, self.mesh = recipe, folder, mesh
        self.prepared, self.store = prepared, store
        tx = recipe.optimizer.transformation()
        self.graph = states.graph_of(recipe.model)
        abstract, kept = states.abstract_state(
            recipe.model, tx, mesh, ema=recipe.ema is not None, rules=recipe.mesh.rules
        )
        size = states.size_in_bytes(abstract)
        _check_space(folder, size)
        self.data = iter(prepared.train)
        found = store.restore(abstract)
        if found is None:
            self.state = states.new_state(recipe.model, tx, abstract, recipe.seed)
        else:
            self.state, meta = found
            self.data.set_state(meta["data"])
        self.start = int(self.state["step"])
        self.step_fn = steps.make_step(
            self.graph,
            recipe.objective,
            recipe.optimizer,
            abstract,
            mesh,
            steps=recipe.steps,
            accumulate=recipe.accumulate,
            ema=recipe.ema,
        )
        self.eval_fn = steps.make_eval_step(self.graph, recipe.objective, mesh)
        # Built now: a recipe that wants validation and holds nothing out fails before the work.
        every, final = recipe.evaluation.batches, recipe.evaluation.final_batches
        self.eval_batches = prepared.validation(limit=every) if recipe.evaluation.every else None
        self.final_batches = prepared.validation(limit=final) if final != 0 else None
        self.figures: dict[str, float] = {}
        self.validated: tuple[int, float] | None = None
        context, batch = prepared.config.context, recipe.data.batch
        peak = recipe.report.peak_flops or peak_flops(mesh.devices.flat[0])
        self.reporter = Reporter(
            folder,
            recipe.report,
            start=self.start,
            total=recipe.steps,
            tokens=batch * context,
            flops=batch * context * recipe.model.flops_per_token(context),
            bytes_per_token=_bytes_per_token(prepared),
            peak=None if peak is None else peak * mesh.size,
        )
        say(
            folder,
            f"{type(recipe.model).__name__}: {states.param_count(self.state):,} parameters, state "
            f"{size / 2**20:.0f} MiB; {describe(mesh)}; {batch} x {context} tokens a step; jax "
            f"{jax.__version__}; config {config.fingerprint(recipe)}; folder {folder}",
        )
        for line in kept:
            say(folder, f"note: {line}")
        if self.start:
            say(folder, f"going on from step {self.start}")

    def loop(self, stop: Any) -> dict[str, Any]:
        """The steps. What step n reports is fetched when step n + 1 has been dispatched."""
        import jax

        from causal_jax.training.sharding import put_batch

        recipe, total = self.recipe, self.recipe.steps
        key = jax.random.fold_in(jax.random.key(recipe.seed), 1)  # key(seed) made the parameters
        pending: tuple[int, Any, Any] | None = None
        self.bad = 0
        stopped = False
        for done in range(self.start + 1, total + 1):
            self._profile(done)
            local = next(self.data)
            self.state, report = self.step_fn(self.state, put_batch(self.mesh, local), key)
            if pending is not None:
                self._finish(*pending)
            pending = (done, report, local)
            stopped = self._asked(stop, done)
            evaluate = _due(done, recipe.evaluation.every) and done < total
            save = _due(done, recipe.checkpoint.every) or stopped or done == total
            if evaluate or save or self._profile_ends(done):
                self._finish(*pending)  # records first: they are complete up to a checkpoint
                pending = None
            if evaluate:
                self._validate(done, self.eval_batches)
            if done == total:
                self._validate(done, self.final_batches, final=True)
            if save:
                self._save(done)
            if stopped:
                break
        self.store.wait()
        done = int(self.state["step"])
        if stopped and done < total:
            self.reporter.say(
                f"{stop.signal.name if stop.signal else 'another process'}: saved at step {done} of "
                f"{total}; the same command goes on from there"
            )
        else:
            self._end(done)
        return {
            "step": done,
            "stopped": stopped and done < total,
            "validation": self.figures,
            "folder": self.folder,
            "state": self.state,
        }

    def _finish(self, done: int, report: Any, local: Any) -> None:
        """Record a step; stop the run after too many that were not finite."""
        if self.reporter.step(done, report):
            self.bad = 0
            return
        self.bad += 1
        if self.bad <= self.recipe.skip:
            self.reporter.say(
                f"step {done}: loss or gradient is not finite; skipped ({self.bad} in a row)"
            )
            return
        import jax
        import numpy as np

        path = self.folder / f"not_finite_step{done}_process{jax.process_index()}.npz"
        np.savez(path, **local)
        raise NotFinite(
            f"step {done}: loss or gradient not finite {self.bad} times in a row (skip = "
            f"{self.recipe.skip}). The batch is in {path}; parameters are as before those steps. A "
            "lower learning rate, a longer warm-up or a lower clip usually helps"
        )

    def _validate(self, done: int, batches: Any, *, final: bool = False) -> None:
        if batches is None:
            return
        import jax

        from causal_jax.training.sharding import put_batch
        from causal_jax.training.state import averaged

        start = time.perf_counter()
        params, sums = averaged(self.state), {}
        for local in batches:
            metrics = self.eval_fn(params, put_batch(self.mesh, local))
            for name, pair in jax.device_get(metrics).items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + float(pair[0]), old[1] + float(pair[1]))
        self.figures = {name: s / max(n, 1e-9) for name, (s, n) in sums.items()}
        if getattr(batches, "bytes", 0):
            self.figures["bits_per_byte"] = batches.bits_per_byte(sums["loss"][0])
        self.validated = (done, self.figures["loss"])
        self.reporter.validation(done, self.figures, final=final)
        self.reporter.away(time.perf_counter() - start)

    def _save(self, done: int) -> None:
        start = time.perf_counter()
        here = self.validated is not None and self.validated[0] == done
        meta = {
            "validation": self.validated[1] if here and self.validated else None,
            "config": config.to_json(self.recipe),
            "data": self.data.get_state(),
            "source": self.prepared.fingerprint,
            "tokenizer": self.prepared.tokenizer.fingerprint(),
        }
        self.store.save(done, self.state, meta)
        self.reporter.away(time.perf_counter() - start)

    def _asked(self, stop: Any, done: int) -> bool:
        import jax

        # processes talk about it now and then only; one alone looks at every step
        if jax.process_count() > 1 and done % self.recipe.report.every:
            return False
        return stop.agreed()

    def _profile(self, done: int) -> None:
        import jax

        if self.recipe.report.profile and done == self.recipe.report.profile[0]:
            jax.block_until_ready(self.state)
            jax.profiler.start_trace(str(self.folder / "profile"))
            self._tracing = True

    def _profile_ends(self, done: int) -> bool:
        import jax

        if not getattr(self, "_tracing", False) or done < self.recipe.report.profile[1]:
            return False
        jax.block_until_ready(self.state)
        jax.profiler.stop_trace()
        self._tracing = False
        self.reporter.say(f"profile of steps {self.recipe.report.profile} in {self.folder}/profile")
        return True

    def _end(self, done: int) -> None:
        """Baselines, sample, last words."""
        from causal_jax.training.finish import baselines, sample

        if done >= self.recipe.steps and self.start == done:
            self.reporter.say(f"nothing to do: step {done} of {self.recipe.steps} is reached")
        for line in baselines(self.recipe, self.prepared, self.figures):
            self.reporter.say(line)
        for line in sample(self.recipe, self.prepared, self.graph, self.state):
            self.reporter.say(line)
        self.reporter.say(f"done: step {done}; run folder {self.folder}")


def _resolve(recipe: "Recipe", prepared: Any) -> "Recipe":
    """Fill in what only the data knows: the vocabulary, and a task's own length."""
    if recipe.model.vocab == 0:
        model = dataclasses.replace(recipe.model, vocab=prepared.vocab)
        recipe = dataclasses.replace(recipe, model=model)
    prepared.check_vocab(recipe.model.vocab)
    limit = getattr(recipe.model, "context", None)
    if limit is not None and prepared.config.context > limit:
        raise InputError(
            f"data.context = {prepared.config.context} is longer than model.context = {limit}"
        )
    return dataclasses.replace(recipe, data=prepared.config)


def _fill(recipe: "Recipe", saved: dict[str, Any]) -> "Recipe":
    """What `_resolve` filled in before, so that a recipe can be compared before data is prepared."""
    vocab, context = saved["model"].get("vocab", 0), saved["data"].get("context", 0)
    if recipe.model.vocab == 0:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab=vocab))
    if recipe.data.context == 0:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, context=context))
    return recipe


def _bytes_per_token(prepared: Any) -> float | None:
    stream = prepared.streams.get("validation")
    return prepared.validation_bytes / stream.pairs if stream is not None and stream.pairs else None


def _check_space(folder: Path, size: int) -> None:
    """Refuse to begin where not even one checkpoint fits."""
    import shutil

    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"workdir {folder} has {free / 2**20:.0f} MiB free, one checkpoint needs about "
            f"{size / 2**20:.0f} MiB; make room or choose another --config.workdir"
        )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _quiet_grain() -> None:
    """grain reads an absl flag, which needs parsed flags outside absl's own entry point."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


if __name__ == "__main__":
    sys.exit(main())
