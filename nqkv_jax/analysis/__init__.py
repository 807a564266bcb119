"""What models' keys and values look like, and what schemes do to them.

Each module has a function that measures, and `draw`, which makes a figure and the data it shows.
"""

from nqkv_jax.analysis.errors import LayerError as LayerError
from nqkv_jax.analysis.errors import SchemeErrors as SchemeErrors
from nqkv_jax.analysis.errors import scheme_errors as scheme_errors
from nqkv_jax.analysis.magnitudes import Magnitudes as Magnitudes
from nqkv_jax.analysis.magnitudes import magnitudes as magnitudes
from nqkv_jax.analysis.normality import BlockStatistics as BlockStatistics
from nqkv_jax.analysis.normality import normality as normality
from nqkv_jax.analysis.spectra import LayerSpectra as LayerSpectra
from nqkv_jax.analysis.spectra import Spectrum as Spectrum
from nqkv_jax.analysis.spectra import spectra as spectra
