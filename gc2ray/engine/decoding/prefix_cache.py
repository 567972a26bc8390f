"""`PrefixCache`: keys and values that several prompts begin with, kept while there are free slots.

A prefix lies where the row that computed it had it: at the beginning of that row's slots. While the
row is live it needs those slots itself; when it ends they belong to the prefix, until another row
needs them. Prefixes used longest ago are dropped first.

Not covered: reading a prefix in place. Rows copy it, which costs little time (memory bandwidth) but
its slots once per row.
"""

from __future__ import annotations

from dataclasses import dataclass

from gc2ray.engine.decoding.kv_cache import KvCache, SlotRange


@dataclass
class _Prefix:
    """A prefix's slots, and whether the row that computed it is still live."""

    slots: SlotRange
    owned: bool = True


class PrefixCache:
    """Prefixes in a KV cache, by key."""

    def __init__(self, kv_cache: KvCache) -> None:
        self._kv_cache = kv_cache
        self._prefixes: dict[str, _Prefix] = {}  # used longest ago first

    def find(self, key: str | None) -> SlotRange | None:
        """The slots of a prefix, or None; it counts as used now."""
        if key is None or key not in self._prefixes:
            return None
        prefix = self._prefixes[key] = self._prefixes.pop(key)
        return prefix.slots

    def __contains__(self, key: str | None) -> bool:
        return key in self._prefixes

    def add(self, key: str, slots: SlotRange) -> None:
        """Add a prefix that a live row has computed, at the beginning of its slots.

        Raises:
            ValueError: There is such a prefix already.
        """
        if key in self._prefixes:
            raise ValueError(f"prefix {key} is in the cache already")
        self._prefixes[key] = _Prefix(slots)

    def disown(self, key: str) -> None:
        """The row that computed a prefix has ended: the slots belong to the prefix alone."""
        self._prefixes[key].owned = False

    def drop_oldest(self, but: str | None = None) -> bool:
        """Drop the prefix used longest ago that no live row owns; False if there is none."""
        for key, prefix in self._prefixes.items():
            if not prefix.owned and key != but:
                self._kv_cache.release(prefix.slots)
                del self._prefixes[key]
                return True
        return False
