"""Circuits that weights alone tell: over the vocabulary, their spectra and tables, composition, subspaces."""
