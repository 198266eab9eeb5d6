"""Keys and values of the texts that are being written, and of those that may go on."""
from collections import deque
from os.path import commonprefix  # of any lists

import torch
import torch.nn.functional as F

from core.generate import KVCache

GROWTH = 256  # positions by which the store grows


class Slots(KVCache):
    """A KVCache that texts join and leave.

    They stand in the first rows of a store (2, n_layer, rows, n_head, positions, size of a head)
    of keys and values, which has room for more and grows as needed.
    """

    def __init__(self, model):
        super().__init__(model, 0, 0)
        self.store = torch.stack([self.k, self.v])

    def make_room(self, rows, positions):
        """Use so many rows of the store, and grow it if it has less rows or positions."""
        more_rows = max(0, rows - self.store.shape[2])
        missing = max(0, positions - self.store.shape[4])
        more_positions = -(-missing // GROWTH) * GROWTH
        if more_rows or more_positions:
            # Zeros, because attention multiplies masked positions by 0: they must not be NaN.
            self.store = F.pad(self.store, (0, 0, 0, more_positions, 0, 0, 0, more_rows))
        self.k, self.v = self.store[:, :, :rows]

    def join(self, cache):
        """Append the one text of another cache."""
        row = len(self.lengths)
        length = cache.lengths[0]
        self.make_room(row + 1, length)
        self.k[:, row, :, :length] = cache.k[:, 0, :, :length]
        self.v[:, row, :, :length] = cache.v[:, 0, :, :length]
        self.lengths.append(length)

    def leave(self, row):
        """Remove a text. The last one moves into its row."""
        last = len(self.lengths) - 1
        length = self.lengths[row] = self.lengths[last]
        if row != last:
            self.store[:, :, row, :, :length] = self.store[:, :, last, :, :length]
        self.lengths.pop()
        self.make_room(last, 0)


class Memory:
    """Keys and values of the last few texts: a chat's next prompt begins with one of them."""

    def __init__(self, n):
        self.texts = deque(maxlen=n)  # (ids, keys, values)

    def keep(self, ids, cache, row):
        """Remember a text that stands in a cache's row, and forget the texts that it continues."""
        for text in list(self.texts):
            if ids[:len(text[0])] == text[0]:
                self.texts.remove(text)
        keys = cache.k[:, row, :, :len(ids)].clone()
        values = cache.v[:, row, :, :len(ids)].clone()
        self.texts.append((ids, keys, values))

    def fill(self, cache, prompt):
        """Copy the longest remembered beginning of the prompt into an empty cache."""
        for ids, keys, values in self.texts:
            # The prompt's last token is always read: its logits give the first token of the answer.
            n = len(commonprefix([ids, prompt[:-1]]))
            if n > cache.lengths[0]:
                cache.lengths = [n]
                cache.k[:, 0, :, :n] = keys[:, :, :n]
                cache.v[:, 0, :, :n] = values[:, :, :n]
