"""Train a model: `python -m causal_jax.train --config F[:ARG] [--config.a.b V]`.

What a run does is in its recipe (`training/recipe.py`), the order in which it is done in the loop
(`training/loop.py`); this file is the command.

A run that finds its folder in use goes on from the newest checkpoint in it, exactly: same order of
the data, same bits. SIGTERM or SIGINT (Ctrl-C) saves and ends the process with exit code 0; the
same command goes on. Several processes (one per host): set JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID, or pass --distributed where JAX finds the others by itself.

Exit codes: 0 done (or stopped by a signal and saved), 2 the user's input, 1 anything else.
"""

import dataclasses
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from causal_jax import config
from causal_jax.errors import InputError

USAGE = """\
usage: python -m causal_jax.train --config F[:ARG] [--config.FIELD VALUE ...] [options]

  --config F[:ARG]       a config file with get_config(ARG), or the folder of an earlier run
  --config.FIELD VALUE   change one field, e.g. --config.steps 200 --config.optimizer.lr 1e-3
  --config.workdir DIR   the run folder (default: runs/<name of the config>); a run in it goes on
  --distributed          one of several processes; JAX finds out the others
  --deterministic        the same bits in every process on a GPU too, which costs speed there
  --help                 with --config: all fields of that config, their values and meanings

example: python -m causal_jax.train --config configs/quickstart.py --config.steps 200"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 2 the user's input, 1 anything else."""
    try:
        return _main(sys.argv[1:] if argv is None else list(argv))
    except InputError as e:
        return _fail(2, f"error: {e}")
    except KeyboardInterrupt:
        return _fail(1, "interrupted: nothing was saved since the last checkpoint")
    except Exception as e:
        # only now: a command that prints help need not wait for JAX
        from causal_jax.training.checkpoint import storage_fault
        from causal_jax.training.loop import NotFinite

        if isinstance(e, NotFinite):
            return _fail(1, f"stopped: {e}")
        if _lost(e):
            _fail(
                1,
                "stopped: another process of this run ended or cannot be reached "
                f"({' '.join(str(e).split())[:160]}). Start all of them again, as many as there "
                "are hosts now, with the same command: it goes on from the last checkpoint",
            )
            os._exit(1)  # a regular end would wait for the others
        fault = storage_fault(e)
        if fault is None:
            traceback.print_exc()
            return 1
        return _fail(2, f"error: {fault} ({e}); the same command goes on from the last checkpoint")


def _main(argv: list[str]) -> int:
    spec, overrides, rest = config.take_words(argv)
    wants_help = "--help" in rest or "-h" in rest
    if "--deterministic" in rest:
        from causal_jax.environment import make_deterministic

        make_deterministic()
    unknown = [
        word for word in rest if word not in ("--help", "-h", "--distributed", "--deterministic")
    ]
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
    from causal_jax.training.loop import train
    from causal_jax.training.recipe import Recipe
    from causal_jax.training.stages import Stages, train_stages

    if not isinstance(recipe, Recipe | Stages):
        raise InputError(f"--config {spec} is a {type(recipe).__name__}, training needs a Recipe")
    _connect("--distributed" in rest)
    if Path(spec).is_dir() and not any(w.startswith("--config.workdir") for w in overrides):
        recipe = dataclasses.replace(recipe, workdir=spec)  # goes on where it is now
    elif not recipe.workdir:
        recipe = dataclasses.replace(recipe, workdir=os.path.join("runs", config.name_of(spec)))
    if isinstance(recipe, Stages):
        train_stages(recipe)
    else:
        train(recipe)
    return 0


def _connect(wanted: bool) -> None:
    """Join the other processes, by the environment variables or by what JAX detects."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    if not (wanted or given[0]):
        return
    import jax

    address, count, index = given
    if not address:
        jax.distributed.initialize()
    elif count and index and count.isdecimal() and index.isdecimal() and int(index) < int(count):
        jax.distributed.initialize(address, int(count), int(index))
    else:
        raise InputError(
            f"{names[1]} = {count!r} and {names[2]} = {index!r}: with {names[0]} set, both are "
            "needed, the number of processes and the index of this one"
        )


def _lost(error: Exception) -> bool:
    """Whether the processes of this run can no longer hear each other."""
    import jax

    words = ("gloo", "coordination", "heartbeat", "unavailable", "connection", "deadline_exceeded")
    said = str(error).lower()
    return jax.process_count() > 1 and any(word in said for word in words)


def _fail(code: int, message: str) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
