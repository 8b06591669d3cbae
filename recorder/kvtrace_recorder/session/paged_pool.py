"""What a paged cache and its scheduler were set to, as rows of `kv_pools`."""

from __future__ import annotations

from typing import Any


def describe(processor: Any) -> list[dict[str, Any]]:
    """Columns of table `kv_pools`, a row a group of layers.

    Parameters
    ----------
    processor : ContinuousBatchProcessor
        Of transformers' continuous batching.
    """
    cache, scheduler = processor.cache, processor.scheduler
    swap = getattr(processor.offloading_manager, "_num_cpu_sectors", 0)
    grouped = len(cache.cache_allocators) > 1
    return [
        {
            "cache_group": allocator.index if grouped else None,
            "block_size": allocator.tokens_per_page,
            # Groups share the pool: each could have all of it.
            "num_blocks": allocator.num_blocks,
            "bytes_per_block": allocator.bytes_per_block,
            # Before it lie the sectors that padding is read from and written to.
            "first_block": cache.pool.num_reserved_sectors * allocator.blocks_per_sector,
            "max_batch_tokens": processor.max_batch_tokens,
            "max_batch_size": scheduler.max_requests_per_batch,
            "scheduler": processor.cb_config.scheduler_type,
            "safety_margin": scheduler.safety_margin,
            "prefix_caching": cache.use_prefix_sharing,
            "swap_blocks": swap * allocator.blocks_per_sector,
        }
        for allocator in cache.cache_allocators.values()
    ]
