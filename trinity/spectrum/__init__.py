"""Which modules of a model have signal: singular values against those of noise (Spectrum, arXiv 2406.06623)."""
