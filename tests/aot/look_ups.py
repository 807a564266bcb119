"""Which look-up of levels in a table the TPU compiler schedules in fewer bundles, per bit width.

    python tests/aot/look_ups.py v5e v6e

`head` is that of `bundles.py`.
"""

import dataclasses
import json
import sys

import bundles
import jax
from decode_attention_cases import CASES

from nqkv_jax import codebooks
from nqkv_jax.pallas_kernels.decode_attention.mosaic_tpu_levels import Levels, gather, select


def main() -> None:
    for target in sys.argv[1:]:
        for bits in (2, 3, 4):
            case = dataclasses.replace(CASES["cubic4"], codebook=codebooks.normal_float(bits))
            for look_up in (gather, select):
                Levels._look_up = staticmethod(look_up)
                jax.clear_caches()
                row = bundles.measure(target, case)
                row = dict(target=target, bits=bits, look_up=look_up.__name__, head=row["head"])
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
