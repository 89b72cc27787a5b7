"""All measurements by group. Targets are those of the project's issues; where one depends on the machine (a share of
its memory-copy rate), the measurement itself gives it."""

from __future__ import annotations

from manyhands.ui.bench.harness import Measurement

_CORE = "manyhands.ui.bench.core"
_SWARM = "manyhands.ui.bench.swarm"
_ENDGAMES = "manyhands.ui.bench.endgames"
_ENGINE = "manyhands.ui.bench.engine"
_SHARDS = "manyhands.ui.bench.shards"
_HOSTS = "manyhands.ui.bench.hosts"

GROUPS: dict[str, tuple[Measurement, ...]] = {
    "core": (
        Measurement(
            name="help_start",
            function=f"{_CORE}:help_start",
            unit="s",
            better="lower",
            target=0.3,
            what="manyhands --help, the whole process",
        ),
        Measurement(
            name="fingerprint_rate",
            function=f"{_CORE}:fingerprint_rate",
            unit="GB/s",
            better="higher",
            target=1.0,
            what="fingerprint of a 124M-parameter model, one thread",
        ),
        Measurement(
            name="aggregate_rate",
            function=f"{_CORE}:aggregate_rate",
            unit="GB/s",
            better="higher",
            what="10 dense fp32 updates of 124M parameters checked and merged, input bytes",
        ),
        Measurement(
            name="aggregate_rate_12m",
            function=f"{_CORE}:aggregate_rate_12m",
            unit="GB/s",
            better="higher",
            what="40 dense fp32 updates of 12M parameters checked and merged, input bytes",
        ),
        Measurement(
            name="aggregate_peak",
            function=f"{_CORE}:aggregate_peak",
            unit="models",
            better="lower",
            target=2.5,
            what="anonymous memory of the aggregator over a round of 10 updates of 124M parameters",
        ),
        Measurement(
            name="aggregate_peak_12m",
            function=f"{_CORE}:aggregate_peak_12m",
            unit="models",
            better="lower",
            target=2.5,
            what="the same over a round of 40 updates of 12M parameters",
        ),
    ),
    "engine": (
        Measurement(
            name="engine_ratio",
            function=f"{_ENGINE}:engine_ratio",
            unit="of bare",
            better="higher",
            target=0.97,
            what="tokens/s of the engine over a bare PyTorch loop's: character GPT, 4 x 4 x 128, batch 12 x 64",
        ),
        Measurement(
            name="engine_ratio_124m",
            function=f"{_ENGINE}:engine_ratio_124m",
            unit="of bare",
            better="higher",
            target=0.97,
            what="the same with GPT-2 124M, batch 2 x 512, bf16",
        ),
        Measurement(
            name="shakespeare_char",
            function=f"{_ENGINE}:shakespeare_char",
            unit="nats",
            better="lower",
            target=1.89,
            what="validation loss of nanoGPT's recipe for a CPU after 2,000 steps",
        ),
        Measurement(
            name="shakespeare_char_time",
            function=f"{_ENGINE}:shakespeare_char_time",
            unit="of nanoGPT's",
            better="lower",
            target=1.0,
            what="time of that recipe over that of nanoGPT's loop; both evaluate and save every 250 steps",
        ),
        Measurement(
            name="ddp_speedup",
            function=f"{_ENGINE}:ddp_speedup",
            unit="times",
            better="higher",
            target=1.7,
            what="tokens/s of two processes with one thread each over one with one thread, batch 48 x 64",
        ),
        Measurement(
            name="loader_ratio",
            function=f"{_ENGINE}:loader_ratio",
            unit="times",
            better="higher",
            target=10.0,
            what="batches made over batches consumed: the character GPT",
        ),
    ),
    "swarm": (
        Measurement(
            name="blob_up",
            function=f"{_SWARM}:blob_up",
            unit="MiB/s",
            better="higher",
            target=400.0,
            what="a blob of 512 MiB to a server process over loopback HTTP, verified",
        ),
        Measurement(
            name="blob_down",
            function=f"{_SWARM}:blob_down",
            unit="MiB/s",
            better="higher",
            target=400.0,
            what="the same blob back, verified",
        ),
        Measurement(
            name="round_overhead_10mb",
            function=f"{_SWARM}:round_overhead_10mb",
            unit="s",
            better="lower",
            target=0.5,
            what="a round of two clients that train nothing, updates of 10 MB",
        ),
        Measurement(
            name="round_overhead_128mb",
            function=f"{_SWARM}:round_overhead_128mb",
            unit="s",
            better="lower",
            target=2.5,
            what="the same with updates of 128 MB",
        ),
        Measurement(
            name="replay_equal",
            function="manyhands.ui.bench.replaying:replay_equal",
            unit="1 = yes",
            better="higher",
            target=1.0,
            what="a networked run with a killed client equals its replay, bit for bit, without the stored updates",
        ),
    ),
    "hosts": (
        Measurement(
            name="host_start",
            function=f"{_HOSTS}:host_start",
            unit="s",
            better="lower",
            target=10.0,
            what="from `manyhands train --host` to its first step's line, on an sshd of this machine",
        ),
        Measurement(
            name="host_death",
            function=f"{_HOSTS}:host_death",
            unit="s",
            better="lower",
            target=10.0,
            what="from the training's kill -9 on the host to its being shown here with the last lines",
        ),
        Measurement(
            name="host_follow",
            function=f"{_HOSTS}:host_follow",
            unit="CPU s",
            better="lower",
            target=2.0,
            what="following a training in a terminal for 3 minutes: all processes of both sides",
        ),
        Measurement(
            name="fetch_rate",
            function=f"{_HOSTS}:fetch_rate",
            unit="MiB/s",
            better="higher",
            target=150.0,
            what="a checkpoint of 256 MiB from the host, hashed on both sides; beside it scp",
        ),
        Measurement(
            name="shard_make",
            function=f"{_SHARDS}:shard_make",
            unit="of bare",
            better="higher",
            target=0.9,
            what="KPkp positions/s with value and policy, by pack with two processes, over bare probing by two",
        ),
        Measurement(
            name="shard_read",
            function=f"{_SHARDS}:shard_read",
            unit="positions/s",
            better="higher",
            target=200_000.0,
            what="positions with 34 moves read from shards, shuffled, 1024 at a time, one process on one core",
        ),
        Measurement(
            name="shard_wait",
            function=f"{_SHARDS}:shard_wait",
            unit="times",
            better="higher",
            target=10.0,
            what="batches of endgame shards made over batches consumed, one thread each",
        ),
        Measurement(
            name="endgame_accuracy",
            function=f"{_ENDGAMES}:endgame_accuracy",
            unit="%",
            better="higher",
            target=95.0,
            what="right values of 100,000 KPkp positions after 3 minutes of training (MANYHANDS_BENCH_MINUTES)",
        ),
        Measurement(
            name="endgame_rate",
            function=f"{_ENDGAMES}:endgame_rate",
            unit="positions/s",
            better="higher",
            what="training on KPkp positions, made, labelled and learned, all cores",
        ),
    ),
}
