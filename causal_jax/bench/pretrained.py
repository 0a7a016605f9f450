"""`bench pretrained`: a pretrained decoder beside the same weights in transformers.

prefill   read a prompt, fill the cache, logits of the last position
decode    greedy continuation of a short prompt with the cache, tokens per second
memory    (--rss) peak resident memory of a fresh process that loads and prefills

The weights are saved once for transformers, so both have the very same; the last logits of the
prefill must agree, or nothing is timed.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.bench.options import pick, positive, words
from causal_jax.bench.peers import need_torch, torch_device, torch_wait
from causal_jax.bench.report import Record, Writer, add_ratios, case_table, mib, table
from causal_jax.bench.timing import Candidate, jax_candidate, measure, peak_rss
from causal_jax.errors import InputError
from causal_jax.generate import generate
from causal_jax.models.pretrained import load, save
from causal_jax.sampling import Sampling

OURS, PEERS = "causal_jax", ("sdpa", "eager")
PROMPT = 64  # tokens before a timed continuation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group."""
    add = parser.add_argument
    add("--model", default="smollm2", help="as for generate --model; default %(default)s")
    add("--lengths", default="2048", metavar="LIST", help="tokens of the prefill")
    add("--tokens", type=int, default=128, help="new tokens of the continuation; 0: none")
    add("--peers", default="sdpa,eager", metavar="LIST", help="attention of transformers, or none")
    add("--dtype", default="float32", help="float32 or bfloat16")


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Time prefills and continuations, measure memory, print the tables."""
    lengths = [positive(n, "lengths") for n in words(args.lengths, "lengths")]
    peers = [] if args.peers == "none" else words(args.peers, "peers")
    pick(peers, PEERS, "peer")
    pick([args.dtype], ("float32", "bfloat16"), "dtype")
    if args.config or args.overrides:
        raise InputError("--config: the group pretrained takes its model by --model")
    model, _ = load(args.model, dtype=args.dtype, param_dtype=args.dtype)
    if max([*lengths, PROMPT + args.tokens]) > model.spec.context:
        raise InputError(f"--lengths, --tokens: the model's context is {model.spec.context}")
    with tempfile.TemporaryDirectory() as folder:
        saved = save(Path(folder) / "model", model, dtype=args.dtype) if peers else Path(folder)
        theirs = {f"transformers {p}": _transformers(saved, p, args.dtype) for p in peers}
        baselines = words(args.baseline, "baseline") if args.baseline else list(theirs)
        rng = np.random.default_rng(args.seed)
        for length in lengths:
            tokens = rng.integers(0, model.spec.vocab, (1, length), np.int32)
            candidates = [_prefill(model, tokens)]
            candidates += [_torch_prefill(n, m, tokens) for n, m in theirs.items()]
            _agree(candidates, args.dtype)
            _report(args, writer, f"prefill of {length} tokens", candidates, length, baselines)
        if args.tokens:
            prompt = rng.integers(0, model.spec.vocab, (1, PROMPT), np.int32)
            candidates = [_decode(model, prompt, args.tokens)]
            candidates += [_torch_decode(n, m, prompt, args.tokens) for n, m in theirs.items()]
            title = f"{args.tokens} tokens after {PROMPT}"
            _report(args, writer, title, candidates, args.tokens, baselines)
        if args.rss:
            del model, theirs, candidates
            _memory(args, writer, saved, peers, max(lengths))


def _report(
    args: argparse.Namespace,
    writer: Writer,
    case: str,
    candidates: list[Candidate],
    tokens: int,
    baselines: list[str],
) -> None:
    timings = measure(candidates, repeats=args.repeats)
    common = {"group": "pretrained", "model": args.model, "case": case, "dtype": args.dtype}
    records = [common | t.record() | {"tokens_per_s": tokens / t.median} for t in timings]
    add_ratios(records, baselines)
    writer.add(records)
    print(f"\n{args.model}: {case}, batch 1, {args.dtype}")
    print(case_table(records, baselines), flush=True)


def _prefill(model: Any, tokens: np.ndarray) -> Candidate:
    graph, params = nnx.split(model)

    def read(params, tokens):
        m = nnx.merge(graph, params)
        hidden, cache = m.extend_hidden(tokens, m.init_cache(*tokens.shape))
        return m.unembed(hidden[:, -1]), cache

    def collect(out):
        return [np.asarray(out[0], np.float32)]

    return jax_candidate(OURS, read, params, jnp.asarray(tokens), collect=collect)


def _decode(model: Any, prompt: np.ndarray, tokens: int) -> Candidate:
    def call():
        return generate(model, list(prompt), max_tokens=tokens, sampling=Sampling(0.0))

    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    start = time.perf_counter()
    call()
    return Candidate(OURS, call, lambda _: None, first - (time.perf_counter() - start))


def _transformers(folder: Path, attention: str, dtype: str) -> Any:
    torch = need_torch()
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise InputError("--peers: needs transformers: pip install transformers") from None
    read = AutoModelForCausalLM.from_pretrained
    model = read(folder, attn_implementation=attention, dtype=getattr(torch, dtype))
    return model.to(torch_device(torch)).eval()


def _torch_call(model: Any, tokens: np.ndarray, call: Callable, name: str, **kw: Any) -> Candidate:
    torch = need_torch()
    ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)

    def run():
        with torch.inference_mode():
            return call(ids)

    return Candidate(name, run, torch_wait(torch, model.device), **kw)


def _torch_prefill(name: str, model: Any, tokens: np.ndarray) -> Candidate:
    def read(ids):
        return model(ids, use_cache=True, logits_to_keep=1)

    def collect(out):
        return [out.logits[:, -1].float().cpu().numpy()]

    return _torch_call(model, tokens, read, name, collect=collect)


def _torch_decode(name: str, model: Any, prompt: np.ndarray, tokens: int) -> Candidate:
    def write(ids):
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        return model.generate(ids, do_sample=False, pad_token_id=0, **length)

    return _torch_call(model, prompt, write, name)


def _agree(candidates: list[Candidate], dtype: str) -> None:
    """Last logits of the prefill equal within what the dtype allows."""
    outputs = [c.collect(c.call())[0] for c in candidates if c.collect is not None]
    tolerance = 1e-2 if dtype == "float32" else 5e-1
    for c, out in zip(candidates, outputs):
        error = float(np.abs(out - outputs[0]).max())
        if error > tolerance * float(np.abs(outputs[0]).std()):
            raise InputError(f"{c.name} gives other logits than {OURS}: by up to {error:g}")


def _memory(
    args: argparse.Namespace, writer: Writer, saved: Path, peers: list[str], length: int
) -> None:
    """Peak resident memory of fresh processes, one after another."""
    jobs = {OURS: (_load_and_read, (args.model, args.dtype, length))}
    jobs |= {
        f"transformers {p}": (_load_and_read_torch, (str(saved), p, args.dtype, length))
        for p in peers
    }
    spawn = multiprocessing.get_context("spawn")
    records: list[Record] = []
    for name, (job, words_) in jobs.items():
        with spawn.Pool(1) as pool:
            peak = pool.apply(job, words_)
        records.append({"group": "pretrained", "case": "memory", "name": name, "rss_bytes": peak})
    writer.add(records)
    print(f"\n{args.model}: peak resident memory, load and prefill of {length} tokens")
    print(table(["", "peak MiB"], [[r["name"], mib(r["rss_bytes"])] for r in records]), flush=True)


def _load_and_read(source: str, dtype: str, length: int) -> int | None:
    model, _ = load(source, dtype=dtype, param_dtype=dtype)
    candidate = _prefill(model, np.zeros((1, length), np.int32))
    candidate.wait(candidate.call())
    return peak_rss()


def _load_and_read_torch(folder: str, attention: str, dtype: str, length: int) -> int | None:
    model = _transformers(Path(folder), attention, dtype)
    candidate = _torch_prefill("", model, np.zeros((1, length), np.int32))
    candidate.wait(candidate.call())
    return peak_rss()
