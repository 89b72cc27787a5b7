"""What a run is: the typed plan. One object, whether it came from YAML, Hydra, a preset or Python.

Every field is documented here once; `manyhands server validate` prints these texts. Settings that only move a
deadline or a path stay out of the plan: a plan is what the clients of a run agree on, and its hash covers all
of it. The choices that do not go together are in `compatibility.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from manyhands.config import Settings
from manyhands.plan.tasks import LanguageModelTask, TaskSettings

Identifier = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
ClientKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


# ---------------------------------------------------------------- what a client does in a round
class InnerOptimizer(Settings):
    """The optimizer of local steps; its state stays with the client."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw: Adam with decoupled weight decay; sgd: with momentum, or plain; muon: orthogonalized momentum for
    the matrices of hidden layers, adamw for the rest."""
    lr: Positive = 1e-3
    """Peak learning rate; the schedule scales it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Momentum (sgd, muon); null: what is usual, 0 for sgd and 0.95 for muon."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean of gradients (adamw)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the mean of squared gradients (adamw)."""
    epsilon: Positive = 1e-8
    """Added to the root of the mean of squares (adamw)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled, on tensors of two and more dimensions."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm of a step; 0 switches clipping off."""

    @property
    def used_momentum(self) -> float:
        """What `momentum` means for this optimizer."""
        if self.momentum is not None:
            return self.momentum
        return 0.95 if self.name == "muon" else 0.0


class LocalWork(Settings):
    """What a client does between two closings."""

    kind: Literal["gradient", "steps"] = "steps"
    """gradient: send the mean gradient over all samples; steps: optimizer steps, and send start minus end."""
    steps: Count = 30
    """Optimizer steps of a round, or micro-batches of a gradient. A slow client may be given fewer."""
    batch_size: Count = 12
    """Samples per step."""
    optimizer: InnerOptimizer = InnerOptimizer()
    """The optimizer of the local steps."""
    keep_inner: bool = True
    """Keep the inner optimizer's state from round to round."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """FedProx's mu: adds mu/2 * |theta_k - theta|^2 to the loss."""
    control_variate: bool = False
    """SCAFFOLD: correct each step by c - c_k and send a second channel, the change of c_k."""


class Schedule(Settings):
    """The inner learning rate over the run, counted in inner steps, computed by the coordinator."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """After the warm-up: constant, linear or cosine decay to `final`, or warmup-stable-decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Inner steps in which the learning rate rises linearly from nothing to its peak."""
    total_steps: Count | None = None
    """Where the decay ends (linear, cosine, wsd); null: rounds.total * local.steps."""
    decay_steps: Count | None = None
    """Length of the decay (wsd); null: a tenth of total_steps."""
    final: Share = 0.1
    """Learning rate at the end, as a share of the peak (linear, cosine, wsd)."""


# ---------------------------------------------------------------- how updates travel and are merged
class Codec(Settings):
    """How one channel of an update is encoded."""

    name: Literal["fp32", "bf16", "int8"] = "fp32"
    """fp32: 4 bytes a value, nothing lost; bf16: 2 bytes; int8: 1 byte, and a scale for each block of
    values."""
    block: Annotated[int, Field(ge=16, le=65_536)] = 256
    """Values that share one scale (int8)."""
    error_feedback: bool = False
    """Add what the codec lost to the next update."""


class Merge(Settings):
    """How updates become one."""

    rule: Literal["mean"] = "mean"
    """mean: sum of weight * update over the sum of weights."""
    weight: Literal["uniform", "samples"] = "uniform"
    """uniform: one contribution, one vote; samples: by the number of samples in the assignment."""


class OuterOptimizer(Settings):
    """The optimizer that applies the merged update to `public`, in exact arithmetic."""

    name: Literal["sgd", "nesterov", "adamw"] = "sgd"
    """sgd: public minus lr times the merged update; nesterov: with Nesterov's momentum; adamw: Adam
    (FedOpt)."""
    lr: Positive = 1.0
    """Outer learning rate; 1 with sgd is plain averaging."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum over rounds (sgd: heavy ball, 0 for plain; nesterov)."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean of merged updates (adamw)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the mean of their squares (adamw)."""
    epsilon: Positive = 1e-8
    """Adam's epsilon (FedOpt calls it tau): it is added to the root of the second moment (adamw)."""
    bias_correction: bool = True
    """Adam's bias corrections (adamw); FedAdam goes without."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled: public is multiplied by 1 - lr * weight_decay."""


# ---------------------------------------------------------------- who takes part, and when a round closes
class Membership(Settings):
    """Who may take part, and how many it takes."""

    kind: Literal["open", "allow_list"] = "open"
    """open: any key; allow_list: only the keys in `allow`."""
    allow: tuple[ClientKey, ...] = ()
    """Public keys, 64 hex digits each, as `manyhands client show-identity` prints them."""
    min_clients: Count = 1
    """The run starts, and goes on, with at least so many live clients."""
    max_clients: Count = 1024
    """Who would be one more than so many live clients is refused, and may try again later."""


class Rounds(Settings):
    """Length of the run and how long anybody waits."""

    total: Count = 20
    """Rounds of the run."""
    quorum: Count = 1
    """At its deadline a round closes when so many contributions are agreed."""
    max_failed: Count = 3
    """After so many rounds in a row without a counted contribution the run pauses and says why."""
    lag: Annotated[int, Field(ge=0, le=2)] = 0
    """Rounds between work and closing: the pipeline. 0: everybody waits for the closing."""
    fragments: Count = 1
    """Into how many fragments the parameters are divided; a round exchanges one of them."""
    apply_after_steps: Annotated[int, Field(ge=0)] = 0
    """Inner steps after which a change that arrived meanwhile is applied."""
    first_deadline_s: Positive = 600.0
    """Deadline of a round while nothing has been measured yet."""
    deadline_floor_s: Positive = 10.0
    """No measured deadline is shorter."""
    deadline_ceiling_s: Positive = 3600.0
    """No measured deadline is longer."""
    deadline_mad_factor: Positive = 6.0
    """Deadlines are median + factor * MAD of the counted contributions' durations, within floor and ceiling,
    and at most 1.5 times the last one."""
    warmup_s: Positive = 300.0
    """How long the run waits for joined clients to load the first snapshot."""
    suspected_after_s: Positive = 2.0
    """Without a heartbeat for so long a client is no longer waited for; it still counts if it is in time."""
    lost_after_s: Positive = 30.0
    """Without a heartbeat for so long a client's data is given back."""
    min_work_share: Share = 0.25
    """A slow client is given at least this share of `local.steps`; 1 gives everybody the same."""
    snapshot_every: Count = 5
    """Rounds between snapshots of `public`, from which newcomers start."""
    save_local_every: Count = 1
    """Rounds between a client's saves of its local state."""
    keep_updates: Count = 2
    """Closed rounds whose updates stay in the archive."""


class Data(Settings):
    """Where the training data is."""

    kind: Literal["shared", "local"] = "shared"
    """shared: everybody can reach all samples, the coordinator hands out ranges of indices; local: data stays
    with its owner, an assignment is a number of steps."""
    shards: str | None = None
    """A directory that `manyhands shards` made: samples are read from there, for `manyhands train`, and the task's
    own sources are not; null: the task reads its sources."""
    on_broken: Literal["stop", "skip"] = "stop"
    """A shard that is missing or broken: stop when it is read, naming file and row group; or verify all of them
    first, and leave out those that are broken, counted and named in the training's shards.json."""


class Evaluation(Settings):
    """How often the public model is judged on validation data, by the server's evaluator."""

    every_snapshots: Annotated[int, Field(ge=0)] = 1
    """Evaluate each n-th snapshot on the validation set; 0: only the first and the last."""
    max_batches: Count = 20
    """Batches of `local.batch_size` validation samples."""


class Plan(Settings):
    """A run's plan. docs/reference/plan.md is made from these texts."""

    name: Identifier = "run"
    """What the run is called in tables and directories."""
    run_id: Identifier | None = None
    """Fixed run id; null: the name and six hex digits."""
    preset: Identifier | None = None
    """The preset that this plan started from, for the record; its values are already in the other
    sections."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    """From this come the first weights, the order of the data and the seed of each piece of work."""
    topology: Literal["star", "mesh"] = "star"
    """star: the aggregator merges and publishes the change; mesh: every client merges the same updates."""
    task: TaskSettings = LanguageModelTask()
    """Model, data and loss."""
    local: LocalWork = LocalWork()
    """What a client does in a round."""
    schedule: Schedule = Schedule()
    """The inner learning rate over the run."""
    codec: Codec = Codec()
    """How clients' updates are encoded."""
    change_codec: Codec = Codec()
    """How the aggregator encodes the change that it publishes (star)."""
    merge: Merge = Merge()
    """How updates become one."""
    outer: OuterOptimizer = OuterOptimizer()
    """The optimizer that applies the merged update to public."""
    membership: Membership = Membership()
    """Who may take part, and how many it takes."""
    rounds: Rounds = Rounds()
    """Length of the run, deadlines, and how long anything is kept."""
    data: Data = Data()
    """Where the samples are."""
    evaluation: Evaluation = Evaluation()
    """When public is evaluated."""
    buffers: Literal["refuse", "keep_local", "average"] = "refuse"
    """What happens to a model's buffers that training changes, such as BatchNorm's running statistics."""

    @field_validator("run_id", "preset", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value
