"""Rank value encoding: a cell becomes its genes, highest median-normalised count first.

Source: Theodoris et al., Nature 618, 616-624 (2023), Methods; as used by Mouse-Geneformer (Ito et al., PLOS Genetics
21(3): e1011420, 2025). Two points that the published code leaves open are fixed here: the order is that of the
float64 key, and equal keys are ordered by token, ascending.

The key is `count / median`. Dividing a cell's counts by its total and multiplying by 10,000, as the formula is usually
written, multiplies all keys of the cell by one number; leaving it out means that the order cannot depend on what is
counted into the total, not even by rounding.
"""

import numba
import numpy as np

_RADIX_BITS = 11
_RADIX_SIZE = 1 << _RADIX_BITS
_RADIX_MASK = _RADIX_SIZE - 1


def rank_cells(
    indptr: np.ndarray, tokens: np.ndarray, counts: np.ndarray, medians: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Order the genes of each cell by `count / median`, descending; ties by token, ascending.

    Parameters
    ----------
    indptr
        int64[cells + 1]: cell i holds entries `indptr[i]:indptr[i + 1]`.
    tokens
        uint16[entries], strictly ascending within a cell.
    counts
        uint32[entries], raw counts (UMIs), all positive.
    medians
        float64[vocab_size], non-zero median of each token, NaN where a token is no gene.

    Returns
    -------
    tokens, counts
        The same entries in rank order.

    Raises
    ------
    ValueError
        If a token repeats or is out of order in a cell, if a count is zero, or if a token has no median.
    """
    indptr = np.ascontiguousarray(indptr, dtype=np.int64)
    tokens = np.ascontiguousarray(tokens, dtype=np.uint16)
    counts = np.ascontiguousarray(counts, dtype=np.uint32)
    ranked_tokens, ranked_counts = np.empty_like(tokens), np.empty_like(counts)
    fault = _rank(indptr, tokens, counts, np.ascontiguousarray(medians), ranked_tokens, ranked_counts)
    if fault >= 0:
        raise ValueError(f"cell {fault}: tokens must ascend, counts be positive, and every token have a median")
    return ranked_tokens, ranked_counts


@numba.njit(cache=True, nogil=True)
def _rank(indptr, tokens, counts, medians, out_tokens, out_counts):  # type: ignore[no-untyped-def]
    """Radix sort on the float32 key, then an insertion pass that settles what float32 could not tell apart.

    Rounding to float32 never reverses two keys, so after the stable radix sort only runs of equal float32 keys can be
    out of float64 order; the insertion pass moves entries inside such runs alone. Returns the first faulty cell or -1.
    """
    longest = 0
    for cell in range(len(indptr) - 1):
        longest = max(longest, indptr[cell + 1] - indptr[cell])
    keys = np.empty(longest, np.float64)
    bits_in, bits_out = np.empty(longest, np.uint32), np.empty(longest, np.uint32)
    order_in, order_out = np.empty(longest, np.int32), np.empty(longest, np.int32)
    histogram = np.empty((3, _RADIX_SIZE), np.int64)
    single = np.empty(1, np.float32)
    single_bits = single.view(np.uint32)
    for cell in range(len(indptr) - 1):
        start = indptr[cell]
        size = indptr[cell + 1] - start
        histogram[:] = 0
        for i in range(size):
            token = tokens[start + i]
            if token >= len(medians) or counts[start + i] == 0 or (i and token <= tokens[start + i - 1]):
                return cell
            key = counts[start + i] / medians[token]
            if not key > 0.0:
                return cell
            keys[i] = key
            single[0] = key
            bits = ~single_bits[0]  # positive floats order as their bits do; inverted: highest first
            bits_in[i], order_in[i] = bits, i
            histogram[0, bits & _RADIX_MASK] += 1
            histogram[1, (bits >> _RADIX_BITS) & _RADIX_MASK] += 1
            histogram[2, bits >> (2 * _RADIX_BITS)] += 1
        for digit in range(3):
            offset = 0
            for value in range(_RADIX_SIZE):
                number = histogram[digit, value]
                histogram[digit, value] = offset
                offset += number
            shift = np.uint32(digit * _RADIX_BITS)
            for i in range(size):
                value = (bits_in[i] >> shift) & _RADIX_MASK
                place = histogram[digit, value]
                histogram[digit, value] = place + 1
                bits_out[place], order_out[place] = bits_in[i], order_in[i]
            bits_in, bits_out = bits_out, bits_in
            order_in, order_out = order_out, order_in
        for i in range(1, size):
            entry = order_in[i]
            j = i
            # Entries ascend with tokens: a lower entry is a lower token.
            while j > 0:
                before = order_in[j - 1]
                if keys[before] > keys[entry] or (keys[before] == keys[entry] and before < entry):
                    break
                order_in[j] = before
                j -= 1
            order_in[j] = entry
        for i in range(size):
            out_tokens[start + i] = tokens[start + order_in[i]]
            out_counts[start + i] = counts[start + order_in[i]]
    return -1


def rank_violation(
    indptr: np.ndarray, tokens: np.ndarray, counts: np.ndarray, medians: np.ndarray
) -> tuple[int, str] | None:
    """Find the first cell whose stored order breaks the definition above.

    Returns
    -------
    (cell, reason), or None if every cell holds: tokens are genes of the vocabulary, unique, counts positive, and each
    entry ranks after the one before it.
    """
    owner = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    if tokens.size == 0:
        return None
    known = tokens < len(medians)
    known[known] = np.isfinite(medians[tokens[known]])
    if not known.all():
        return int(owner[np.argmin(known)]), "a token is outside the vocabulary"
    if not (counts > 0).all():
        return int(owner[np.argmin(counts > 0)]), "a count is zero"
    keys = counts / medians[tokens]
    same_cell = owner[1:] == owner[:-1]
    in_order = (keys[:-1] > keys[1:]) | ((keys[:-1] == keys[1:]) & (tokens[:-1] < tokens[1:]))
    if not (in_order | ~same_cell).all():
        return int(owner[1:][np.argmin(in_order | ~same_cell)]), "tokens are not in rank order"
    pairs = np.sort((owner.astype(np.int64) << 16) | tokens)
    repeated = pairs[1:] == pairs[:-1]
    if repeated.any():
        return int(pairs[1:][np.argmax(repeated)] >> 16), "a token occurs twice"
    return None
