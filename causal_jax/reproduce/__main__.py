"""`python -m causal_jax.reproduce`."""

import sys

from causal_jax.reproduce import main

sys.exit(main())
