"""Which layers attend within a window: `layer_types` in config.json."""

from collections.abc import Sequence

from causal_jax.attention import Dense
from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.models.pretrained._base import Config

FULL, SLIDING = "full_attention", "sliding_attention"


def read_layers(config: Config, types: Sequence[str], full: Dense, sliding: Dense) -> tuple:
    """`Decoder.attention` for layers of these kinds: the shortest pattern that repeats to them.

    Args:
        config: of the model; its own layer_types win over `types`.
        types: per layer "full_attention" or "sliding_attention", by the family's rule.
        full, sliding: the two kinds.
    """
    depth = config.need("num_hidden_layers")
    types = list(config.get("layer_types") or types)
    if len(types) != depth or not set(types) <= {FULL, SLIDING}:
        raise InputError(
            f"{config.where}: layer_types={types}: expected {depth} of {FULL!r} and {SLIDING!r}"
        )
    for period in range(1, depth + 1):
        if types == (types[:period] * depth)[:depth]:
            return tuple(full if t == FULL else sliding for t in types[:period])
    raise AssertionError("a list is a period of itself")


def windowed(window: int | None, **rest) -> Dense:
    """A window as transformers counts it (self included), None: everything."""
    return Dense(window=None if window is None else window - 1, **rest)


def write_layers(spec: Decoder) -> tuple[list[str], int | None]:
    """(layer_types, sliding_window) of a spec.

    Raises:
        InputError: attention that these files cannot describe.
    """
    types, windows = [], set()
    for layer in spec.layer_specs():
        if not isinstance(layer, Dense) or layer.sinks:
            raise InputError(
                f"attention {layer}: a file for transformers describes dense attention and windows"
                " only; save the run instead"
            )
        types.append(FULL if layer.window is None else SLIDING)
        windows |= {layer.window} - {None}
    if len(windows) > 1:
        raise InputError(f"windows {sorted(windows)}: the file has place for one only")
    return types, next(iter(windows), -1) + 1 or None
