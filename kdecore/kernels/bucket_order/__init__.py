"""Order of rows by bucket."""
