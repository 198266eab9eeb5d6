"""Keys and values of the answers that are being written together."""
import torch
import torch.nn.functional as F

from core.generate import KVCache

GROWTH = 256  # positions by which the store grows


class Slots(KVCache):
    """A KVCache that texts join and leave.

    They are the first rows of a store of keys and values that grows as needed:
    (2, n_layer, rows, n_head, positions, size of a head).
    """

    def __init__(self, model):
        super().__init__(model, 0, 0)
        self.store = torch.stack([self.k, self.v])

    def make_room(self, rows, positions):
        """Use so many rows of the store, grown if it has less room."""
        more_rows = max(0, rows - self.store.shape[2])
        missing = max(0, positions - self.store.shape[4])
        more_positions = -(-missing // GROWTH) * GROWTH
        if more_rows or more_positions:
            # Zeros: attention multiplies masked positions by 0, and NaN would stay.
            more = (0, 0, 0, more_positions, 0, 0, 0, more_rows)
            self.store = F.pad(self.store, more)
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
        length = self.lengths.pop()
        last = len(self.lengths)
        if row < last:
            self.lengths[row] = length
            self.store[:, :, row, :, :length] = self.store[:, :, last, :, :length]
        self.make_room(last, 0)
