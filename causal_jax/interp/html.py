"""A prompt with a value per token as one HTML file: no scripts, no links, opens anywhere."""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from causal_jax.interp.plots import paint

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/2 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.2em; }} h2 {{ font-size: 1em; margin-bottom: 0; color: #555; }}
p {{ white-space: pre-wrap; margin: 0 0 1em; }}
span {{ padding: .15em 0; border-radius: .2em; }}
span:hover {{ outline: 2px solid #222; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def token_page(
    tokens: Sequence[str], values: Mapping[str, Any] | Any, *, title: str = "tokens"
) -> str:
    """HTML with the prompt once per row of values; pointing at a token shows number and value.

    Args:
        tokens: text of each token.
        values: [T], or {name: [T]}; of both signs they are red and blue, otherwise white to dark.

    Raises:
        InputError: not one value per token.
    """
    rows = values if isinstance(values, Mapping) else {"": values}
    parts = []
    for name, row in rows.items():
        painted = zip(tokens, np.asarray(row, np.float64), paint(tokens, row))
        spans = [
            f'<span title="{i}: {value:.4g}" style="background:{colour};color:{ink}">'
            f"{_shown(token)}</span>"
            for i, (token, value, (colour, ink)) in enumerate(painted)
        ]
        head = f"<h2>{html.escape(name)}</h2>" if name else ""
        parts.append(f"{head}<p>{''.join(spans)}</p>")
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def save_page(page: str, path: str | os.PathLike) -> None:
    """Write a page; folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _shown(token: str) -> str:
    text = html.escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in token))
    return text.replace("\n", "⏎\n") or "·"
