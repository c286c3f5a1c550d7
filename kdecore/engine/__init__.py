"""From selections to results: evaluating them, cutting restrictions into rectangles, groups that see alike."""
