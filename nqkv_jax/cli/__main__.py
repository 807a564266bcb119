"""`python -m nqkv_jax.cli`."""

import sys

from nqkv_jax.cli import main

sys.exit(main())
