"""Other people's exact attention, each in its own preferred layout, for timing beside ours.

A peer is asked to build a `Candidate` for one case. It raises `NotImplementedError` with the reason
where it cannot serve (its library is missing, the device is the wrong one, no backward pass, not
enough memory): the report prints the reason, nothing is skipped in silence.
"""

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.bench.mask_names import NamedMask
from causal_jax.bench.timing import Candidate, jax_candidate, refuse_if_too_large


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs: numpy float32 q, do [B,T,N,H], k, v [B,T,K,H], mask, dtype, and what is timed."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    do: np.ndarray
    mask: NamedMask
    dtype: str
    backward: bool

    @property
    def length(self) -> int:
        """T."""
        return self.q.shape[1]

    def jax_arrays(self) -> list[jax.Array]:
        """q, k, v, do as jax arrays [B,T,N,H]."""
        return [jnp.asarray(x, self.dtype) for x in (self.q, self.k, self.v, self.do)]


def attention_program(attend: Callable, backward: bool) -> Callable:
    """(q, k, v, do, *rest) -> [o] or [o, dq, dk, dv] for `attend(q, k, v, *rest) -> o`."""

    def program(q, k, v, do, *rest):
        if not backward:
            return [attend(q, k, v, *rest)]
        o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)
        return [o, *pull(do)]

    return program


def numpy_list(arrays: Sequence[Any]) -> list[np.ndarray]:
    """jax arrays as numpy float32."""
    return [np.asarray(a, np.float32) for a in arrays]


def jax_nn(name: str, case: Case, implementation: str | None = "xla") -> Candidate:
    """`jax.nn.dot_product_attention`: its causal flag, or the mask written out."""
    rest: list[Any] = []
    flags: dict[str, Any] = {"implementation": implementation}
    if case.mask.name == "causal":
        flags["is_causal"] = True
    elif case.mask.name != "full":
        rest = [jnp.asarray(case.mask.dense(case.length))]

    def attend(q, k, v, *mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[0] if mask else None, **flags)

    try:
        return jax_candidate(
            name,
            attention_program(attend, case.backward),
            *case.jax_arrays(),
            *rest,
            collect=numpy_list,
        )
    except (RuntimeError, ValueError) as e:
        raise NotImplementedError(str(e).splitlines()[0]) from e


def jax_cudnn(name: str, case: Case) -> Candidate:
    """The same through cuDNN."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("cuDNN needs a GPU")
    return jax_nn(name, case, "cudnn")


def tokamax(name: str, case: Case) -> Candidate:
    """`tokamax.dot_product_attention` with its own choice of kernel."""
    _need("tokamax", "kernels")
    import tokamax  # pyright: ignore[reportMissingImports]

    rest: list[Any] = []
    if case.mask.name not in ("causal", "full"):
        rest = [jnp.asarray(case.mask.dense(case.length))]

    def attend(q, k, v, *mask):
        flags: dict[str, Any] = {"mask": mask[0]} if mask else {}
        if case.mask.name == "causal":
            flags["is_causal"] = True
        return tokamax.dot_product_attention(q, k, v, **flags)

    return jax_candidate(
        name,
        attention_program(attend, case.backward),
        *case.jax_arrays(),
        *rest,
        collect=numpy_list,
    )


def splash(name: str, case: Case, *, interpret: bool = False) -> Candidate:
    """JAX's splash attention, block-sparse with the mask's own tiles left out (TPU)."""
    if jax.default_backend() != "tpu" and not interpret:
        raise NotImplementedError("splash attention needs a TPU")
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    n, heads = case.length, case.q.shape[2]
    if case.mask.name == "causal":
        mask = lib.CausalMask((n, n))
    elif case.mask.name == "full":
        mask = lib.FullMask((n, n))
    else:
        refuse_if_too_large(n**2)
        mask = lib.NumpyMask(case.mask.dense(n)[0, 0].copy())
    try:
        kernel: Any = lib.make_splash_mha(
            lib.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, interpret=interpret
        )
    except ValueError as e:
        raise NotImplementedError(str(e).splitlines()[0]) from e

    def attend(q, k, v):
        q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
        return jnp.moveaxis(jax.vmap(kernel)(q, k, v), 1, 2)

    program = attention_program(attend, case.backward)
    return jax_candidate(name, program, *case.jax_arrays(), collect=numpy_list)


def torch_sdpa(name: str, case: Case) -> Candidate:
    """torch's eager `scaled_dot_product_attention` on [B,N,T,H], its own choice of kernel."""
    torch, (q, k, v, do) = torch_inputs(case)
    flags: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
    if case.mask.name == "causal":
        flags["is_causal"] = True
    elif case.mask.name != "full":
        refuse_if_too_large(case.length**2)
        flags["attn_mask"] = torch.from_numpy(case.mask.dense(case.length).copy()).to(q.device)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return torch_candidate(name, lambda q, k, v: sdpa(q, k, v, **flags), q, k, v, do, case.backward)


def torch_flex(name: str, case: Case) -> Candidate:
    """torch's compiled FlexAttention (on CPU: forward only, needs a C++ compiler)."""
    torch, (q, k, v, do) = torch_inputs(case)
    if case.backward and q.device.type == "cpu":
        raise NotImplementedError("torch's FlexAttention has no backward pass on CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    refuse_if_too_large(case.length**2)
    formula = case.mask.formula
    if formula is None:
        seen = torch.from_numpy(case.mask.dense(case.length)[0, 0].copy()).to(q.device)

        def mask_mod(b, h, i, j):
            return seen[i, j]
    else:
        ids = None if case.mask.ids is None else torch.from_numpy(case.mask.ids).to(q.device)

        def mask_mod(b, h, i, j):
            return formula(i, j, ids)

    n = case.length
    blocks = create_block_mask(mask_mod, None, None, n, n, device=q.device.type)
    torch._dynamo.reset()  # else every further shape counts towards its limit of recompilations
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = q.shape[1] != k.shape[1]

    def attend(q, k, v):
        return compiled(q, k, v, block_mask=blocks, enable_gqa=grouped)

    start = time.perf_counter()
    try:
        attend(q, k, v)
    except Exception as e:  # whatever its compiler raises: missing compiler, unsupported shape
        reason = str(e).strip().splitlines()[0]
        raise NotImplementedError(f"did not compile: {reason[:200]}") from e
    seconds = time.perf_counter() - start
    return dataclasses.replace(
        torch_candidate(name, attend, q, k, v, do, case.backward), compile_s=seconds
    )


PEERS: dict[str, Callable[[str, Case], Candidate]] = {
    "jax": jax_nn,
    "cudnn": jax_cudnn,
    "tokamax": tokamax,
    "splash": splash,
    "torch": torch_sdpa,
    "flex": torch_flex,
}


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise NotImplementedError(f'not installed: pip install "causal_jax[{extra}]"')


def need_torch() -> Any:
    """The torch module, or `NotImplementedError` that says how to get it."""
    _need("torch", "bench")
    import torch

    return torch


def torch_device(torch: Any) -> Any:
    """Where torch runs beside jax: its GPU when jax uses one, else the CPU."""
    if jax.default_backend() == "cpu":
        return torch.device("cpu")
    if jax.default_backend() == "gpu" and torch.cuda.is_available():
        return torch.device("cuda")
    raise NotImplementedError(f"this torch does not run on jax's device {jax.devices()[0]}")


def torch_inputs(case: Case) -> tuple[Any, list[Any]]:
    """torch, and q, k, v, do as contiguous tensors [B,N,T,H]."""
    torch = need_torch()
    device, dtype = torch_device(torch), getattr(torch, case.dtype)
    arrays = (case.q, case.k, case.v, case.do)
    heads_first = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in arrays)
    return torch, [torch.from_numpy(x).to(device, dtype) for x in heads_first]


def torch_wait(torch: Any, device: Any) -> Callable[[Any], None]:
    """Returns when torch has finished all it was given on the device."""
    return lambda _: torch.cuda.synchronize() if device.type == "cuda" else None


def torch_candidate(
    name: str, attend: Callable, q: Any, k: Any, v: Any, do: Any, backward: bool
) -> Candidate:
    """An eager torch function of q, k, v [B,N,T,H], with its gradients where asked."""
    torch = need_torch()

    def forward():
        with torch.no_grad():
            return [attend(q, k, v)]

    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

    def both():
        o = attend(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    def collect(arrays):
        return [a.float().transpose(1, 2).cpu().numpy() for a in arrays]

    return Candidate(
        name, both if backward else forward, torch_wait(torch, q.device), collect=collect
    )
