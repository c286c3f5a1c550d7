"""What passes between the stages of a call: problems, what is seen of keys, trees, selections, results, options."""
