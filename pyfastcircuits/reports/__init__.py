"""The report: one HTML page that shows what a model's circuits do, to be opened from a file, offline."""
