"""What benchmarks/merge.py merges: random checkpoints in 31B's layout, and runs on them."""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

NAME = "bench_31b"
SHARD_BYTES = 2_000_000_000


def make_base(folder: Path, arch) -> None:
    """Random values, in shards as transformers writes them."""
    import ml_dtypes
    import numpy as np

    from gemma4_tpu.architectures import to_hf_config
    from gemma4_tpu.models.names import name_map

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(arch)))
    noise = np.random.default_rng(0).standard_normal(8 << 20).astype(np.float32) * 0.02
    noise = noise.astype(ml_dtypes.bfloat16).view(np.uint16)
    shapes = {f"model.{name}": t.hf_shape for t in name_map(arch).values() for name in t.hf_names}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held_bytes = 0
    for name, shape in sorted(shapes.items()):
        size_bytes = 2 * int(np.prod(shape))
        if held_bytes and held_bytes + size_bytes > SHARD_BYTES:
            shards.append({})
            held_bytes = 0
        shards[-1][name] = shape
        held_bytes += size_bytes
    index = {}
    for number, own in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, own, noise)
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], noise) -> None:
    """Written by hand, as safetensors would hold the whole shard in memory."""
    import numpy as np

    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        stop = at + 2 * int(np.prod(shape))
        header[name], at = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, stop]}, stop
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                left -= file.write(noise[: min(left, len(noise))].data) // 2


def small_31b(layers: int):
    """31B with so many layers, the last of them global."""
    from gemma4_tpu.architectures import ARCHITECTURES

    big = ARCHITECTURES["gemma4_31b"]
    return replace(big, name=NAME, num_layers=layers, layer_types=("sliding",) * (layers - 1) + ("global",))


def make(work: Path, layers: int, rank: int | None) -> None:
    """Base and run; for a LoRA its PEFT adapter too."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from gemma4_tpu.config.schema import LoraConfig
    from gemma4_tpu.merge import main
    from tests.export.runs import make_run

    arch = small_31b(layers)
    make_base(work / "base", arch)
    register(work / "base")
    if rank:
        make_run(work / "run", work / "base", lora=LoraConfig(rank=rank, alpha=rank), name=NAME, size=0.01)
        assert main([f"run={work}/run", "export=peft"]) == 0
    else:
        make_full_run(work, arch)


def make_full_run(work: Path, arch) -> None:
    """A run that trained every weight. Its values would not fit in memory: Orbax saves those of a small model, and each
    array is then replaced by one of the real size, chunk by chunk.
    """
    import numpy as np
    import tensorstore as ts
    import yaml

    from gemma4_tpu.config.schema import LoraConfig
    from gemma4_tpu.models.base import Base
    from gemma4_tpu.models.names import name_map
    from gemma4_tpu.training import checksums
    from gemma4_tpu.training.checkpoint import CHUNK_BYTES
    from gemma4_tpu.training.saved import open_saved
    from tests.export.runs import make_run

    sizes = {"vocab_size": 64, "embed_dim": 64, "hidden_dim": 64, "head_dim": 16, "global_head_dim": 16}
    make_base(work / "small", replace(arch, **sizes))
    register(work / "small")
    make_run(work / "run", work / "small", lora=LoraConfig(enabled=False), name=NAME)
    noise = np.random.default_rng(1).standard_normal(CHUNK_BYTES // 4).astype(np.float32) * 0.02
    state = open_saved(work / "run", "latest")
    for tensor in name_map(arch).values():
        chunks = list(tensor.shape)
        while 4 * math.prod(chunks) > CHUNK_BYTES:  # about as Orbax splits
            longest = chunks.index(max(chunks))
            chunks[longest] = -(-chunks[longest] // 2)
        metadata = {"shape": list(tensor.shape), "chunks": chunks, "dtype": "<f4", "compressor": None}
        spec = state._spec(tensor.name) | {"metadata": metadata}
        store = ts.open(spec, create=True, delete_existing=True).result()
        for corner in itertools.product(*(range(0, n, c) for n, c in zip(tensor.shape, chunks, strict=True))):
            ends = (min(at + c, n) for at, c, n in zip(corner, chunks, tensor.shape, strict=True))
            part = store[tuple(map(slice, corner, ends))]
            part.write(noise[: part.size].reshape(part.shape)).result()
    checksums.write(state.folder)
    register(work / "base")
    config = yaml.safe_load((work / "run" / "config.yaml").read_text())
    config["model"]["path"] = str(work / "base")
    (work / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    fingerprint = Base(arch, str(work / "base"), None, str(work / "base")).fingerprint
    (work / "run" / "provenance.json").write_text(json.dumps({"fingerprints": {"base": fingerprint}}))


def register(base: Path) -> None:
    from gemma4_tpu.architectures import ARCHITECTURES, from_hf_config

    ARCHITECTURES[NAME] = from_hf_config(json.loads((base / "config.json").read_text()), name=NAME)
