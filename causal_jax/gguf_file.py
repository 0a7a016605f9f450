"""A GGUF file (llama.cpp's container): metadata, and tensors dequantised block by block."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from causal_jax.errors import InputError

_READABLE = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"} | {
    f"Q{bits}_K" for bits in range(2, 7)
}
_CHUNK = 1 << 22  # entries dequantised at a time: the package's temporaries stay small


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A stored tensor.

    Attributes:
        shape: as NumPy writes it (the file has it backwards).
        kind: name of the quantisation, "Q4_K".
        data: the bytes, a row of blocks per row of the tensor; mapped from the file.
    """

    shape: tuple[int, ...]
    kind: str
    data: np.ndarray

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of the first axis, in float32."""
        import gguf

        kind = gguf.GGMLQuantizationType[self.kind]
        out = np.empty((stop - start, *self.shape[1:]), np.float32)
        step = max(1, _CHUNK // max(1, int(np.prod(self.shape[1:]))))
        for at in range(start, stop, step):
            block = self.data[at : min(at + step, stop)]
            out[at - start : at - start + len(block)] = gguf.dequantize(block, kind)
        return out


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What a file holds; nothing is read before it is asked for.

    Attributes:
        where: the file's name.
        metadata: key -> number, text, or list of these.
        tensors: name -> tensor.
    """

    where: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def open_gguf(path: Path | str) -> GGUFFile:
    """Read the head of a GGUF file and map the rest.

    Raises:
        InputError: the file is missing, no GGUF, truncated, damaged, or holds a quantisation that
            the package cannot undo.
    """
    try:
        import gguf
    except ImportError:
        raise InputError(
            'a GGUF file needs the package gguf: pip install "causal_jax[models]"'
        ) from None
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file (its first four bytes are not 'GGUF')")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: _value(field.contents()) for key, field in reader.fields.items()}
        tensors = {
            t.name: GGUFTensor(tuple(int(n) for n in t.shape[::-1]), t.tensor_type.name, t.data)
            for t in reader.tensors
        }
    except Exception as e:  # whatever a damaged file makes of the parser
        raise InputError(
            f"{path}: truncated or damaged GGUF file ({type(e).__name__}: {e})"
        ) from None
    unknown = {t.kind for t in tensors.values()} - _READABLE
    if unknown:
        raise InputError(
            f"{path}: tensors of type {', '.join(sorted(unknown))} cannot be read, only"
            f" {', '.join(sorted(_READABLE))}"
        )
    return GGUFFile(str(path), metadata, tensors)


def _value(value: Any) -> Any:
    """float32 numbers as people write them: 1e-05, not 9.999999747378752e-06."""
    if isinstance(value, list):
        return [_value(v) for v in value] if value and isinstance(value[0], float) else value
    if isinstance(value, float) and value == float(np.float32(value)):
        return float(str(np.float32(value)))
    return value
