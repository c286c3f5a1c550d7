"""Sign-LSH bucket of every row, as its rank in Gray order."""
