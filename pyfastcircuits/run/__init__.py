"""One frozen run of a model: its trace, patterns, components, paths, and the losses of rows."""
