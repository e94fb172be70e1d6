"""From files to batches: sources, rendering with loss flags, packing, the pipeline and its preview."""
