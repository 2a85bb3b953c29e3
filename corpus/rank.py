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

_DROPPED_BITS = 52 - 11
_MOVES_PER_ENTRY = 32


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
    """Radix sort on 16 bits of the key, then an insertion pass that settles what 16 bits could not tell apart.

    The 16 bits are 5 of the exponent, counted from the cell's highest key, and 11 of the mantissa: two passes of 8 bits
    over words that hold bits and place in one uint32. Dropping bits never reverses two keys, so after the stable sort
    only runs of equal bits can be out of order. Returns the first faulty cell or -1.
    """
    longest = 0
    for cell in range(len(indptr) - 1):
        longest = max(longest, indptr[cell + 1] - indptr[cell])
    keys = np.empty(longest, np.float64)
    key_bits = keys.view(np.int64)  # positive floats order as their bits do
    words, other = np.empty(longest, np.uint32), np.empty(longest, np.uint32)
    low, high = np.empty(256, np.int32), np.empty(256, np.int32)
    for cell in range(len(indptr) - 1):
        start = indptr[cell]
        size = indptr[cell + 1] - start
        top, last = np.int64(0), np.int64(-1)
        for i in range(size):
            token, count = np.int64(tokens[start + i]), counts[start + i]
            if token <= last or token >= len(medians) or count == 0:
                return cell
            last = token
            keys[i] = count / medians[token]
            if not keys[i] > 0.0:
                return cell
            top = max(top, key_bits[i])
        low[:] = 0
        high[:] = 0
        top >>= _DROPPED_BITS
        for i in range(size):
            bits = np.uint32(min(top - (key_bits[i] >> _DROPPED_BITS), 0xFFFF))  # highest key first
            words[i] = bits << np.uint32(16) | np.uint32(i)
            low[bits & 255] += 1
            high[bits >> 8] += 1
        first_low, first_high = 0, 0
        for value in range(256):
            low[value], first_low = first_low, first_low + low[value]
            high[value], first_high = first_high, first_high + high[value]
        for i in range(size):
            value = (words[i] >> np.uint32(16)) & 255
            other[low[value]] = words[i]
            low[value] += 1
        for i in range(size):
            value = other[i] >> np.uint32(24)
            words[high[value]] = other[i] & np.uint32(0xFFFF)
            high[value] += 1
        moves = 0
        for i in range(1, size):
            entry = words[i]
            j = i
            # Entries ascend with tokens: a lower entry is a lower token.
            while j > 0:
                before = words[j - 1]
                if keys[before] > keys[entry] or (keys[before] == keys[entry] and before < entry):
                    break
                words[j] = before
                j -= 1
            words[j] = entry
            moves += i - j
            if moves > _MOVES_PER_ENTRY * size:
                # Thousands of keys within 1/2048 of each other: a merge sort, stable, is safe from quadratic time.
                words[:size] = np.argsort(-keys[:size], kind="mergesort")
                break
        for i in range(size):
            out_tokens[start + i] = tokens[start + words[i]]
            out_counts[start + i] = counts[start + words[i]]
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
