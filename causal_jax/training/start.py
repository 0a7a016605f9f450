"""The weights a run begins with, where it does not begin at random: `Recipe.start`.

What the model has and the source has not (adapters, another attention's own parameters) is drawn;
what only the source has is left behind. Both are said. Of a `Pair`, the student's begin there, the
teacher's are `Pair.weights`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from causal_jax.data.tokenizers import Tokenizer
from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder, DecoderModel
from causal_jax.models.pair import Pair
from causal_jax.models.pretrained import load, resolve
from causal_jax.paths import map_named, named_leaves
from causal_jax.surgery import rebuilt
from causal_jax.training.run import load_run


def sources(start: str, spec: Any) -> dict[str, str]:
    """{part of the model ("": all of it): where its weights come from}.

    Raises:
        InputError: neither a run folder nor what `models.pretrained.load` takes.
    """
    parts = {"student": start, "teacher": spec.weights} if isinstance(spec, Pair) else {"": start}
    given = {part: source for part, source in parts.items() if source}
    for source in given.values():
        if not _is_run(source):
            resolve(source)
    return given


def parameters(
    sources: Mapping[str, str], spec: Any, tokenizer: Tokenizer, shardings: Any, seed: int
) -> tuple[Any, str]:
    """The parameters of `spec`, taken from its sources, each where it belongs.

    Args:
        sources: by part, each a run folder (its newest checkpoint, averaged where the run keeps an
            average), or what `models.pretrained.load` takes.
        spec: the model to be trained.
        tokenizer: the one it is trained with.
        shardings: of the parameters.
        seed: of those that are drawn, which are the ones a run from scratch would draw.

    Returns:
        (parameters, what came from where, in lines).

    Raises:
        InputError: text that means other ids to the two, another architecture, other shapes.
    """
    with jax.set_mesh(Mesh(np.array(jax.local_devices()[:1]), ("one",))):  # not the run's own
        key = jax.random.key(seed)
        if "" in sources:
            model, said = _part("start", sources[""], spec, tokenizer, key)
        else:
            model, lines = nnx.merge(*_drawn(spec, key)), []
            for part, source in sources.items():
                new, line = _part(part, source, getattr(spec, part), tokenizer, key)
                setattr(model, part, new)
                lines.append(line)
            said = "\n".join(lines)
    return jax.tree.map(_placed, nnx.split(model)[1], shardings), said


def _part(
    part: str, source: str, spec: Any, tokenizer: Tokenizer, key: jax.Array
) -> tuple[Any, str]:
    """A model of `spec` with the weights of a source, and a line about it."""
    given, theirs, what = _read(source)
    if theirs is not None and theirs.fingerprint() != tokenizer.fingerprint():
        raise InputError(
            f"data.tokenizer is {tokenizer.spec()}, but {part} = {source!r} was trained with "
            f"{theirs.spec()}, for which the same text has other ids; set data.tokenizer to that"
        )
    model = _fitted(source, given, spec, key)
    old, new = _names(given), _names(model)
    said = f"{part}: {what}"
    for names, how in ((new - old, "drawn"), (old - new, "left behind")):
        if names:
            said += f"; {how}: {', '.join(sorted(names))}"
    return model, said


def _read(start: str) -> tuple[Any, Tokenizer | None, str]:
    if _is_run(start):
        run = load_run(start)
        return run.model, run.tokenizer, f"step {run.step} of {start}"
    return *load(start), start


def _is_run(start: str) -> bool:
    return (Path(start) / "checkpoints").is_dir()


def _names(model: Any) -> set[str]:
    """What the parameters are called, layer by layer alike."""
    words = (name.split("/") for name in named_leaves(nnx.split(model)[1]))
    return {"/".join(w[4:] if w[:2] == ["stack", "blocks"] else w) for w in words}


def _fitted(start: str, given: Any, spec: Any, key: jax.Array) -> Any:
    """The model of `spec` with what it has in common with the given one."""
    if isinstance(spec, Decoder) and isinstance(given, DecoderModel):
        return rebuilt(given, spec, key)
    graph, fresh = _drawn(spec, key)
    old = named_leaves(nnx.split(given)[1])

    def take(name: str, leaf: Any) -> Any:
        if name in old and old[name].shape != leaf.shape:
            raise InputError(
                f"start = {start!r}: {name} of shape {list(old[name].shape)} cannot become "
                f"{list(leaf.shape)}"
            )
        return old.get(name, leaf)

    if not set(old) & set(named_leaves(fresh)):
        raise InputError(
            f"start = {start!r} is a {type(given).__name__}, which shares no parameter with "
            f"{type(spec).__name__}"
        )
    return nnx.merge(graph, map_named(take, fresh))


def _drawn(spec: Any, key: jax.Array) -> tuple[Any, Any]:
    return nnx.split(jax.jit(spec.build)(key))


def _placed(leaf: Any, sharding: Any) -> jax.Array:
    host = np.asarray(jax.device_get(leaf))
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])
