"""A model as the article writes it: its weights, equivalent weights, factored matrices."""
