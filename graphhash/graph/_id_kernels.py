"""Numba kernels of raw ids: a bitmap that ranks dense integers, hash tables that number ids, and the order of strings.

Integers within a narrow range are ranked by a bitmap: the row of a value is the number of marked values below it. Other ids are numbered
in order of first appearance by open addressing, with linear probing; a slot holds 32 bits of the hash and the code plus one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(0xFFFFFFFF00000000)
# Ids whose slots are loaded together.
_BLOCK = 1024


@njit(cache=True, nogil=True)
def mark_values(values, low, words):
    """Mark values in a bitmap.

    Args:
        values: int64, shape (n,), none below ``low``.  words: uint64, shape (n_words, 2), whose first column is the bitmap, written.
    """
    for i in range(len(values)):
        place = np.uint64(values[i] - low)
        words[place >> np.uint64(6), 0] |= np.uint64(1) << (place & np.uint64(63))


@njit(cache=True, nogil=True)
def count_bits(word):
    """Number of ones in a uint64."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(cache=True, nogil=True)
def rank_words(words):
    """Write the number of marked values before each word into the second column. Returns the number of all."""
    n_marked = np.uint64(0)
    for place in range(len(words)):
        words[place, 1] = n_marked
        n_marked += count_bits(words[place, 0])
    return n_marked


@njit(cache=True, nogil=True)
def marked_values(words, low, found):
    """Write the marked values, ascending, into ``found`` (int64, as long as there are such values)."""
    n_found = 0
    for place in range(len(words)):
        word = words[place, 0]
        while word:
            lowest = word & (~word + np.uint64(1))
            found[n_found] = low + place * 64 + np.int64(count_bits(lowest - np.uint64(1)))
            n_found += 1
            word ^= lowest


@njit(cache=True, nogil=True)
def ranks_of(values, low, words, rows):
    """Write the row of each marked value into ``rows`` (int32 or int64, shape (n,))."""
    for i in range(len(values)):
        place = np.uint64(values[i] - low)
        word = place >> np.uint64(6)
        below = words[word, 0] & ((np.uint64(1) << (place & np.uint64(63))) - np.uint64(1))
        rows[i] = words[word, 1] + count_bits(below)


@njit(cache=True, nogil=True)
def read_integers(offsets, text, values, is_read):
    """Read decimal integers: digits without leading zeros, at most 18, which always fit, and a minus before them.

    Args:
        offsets, text: int64 (n + 1,) and the bytes between them.
        values: int64, shape (n,), written, 0 where the text is something else.  is_read: bool, shape (n,), written: whether it is not.
    """
    for i in range(len(offsets) - 1):
        start, stop = offsets[i], offsets[i + 1]
        is_negative = start < stop and text[start] == 45
        first = start + is_negative
        good = 0 < stop - first <= 18 and (text[first] != 48 or (stop - first == 1 and not is_negative))
        value = np.int64(0)
        for place in range(first, stop if good else first):
            digit = np.int64(text[place]) - 48
            good &= (digit >= 0) & (digit <= 9)
            value = value * 10 + digit
        is_read[i] = good
        values[i] = 0 if not good else -value if is_negative else value


@njit(cache=True, nogil=True)
def _mixed(state):
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@njit(cache=True, nogil=True)
def number_integers(values, table, ids, n_ids, codes):
    """Write the code of each value, in order of first appearance. Returns the number of ids.

    Args:
        values: int64, shape (n,).  table: uint64, a power of two above n_ids + n; 0 is a free slot.
        ids: int64, at least n_ids + n long, with those of before.  codes: int32, shape (n,), written.
    """
    mask, hashes = np.uint64(len(table) - 1), np.empty(_BLOCK, np.uint64)
    for low in range(0, len(values), _BLOCK):
        high = min(low + _BLOCK, len(values))
        for i in range(low, high):
            hashes[i - low] = _mixed(np.uint64(values[i]))
        _touch(table, ids, hashes[: high - low])
        for i in range(low, high):
            mixed = hashes[i - low]
            slot = mixed & mask
            while True:
                entry = table[slot]
                if entry == 0:
                    table[slot] = (mixed & _HIGH) | np.uint64(n_ids + 1)
                    ids[n_ids] = values[i]
                    codes[i] = n_ids
                    n_ids += 1
                    break
                code = np.int64(entry & _LOW) - 1
                if ids[code] == values[i]:
                    codes[i] = code
                    break
                slot = (slot + np.uint64(1)) & mask
    return n_ids


@njit(cache=True, nogil=True)
def _touch(table, ids, hashes):
    """Load what the block will read: loads that do not wait for each other are many times faster than one after the other.

    Returns: the place in ``ids`` of what each slot holds, int64, and -1 of free slots.
    """
    mask, found = np.uint64(len(table) - 1), np.empty(len(hashes), np.int64)
    for i in range(len(hashes)):
        found[i] = np.int64(table[hashes[i] & mask] & _LOW) - 1
    for i in range(len(hashes)):
        found[i] = ids[max(found[i], 0)]
    return found


@njit(cache=True, nogil=True)
def _hash_bytes(text, start, stop):
    """A hash of the bytes: FNV-1a over words of 8 bytes, mixed."""
    state, place = np.uint64(0xCBF29CE484222325) ^ np.uint64(stop - start), start
    while place < stop:
        word = np.uint64(0)
        if place + 8 <= stop:
            for i in range(8):
                word |= np.uint64(text[place + i]) << np.uint64(8 * i)
        else:
            for i in range(stop - place):
                word |= np.uint64(text[place + i]) << np.uint64(8 * i)
        state = (state ^ word) * np.uint64(0x9E3779B97F4A7C15)
        state ^= state >> np.uint64(32)
        place += 8
    return _mixed(state)


@njit(cache=True, nogil=True)
def number_strings(offsets, text, table, ids, id_text, n_ids, codes):
    """Write the code of each string, in order of first appearance. Returns the number of ids.

    Args:
        offsets, text: int64 (n + 1,) and the bytes between them.  table: uint64, a power of two above n_ids + n; 0 is a free slot.
        ids, id_text: the same of the ids, with those of before and room for n more and all their bytes.
        codes: int32, shape (n,), written.
    """
    mask, hashes = np.uint64(len(table) - 1), np.empty(_BLOCK, np.uint64)
    for low in range(0, len(offsets) - 1, _BLOCK):
        high, seen = min(low + _BLOCK, len(offsets) - 1), 0
        for i in range(low, high):
            hashes[i - low] = _hash_bytes(text, offsets[i], offsets[i + 1])
        for at in _touch(table, ids, hashes[: high - low]):
            seen += id_text[at]
        if seen < 0:  # Never, but a sum that nobody reads would not be made.
            break
        for i in range(low, high):
            start, stop = offsets[i], offsets[i + 1]
            mixed = hashes[i - low]
            slot = mixed & mask
            while True:
                entry = table[slot]
                if entry == 0:
                    table[slot] = (mixed & _HIGH) | np.uint64(n_ids + 1)
                    at = ids[n_ids]
                    for place in range(stop - start):
                        id_text[at + place] = text[start + place]
                    ids[n_ids + 1] = at + stop - start
                    codes[i] = n_ids
                    n_ids += 1
                    break
                if (entry ^ mixed) & _HIGH == 0:
                    code = np.int64(entry & _LOW) - 1
                    if _is_same(text, start, stop, id_text, ids[code], ids[code + 1]):
                        codes[i] = code
                        break
                slot = (slot + np.uint64(1)) & mask
    return n_ids


@njit(cache=True, nogil=True)
def fill_integer_table(ids, n_ids, table):
    """Enter the first n_ids integers into an empty table."""
    mask = np.uint64(len(table) - 1)
    for code in range(n_ids):
        mixed = _mixed(np.uint64(ids[code]))
        _enter(table, mask, mixed, code)


@njit(cache=True, nogil=True)
def fill_string_table(ids, id_text, n_ids, table):
    """Enter the first n_ids strings into an empty table."""
    mask = np.uint64(len(table) - 1)
    for code in range(n_ids):
        _enter(table, mask, _hash_bytes(id_text, ids[code], ids[code + 1]), code)


@njit(cache=True, nogil=True)
def _enter(table, mask, mixed, code):
    slot = mixed & mask
    while table[slot]:
        slot = (slot + np.uint64(1)) & mask
    table[slot] = (mixed & _HIGH) | np.uint64(code + 1)


@njit(cache=True, nogil=True)
def _is_same(text, start, stop, other, other_start, other_stop):
    if stop - start != other_stop - other_start:
        return False
    for place in range(stop - start):  # noqa: SIM110  Compiled.
        if text[start + place] != other[other_start + place]:
            return False
    return True


@njit(cache=True, nogil=True)
def order_of_strings(offsets, text):
    """Places of distinct strings in ascending order of their bytes, int64, shape (n,).

    A quicksort over the first 8 bytes behind the prefix that all share; equal ones are compared byte by byte.
    """
    n = len(offsets) - 1
    order = np.arange(n)
    if n < 2:
        return order
    prefix = _shared_prefix(offsets, text)
    keys = np.empty(n, np.uint64)
    for i in range(n):
        key, at = np.uint64(0), offsets[i] + prefix
        for place in range(at, at + 8):
            key = (key << np.uint64(8)) | (np.uint64(text[place]) if place < offsets[i + 1] else np.uint64(0))
        keys[i] = key
    stack = np.empty((128, 2), np.int64)
    stack[0, 0], stack[0, 1] = 0, n - 1
    depth, state = 1, np.uint64(1)
    while depth:
        depth -= 1
        low, high = stack[depth, 0], stack[depth, 1]
        while high - low > 16:
            # A pivot at random, so that no order of the strings makes this quadratic.
            state = _mixed(state + np.uint64(0x9E3779B97F4A7C15))
            pivot = low + np.int64(state % np.uint64(high - low + 1))
            key, name = keys[pivot], order[pivot]
            i, j = low, high
            while i <= j:
                while _comes_before(keys[i], order[i], key, name, offsets, text, prefix):
                    i += 1
                while _comes_before(key, name, keys[j], order[j], offsets, text, prefix):
                    j -= 1
                if i <= j:
                    keys[i], keys[j] = keys[j], keys[i]
                    order[i], order[j] = order[j], order[i]
                    i += 1
                    j -= 1
            # The longer side waits, so that the stack stays short.
            if j - low > high - i:
                stack[depth, 0], stack[depth, 1] = low, j
                low = i
            else:
                stack[depth, 0], stack[depth, 1] = i, high
                high = j
            depth += 1
        for i in range(low + 1, high + 1):
            key, name, j = keys[i], order[i], i
            while j > low and _comes_before(key, name, keys[j - 1], order[j - 1], offsets, text, prefix):
                keys[j], order[j] = keys[j - 1], order[j - 1]
                j -= 1
            keys[j], order[j] = key, name
    return order


@njit(cache=True, nogil=True)
def _shared_prefix(offsets, text):
    """Number of bytes with which all strings begin."""
    shared = offsets[1] - offsets[0]
    for i in range(1, len(offsets) - 1):
        shared = min(shared, offsets[i + 1] - offsets[i])
        for place in range(shared):
            if text[offsets[i] + place] != text[offsets[0] + place]:
                shared = place
                break
    return shared


@njit(cache=True, nogil=True)
def _comes_before(key, name, other_key, other, offsets, text, prefix):
    if key != other_key:
        return key < other_key
    start, other_start = offsets[name] + prefix, offsets[other] + prefix
    length, other_length = offsets[name + 1] - start, offsets[other + 1] - other_start
    for place in range(min(length, other_length)):
        byte, other_byte = text[start + place], text[other_start + place]
        if byte != other_byte:
            return byte < other_byte
    return length < other_length
