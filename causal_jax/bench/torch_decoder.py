"""The decoder and its training step in plain eager torch: the peer of `bench train`.

Only imported when torch is wanted. Weights are copied from our model: both compute the same.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from causal_jax.attention import Dense
from causal_jax.models.decoder import Decoder, DecoderModel
from causal_jax.objectives.next_token import NextToken
from causal_jax.positions import Rotary
from causal_jax.training.optimizer import AdamW, Muon
from causal_jax.training.recipe import Recipe

# What the peer can follow; every other setting of a Decoder must have its default value.
_SIZES = ("vocab", "layers", "width", "heads", "kv_heads", "head_dim", "hidden", "context")
_FREE = (*_SIZES, "norm_eps", "rotary", "attention", "tied", "remat", "scan")


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding through torch's fused kernel."""

    def __init__(self, spec: Decoder):
        super().__init__()
        n, k, h, d = spec.heads, spec.kv_count, spec.head_width, spec.width
        self.n, self.k, self.h = n, k, h
        self.q, self.kk, self.v = (nn.Linear(d, m * h, bias=False) for m in (n, k, k))
        self.o = nn.Linear(n * h, d, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n, self.h).transpose(1, 2)
        k = self.kk(x).view(B, T, self.k, self.h).transpose(1, 2)
        v = self.v(x).view(B, T, self.k, self.h).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n != self.k)
        return self.o(z.transpose(1, 2).reshape(B, T, -1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding on halves: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """Pre-norm block: attention, then SwiGLU."""

    def __init__(self, spec: Decoder):
        super().__init__()
        d, f = spec.width, spec.hidden_width
        self.attention_norm = nn.RMSNorm(d, eps=spec.norm_eps)
        self.attention = Attention(spec)
        self.mlp_norm = nn.RMSNorm(d, eps=spec.norm_eps)
        self.gate, self.up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class TorchDecoder(nn.Module):
    """The shape of a `Decoder` with default switches.

    Raises:
        NotImplementedError: the spec has a setting that this peer does not follow.
    """

    def __init__(self, spec: Decoder):
        refuse(spec)
        super().__init__()
        self.embed = nn.Embedding(spec.vocab, spec.width)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = nn.RMSNorm(spec.width, eps=spec.norm_eps)
        self.head = nn.Linear(spec.width, spec.vocab, bias=False)
        if spec.tied:
            self.head.weight = self.embed.weight
        half = spec.head_width // 2
        assert spec.rotary is not None
        freq = spec.rotary.base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(spec.context, dtype=torch.float64), freq)
        self.cos, self.sin = (
            nn.Buffer(t.float(), persistent=False) for t in (angle.cos(), angle.sin())
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] for tokens [B, T]."""
        x, T = self.embed(tokens), tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.head(self.norm(x))

    @torch.no_grad()
    def copy_from(self, model: DecoderModel) -> None:
        """Take over the weights of our model."""
        put(self.embed.weight, model.embed.table)
        put(self.norm.weight, model.norm.scale)
        if model.head is not None:
            put(self.head.weight, model.head.kernel, transpose=True)
        layers: Any = model.unstacked().stack.blocks
        for mine, (theirs,) in zip(cast(list[Block], self.blocks), layers, strict=True):
            put(mine.attention_norm.weight, theirs.attention_norm.scale)
            put(mine.mlp_norm.weight, theirs.mlp_norm.scale)
            a, m = theirs.attention, theirs.mlp
            pairs = (
                (mine.attention.q, a.q),
                (mine.attention.kk, a.k),
                (mine.attention.v, a.v),
                (mine.attention.o, a.o),
                (mine.gate, m.gate),
                (mine.up, m.up),
                (mine.down, m.down),
            )
            for linear, source in pairs:
                put(linear.weight, source.kernel, transpose=True)


def put(target: torch.Tensor, source: Any, transpose: bool = False) -> None:
    """Copy one parameter; ours may have a leading axis of size 1, and kernels are [in, out]."""
    x = np.asarray(source[...])
    x = x.reshape(x.shape[-target.ndim :])
    target.copy_(torch.from_numpy(np.array(x.T if transpose else x)))


def refuse(spec: Any) -> None:
    """`NotImplementedError` naming the first setting the peer does not follow."""
    if type(spec) is not Decoder:
        raise NotImplementedError(f"the torch peer is a Decoder, not a {type(spec).__name__}")
    default = Decoder()
    for field in dataclasses.fields(Decoder):
        value = getattr(spec, field.name)
        if field.name not in _FREE and value != getattr(default, field.name):
            raise NotImplementedError(f"the torch peer has no {field.name}={value!r}")
    for mechanism in spec.attention:
        if (
            dataclasses.replace(Dense(), implementation=getattr(mechanism, "implementation", None))
            != mechanism
        ):
            raise NotImplementedError(f"the torch peer has causal attention only, not {mechanism}")
    if spec.rotary is None or spec.rotary != Rotary(base=spec.rotary.base):
        raise NotImplementedError(f"the torch peer has plain rotary only, not {spec.rotary}")


class Muon32(torch.optim.Optimizer):
    """Muon in float32 as in `training/optimizer/muon.py` (torch's own uses bfloat16)."""

    def __init__(self, params: Sequence[torch.Tensor], lr: float, cfg: Muon):
        super().__init__(params, {"lr": lr})
        self.cfg, self.t = cfg, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every matrix."""
        self.t, beta = self.t + 1, self.cfg.momentum
        for group in self.param_groups:
            for p in group["params"]:
                mu = self.state[p].setdefault("mu", torch.zeros_like(p))
                mu.lerp_(p.grad, 1 - beta)
                ahead = mu * (beta / (1 - beta ** (self.t + 1)))
                ahead.add_(p.grad, alpha=(1 - beta) / (1 - beta**self.t))
                u = orthogonal(ahead, self.cfg.ns_steps)
                p.mul_(1 - group["lr"] * self.cfg.weight_decay)
                p.add_(u, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonal(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Newton-Schulz: x's singular values towards 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-8)
    for _ in range(steps):
        s = x @ x.T
        x = torch.addmm(x, torch.addmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class TrainStep:
    """One optimisation step on the same batch again and again; returns the loss before it.

    The learning rate stays at its peak: no comparison of speed would see the schedule.

    Raises:
        NotImplementedError: the recipe has a setting that this peer does not follow.
    """

    def __init__(
        self,
        recipe: Recipe,
        weights: DecoderModel,
        batch: dict[str, np.ndarray],
        device: torch.device,
        *,
        compiled: bool = False,
    ):
        if recipe.accumulate != 1 or recipe.ema is not None:
            raise NotImplementedError("the torch peer has no accumulate and no ema")
        if not isinstance(recipe.objective, NextToken) or recipe.objective.z_loss:
            raise NotImplementedError(f"the torch peer has no objective={recipe.objective}")
        model = TorchDecoder(weights.spec)
        model.copy_from(weights)
        self.model = model.to(device)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.clip = recipe.optimizer.clip
        self.optimizers = optimizers(self.model, recipe.optimizer)
        self.tokens, self.targets = (
            torch.from_numpy(batch[n]).long().to(device) for n in ("tokens", "targets")
        )

    def __call__(self) -> torch.Tensor:
        logits = self.forward(self.tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()


def optimizers(model: TorchDecoder, cfg: Any) -> list[torch.optim.Optimizer]:
    """AdamW (torch's fused one), or Muon for the blocks' matrices and AdamW for the rest."""
    if type(cfg) not in (AdamW, Muon):
        raise NotImplementedError(f"the torch peer has no optimizer={cfg}")
    if cfg.decays != AdamW().decays or (type(cfg) is Muon and cfg.matrices != Muon().matrices):
        raise NotImplementedError("the torch peer knows the default parameter patterns only")
    inside = [p for p in model.blocks.parameters() if p.ndim == 2]
    outside = [p for n, p in model.named_parameters() if p.ndim == 2 and "blocks" not in n]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    out: list[torch.optim.Optimizer] = []
    if type(cfg) is Muon:
        if cfg.adam_lr != 1.0:
            raise NotImplementedError(f"the torch peer has no adam_lr={cfg.adam_lr}")
        out.append(Muon32(inside, cfg.lr, cfg))
        inside = []
    groups = [
        {"params": inside + outside, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    out.append(
        torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.b1, cfg.b2), eps=cfg.eps, fused=True)
    )
    return out
