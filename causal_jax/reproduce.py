"""Check a published claim: `python -m causal_jax.reproduce NAME`."""

import sys
from collections.abc import Sequence

from causal_jax.errors import InputError
from causal_jax.papers import Report, papers


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 all claims hold, 3 one does not, 2 wrong input."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        evidence = papers[words[0]].small().run(Report())
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for row in evidence.rows:
        print(row)
    return 0 if evidence.holds else 3


if __name__ == "__main__":
    sys.exit(main())
