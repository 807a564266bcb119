"""What models' keys and values look like."""

from nqkv_jax.analysis.spectra import LayerSpectra as LayerSpectra
from nqkv_jax.analysis.spectra import Spectrum as Spectrum
from nqkv_jax.analysis.spectra import spectra as spectra
