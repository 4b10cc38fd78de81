"""Figures of plain arrays and names, by matplotlib; nothing imports this package before a figure is drawn."""

try:
    import matplotlib as matplotlib
except ImportError as error:
    raise ImportError("figures need matplotlib: pip install 'pyfastcircuits[plot]'") from error
