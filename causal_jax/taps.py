"""Read, change and differentiate activations: one explicit argument, no hooks, no globals.

A model calls `x = tap(name, x)` at named sites, passes `tap` down (default `OFF`) and runs its
layers through `tap.loop`. `run` makes the tap and returns what was read:

    out, acts = run(model, tokens, capture=["resid_post", "attn.*"])  # acts["resid_post"] [L,B,T,D]

An `Edit` is a pytree: its form (site, function, kind of index) is static, its values (payload,
index, selected layers) are leaves. So edits are arguments of `jit`, can be differentiated, and a
sweep over layers and positions is a `vmap`: one program. Edits apply in the order given; a capture
shows the value after the edits. With `OFF` the traced program is, letter for letter, that of a
model without taps.

    logit lens        model.unembed(acts["resid_post"])                                # [L,B,T,V]
    patch             site("resid_post", layer=l).at[:, p].set(clean[l, :, p])
    L x T map         vmap(vmap(lambda l, p: metric(run(model, bad, edits=patch(l, p))[0]),
                                (None, 0)), (0, None))(arange(L), arange(T))
    knock out         site("attn.mask", layer=3).at[:, h, q, k].set(False)
    ablate a head     site("attn.z", layer=3).at[:, :, h].set(0.0)
    mean ablation     site("attn.z").at[:, :, h].set(mean, per="layer")           # mean [L, ...]
    suppress a span   site("attn.mask").at[..., k0:k1].set(False)          # k0, k1 may be traced
    steer             site("resid_post", layer=range(4, 8)).add(alpha * v)
    subspace patch    site("resid_post", layer=l).apply(subspace, source, P)
    noise             site("embed").at[:, subject].add(noise)
    decode step 5     site("resid_post", step=5, layer=3).add(v)
    keep less         capture={"attn.pattern": last_row_argmax}           # a reducer, run in place
    attribution       loss, acts, grads = grad_sites(metric, model, bad, at=["attn.z"])
    train an edit     jax.grad(lambda v: loss(run(model, x, edits=site("embed").add(v))[0]))(v)

Rules that matter in practice:
- `resid_post` of layer l is "after l+1 layers". Layers, steps and positions count from 0.
- Known selections and indices (Python, numpy) are checked; traced ones out of range do nothing.
- The gate `where(on, fn(x), x)` computes fn in every scanned layer and a NaN made there poisons
  gradients: give a total fn, or gate="cond" (which vmap turns back into where).
- The identity of fn and of reducers is part of the compile key: no fresh lambdas in a loop; what
  varies goes into args. What is closed over becomes a constant: pass clean caches as arguments.
- A row of `attn.mask` emptied by an edit attends to nothing and gives 0.
- A value captured inside a vmap, scan or jit of the model's own leaks (jax says so): use tap.loop.
- On meshes with explicit axes set, add and mul reshard their payload to the activation; the fn of
  apply must do so for its args. An index into a sharded axis communicates, where jax allows it.
- A site that only some layers have is stacked over those, in order.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from causal_jax import loops
from causal_jax.edits import Deferrable, Edit, Site, edited, is_bool, selected, site
from causal_jax.errors import InputError

__all__ = ["OFF", "Edit", "Site", "Tap", "grad_sites", "run", "site", "sites"]


@dataclasses.dataclass
class _Record:
    """A site met while tracing one body."""

    loops: tuple = ()  # (axis, turns that have the site, end of the loop), outermost first
    captured: bool = False
    value: Any = None


@dataclasses.dataclass
class _Log:
    """What happened while tracing; from it `_check` finds what was asked for and did not happen."""

    met: set = dataclasses.field(default_factory=set)  # numbers of edits, capture patterns
    reached: dict = dataclasses.field(default_factory=dict)  # (number of edit, axis) -> end
    loops: dict = dataclasses.field(default_factory=dict)  # axis -> end


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tap:
    """What a model calls at its sites: `tap(name, x)`, `tap.wants`, `tap.scope`, `tap.loop`.

    Made by `run`; the fields are its own business.
    """

    edits: tuple = ()
    capture: dict = dataclasses.field(default_factory=dict)  # pattern -> reducer | None
    prefix: str = ""
    axes: dict = dataclasses.field(default_factory=dict)  # loop axis -> (index, end)
    frame: dict = dataclasses.field(default_factory=dict)  # site -> _Record, of this body
    log: _Log = dataclasses.field(default_factory=_Log)

    @property
    def off(self) -> bool:
        """Nothing is read or changed."""
        return not self.edits and not self.capture

    def __call__(self, name: str, x):
        """x after the edits that match, recorded if captured; same shape and dtype."""
        if self.off:
            return x
        name = self.prefix + name
        for number, edit in enumerate(self.edits):
            if fnmatchcase(name, edit.site):
                x = self._apply(number, edit, name, x)
        patterns = [p for p in self.capture if fnmatchcase(name, p)]
        self.log.met.update(patterns)
        if patterns:  # the name itself goes before a pattern, then the first
            reduce = self.capture[name if name in patterns else patterns[0]]
            self._record(name, _Record((), True, x if reduce is None else reduce(x)))
        else:
            self._record(name, _Record())
        return x

    def wants(self, name: str) -> bool:
        """Static: does anything read or change this site here? Choose fast or dense path by it."""
        name = self.prefix + name
        changed = (e for e in self.edits if fnmatchcase(name, e.site))
        return any(fnmatchcase(name, p) for p in self.capture) or any(
            self._on(e) is not False for e in changed
        )

    def deferred(self, name: str) -> list | None:
        """[(edit, on)] of a site that need not become an array, or None: then visit it.

        For sites whose value has another form (a mask as a function of its indices): every edit
        here is of a `Deferrable` function, and nothing reads the site.
        """
        name = self.prefix + name
        here = [(n, e) for n, e in enumerate(self.edits) if fnmatchcase(name, e.site)]
        plain = all(isinstance(e.op, Deferrable) and e.index is None for _, e in here)
        if not plain or any(fnmatchcase(name, p) for p in self.capture):
            return None
        self._record(name, _Record())
        gates = [(e, self._meet(n, e, name)) for n, e in here]
        return [(e, on) for e, on in gates if on is not False]

    def scope(self, prefix: str) -> "Tap":
        """The tap of a sub-module, whose sites are called `prefix.name`."""
        return self if self.off else dataclasses.replace(self, prefix=f"{self.prefix}{prefix}.")

    def loop(
        self,
        f,
        carry,
        xs,
        *,
        axis: str = "layer",
        length: int | None = None,
        start: int = 0,
        scan: bool = True,
        remat: Any = None,
        unroll: int | bool = 1,
    ):
        """Repeat `carry, y = f(carry, x, tap)` over the leading axis of xs: `lax.scan` or Python.

        Args:
          f: the body, or a tuple of p bodies (a period of p different layers). Then xs is a tuple
            of p pytrees with leading axis G; repeat g of body j is turn start + g*p + j.
          carry, xs, length, unroll: as in `jax.lax.scan`.
          axis: the loop's name in `site(..., layer=3)` and `per="layer"`.
          start: number of the first turn, when loops over one axis follow each other.
          scan: False unrolls in Python: same meaning, same layout of ys and captures.
          remat: None, "full", "dots" or a `jax.checkpoint` policy; applied to each body.
        Returns: (carry, ys), ys stacked [G, ...], a tuple of p for a period. Captures made inside
          get the loop's axis in front, in the order of the turns: [G*p, ...].
        """
        period = isinstance(f, tuple)
        fs, xs = (f, xs) if period else ((f,), (xs,))
        p, repeats = len(fs), loops.repeats(len(fs), xs, length)
        turns = range(start, start + repeats * p)
        if not self.off and axis in self.axes:
            raise InputError(f"tap.loop: {axis!r} inside {axis!r}; one needs another name")
        edits, payload = self._payloads(axis, turns)
        seen = {}  # place of the turn (of the body, when scanned) -> its frame without values

        def turn(place, number, carry, x, payload):
            tap = self if self.off else self._inside(axis, number, turns.stop, edits, payload)
            carry, y = fs[place % p](carry, x, tap)
            frame = {} if self.off else tap.frame
            seen[place] = {k: dataclasses.replace(r, value=None) for k, r in frame.items()}
            return carry, y, {k: r.value for k, r in frame.items() if r.captured}

        def body(place, number):
            this = functools.partial(turn, place, number)
            return loops.rematerialised(this, remat, prevent_cse=not scan)

        if scan:
            gated = any(axis in e.when for e in self.edits)
            first = start + p * jnp.arange(repeats, dtype=jnp.int32) if gated else None
            carry, outs = loops.scanned(
                body, carry, xs, first, payload, length=repeats, unroll=unroll
            )
            ys = tuple(y for y, _ in outs)
        else:
            carry, outs = loops.unrolled(body, carry, xs, payload, turns)
            ys = tuple(loops.stack([y for y, _ in outs[j::p]]) for j in range(p))
        if not self.off:
            self.log.loops[axis] = max(self.log.loops.get(axis, 0), turns.stop)
            for name in dict.fromkeys(k for frame in seen.values() for k in frame):
                self._record(name, _merge(name, axis, turns, seen, [z for _, z in outs], scan))
        return carry, ys if period else ys[0]

    def _inside(self, axis, index, stop, edits, payload) -> "Tap":
        edits = tuple(
            e if a is None else dataclasses.replace(e, args=a) for e, a in zip(edits, payload)
        )
        axes = {**self.axes, axis: (index, stop)}
        return dataclasses.replace(self, edits=edits, axes=axes, frame={})

    def _payloads(self, axis, turns):
        """Edits without `axis` in `per`, and their args as scan inputs.

        As loop constants their cotangents would be accumulated once per turn, as inputs they come
        out stacked. One that is too short stays as it is: the site may lie in another loop.
        """
        edits, inputs = [], []
        for e in self.edits:
            k = e.per.index(axis) if axis in e.per else -1
            fits = k >= 0 and all(jnp.shape(a)[k] >= turns.stop for a in jax.tree.leaves(e.args))
            per = e.per[:k] + e.per[k + 1 :] if fits else e.per
            edits.append(dataclasses.replace(e, per=per))
            inputs.append(_front(e.args, k, turns) if fits else None)
        return tuple(edits), tuple(inputs)

    def _on(self, edit: Edit):
        """Is the edit on in this turn of the loops: True, False, or a traced bool."""
        on = True
        for axis, selection in edit.when.items():
            this = selected(selection, self.axes[axis][0]) if axis in self.axes else True
            if this is False:
                return False
            on = this if on is True else on if this is True else on & this
        return on

    def _meet(self, number: int, edit: Edit, name: str):
        """Does the edit act here: False, True or traced? Checked, and noted that it was met."""
        around = ", ".join(f"{axis} (0..{end - 1})" for axis, (_, end) in self.axes.items())
        if missing := [axis for axis in (*edit.per, *edit.when) if axis not in self.axes]:
            raise InputError(f"site {name!r} is in no loop over {missing[0]!r}; loops: {around}")
        if edit.per:
            shapes = [list(jnp.shape(a)) for a in jax.tree.leaves(edit.args)]
            raise InputError(f"site {name!r}: payload {shapes} per={edit.per}; loops: {around}")
        self.log.met.add(number)
        for axis, (_, end) in self.axes.items():
            key = number, axis
            self.log.reached[key] = max(end, self.log.reached.get(key, 0))
        return self._on(edit)

    def _apply(self, number: int, edit: Edit, name: str, x):
        on = self._meet(number, edit, name)
        if on is False:
            return x
        if on is True:
            return edited(edit, name, x)
        if edit.gate == "cond":
            return lax.cond(on, lambda x: edited(edit, name, x), lambda x: x, x)
        return lax.select(on, edited(edit, name, x), x)

    def _record(self, name: str, new: _Record):
        old = self.frame.get(name)
        if old is not None:  # fine only in a later part of the same chain of loops
            chain = old.loops and new.loops and old.loops[0][0] == new.loops[0][0]
            if not chain or old.loops[0][1][-1] >= new.loops[0][1][0]:
                raise InputError(
                    f"site {name!r} is visited twice in one body: tell the visits apart with "
                    "tap.scope, or give the second of two loops over one axis its start="
                )
            (axis, before, _), (_, after, end) = old.loops[0], new.loops[0]
            new.loops = ((axis, before + after, end), *new.loops[1:])
            if new.captured:
                join = lambda *a: jnp.concatenate(a)  # noqa: E731
                new.value = _joined(name, join, [old.value, new.value])
        self.frame[name] = new


OFF = Tap()
"""The tap of a model nobody looks into: `OFF(name, x)` is x, `OFF.loop` a plain loop."""


def _merge(name, axis, turns, seen, captured, scan) -> _Record:
    """One site of the bodies of a loop as a site of what is around the loop."""
    have = [place for place in sorted(seen) if name in seen[place]]
    visits = tuple(sorted(t for place in have for t in turns[place :: len(seen)]))
    first = seen[have[0]][name]
    record = _Record(((axis, visits, turns.stop), *first.loops), first.captured)
    if first.captured:
        parts = [captured[place][name] for place in have]
        if not scan:  # one part per turn
            record.value = _joined(name, lambda *a: jnp.stack(a), parts)
        elif len(parts) == 1:  # stacked by the scan
            record.value = parts[0]
        else:  # [G, ...] of several bodies -> [G * bodies, ...]
            weave = lambda *a: jnp.stack(a, 1).reshape(-1, *a[0].shape[1:])  # noqa: E731
            record.value = _joined(name, weave, parts)
    return record


def _joined(name, join, parts):
    try:
        return jax.tree.map(join, *parts)
    except (TypeError, ValueError) as e:
        shapes = [jax.tree.map(jnp.shape, v) for v in parts]
        raise InputError(f"site {name!r} differs between layers, {shapes}: give a reducer") from e


def _front(tree, k, turns):
    move = lambda a: jnp.moveaxis(jnp.asarray(a), k, 0)  # noqa: E731
    return jax.tree.map(lambda a: move(a)[turns.start : turns.stop], tree)


def run(f: Callable, *args, edits: Any = (), capture: Any = (), **kw):
    """Call `f(*args, tap=..., **kw)` with edits made and activations read.

    Args:
      f: a model, or any function with a keyword `tap`.
      edits: an Edit or Edits in order, lists in lists are fine.
      capture: site names or fnmatch patterns, or {pattern: reducer}, the reducer applied in place.
    Returns: (what f returns, {site: array}), loop axes in front, outermost first.
    Raises: InputError with the site's name: never visited (with the nearest real ones), visited
      twice in a body, shape or dtype changed, selection or payload at odds with the loops.
    """
    out, frame = _run(f, args, kw, _edits(edits), _captures(capture))
    return out, {name: r.value for name, r in frame.items() if r.captured}


def sites(f: Callable, *args, **kw) -> dict:
    """{site: ShapeDtypeStruct} of all f visits, in order, if all is wanted; computes nothing.

    args may hold ShapeDtypeStructs in place of arrays.
    """
    leaves, tree = jax.tree.flatten((args, kw))
    given = {i: a for i, a in enumerate(leaves) if isinstance(a, jax.ShapeDtypeStruct)}

    order = []

    def read(given):
        args, kw = tree.unflatten([given.get(i, a) for i, a in enumerate(leaves)])
        acts = run(f, *args, capture="*", **kw)[1]
        order[:] = acts
        return acts

    shapes = jax.eval_shape(read, given)
    return {name: shapes[name] for name in order}


def grad_sites(loss: Callable, f: Callable, *args, at: Any, edits: Any = (), **kw):
    """Gradients of loss(f(...)) with respect to activations, all sites in one backward pass.

    Args:
      loss: what f returns -> scalar.
      at: site names or patterns, floating-point sites only.
      edits: made first; the gradient is that at the edited value.
    Returns: (loss, {site: activation}, {site: gradient}), alike in shape, loop axes in front.
    Raises: InputError as `run`, and for a site that has no gradient.
    """
    edits, nests = _edits(edits), {}

    def probe():
        frame = _run(f, args, kw, edits, _captures(at))[1]
        nests.update({name: r.loops for name, r in frame.items() if r.captured})
        return {name: frame[name].value for name in nests}

    zeros = {}
    for name, s in jax.eval_shape(probe).items():
        if not jnp.issubdtype(s.dtype, jnp.inexact):
            raise InputError(f"site {name!r} holds {s.dtype}: it has no gradient")
        ends = tuple(end for _, _, end in nests[name])  # turns without the site stay unread
        kind = {"out_sharding": s.sharding} if s.sharding and s.sharding.mesh.explicit_axes else {}
        zeros[name] = jnp.zeros(ends + s.shape[len(ends) :], s.dtype, **kind)

    def perturbed(zeros):
        per = {name: tuple(axis for axis, _, _ in nests[name]) for name in zeros}
        nudges = tuple(site(name).add(z, per=per[name]) for name, z in zeros.items())
        out, frame = _run(f, args, kw, edits + nudges, _captures(zeros))
        return loss(out), {name: frame[name].value for name in zeros}

    (value, acts), grads = jax.value_and_grad(perturbed, has_aux=True)(zeros)
    for name in grads:
        for k, (_, turns, end) in enumerate(nests[name]):
            if len(turns) < end:
                grads[name] = jnp.take(grads[name], np.asarray(turns), axis=k)
    return value, acts, grads


def _edits(edits) -> tuple:
    flat = tuple(jax.tree.leaves(edits, is_leaf=lambda e: isinstance(e, Edit | Site)))
    for e in flat:
        if not isinstance(e, Edit):
            hint = "; finish it with .set, .add, .mul or .apply" if isinstance(e, Site) else ""
            raise InputError(f"edits: {e!r} is no Edit{hint}")
    return flat


def _captures(capture) -> dict:
    if isinstance(capture, str):
        return {capture: None}
    if isinstance(capture, dict) and all(r is None or callable(r) for r in capture.values()):
        return capture
    return dict.fromkeys(capture)


def _run(f, args, kw, edits, capture):
    if not edits and not capture:
        return f(*args, tap=OFF, **kw), {}
    tap = Tap(edits, capture)
    out = f(*args, tap=tap, **kw)
    for number, edit in enumerate(edits):
        _check_loops(number, edit, tap.log)
    asked = {e.site: number for number, e in enumerate(edits)} | {p: p for p in capture}
    if missing := [name for name, key in asked.items() if key not in tap.log.met]:
        names = list(sites(functools.partial(f, *args, **kw)))
        near = difflib.get_close_matches(missing[0], names, n=3, cutoff=0.5) or ["none"]
        raise InputError(
            f"site {missing[0]!r} is never visited; nearest: {', '.join(near)}; "
            f"sites: {', '.join(names)}"
        )
    return out, tap.frame


def _check_loops(number: int, edit: Edit, log: _Log):
    """Selections and payloads must agree with the loops: nothing is passed over in silence."""
    for axis in dict.fromkeys((*edit.per, *edit.when)):
        end = log.reached.get((number, axis), log.loops.get(axis))
        if end is None:
            raise InputError(f"site {edit.site!r}: no loop over {axis!r}; loops: {[*log.loops]}")
        selection = edit.when.get(axis)
        if is_bool(selection) and len(selection) != end:
            raise InputError(
                f"site {edit.site!r}: mask {axis}= has {len(selection)} entries for {end} turns"
            )
        known = isinstance(selection, int | np.ndarray) and not is_bool(selection)
        if known and np.any(np.asarray(selection) >= end):
            raise InputError(f"site {edit.site!r}: {axis}={selection} is outside 0..{end - 1}")
        if axis in edit.per and number in log.met:
            for a in jax.tree.leaves(edit.args):
                if jnp.shape(a)[edit.per.index(axis)] != end:
                    raise InputError(
                        f"site {edit.site!r}: payload {list(jnp.shape(a))} per={edit.per}, but "
                        f"the loop over {axis!r} has {end} turns"
                    )
