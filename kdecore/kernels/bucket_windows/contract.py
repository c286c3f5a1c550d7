"""What every implementation of `bucket_windows` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class BucketWindows(Protocol):
    """Place a window of keys for every block of queries, both in the order of their buckets."""

    def __call__(
        self,
        xp: Namespace,
        query_codes: Array,
        query_order: Array,
        key_codes: Array,
        key_order: Array,
        blocks: int,
        size: int,
    ) -> Array:
        """Return where each block's window begins.

        Block i holds the queries s_i = ⌊i · m_q / B⌋ … s_{i+1} − 1 of their order; the relative place of its middle query
        m = ⌊(s_i + s_{i+1}) / 2⌋ within its bucket is carried over to the keys' bucket (derived): with the bucket's queries
        from a on, c of them, and its keys from A on, C of them, the window's centre is A + (m + ½ − a) C / c, where a bucket
        without keys has A where its keys would be. It begins at ⌊centre − size / 2⌋, moved to lie within the keys.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        query_codes, key_codes
            (G, n_q) and (G, n_k) integers in [0, 2**30): each row's bucket.
        query_order, key_order
            (G, m_q) and (G, m_k) int64: some of the rows, each once, whose codes ascend; m_q, m_k below 2**30.
        blocks
            B, at most m_q.
        size
            Keys in a window, at most m_k.

        Returns
        -------
        Array
            (G, B) int64, places in the keys' order. O(G (m_q + m_k)); O(G B log(m_q + m_k)) on CUDA devices.
        """
