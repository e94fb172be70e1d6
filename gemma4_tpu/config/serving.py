"""Types of servers and of load tests: serve, bench. Base layer, as `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class GkeServingConfig:
    """The Kubernetes objects of `serving.runner=gke` (`serving.gke.`)."""

    namespace: str = "default"
    """Namespace of all objects."""
    service_account: str | None = None
    """Kubernetes service account of the pods, with read access to the bucket (Workload Identity); null: the namespace's
    default."""
    secret: str | None = None
    """Kubernetes secret with the keys HF_TOKEN and VLLM_API_KEY, both optional; null: neither is set."""
    min_replicas: int = 1
    """Minimum number of slices, which always run."""
    max_replicas: int = 4
    """Maximum number of slices, under load."""
    waiting_requests: int = 8
    """Start another slice when more requests than this wait in each slice's queue, on average."""


@dataclass(kw_only=True)
class ServingConfig:
    """A vLLM server in its container or as a process, or an embedded server (`serving=local`). Names follow
    `vllm serve`.
    """

    runner: str = "docker"
    """`docker`: vLLM in its container, started by `engine`. `process`: vLLM's command on this machine, `executable`.
    `embedded`: no vLLM; PyTorch serves in this process (`serving=local`). `gke`: starts nothing, but prints the
    Kubernetes objects that serve `run=gs://…` on GKE, for `kubectl apply -f -`."""
    executable: str = "vllm"
    """With `runner=process`: vLLM's command, as a path or a name on the PATH."""
    engine: str = "docker"
    """Command of the container engine: `docker`, `podman`, or one with a prefix, such as `sudo
    --preserve-env=HF_TOKEN docker`."""
    image: str = ""
    """Container image with a version tag or a digest; moving tags (`latest`, `nightly`) are refused."""
    slice: str = "v6e-8"
    """The machine of the server: key of `hardware.SLICES`. Determines memory, and how the container gets its devices.
    `local`: this machine's CPU, with `runner=process` or `embedded`."""
    tensor_parallel_size: int = 1
    """Chips that each layer is split across."""
    data_parallel_size: int = 1
    """Copies of the model, each on `tensor_parallel_size` chips."""
    max_model_len: int = 16384
    """Longest sequence in tokens, prompt and answer together."""
    max_num_seqs: int | None = None
    """Maximum number of concurrent sequences; null: vLLM's default, or 64 for `serving=local`."""
    max_num_batched_tokens: int | None = None
    """Tokens per step; null: vLLM's default. For `serving=local`, prompt tokens only, and null is 1024."""
    gpu_memory_utilization: float = 0.9
    """Share of each chip's memory for weights and KV cache (on TPUs too, despite its name)."""
    weight_dtype: str = "bfloat16"
    """`bfloat16`, or `fp8`: weights are quantised on load (by Qwix on TPUs). On a CPU: `float32` or `bfloat16`."""
    kv_cache_dtype: str = "auto"
    """`auto` (the image decides; estimated as bfloat16), `bfloat16` or `fp8`."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Further flags of `vllm serve` without dashes, such as `{enable-prefix-caching: true, seed: 0}`: true is `--flag`,
    false `--no-flag`, null omits it, lists and mappings become JSON. Checked against the image's flags."""
    drafter: str | None = None
    """Folder of a drafter (such as gemma-4-31B-it-assistant), which drafts tokens that the model then verifies. Becomes
    `model` in `flags.speculative-config`, with `method: mtp` unless that names another method."""
    extra_args: list[str] = field(default_factory=list)
    """Further words for `vllm serve`, passed through unchecked, except that what asks for code from a checkpoint, for
    adapters, for secrets or for a file of flags is refused."""
    env: dict[str, Any] = field(default_factory=dict)
    """Environment variables of vLLM. No secrets: HF_TOKEN and VLLM_API_KEY are passed on from the environment by
    name."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the server to everyone who can reach this machine."""
    port: int = 8000
    """Port to listen on."""
    served_model_name: str | None = None
    """Model name that clients request; null: the folder's name, or the run's for `<run>/merged`."""
    compile_cache: str | None = "auto"
    """Local folder for compiled programs, kept between starts; `auto`: `gemma4_tpu/vllm` in the user's cache folder;
    null: none."""
    shm_size_gib: int = 16
    """Shared memory of the container, in GiB."""
    ready_timeout_seconds: float = 3600.0
    """Stop a server that has not answered within this time; the first start compiles for 8 to 30 minutes."""
    probe: bool = True
    """After the start, send the server a few stored prompts on which merged and base model differ."""
    gke: GkeServingConfig = field(default_factory=GkeServingConfig)
    source: str | None = None
    """Source and date of this recipe; shown before the start."""
    warning: str | None = None
    """Known problems of this recipe; shown before the start."""


@dataclass(kw_only=True)
class ServeRoot:
    """Everything that `python -m gemma4_tpu.serve` takes."""

    serving: ServingConfig = field(default_factory=ServingConfig)
    run: str = ""
    """Folder of a merged checkpoint, or a run folder with `merged` in it. With `adapters`: their base; empty: the one
    they were trained on. With `serving.runner=gke`: the merged folder on gs://."""
    architecture: str | None = None
    """With `serving.runner=gke`: the size in that folder, key of `architectures.ARCHITECTURES`, if this machine can't
    read the bucket; null: from its config.json."""
    adapters: list[str] = field(default_factory=list)
    """Run folders whose adapters (`merge export=peft`) are served on one base, each under its folder's name; the folder
    of a sweep stands for its runs."""
    dry_run: bool = False
    """Check, show the memory estimate and the container command, then stop."""
    name: str = "servings"
    """Name of the records' folder in the run folder, or in `outputs`."""
    run_dir: str | None = None
    """Folder for the record of this server (configuration, log, result); null: `<run>/<name>/<date>_<time>`."""


@dataclass(kw_only=True)
class BenchConfig:
    """Load on a server, cell by cell (`bench=`): each of `lengths` with each of `rates` or each of `users`, or with the
    highest rate that keeps `slo`.
    """

    lengths: list[list[int]] = field(default_factory=lambda: [[512, 256]])
    """Pairs of token counts: prompt, answer. Answers are requested at exactly this length (`ignore_eos`)."""
    rates: list[float] = field(default_factory=list)
    """Requests per second, sent whether or not earlier ones are answered; `inf`: all at once. Set either `rates` or
    `users`."""
    users: list[int] = field(default_factory=list)
    """Concurrent users; each sends its next request when the last one is answered."""
    slo: str = ""
    """Limits on latency, such as `ttft_p99<500ms,e2e_p50<2s`: mean, median or p1 to p99 of ttft, tpot, itl or e2e, in
    ms or s. Cells report how many requests keep them. Without `rates` and `users`, the highest rate that keeps them is
    searched for (`bench=slo`)."""
    requests: int = 30
    """With `rates`: requests per cell. With `users`: per user. In a rate search: per trial; a p99 needs 1,000."""
    arrivals: str = "poisson"
    """At a rate, requests arrive as a `poisson` process, or at `fixed` intervals."""
    prompts: str | None = None
    """File of UTF-8 text from which prompts are cut at random places; the server tokenizes it (`/tokenize`, as in
    vLLM). null: random token ids, which no drafter can predict."""
    shared_tokens: int = 0
    """Length of a common prefix of all prompts of a cell, in tokens, like a system prompt, which a prefix cache can
    reuse."""
    turns: int = 1
    """With `users`: requests per session. Each prompt after the first consists of the previous one, tokens in place of
    its answer, and as many new ones as `lengths` says."""
    warmup_requests: int = 2
    """Requests sent all at once before each cell; they do not count."""
    seed: int = 0
    """Each cell's own seed, for prompts and arrivals, is derived from this one and the cell's name. Repeated prompts
    can come from a prefix cache: restart the server, or give another seed."""
    temperature: float = 0.0
    """Sampling temperature; 0: greedy."""
    request_seeds: bool = False
    """Send a seed with each request, which vLLM refuses on TPUs."""
    served_model_name: str | None = None
    """The model's name on the server; null: the only one that it lists."""
    max_model_len: int | None = None
    """Longest sequence in tokens: longer cells are infeasible. null: as the server reports."""
    request_timeout_seconds: float = 3600.0
    """A request fails when no chunk arrives for this long; comments that keep a connection alive do not count."""
    cross_check: bool = False
    """Also put the same cells under the load of `vllm bench serve`, run in the container of the server of `served` or
    by its command, three rounds of both clients in turn, and compare the medians."""


@dataclass(kw_only=True)
class BenchRoot:
    """Everything that `python -m gemma4_tpu.bench` takes."""

    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server, with or without /v1. A key is taken from OPENAI_API_KEY. null: the
    server of `served`."""
    served: str | None = None
    """Folder of the server's record by `python -m gemma4_tpu.serve`, which contains `slice` and the model."""
    slice: str = "local"
    """Where the server runs: key of `hardware.SLICES`, for costs and ceilings; `local`: neither."""
    architecture: str | None = None
    """The size that the server serves: key of `architectures.ARCHITECTURES`, for ceilings, and for prompts from its
    whole vocabulary. null: that of `served`, else unknown, and prompts use token ids 256 to 511."""
    bench: BenchConfig = field(default_factory=BenchConfig)
    dry_run: bool = False
    """Check, show the cells and, with `bench.cross_check`, the commands in the container, then stop; no request is
    sent."""
    name: str = "benchmarks"
    """Name of the records' folder in `outputs`."""
    run_dir: str | None = None
    """Folder of this load test; null: `outputs/<name>/<date>_<time>`. Giving the same folder again resumes it: finished
    cells are kept."""
