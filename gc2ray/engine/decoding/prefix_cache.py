"""`PrefixCache`: keys and values that several prompts begin with, kept while there is room.

A prefix lies where the row that computed it had it: at the beginning of that row's extent. While
the row is live it needs those places itself; when it ends they stay behind as the prefix, until
another row needs the room. Prefixes used longest ago go first.

Not covered: reading a prefix in place. Rows copy it, which costs little time (memory bandwidth) but
its tokens once per row.
"""

from __future__ import annotations

from dataclasses import dataclass

from gc2ray.engine.decoding.kv_cache import KvCache, SlotRange


@dataclass
class _Prefix:
    """Where a prefix is, and whether the row that computed it is still live."""

    extent: SlotRange
    held: bool = True


class PrefixCache:
    """Prefixes in a pool, by key."""

    def __init__(self, pool: KvCache) -> None:
        self._pool = pool
        self._known: dict[str, _Prefix] = {}  # used longest ago first

    def find(self, key: str | None) -> SlotRange | None:
        """Where a prefix is, or None; it counts as used now."""
        if key is None or key not in self._known:
            return None
        prefix = self._known[key] = self._known.pop(key)
        return prefix.extent

    def __contains__(self, key: str | None) -> bool:
        return key in self._known

    def remember(self, key: str, extent: SlotRange) -> None:
        """A live row has computed a prefix, at the beginning of its extent.

        Raises:
            ValueError: The prefix is known already.
        """
        if key in self._known:
            raise ValueError(f"prefix {key} is known already")
        self._known[key] = _Prefix(extent)

    def leave(self, key: str) -> None:
        """The row that computed a prefix has ended: its places belong to the prefix alone."""
        self._known[key].held = False

    def drop_oldest(self, but: str | None = None) -> bool:
        """Give back the places of the prefix used longest ago that no row holds; False if none."""
        for key, prefix in self._known.items():
            if not prefix.held and key != but:
                self._pool.release(prefix.extent)
                del self._known[key]
                return True
        return False
