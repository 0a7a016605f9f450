"""`python -m causal_jax.bench`."""

import sys

from causal_jax.bench import main

sys.exit(main())
