"""`bench hyper`: causal HyperAttention beside exact attention and a plain PyTorch HyperAttention.

    strict, faithful   ours; the past alone decides, or the paper's blocks of equal counts
    exact              our dense causal attention, the baseline
    torch              the paper's algorithm as its PyTorch code computes it without kernels of a
                       GPU: pieces and blocks with all scores at once, autograd through them

Inputs are normal random: speed does not depend on them. Accuracy is `reproduce hyper_attention`.
"""

import argparse
import math
from typing import Any

import numpy as np

from causal_jax.attention import Dense
from causal_jax.attention.hyper import HyperAttention
from causal_jax.bench import peers
from causal_jax.bench.mask_names import parse
from causal_jax.bench.options import pick, positive, words
from causal_jax.bench.report import Record, Writer, add_ratios, case_table
from causal_jax.bench.timing import Candidate, jax_candidate, measure, refuse_if_too_large
from causal_jax.errors import InputError
from causal_jax.masks import Causal

NAMES = ("strict", "faithful", "exact", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group."""
    parser.add_argument("--names", default="all", metavar="LIST", help=", ".join(NAMES))
    parser.add_argument("--seq", default="32768", metavar="LIST", help="sequence lengths")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--block_size", type=int, default=256, help="keys of a block")
    parser.add_argument("--sample_size", type=int, default=256, help="sampled keys")
    parser.add_argument("--min_seq_len", type=int, default=4096, help="exact up to this length")
    parser.add_argument("--bwd", action="store_true", help="also time forward + backward")


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Time every length, forward and, where asked, with the backward pass."""
    names = words(args.names, "names", lambda: list(NAMES))
    pick(names, NAMES, "name")
    baselines = words(args.baseline, "baseline") if args.baseline else ["exact", "torch"]
    pick(baselines, NAMES, "baseline")
    lengths = [positive(s, "seq") for s in words(args.seq, "seq")]
    for option in ("heads", "head_dim", "batch"):
        if getattr(args, option) < 1:
            raise InputError(f"--{option} {getattr(args, option)}: expected at least 1")
    sizes = {f: getattr(args, f) for f in ("block_size", "sample_size", "min_seq_len")}
    specs = {
        "strict": HyperAttention(**sizes, seed=0),
        "faithful": HyperAttention(**sizes, seed=0, causal_strict=False),
        "exact": Dense(),
    }
    for n in lengths:
        for backward in (False, True) if args.bwd else (False,):
            case = _case(args, n, backward)
            records = _measured(case, names, specs, sizes, args)
            common = {
                "group": "hyper", "seq": n, "batch": args.batch, "heads": args.heads,
                "head_dim": args.head_dim, "dtype": args.dtype, **sizes,
                "direction": "forward+backward" if backward else "forward",
            }  # fmt: skip
            records = [common | r for r in records]
            add_ratios(records, baselines)
            writer.add(records)
            title = (
                f"causal, n = {n}, {common['direction']}: batch {args.batch}, {args.heads} heads"
            )
            print(f"\n{title} of {args.head_dim}, {sizes}\n{case_table(records, baselines)}")


def _case(args: argparse.Namespace, n: int, backward: bool) -> peers.Case:
    rng = np.random.default_rng(args.seed)
    shape = (args.batch, n, args.heads, args.head_dim)
    q, k, v, do = (rng.standard_normal(shape, np.float32) for _ in range(4))
    return peers.Case(q, k, v, do, parse("causal", n), args.dtype, backward)


def _measured(case: peers.Case, names, specs, sizes, args) -> list[Record]:
    candidates: list[Candidate] = []
    refused: list[Record] = []
    for name in names:
        try:
            if name == "torch":
                candidates.append(_torch(name, case, sizes, args.seed))
            else:
                candidates.append(_ours(name, case, specs[name]))
        except NotImplementedError as e:
            refused.append({"name": name, "note": str(e)})
    timings = measure(candidates, repeats=args.repeats, rss=args.rss)
    return [t.record() for t in timings] + refused


def _ours(name: str, case: peers.Case, spec: Any) -> Candidate:
    def attend(q, k, v):
        return spec(q, k, v, mask=Causal())

    program = peers.attention_program(attend, case.backward)
    return jax_candidate(name, program, *case.jax_arrays(), collect=peers.numpy_list)


def _torch(name: str, case: peers.Case, sizes: dict[str, int], seed: int) -> Candidate:
    torch, (q, k, v, do) = peers.torch_inputs(case)
    pieces = 2 ** math.ceil(math.log2(max(1, case.length / sizes["min_seq_len"])))
    scores = case.q.shape[0] * case.q.shape[2] * case.length**2 // pieces
    refuse_if_too_large(4 * scores * (5 if case.backward else 3))
    torch.manual_seed(seed)
    planes = torch.randn(q.shape[-1], 7, device=q.device, dtype=torch.float32)
    peer = TorchHyper(torch, planes, **sizes)
    return peers.torch_candidate(
        name, lambda q, k, v: peer.causal(q, k, v)[0], q, k, v, do, case.backward
    )


class TorchHyper:
    """The paper's algorithm in eager PyTorch on [B, N, T, H], for timing.

    Args:
        torch: the module. planes: [H, r] hyperplanes.
    """

    def __init__(
        self, torch: Any, planes: Any, block_size: int, sample_size: int, min_seq_len: int
    ):
        self.torch, self.planes = torch, planes
        self.b, self.m, self.least = block_size, sample_size, min_seq_len

    def softmax(self, q, k, v, forbidden=None):
        """(o, lse [.., 1]) with all scores at once."""
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if forbidden is not None:
            s = s.masked_fill(forbidden, self.torch.finfo(s.dtype).min)
        return s.softmax(-1) @ v, s.logsumexp(-1, keepdim=True)

    def causal(self, q, k, v):
        """(o, lse) by halving."""
        B, N, n, H = q.shape
        if n <= self.least:
            ones = self.torch.ones(n, n, dtype=self.torch.bool, device=q.device)
            return self.softmax(q, k, v, ones.triu(1))
        if n % 2:
            q, k, v = (self.torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (q, k, v))
        half = q.shape[2] // 2
        o, lse = self.causal(*(x.reshape(B, 2 * N, half, H) for x in (q, k, v)))
        o, lse = (x.reshape(B, N, 2 * half, -1) for x in (o, lse))
        below = self.full(q[:, :, half:], k[:, :, :half], v[:, :, :half])
        late = self.merged((o[:, :, half:], lse[:, :, half:]), below)
        joined = (self.torch.cat((a[:, :, :half], b), 2) for a, b in zip((o, lse), late))
        return tuple(x[:, :, :n] for x in joined)

    def full(self, q, k, v):
        """(o, lse): blocks of sorted hashes, and samples."""
        n = q.shape[2]
        if n < self.least:
            return self.softmax(q, k, v)
        by_q, by_k = (self.rank(x).sort(dim=2, stable=True)[1] for x in (q, k))
        q, k, v = self.rows(q, by_q), self.rows(k, by_k), self.rows(v, by_k)
        pad = -n % self.b
        blocks = [
            self.torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, self.b))
            for x in (q, k, v)
        ]
        out = [x.flatten(2, 3)[:, :, :n] for x in self.softmax(*blocks)]
        if self.m and n > self.b:
            drawn = self.torch.randint(n, (*q.shape[:2], self.m), device=q.device)
            own = self.torch.arange(n, device=q.device)[:, None] // self.b
            mine = own == (drawn // self.b)[:, :, None]
            o, lse = self.softmax(q, self.rows(k, drawn), self.rows(v, drawn), mine)
            out = self.merged(out, (o, lse + math.log(n / self.m)))
        back = by_q.argsort(2)
        return tuple(self.rows(x, back) for x in out)

    def rank(self, x):
        """Place of each hash in the Gray sequence, [B, N, T]."""
        code = ((x.float() @ self.planes > 0) * 2 ** self.torch.arange(7, device=x.device)).sum(-1)
        for shift in (1, 2, 4):
            code = code ^ (code >> shift)
        return code

    def rows(self, x, index):
        """x [B, N, T, D] at index [B, N, S]."""
        return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))

    def merged(self, a, b):
        """Two parts by their lse."""
        w = self.torch.sigmoid(a[1] - b[1])
        return w * a[0] + (1 - w) * b[0], self.torch.logaddexp(a[1], b[1])
