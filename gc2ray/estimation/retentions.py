"""The retentions that estimates and tuning compare where the user names none."""

from __future__ import annotations

RETENTIONS = (1.0, 0.75, 0.5, 0.25, 0.1)
"""Those of table 8 of the GlobalCom2 paper."""
LOWEST_RETENTION = 0.05
TUNED_RETENTIONS = (*RETENTIONS[1:], LOWEST_RETENTION)
"""Compared with no compression by `gc2ray tune`."""
DEFAULT_METHOD = "globalcom2"
"""Compared where the recipe's method takes no retention."""
