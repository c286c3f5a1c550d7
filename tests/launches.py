"""How many kernels the version for CUDA launches that PyTorch's tensors get: test_grids.py holds that it does."""

LAUNCHES = {
    "hash_codes": 2,
    "bucket_order": 1,
    "row_norms": 2,
    "value_sizes": 2,
    "spoil_groups": 2,
    "node_summaries": 3,
    "scaled_nodes": 2,
    "draw_indices": 2,
    "rank_codes": 2,
    "pick_threshold": 7,
    "attend_tree": 2,
}
"""Of a kernel; 1 of the others, and of PyTorch's own sort, which `bucket_order` is there."""
GROWING = {"node_summaries", "pick_threshold"}
"""Launches that grow with the depth of a tree: these are of some ten levels, and of cleared counts."""
