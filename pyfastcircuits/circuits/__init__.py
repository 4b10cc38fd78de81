"""What weights alone say: circuits over the vocabulary, composition, tables, subspaces."""
