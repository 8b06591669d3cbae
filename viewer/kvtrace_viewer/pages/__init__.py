"""The pages, one file each; the order here is the order of the navigation."""

from __future__ import annotations

from kvtrace_viewer.pages import attention, blocks, regret, replay, runs, sql, tiers

PAGES = (runs, attention, replay, regret, blocks, tiers, sql)
