"""Look inside a model from the command line.

    P="python -m causal_jax.interp"
    $P sites   --model smollm2
    $P capture --model smollm2 --prompt "..." --site "attn.*" --out acts.npz
    $P patch   --model smollm2 --clean "Paris is in" --corrupt "Rome is in" \\
               --answer " France" --wrong " Italy" --layer 12 --phrase "Rome"
    $P sweep   (the same, without --layer and --phrase)  --over position --out maps

`--run DIR` takes the model of a run folder instead. patch and sweep put activations of the clean
prompt into the run on the corrupt one, and say how much of the difference between the two answers
comes back: 0 % is the corrupt run, 100 % the clean one. Exit codes: 0 done, 2 wrong input.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.data.tokenizers import Tokenizer
from causal_jax.errors import InputError
from causal_jax.interp.edits import patch
from causal_jax.interp.html import save_page, token_page
from causal_jax.interp.plots import heat_map, save
from causal_jax.interp.scores import logit_difference
from causal_jax.interp.sweeps import sweep
from causal_jax.interp.tokens import Prompt, tokenize
from causal_jax.taps import run, sites
from causal_jax.training.run import load_run_or_model


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        args.call(args)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def _sites(args: argparse.Namespace) -> None:
    model, tokenizer = load_run_or_model(args.run, args.model, args.checkpoint)
    tokens = _ids(tokenize(tokenizer, args.prompt))
    found = sites(model, tokens)
    width = max(map(len, found))
    for name, shape in found.items():
        print(f"{name:<{width}}  {shape.dtype.name:<8}  {list(shape.shape)}")


def _capture(args: argparse.Namespace) -> None:
    path = Path(args.out)
    if path.suffix != ".npz":
        raise InputError(f"--out {args.out}: expected a name that ends in .npz")
    model, tokenizer = load_run_or_model(args.run, args.model, args.checkpoint)
    prompt = tokenize(tokenizer, args.prompt)
    _, acts = _forward(model, _ids(prompt), (), tuple(args.site))
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: np.asarray(a) for name, a in acts.items()}
    np.savez(path, tokens=prompt.ids, pieces=np.array(prompt.pieces), **arrays)
    for name, a in arrays.items():
        print(f"{name}  {list(a.shape)}  {a.nbytes / 2**20:.1f} MiB")
    print(f"written: {path}")


class _Pair:
    """A clean and a corrupt prompt of one length, their runs, and what counts as the answer."""

    def __init__(self, args: argparse.Namespace):
        self.model, tokenizer = load_run_or_model(args.run, args.model, args.checkpoint)
        self.clean, self.corrupt = (tokenize(tokenizer, t) for t in (args.clean, args.corrupt))
        if len(self.clean.ids) != len(self.corrupt.ids):
            raise InputError(
                f"--clean has {len(self.clean.ids)} tokens {list(self.clean.pieces)}, --corrupt "
                f"{len(self.corrupt.ids)} {list(self.corrupt.pieces)}: they must be as many"
            )
        right, wrong = (_first(tokenizer, o, getattr(args, o)) for o in ("answer", "wrong"))
        if right == wrong:
            raise InputError(
                f"--answer {args.answer!r} and --wrong {args.wrong!r} begin with the same token"
            )
        self.metric = functools.partial(
            logit_difference, right=jnp.asarray(right), wrong=jnp.asarray(wrong)
        )
        out, self.acts = _forward(self.model, _ids(self.clean), (), (args.site,))
        self.high = float(self.metric(out))
        self.low = float(self.metric(_forward(self.model, _ids(self.corrupt), (), ())[0]))
        spelled = [tokenizer.pieces[i].decode(errors="replace") for i in (right, wrong)]
        print(f"logit({spelled[0]!r}) - logit({spelled[1]!r}): clean {self.high:.3f}, ", end="")
        print(f"corrupt {self.low:.3f}")
        if abs(self.high - self.low) < 1e-6:
            raise InputError("--clean and --corrupt: the model answers both alike, nothing to move")

    def recovered(self, value: Any) -> Any:
        """Share of the difference that came back, in per cent."""
        return 100.0 * (np.asarray(value, np.float64) - self.low) / (self.high - self.low)


def _patch(args: argparse.Namespace) -> None:
    pair = _Pair(args)
    position: Any = args.position
    if args.phrase is not None:
        if position is not None:
            raise InputError("--position and --phrase: give one of them")
        position = pair.corrupt.find(args.phrase)
    edits = patch(pair.acts, site=args.site, layer=args.layer, position=position, head=args.head)
    out, _ = _forward(pair.model, _ids(pair.corrupt), edits, ())
    value = float(pair.metric(out))
    where = "all positions"
    if position is not None:
        picked = np.atleast_1d(position)
        where = f"positions {picked.tolist()} {[pair.corrupt.pieces[i] for i in picked]}"
    print(f"patched {args.site}, layer {args.layer}, {where}: {value:.3f}, ", end="")
    print(f"{pair.recovered(value):.1f} % recovered")


def _sweep(args: argparse.Namespace) -> None:
    if args.over == "head" and args.site == "resid_post":
        args.site = "attn.z"
    pair = _Pair(args)
    clean = pair.acts[args.site]
    if clean.ndim < 4:
        raise InputError(f"--site {args.site}: it is in no layer, so there is no map over layers")
    if args.over == "head" and clean.ndim != 5:
        raise InputError(f"--site {args.site}: it has no heads; attn.z, q, k and v have")
    columns = clean.shape[3] if args.over == "head" else clean.shape[2]
    edits_of = functools.partial(_edits_at, clean, site=args.site, over=args.over)
    f = functools.partial(pair.model, _ids(pair.corrupt))
    begun = time.perf_counter()
    print(f"{len(clean)} layers x {columns} {args.over}s: one program ...", flush=True)
    values = sweep(pair.metric, f, edits_of, range(len(clean)), range(columns), chunk=args.chunk)
    shares = pair.recovered(values)
    print(f"done in {time.perf_counter() - begun:.1f} s, compiling included")
    _write(args, pair, shares)


def _write(args: argparse.Namespace, pair: _Pair, shares: np.ndarray) -> None:
    out = Path(args.out)
    labels: Any = pair.corrupt.pieces if args.over == "position" else "head"
    title = f"{args.site} of the clean prompt put into the corrupt one"
    figure = heat_map(shares, x=labels, title=title, label="% recovered")
    save(figure, out / "map.png")
    record = {
        "clean": args.clean, "corrupt": args.corrupt, "answer": args.answer, "wrong": args.wrong,
        "site": args.site, "over": args.over, "metric_clean": pair.high, "metric_corrupt": pair.low,
        "tokens": list(pair.corrupt.pieces), "recovered_percent": shares.tolist(),
    }  # fmt: skip
    (out / "map.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    written = ["map.png", "map.json"]
    if args.over == "position":
        rows = {"most recovered by one layer, %": shares.max(0)}
        rows |= {f"layer {layer}": row for layer, row in enumerate(shares)}
        save_page(token_page(pair.corrupt.pieces, rows, title=title), out / "map.html")
        written.append("map.html")
    order = np.argsort(shares, axis=None)[::-1][:5]
    for layer, column in zip(*np.unravel_index(order, shares.shape)):
        name = repr(pair.corrupt.pieces[column]) if args.over == "position" else ""
        print(f"  layer {layer:>3}  {args.over} {column:>3} {name}: {shares[layer, column]:.1f} %")
    print(f"written to {out}: {', '.join(written)}")


def _edits_at(clean, layer, column, *, site, over):
    return patch(clean, site=site, layer=layer, **{over: column})


def _forward(model: Any, tokens: jax.Array, edits: Any, capture: tuple[str, ...]) -> tuple:
    return _compiled(*nnx.split(model), tokens, edits, capture)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _compiled(graph, params, tokens, edits, capture):
    return run(nnx.merge(graph, params), tokens, edits=edits, capture=capture)


def _ids(prompt: Prompt) -> jax.Array:
    if not len(prompt.ids):
        raise InputError("the prompt has no tokens")
    return jnp.asarray(prompt.ids)[None]


def _first(tokenizer: Tokenizer, option: str, text: str) -> int:
    ids = tokenizer.encode(text)
    if not len(ids):
        raise InputError(f"--{option} {text!r} has no tokens")
    return int(ids[0])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m causal_jax.interp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: Any, about: str) -> Any:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(call=call)
        which = sub.add_mutually_exclusive_group(required=True)
        which.add_argument("--run", metavar="DIR", help="the run folder that training made")
        which.add_argument("--model", metavar="SOURCE", help="pretrained weights, as of generate")
        sub.add_argument("--checkpoint", default="latest", help="of --run: latest, best or a step")
        return sub.add_argument

    add = command("sites", _sites, "list all sites with their shapes")
    add("--prompt", default="1", help="text whose length the shapes have; default %(default)r")
    add = command("capture", _capture, "write activations of a prompt to a .npz file")
    add("--prompt", required=True, help="what the model reads")
    add("--site", action="append", required=True, help="name or pattern; may be given again")
    add("--out", required=True, metavar="FILE.npz")
    for name, call, about in (
        ("patch", _patch, "put activations of one prompt into the run on another"),
        ("sweep", _sweep, "do so for every layer and position (or head), as one program"),
    ):
        add = command(name, call, about)
        for option, text in (
            ("clean", "prompt whose activations are taken"),
            ("corrupt", "prompt into which they are put; as many tokens"),
            ("answer", "what follows the clean prompt (its first token counts)"),
            ("wrong", "what follows the corrupt prompt (its first token counts)"),
        ):
            add(f"--{option}", required=True, metavar="TEXT", help=text)
        add("--site", default="resid_post", help="what is patched; default %(default)s")
        if name == "patch":
            add("--layer", type=int, required=True, help="from 0")
            add("--position", type=int, help="one position, from 0 or -1: the last; default: all")
            add("--phrase", metavar="TEXT", help="all positions of this text in --corrupt")
            add("--head", type=int, help="one head, for sites that have heads")
        else:
            add("--over", choices=("position", "head"), default="position", help="the second axis")
            add("--chunk", type=int, default=32, help="runs side by side; default %(default)s")
            add("--out", default="interp", metavar="DIR", help="folder; default %(default)s")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
